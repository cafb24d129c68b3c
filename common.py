"""The steps of the loop in main(), in the order in which it calls them. What they lean on is in runtime/.

A step with two prompts, two responses each, EOS = 9 and L = --max_response = 3, in numbers:

    >>> from runtime.rows import Problem, collate
    >>> one = Problem(index=0, text="1+1=", prompt=[5, 6], answer="2", demonstration="", part="", row={})
    >>> two = Problem(index=1, text="1+2=", prompt=[7], answer="3", demonstration="", part="", row={})

rollout() samples token ids; a response ends with EOS unless it was cut at L. verify() rewards them: 1.0 where
the boxed answer is right. A group is the responses to one prompt; its mean reward is what was expected.

    >>> rows = [Row(one, [2, 9]), Row(one, [3, 4, 9]), Row(two, [3, 9]), Row(two, [8, 3, 9])]
    >>> rewards = torch.tensor([1.0, 0.0, 1.0, 1.0])
    >>> groups = torch.tensor([row.problem.index for row in rows])
    >>> from grpo import group_advantages, grpo_loss
    >>> advantages = group_advantages(rewards, groups)
    >>> advantages.tolist()
    [0.5, -0.5, 0.0, 0.0]

The rows of an optimiser step are a mini-batch: B = 4. Rows of advantage 0 have no gradient; micro_batches()
leaves them out and makes tensors of the others, S = 5 tokens wide, padded on the right:

    >>> for row, advantage in zip(rows, advantages.tolist()):
    ...     row.advantage = advantage
    >>> batch = collate([row for row in rows if row.advantage], "cpu")
    >>> batch.tokens.tolist()
    [[5, 6, 2, 9, 0], [5, 6, 3, 4, 9]]
    >>> batch.mask.int().tolist(), batch.positions.tolist()
    ([[1, 1, 0], [1, 1, 1]], [[2, 3, 0], [2, 3, 4]])

The mask has T = 3 columns, a response's tokens with EOS; `positions` says where in `tokens` they stand.
logprobs() gives their log-probs in the same shape. While the policy is what it was at score(), every ratio is
1, and the loss is the sum of -A over the tokens, -0.5 * 2 + 0.5 * 3, divided by B L = 12:

    >>> logp = torch.log(torch.tensor([[0.5, 0.9, 0.0], [0.1, 0.2, 0.9]])).where(batch.mask, 0.0)
    >>> loss, _ = grpo_loss(logp, logp, batch.advantages, batch.mask, normaliser=4 * 3)
    >>> round(loss.item(), 4)
    0.0417
"""
import random
from collections import defaultdict
from collections.abc import Collection

from runtime.flags import Args, fail, flag, parse, parse_early

parse_early()  # the other imports take seconds

import torch
import transformers
from tqdm import tqdm

from runtime import memory, processes
from runtime.diagnosis import diagnose
from runtime.evaluation import evaluate
from runtime.policy import Policy, choose_device
from runtime.problems import draw, fingerprint, load_data, read_data
from runtime.progress import bar, show_only_downloads, waiting
from runtime.record import Record
from runtime.reward import OwnReward
from runtime.rows import Batch, Problem, Row, collate, micro_batches
from runtime.sampling import Sampler
from runtime.stored import Demonstrations, Experience, KeptRows
from runtime.verification import RIGHT, TIMEOUT, UNPARSED, WRONG, Verifier, boxed_answer

__all__ = ["Args", "Problem", "Row", "Run", "flag", "parse"]  # what the scripts import from here


