"""A run: its folder, its state, its metrics, and the steps of the loop in main() that no paper speaks of."""
import contextlib
import json
import os
import pickle
import random
import shlex
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import datasets
import torch
import transformers
from tqdm import tqdm

import common
import evaluation
import memory
from common import Args, Batch, Problem, Row, fail
from problems import load_data, read_data
from rollout import TransformersSampler, VLLMSampler
from verification import RIGHT, TIMEOUT, UNPARSED, WRONG, Verifier

STALE = {"cpu": 1e-3, "cuda": 0.1}  # mean nats a token from the trainer: float32, bfloat16


@lru_cache(maxsize=8)
def epoch_order(seed: str, size: int) -> list[int]:
    return random.Random(seed).sample(range(size), size)


class Run:
    """A run's state and its folder runs/<name>: what the loop in main() needs and no paper speaks of."""

    def __init__(self, args: Args):
        for logging in (transformers.utils.logging, datasets.utils.logging):
            logging.disable_progress_bar()
            logging.set_verbosity(logging.CRITICAL)  # what matters is said here, in one line
        if args.device == "cuda" and not torch.cuda.is_available():
            fail("--device cuda: torch sees no CUDA device")
        self.args, self.script = args, Path(sys.argv[0]).stem
        self.device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        self.step, self.updates, self.skipped, self.optimizers = 0, 0, 0, {}
        self.state = {}  # what a method keeps between steps, of plain values: a checkpoint has it too
        self.sums = defaultdict(lambda: [0.0, 0])
        if args.dry_run:
            memory.dry_run(args, self.script, self.device)
        self.folder, settings = self.choose_folder()
        rows = read_data(args)  # first what fails fast, then the model
        self.model, self.tokenizer = common.load_model(args, self.device)
        self.verifier = Verifier()
        self.train, self.held_out = load_data(args, *rows, self.tokenizer, self.verifier)
        self.make_folder(settings)
        self.saved = self.load_checkpoint()
        self.sampler = self.make_sampler()
        self.hand_over()

    def make_sampler(self):
        args, engine = self.args, self.args.rollout
        if engine == "auto":
            engine = "vllm" if self.device.type == "cuda" and find_spec("vllm") else "transformers"
        if engine == "transformers":
            return TransformersSampler(self.model, self.tokenizer)
        length = args.max_prompt + max(args.max_response, args.eval_response)
        return VLLMSampler(self.model, self.tokenizer, length, args.gpu_memory_utilization)

    @torch.no_grad()
    def hand_over(self):
        """Gives the sampler the weights and has responses scored by both: a gap between them ends the run."""
        self.sampler.update(self.model)
        if isinstance(self.sampler, TransformersSampler) and (self.step or self.args.eval_only):
            return  # it samples with the trainer's own weights: once is enough
        problem, length = (self.train or self.held_out)[0], min(32, self.args.max_response)
        rows = self.generate([problem] * 8, length, 1.0, self.args.seed)
        batch = common.collate(rows, self.device)
        logp, _ = common.logprobs(self.model.eval(), batch, 1.0)
        sampler_logp = torch.tensor([number for row in rows for number in row.sampler_logp])
        gap, limit = float((logp[batch.mask].cpu() - sampler_logp).abs().mean()), STALE[self.device.type]
        if not gap <= limit:  # nan is a gap too
            fail("the sampler is stale, or the model does more after its head (caps or scales logits) than "
                 f"common.py knows: after step {self.step}'s hand-over its log-probs are {gap:.2g} nats a "
                 f"token from the trainer's, more than {limit}")

    def choose_folder(self) -> tuple[Path, dict]:
        """runs/<name> and what args.json will say: a new one, or with --resume that of the same arguments."""
        name, number = self.args.name, 0
        while not name or not self.args.name and Path("runs", name).exists():
            number += 1
            name = f"{self.script}-{Path(self.args.model).name}-{number}"
        folder, settings = Path("runs", name), {"script": self.script} | asdict(self.args)
        if self.args.resume and not (folder / "args.json").exists():
            fail(f"--resume: {folder} holds no run; --name says which one to go on with")
        if folder.exists() and not self.args.resume:
            fail(f"{folder} exists: go on with it by --resume, or choose another --name")
        place = next(place for place in (folder, *folder.parents) if place.exists())
        if not (place.is_dir() and os.access(place, os.W_OK)):
            fail(f"{folder} cannot be written: {place} is read-only, or not a folder")
        if self.args.resume:
            try:
                old = json.loads((folder / "args.json").read_text())
            except (OSError, ValueError) as error:
                fail(f"--resume: {folder}/args.json cannot be read: {error}")
            fixed = sorted(settings.keys() - {"resume", "steps", "name"})
            changed = [key for key in fixed if old.get(key) != settings[key]]
            if changed:
                fail(f"{folder} was begun with other arguments: "
                     + ", ".join(f"{key} {old.get(key)}, not {settings[key]}" for key in changed))
        return folder, settings | {"name": name, "resume": False}

    def make_folder(self, settings: dict):
        try:
            self.folder.mkdir(parents=True, exist_ok=self.args.resume)
            (self.folder / "args.new").write_text(json.dumps(settings, indent=2))
            os.replace(self.folder / "args.new", self.folder / "args.json")  # whole or not at all
        except OSError as error:
            fail(f"{self.folder} cannot be written: {error.strerror}")

    def announce(self):
        args, example = self.args, (self.train or self.held_out)[0]
        size = sum(parameter.numel() for parameter in self.model.parameters())
        demonstrated = sum(bool(problem.demonstration) for problem in self.train)
        print(f"{self.script} on {self.device}: {args.model}, {size / 1e6:.1f}M parameters; {self.folder}/")
        if not args.eval_only:
            print(f"{len(self.train)} problems from {args.data}, {demonstrated} of them with a "
                  f"demonstration; {len(self.held_out)} held out")
            print(f"{args.steps} steps of {args.prompts} prompts x {args.n} responses of at most "
                  f"{args.max_response} tokens, {args.updates} optimiser steps on each")
        print(f"--- a rendered prompt\n{example.text}")
        print(f"--- its demonstration\n{example.demonstration[:1000] or 'none'}\n---")

    # ---- metrics
    def log(self, name: str, total, count=1):
        """Adds `count` values, whose sum is `total`, to a mean over the step; with count 0 adds to a sum."""
        self.sums[name][0] += total.detach() if torch.is_tensor(total) else total
        self.sums[name][1] += count

    @contextlib.contextmanager
    def timer(self, name: str):
        start = time.perf_counter()
        yield
        self.log(f"seconds/{name}", time.perf_counter() - start, 0)

    # ---- a step, in the order of the loop
    def steps(self):
        """Step numbers from 1, with a progress bar; evaluates before the first."""
        self.announce()
        if self.step == 0 or self.args.eval_only:
            self.write_metrics(self.evaluate())
        if self.args.eval_only:
            self.verifier.close()
            print(f"every answer is in {self.folder}/answers.jsonl")
            raise SystemExit(0)
        self.stop_signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        self.bar = tqdm(total=self.args.steps, initial=self.step, desc=self.script, unit="step")
        while self.step < self.args.steps:
            self.step += 1
            yield self.step
        self.bar.close()

    def on_signal(self, number, _frame):
        signal.signal(number, signal.SIG_DFL)
        self.stop_signal = number
        tqdm.write("ending after this step, with a checkpoint; a second signal ends at once")

    def next_problems(self) -> list[Problem]:
        """The step's prompts."""
        return self.draw("prompts", (self.step - 1) * self.args.prompts, self.args.prompts)

    def draw(self, stream: str, start: int, count: int) -> list[Problem]:
        """Problems start, start + 1, ... of a stream that goes through all of them anew in every epoch."""
        size, problems = len(self.train), []
        for number in range(start, start + count):
            order = epoch_order(f"{self.args.seed} {stream} {number // size}", size)
            problems.append(self.train[order[number % size]])
        return problems

    def generate(self, problems: list[Problem], max_tokens: int, temperature: float, seed: int) -> list[Row]:
        if not problems:
            return []
        prompts = [problem.prompt for problem in problems]
        responses = self.sampler.generate(prompts, max_tokens, temperature, seed)
        return [Row(problem, *response) for problem, response in zip(problems, responses)]

    def rollout(self, problems: list[Problem]) -> list[Row]:
        """One response of the policy to each problem; a problem stands in the list once for each response."""
        args, seed = self.args, self.args.seed * 1_000_003 + self.step
        with self.timer("rollout"):
            rows = self.generate(problems, args.max_response, args.temperature, seed)
        if rows:
            self.log("response/length", sum(len(row.response) for row in rows), len(rows))
            self.log("response/cut", sum(not self.ended(row) for row in rows), len(rows))
        return rows

    def ended(self, row: Row) -> bool:
        return row.response[-1] == self.tokenizer.eos_token_id

    def text(self, row: Row) -> str:
        return self.tokenizer.decode(row.response[:-1] if self.ended(row) else row.response)

    def demonstration(self, problem: Problem) -> Row | None:
        """A problem's demonstration as a row; None without one or, counted, if it and EOS do not fit in L."""
        if not problem.demonstration:
            return None
        response = self.encode(problem, problem.demonstration)
        fits = len(response) <= self.args.max_response
        self.log("demonstrations/left_out", not fits, 0)
        return Row(problem, response, is_demo=True) if fits else None

    def next_demonstrations(self, count: int) -> list[Row]:
        """The next `count` demonstrations of a stream of their own, without those that do not fit."""
        rows, start = [], self.state.get("drawn", 0)
        self.state["drawn"] = start
        while len(rows) < count:
            rows += filter(None, map(self.demonstration, self.draw("experts", self.state["drawn"], 1)))
            self.state["drawn"] += 1
            if not rows and self.state["drawn"] - start > 2 * len(self.train):
                fail(f"{self.args.data}: no demonstration fits in --max_response {self.args.max_response}")
        for row in rows:
            row.advantage = 1.0  # imitated, not compared
        return rows

    def encode(self, problem: Problem, response: str) -> list[int]:
        """Token ids of a response, with EOS, and without a leading <think> that the prompt has already."""
        if problem.text.rstrip().endswith("<think>"):
            response = response.removeprefix("<think>\n")
        return self.tokenizer(response, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]

    def read_offline(self) -> list[Row]:
        """The responses of --offline that end within --max_response tokens, as rows of their problems."""
        if "response" not in self.train[0].row:
            fail(f"--offline {self.args.offline}: it has no column `response`")
        rows = [Row(problem, self.encode(problem, problem.row["response"]))
                for problem in self.train if isinstance(problem.row["response"], str)]
        fitting = [row for row in rows if len(row.response) <= self.args.max_response]
        print(f"{self.args.offline}: left out {len(self.train) - len(rows)} rows without a response and "
              f"{len(rows) - len(fitting)} responses of more than {self.args.max_response} tokens")
        if not fitting:
            fail(f"--offline {self.args.offline}: no response can be used")
        return fitting

    def save_rollouts(self, rows: list[Row]):
        """Appends responses to rollouts.jsonl, which --offline can read; those that were cut are left out."""
        ended = [row for row in rows if self.ended(row)]
        with open(self.folder / "rollouts.jsonl", "a") as file:
            for row in ended:
                kept = {"answer": row.problem.answer, "response": self.text(row)}
                file.write(json.dumps({"problem": row.problem.text} | row.problem.row | kept) + "\n")
        tqdm.write(f"saved {len(ended)} of {len(rows)} responses; the others were cut")

    def keep_set(self, rows: list[Row]):
        """Keeps rows for the steps to come; with --save_rollouts also in rollouts.jsonl."""
        self.state["set"] = self.pack(rows)
        if self.args.save_rollouts:
            self.save_rollouts(rows)

    def pack(self, rows: list[Row]) -> list[dict]:
        """Rows as plain values, for a checkpoint."""
        return [vars(row) | {"problem": row.problem.index} for row in rows]

    def unpack(self, packed: list[dict]) -> list[Row]:
        problems = {problem.index: problem for problem in self.train}
        return [Row(**values | {"problem": problems[values["problem"]]}) for values in packed]

    def judge(self, rows: list[Row]) -> tuple[list[str], list[int | None]]:
        """Sets rewards: 1 for a right answer in the box after </think>, else 0; 0 if the response was cut.

        Returns the responses' texts and the verifier's verdicts.
        """
        texts = [self.text(row) for row in rows]
        ended = [text if self.ended(row) else "" for row, text in zip(rows, texts)]
        verdicts = self.verifier([row.problem.answer for row in rows], ended)
        for row, verdict in zip(rows, verdicts):
            row.reward = float(verdict == RIGHT)
        return texts, verdicts

    def verify(self, rows: list[Row]) -> torch.Tensor:
        """Sets and returns the rewards (B,)."""
        with self.timer("verification"):
            _, verdicts = self.judge(rows)
        groups = defaultdict(list)
        for row in rows:
            self.log("reward/demonstrations" if row.is_demo else "reward", row.reward)
            if not row.is_demo:
                groups[row.problem.index].append(row.reward)
        if groups:
            self.log("groups/all_right", sum(min(rewards) == 1 for rewards in groups.values()), len(groups))
            self.log("groups/all_wrong", sum(max(rewards) == 0 for rewards in groups.values()), len(groups))
        self.log("verifier/no_box", verdicts.count(None), 0)
        self.log("verifier/unparsed", verdicts.count(UNPARSED), 0)
        self.log("verifier/timeouts", verdicts.count(TIMEOUT), 0)
        known = (None, RIGHT, WRONG, UNPARSED, TIMEOUT)
        self.log("verifier/crashes", sum(verdict not in known for verdict in verdicts), 0)
        if rows:
            self.write_sample(random.Random(self.step).choice(rows))
        return torch.tensor([row.reward for row in rows])

    @torch.no_grad()
    def score(self, rows: list[Row]):
        """Sets old_logp: the log-probs, by the trainer, of the policy before this step's updates."""
        with self.timer("update"):
            self.model.eval()
            for part in common.micro_batches(rows, self.args.micro_tokens):
                batch = common.collate(part, self.device)
                logp, entropy = common.logprobs(self.model, batch, self.args.temperature, entropy=True)
                for row, row_logp, row_entropy in zip(part, logp.cpu(), entropy.cpu()):
                    size = len(row.response)
                    row.old_logp = row_logp[:size]
                    if row.is_demo:
                        self.log("demonstrations/probability", row.old_logp.exp().sum(), size)
                    else:
                        self.log("entropy", row_entropy.sum(), size)
                    if row.sampler_logp:
                        gap = (row.old_logp - torch.tensor(row.sampler_logp)).abs()
                        self.log("sampler_gap", gap.sum(), size)

    def minibatches(self, rows: list[Row]) -> list[list[Row]]:
        """The rows of each of the --updates optimiser steps."""
        return [rows[start::self.args.updates] for start in range(self.args.updates)]

    def micro_batches(self, rows: list[Row], entropy_bonus: float = 0.0):
        """Tensors of a few rows at a time; rows of advantage 0 only if a bonus gives them a gradient."""
        rows = [row for row in rows if row.advantage or entropy_bonus]
        for part in common.micro_batches(rows, self.args.micro_tokens):
            yield common.collate(part, self.device)

    def logprobs(self, batch: Batch, entropy_bonus: float = 0.0):
        """Log-probs and entropy (B, T) of the policy; the entropy is zeros if there is no bonus on it."""
        with self.timer("update"):
            self.model.train()
            return common.logprobs(self.model, batch, self.args.temperature, entropy=entropy_bonus != 0)

    def backward(self, loss: torch.Tensor, metrics: dict):
        with self.timer("update"):
            loss.backward()
        self.log("loss", loss, 0)
        for name, (total, count) in metrics.items():
            self.log(name, total, count)

    def make_optimizer(self, name: str) -> torch.optim.Optimizer:
        """AdamW, with the moments that the checkpoint has under this name."""
        args = self.args
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, betas=(0.9, args.beta2),
                                      weight_decay=args.weight_decay)
        if self.saved:
            optimizer.load_state_dict(self.saved["optimizers"][name])
        self.optimizers[name] = optimizer
        return optimizer

    def optimizer_step(self, optimizer: torch.optim.Optimizer, rows: list[Row]):
        """Clips the gradient and takes the step, but never with a gradient that is not finite."""
        self.log("loss", 0.0, 0)  # which it is where no row has an advantage
        with self.timer("update"):
            for parameter in self.model.parameters():
                if parameter.grad is None:  # nor has it a gradient then: the step is taken with one of 0
                    parameter.grad = torch.zeros_like(parameter)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            self.updates += 1
            for group in optimizer.param_groups:
                group["lr"] = self.args.lr * min(1.0, self.updates / max(1, self.args.warmup))
            if norm.isfinite():
                optimizer.step()
                self.skipped = 0
                self.log("gradient_norm", norm)
            else:
                self.skip(rows)
            optimizer.zero_grad()

    def skip(self, rows: list[Row]):
        """Counts an update whose gradient is not finite and keeps its rows; three in a row end the run."""
        self.log("updates/skipped", 1, 0)
        path = self.folder / f"skipped-{self.updates}.json"
        path.write_text(json.dumps([self.describe(row) for row in rows], indent=1))
        tqdm.write(f"step {self.step}: the gradient is not finite; no update from the rows in {path}")
        self.skipped += 1
        if self.skipped == 3:
            fail(f"three updates in a row without a finite gradient: lower --lr, and look at {path}")

    def end_step(self):
        """Hands the weights to the sampler, evaluates, writes metrics and checkpoint."""
        args, last = self.args, self.step == self.args.steps
        self.hand_over()
        sums = sorted(self.sums.items())
        metrics = {name: float(total) / max(1, int(count)) for name, (total, count) in sums}
        self.sums.clear()
        shown = [name for name in ("reward", "response/length", "entropy") if name in metrics]
        self.bar.set_postfix({name: f"{metrics[name]:.2f}" for name in shown})
        self.bar.update()
        if last or self.step % args.eval_every == 0:
            metrics |= self.evaluate()
        self.write_metrics(metrics)
        if last or self.stop_signal or args.save_every and self.step % args.save_every == 0:
            self.save_checkpoint()
        if self.stop_signal and not last:
            self.bar.close()
            again = [part for part in sys.argv if part != "--resume"] + ["--resume"]
            again += [] if args.name else ["--name", self.folder.name]
            print(f"ended after step {self.step}; to go on: python {shlex.join(again)}")
            self.verifier.close()
            raise SystemExit(128 + self.stop_signal)

    # ---- evaluation and outputs
    def evaluate(self) -> dict[str, float]:
        """accuracy/<slice> and, with several samples of a problem, pass@k/<slice> of held-out problems."""
        args = self.args
        problems = [problem for problem in self.held_out for _ in range(problem.samples)]
        rows = self.generate(problems, args.eval_response, args.eval_temperature, args.seed)
        texts, verdicts = self.judge(rows)
        evaluation.write_answers(self.folder / "answers.jsonl", self.step, rows, texts, verdicts)
        summary = evaluation.summarise(rows)
        shown = ", ".join(f"{name} {figures['accuracy']:.3f}" for name, figures in summary.items())
        tqdm.write(evaluation.table(summary) if args.eval_only else
                   f"step {self.step}: {shown or 'no problems are held out'}")
        return {f"{kind}/{name}": value for name, figures in summary.items()
                for kind, value in figures.items() if kind == "accuracy" or "@" in kind}

    def write_metrics(self, metrics: dict):
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step} | metrics) + "\n")

    def describe(self, row: Row) -> dict:
        return {"step": self.step, "prompt": row.problem.text, "response": self.text(row),
                "answer": row.problem.answer, "is_demo": row.is_demo, "reward": row.reward,
                "advantage": row.advantage}

    def write_sample(self, row: Row):
        sample = self.describe(row)
        with open(self.folder / "samples.jsonl", "a") as file:
            file.write(json.dumps(sample) + "\n")
        if self.step % 10 == 1:
            tqdm.write(f"--- a sample of step {self.step}, reward {row.reward:.0f}\n"
                       f"{sample['prompt']}{sample['response'][:1000]}\n---")

    def save_checkpoint(self):
        """The whole state in one file, which appears whole or not at all."""
        path = self.folder / "checkpoint" / "state.pt"
        path.parent.mkdir(exist_ok=True)
        sizes = {path.name: path.stat().st_size for path in self.folder.glob("*.jsonl")}
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        state = {"step": self.step, "updates": self.updates, "skipped": self.skipped, "state": self.state,
                 "sizes": sizes, "model": self.model.state_dict(), "optimizers": optimizers}
        with open(path.with_suffix(".new"), "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".new"), path)

    def load_checkpoint(self) -> dict | None:
        """The last checkpoint, if there is one. What was logged after it is cut off and will come again."""
        path = self.folder / "checkpoint" / "state.pt"
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            fail(f"{path} cannot be read: {error}")
        for log in self.folder.glob("*.jsonl"):
            os.truncate(log, saved["sizes"].get(log.name, 0) if saved else 0)
        if saved:
            self.model.load_state_dict(saved["model"])
            self.step, self.updates, self.skipped = saved["step"], saved["updates"], saved["skipped"]
            self.state = saved["state"]
        return saved

    def end(self):
        """Writes model/ in Hugging Face format and says what was learnt."""
        self.verifier.close()
        self.model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        self.model.save_pretrained(self.folder / "model")
        self.tokenizer.save_pretrained(self.folder / "model")
        history = defaultdict(list)
        for line in open(self.folder / "metrics.jsonl"):
            for name, value in json.loads(line).items():
                history[name].append(value)
        learnt = [f"{name.removeprefix('accuracy/')} {values[0]:.2f} -> {values[-1]:.2f}"
                  for name, values in history.items() if name.startswith("accuracy/")]
        print(f"accuracy: {', '.join(learnt) or 'no problems were held out'}; see {self.folder}/")