class Run:
    """A run's state, and the steps of main()'s loop. What they write goes to runs/<name>/ (`record`)."""

    def __init__(self, args: Args):
        logging = transformers.utils.logging
        show_only_downloads()
        logging.set_verbosity(logging.CRITICAL)  # what matters is said here, in one line
        self.args, self.device = args, choose_device(args)
        if args.prompts < processes.world():
            fail(f"--prompts {args.prompts} are fewer than the {processes.world()} processes that sample")
        self.record = Record(args)
        if args.dry_run:
            memory.dry_run(args, self.record.script, self.device)
        if self.device.type == "cuda":
            memory.fit(args, self.record.script, torch.cuda.get_device_properties(self.device).total_memory)
        with waiting("reading data (from the Hub at their first use)"), processes.first_of_machine_ahead():
            rows = read_data(args)  # first what fails fast, then the model
        with waiting(f"loading {args.model} (from the Hub at its first use)"):
            self.policy = Policy(args, self.device)
        self.codec = self.policy.codec
        self.verifier = (OwnReward(args.reward) if args.reward
                         else Verifier(processes.workers(), processes.spread, bar))
        self.train, self.held_out = load_data(args, *rows, self.codec, self.verifier)
        self.record.open(fingerprint(*rows))
        self.step, self.skipped = 0, 0  # steps so far; updates skipped in a row
        self.state = {}  # what a method keeps between steps, of plain values and tensors: checkpoints have it
        self.resume()
        self.log, self.log_own = self.record.log, self.record.log_own  # of all rows; of this process's
        self.demonstrations = Demonstrations(args, self.train, self.codec, self.state, self.log)
        self.experience = Experience(self.train, self.state, self.log)
        self.kept = KeptRows(self.train, self.codec, self.state, self.record.folder / "rollouts.jsonl")
        with waiting("starting the sampler (vLLM: a minute or two, at its first start on a machine more)"):
            self.sampler = Sampler(args, self.policy)
            stale = self.sampler.hand_over(0, (self.train or self.held_out)[0])
        if stale:
            fail(stale)

    @waiting("reading the checkpoint")
    def resume(self):
        """Takes up the last checkpoint, if there is one."""
        saved = self.record.load()
        if saved:
            self.policy.load(saved["updates"], saved["optimizers"], self.record.read_tensors)
            self.step, self.skipped, self.state = saved["step"], saved["skipped"], saved["state"]

    def steps(self, plan: str = ""):
        """Step numbers from 1, with a progress bar; evaluates before the first. `plan` is said of it."""
        self.record.write_arguments()  # once more: a method may have worked out --steps
        self.record.announce(self.policy, self.train, self.held_out, plan)
        if self.step == 0 or self.args.eval_only:
            self.record.write_metrics(self.step, self.evaluate())
        if self.args.eval_only:
            self.verifier.close()
            print(f"every answer is in {self.record.folder}/answers.jsonl")
            raise SystemExit(0)
        self.record.begin(self.step)
        while self.step < self.args.steps:
            self.step += 1
            yield self.step
        self.record.bar.close()

    # ---- who is in the batch
    def next_problems(self, batch: int | None = None, without: Collection[Problem] = ()) -> list[Problem]:
        """The --prompts problems of a rollout batch, by its number from 0 (by default the step's).

        They go through all problems in the seed's order, then through all of them in another order. Those in
        `without` are passed over; if that is all of them, none is.
        """
        batch = self.step - 1 if batch is None else batch
        place, problems = batch * self.args.prompts + self.state.get("passed_over", 0), []
        while len(problems) < self.args.prompts:
            problem, = draw(self.train, f"{self.args.seed} prompts", place, 1)
            place += 1
            if problem in without and len(without) < len(self.train):
                self.state["passed_over"] = self.state.get("passed_over", 0) + 1
            else:
                problems.append(problem)
        return problems

    def rollout(self, problems: list[Problem], prefixes: list[list[int]] | None = None,
                again: int = 0) -> list[Row]:
        """One response of the policy to each problem; a problem stands in the list once for each response.

        At --temperature and from the whole distribution; at most L = --max_response tokens, EOS included.
        prefixes: token ids for each that are given, [] for none; the policy goes on behind them. They count
        in L, are fewer than L and have no EOS. Sets row.prefix, their number; the response begins with them.
        again: 1, 2, ... for further rollouts in a step, whose noise is another.
        """
        args, seed = self.args, self.args.seed * 1_000_003 + self.step + again * 10**15
        with self.record.timer("rollout"):
            rows = self.sampler.rows(problems, args.max_response, args.temperature, seed, prefixes)
        if rows:
            self.log("response/length", sum(len(row.response) - row.prefix for row in rows), len(rows))
            self.log("response/cut", sum(not self.codec.ended(row) for row in rows), len(rows))
        if prefixes:
            self.log("response/prefix", sum(row.prefix for row in rows), sum(row.prefix > 0 for row in rows))
        return rows

    def verify(self, rows: list[Row]) -> torch.Tensor:
        r"""Sets row.reward and returns rewards (rows,): 1.0 or 0.0, or what the function of --reward says.

        1.0 if the \boxed{} answer after </think> equals the reference by math-verify; 0.0 also without a
        </think>, without a box, and for a response that was cut. Logs rewards, groups and verdicts.
        """
        with self.record.timer("verification"):
            texts, verdicts = self.verifier.judge(rows, self.codec)
        groups = defaultdict(list)
        for row in rows:
            self.log("reward/demonstrations" if row.is_demo else "reward", row.reward)
            if row.prefix:
                self.log("reward/prefixed", row.reward)
            if not row.is_demo:
                groups[row.problem.index].append(row.reward)
        if groups:
            judged = [self.codec.judged(row, text) for row, text in zip(rows, texts) if not row.is_demo]
            self.log("response/thought", sum("</think>" in text for text in judged), len(judged))
            self.log("response/boxed", sum(boxed_answer(text) is not None for text in judged), len(judged))
            self.log("groups/all_right", sum(min(rewards) == 1 for rewards in groups.values()), len(groups))
            self.log("groups/all_wrong", sum(max(rewards) == 0 for rewards in groups.values()), len(groups))
        self.log("verifier/no_box", verdicts.count(None), 0)
        self.log("verifier/unparsed", verdicts.count(UNPARSED), 0)
        self.log("verifier/timeouts", verdicts.count(TIMEOUT), 0)
        known = (None, RIGHT, WRONG, UNPARSED, TIMEOUT)
        self.log("verifier/crashes", sum(verdict not in known for verdict in verdicts), 0)
        if rows:
            self.record.write_sample(self.step, random.Random(self.step).choice(rows), self.codec)
        return torch.tensor([row.reward for row in rows])

    # ---- the update
    @torch.no_grad()
    def score(self, rows: list[Row], entropy: bool = True):
        """Sets row.old_logp, (tokens,): log-probs by the trainer at --temperature before the step's updates.

        By the trainer and not by the sampler, whose rounding differs; the difference is logged (sampler_gap).
        Of what was given, a prefix or a demonstration, it sets row.prefix_entropy too, (row.demo_tokens,).
        entropy: without it none is computed, set or logged.
        """
        with self.record.timer("scoring"):
            self.policy.model.eval()
            scored = {}  # this process's rows
            parts = micro_batches(rows, self.args.micro_tokens, processes.rank(), processes.world())
            for part in bar(parts, desc="scoring"):
                logp, entropies = self.policy.logprobs(collate(part, self.device), entropy=entropy)
                for row, row_logp, row_entropy in zip(part, logp.cpu(), entropies.cpu()):
                    size, demo = len(row.response), row.demo_tokens
                    old_logp = row_logp[:size].clone()
                    scored[row] = old_logp, row_entropy[:demo].clone() if entropy and demo else None
                    if demo:
                        self.log_own("demonstrations/probability", old_logp[:demo].exp().sum(), demo)
                    if entropy and not row.is_demo:
                        self.log_own("entropy", row_entropy[demo:size].sum(), size - demo)
                    if row.sampler_logp:
                        gap = (old_logp[demo:] - torch.tensor(row.sampler_logp)).abs()
                        self.log_own("sampler_gap", gap.sum(), size - demo)
            numbered = {number: scored[row] for number, row in enumerate(rows) if row in scored}
            for part in processes.gather(numbered):
                for number, values in part.items():
                    rows[number].old_logp, rows[number].prefix_entropy = values

    def minibatches(self, rows: list[Row]) -> list[list[Row]]:
        """The rows of each of the --updates optimiser steps: every --updates-th, so groups are spread out."""
        return [rows[start::self.args.updates] for start in range(self.args.updates)]

    def micro_batches(self, minibatch: list[Row], entropy_bonus: float = 0.0, all_rows: bool = False):
        """Tensors (Batch) of at most --micro_tokens tokens: what is in memory at once changes no gradient.

        Rows of advantage 0 are left out, unless an entropy bonus gives them a gradient, or the loss does and
        all_rows says so; with --mask_cut responses that were cut are left out too.
        """
        masked = {row for row in minibatch if self.args.mask_cut and not self.codec.ended(row)}
        rows = [row for row in minibatch
                if (row.advantage or entropy_bonus or all_rows) and row not in masked]
        if self.args.mask_cut:
            self.log("response/masked", len(masked), 0)
        parts = micro_batches(rows, self.args.micro_tokens, processes.rank(), processes.world())
        for part in bar(parts, desc="update"):
            yield collate(part, self.device)

    def logprobs(
        self, batch: Batch, entropy_bonus: float = 0.0, entropy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of response tokens under the policy and its entropy there, both (rows, T), in nats.

        At --temperature: logits are divided by it first. Without a bonus, or `entropy`, which asks for it,
        the entropy is not computed: zeros.
        """
        with self.record.timer("update"):
            self.policy.model.train()
            outputs = self.policy.logprobs(batch, entropy=entropy or entropy_bonus != 0)
            self.policy.check_ratio(batch, outputs[0])
            return outputs

    def backward(self, loss: torch.Tensor, metrics: dict):
        """Adds the loss's gradient to the mini-batch's; logs the loss and metrics {name: (sum, count)}."""
        with self.record.timer("update"):
            self.policy.backward(loss)
        self.log_own("loss", loss, 0)
        for name, (total, count) in metrics.items():
            self.log_own(name, total, count)

    def optimizer_step(self, minibatch: list[Row], moments: str = "rl", max_grad_norm: float | None = None):
        """Scales the gradient to --max_grad_norm if it is longer, and takes a step of AdamW.

        moments: name of the optimiser; each has moments of its own over the same parameters.
        A gradient that is not finite is skipped and counted, its rows kept; three in a row end the run.
        """
        self.log("loss", 0.0, 0)  # which it is where no row has an advantage
        with self.record.timer("update"), waiting("the optimiser's step"):
            norm = self.policy.step(moments, max_grad_norm or self.args.max_grad_norm)
        if norm.isfinite():
            self.skipped = 0
            self.log("gradient_norm", norm)
            return
        self.log("updates/skipped", 1, 0)
        path = self.record.write_skipped(self.step, self.policy.updates, minibatch, self.codec)
        self.skipped += 1
        if self.skipped == 3:
            fail(f"three updates in a row without a finite gradient: lower --lr, and look at {path}")

    # ---- the end of a step, and of the run
    def end_step(self):
        """Hands the weights to the sampler, evaluates, writes metrics and checkpoint.

        Ends the run, once the step is saved, after a signal or if the sampler did not take the weights.
        """
        args, last = self.args, self.step == self.args.steps
        with waiting("handing the weights to the sampler"):
            stale = self.sampler.hand_over(self.step, self.train[0])
        metrics = self.record.take_metrics()
        if self.step == 1:
            for line in diagnose(metrics, self.device.type, self.demonstrations.given > 0, bool(args.reward)):
                tqdm.write(line)
        if not stale and (last or self.step % args.eval_every == 0):
            metrics |= self.evaluate()
        self.record.write_metrics(self.step, metrics)
        stopped = max(processes.gather(self.record.stop_signal))
        if last or stopped or stale or args.save_every and self.step % args.save_every == 0:
            self.save()
        if stale:
            fail(f"{stale}; --resume goes on after the step, which is saved")
        if stopped and not last:
            self.verifier.close()
            self.record.end_early(self.step, stopped)

    def evaluate(self) -> dict[str, float]:
        """Accuracy per slice of the held-out problems."""
        return evaluate(self.args, self.step, self.held_out, self.sampler, self.verifier, self.codec,
                        self.record.folder / "answers.jsonl")

    def save(self):
        """Writes the checkpoint, from which --resume goes on."""
        values = {"step": self.step, "skipped": self.skipped, "state": self.state,
                  "updates": self.policy.updates, "optimizers": list(self.policy.optimizers)}
        self.record.save(self.step, values, self.policy.state())

    @waiting("writing model/")
    def end(self):
        """Writes model/ in Hugging Face format and says what was learnt."""
        self.verifier.close()
        self.policy.save(self.record.folder / "model")
        self.record.say_what_was_learnt()
