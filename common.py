"""What is not the method: flags, data, rollout, verification, log-probs, and a run's state and outputs.

In the order of the data's way. Left out on purpose: several GPUs, LoRA, reward models, a KL term, experiment
trackers (metrics.jsonl loads anywhere). Linux and macOS: verification needs `fork`.
"""
import argparse
import contextlib
import errno
import inspect
import json
import os
import queue
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import datasets
import jinja2
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

LOGIT_CHUNK = 256           # tokens whose logits are held at once
STALE = {"cpu": 1e-3, "cuda": 0.1}  # mean nats a token from the trainer: float32, bfloat16
ANSWER_SECONDS = 3.0        # wall clock for verifying one answer
ANSWER_MEGABYTES = 2048     # address space of the process that does it
ANSWER_CHARACTERS = 10_000  # a longer boxed answer is wrong unread
SYSTEM = ("Think step by step before you answer. Write your thinking between <think> and </think>, "
          "and after it the final answer in \\boxed{}.")
PLAIN_TEMPLATE = (  # for a base model whose tokenizer has no chat template
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")


def fail(message: str):
    """For the user's mistakes: one line that says what is wrong, where and what to do; exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())[:600]}", file=sys.stderr)
    raise SystemExit(2)


def explain(kind, error, trace):
    """For what goes wrong later: one line where it is enough. The last checkpoint stays."""
    if issubclass(kind, torch.OutOfMemoryError):
        print(f"out of memory: lower --micro_tokens, or for the rollout --prompts. {error}", file=sys.stderr)
    elif "No space left" in str(error) or getattr(error, "errno", None) in (errno.EROFS, errno.EACCES):
        print(f"cannot write: {error}; --resume goes on from the last checkpoint", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# ------------------------------------------------------------------------------------------------- flags
def flag(text: str, default=None, *, toy=None, real=None, choices=None):
    """One command-line flag: its line of help, and one default or two, for the toy and for real models."""
    if default is not None:
        text = f"{text} (default: {default!r})"
    elif toy is not None:
        text = f"{text} (default: toy {toy!r}, other models {real!r})"
    metadata = {"help": text, "choices": choices, "toy": toy, "real": real}
    return field(default=default, metadata=metadata)


@dataclass
class Args:
    """The flags that all scripts share, with their units and the toy's and real models' defaults."""
    model: str = flag("'toy', or a Hub name or local folder of a causal language model", "toy")
    data: str = flag("'toy', a Hub dataset or a jsonl/json/parquet/csv file",
                     toy="toy", real="Elliott/Openr1-Math-46k-8192")
    eval_data: str = flag("held-out problems, as --data; empty: a tenth of --data, at most 128 rows",
                          toy="toy", real="")
    name: str = flag("the run's folder in runs/; empty: script, model and a number", "")
    resume: bool = flag("go on with the run --name from its last checkpoint", False)
    seed: int = flag("seed of the data's order and of sampling", 0)
    steps: int = flag("rollout batches to train on", toy=80, real=500)
    prompts: int = flag("prompts in a rollout batch", toy=16, real=128)
    n: int = flag("responses to a prompt: the size of a group", 8)
    updates: int = flag("optimiser steps on a rollout batch", toy=1, real=2)
    lr: float = flag("learning rate of AdamW", toy=2e-4, real=1e-6)
    warmup: int = flag("optimiser steps in which the learning rate rises to --lr", toy=5, real=0)
    weight_decay: float = flag("weight decay of AdamW", toy=0.0, real=0.01)
    beta2: float = flag("AdamW's decay of the second moment", toy=0.95, real=0.999)
    max_grad_norm: float = flag("a longer gradient is scaled down to this norm", 1.0)
    entropy_bonus: float = flag("weight of the tokens' mean entropy in the objective", 0.0)
    temperature: float = flag("sampling temperature, at which log-probs are taken too", 1.0)
    max_prompt: int = flag("tokens; problems with a longer prompt are left out", toy=64, real=1024)
    max_response: int = flag("tokens, L in the formulas; longer responses are cut", toy=72, real=3072)
    micro_tokens: int = flag("tokens of a micro-batch with padding; sets memory, not the gradient",
                             toy=2048, real=16384)
    eval_every: int = flag("steps between evaluations on held-out problems", toy=20, real=50)
    eval_response: int = flag("tokens of a response in evaluation", toy=100, real=3072)
    eval_temperature: float = flag("sampling temperature in evaluation", toy=1.0, real=0.6)
    save_every: int = flag("steps between checkpoints; 0: only at the end", toy=20, real=50)
    rollout: str = flag("engine that samples", "auto", choices=("auto", "vllm", "transformers"))
    gpu_memory_utilization: float = flag("share of the GPU's memory that vLLM takes while it samples", 0.4)
    device: str = flag("where the model is", "auto", choices=("auto", "cpu", "cuda"))


def parse(cls, doc: str, smallest_n: int = 2):
    """Args of class `cls` from the command line; what cannot be right is one line and exit code 2."""
    sys.excepthook = explain
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)
    for f in fields(cls):
        options = {"default": f.default, "help": f.metadata["help"]}
        if f.type is bool:
            parser.add_argument(f"--{f.name}", action="store_true", **options)
        else:
            parser.add_argument(f"--{f.name}", type=f.type, choices=f.metadata["choices"], **options)
    args = cls(**vars(parser.parse_args()))
    is_toy = args.model == "toy" or (args.data or "").startswith("toy")
    for f in fields(cls):
        if getattr(args, f.name) is None:
            setattr(args, f.name, f.metadata["toy" if is_toy else "real"])
    for name in "steps prompts updates max_prompt max_response micro_tokens eval_every eval_response".split():
        if (value := getattr(args, name)) is not None and value < 1:
            fail(f"--{name} is {value}: it must be at least 1")
    if args.n < smallest_n:
        fail(f"--n is {args.n}: it must be at least {smallest_n}, to compare the responses to a prompt")
    if args.temperature <= 0 or args.eval_temperature <= 0:
        fail("--temperature and --eval_temperature must be above 0")
    return args


# -------------------------------------------------------------------------------- problems and demonstrations
@dataclass(eq=False)
class Problem:
    index: int          # row of the dataset; names the group
    text: str           # the prompt rendered with the chat template
    prompt: list[int]   # its token ids
    answer: str         # the reference answer
    demonstration: str  # an expert's response, empty if there is none
    part: str           # slice of the held-out problems to which the row belongs
    row: dict           # as it was read


def read_rows(source: str, held_out: bool = False) -> list[dict]:
    """The rows of the toy, of a Hub dataset (split `train`) or of a local file."""
    if source in ("toy", "toy:easy"):
        import toy
        return [row for row in toy.make_rows()[held_out] if source == "toy" or row["data_source"] == "easy"]
    builders = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    path = Path(source)
    if path.suffix in builders and not path.is_file():
        fail(f"{source}: no such file")
    if path.is_file() and path.stat().st_size == 0:
        fail(f"{source} is empty")
    if path.exists() and path.suffix not in builders:
        fail(f"{source}: not a {', '.join(builders)} file")
    try:
        if path.is_file():
            return datasets.load_dataset(builders[path.suffix], data_files=str(path), split="train").to_list()
        return datasets.load_dataset(source, split="train").to_list()
    except Exception as error:  # whatever a parser or the network says of the user's data is passed on
        if path.suffix == ".jsonl":
            find_broken_line(path)
        fail(f"{source} cannot be read as a dataset: {error}: {error.__cause__ or ''}")


def find_broken_line(path: Path):
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                json.loads(line or "{}")
            except ValueError as error:
                fail(f"{path}, line {number}: {error}")


def read_problem(row: dict) -> tuple[list[dict], str, str, str]:
    """(chat messages, answer, demonstration, slice) of a row in either schema; ValueError: why not."""
    if "prompt" in row:  # the schema of Elliott/Openr1-Math-46k-8192
        messages, target, gold = row["prompt"], row.get("target"), row.get("reward_model")
        answer = gold.get("ground_truth") if isinstance(gold, dict) else None
        demonstration = target[0].get("content") if isinstance(target, list) and target else target
    else:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row.get("problem")}]
        answer, demonstration = row.get("answer"), row.get("demonstration")
    if not isinstance(messages, list) or not messages:
        raise ValueError("without a problem")
    for message in messages:
        text = message.get("content") if isinstance(message, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise ValueError("whose problem is empty or not text")
    if not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise ValueError("without an answer")
    return messages, str(answer), demonstration or "", str(row.get("data_source") or "held_out")


def load_problems(source: str, rows: list[dict], tokenizer, verifier, max_prompt: int) -> list[Problem]:
    """The usable rows, rendered with the chat template. What is left out is counted and said."""
    columns = set().union(*rows) if rows else {"problem", "answer"}
    if not ({"problem", "answer"} <= columns or {"prompt", "reward_model"} <= columns):
        fail(f"{source}: needs the columns `problem` and `answer`, or `prompt` and `reward_model`; "
             f"it has {', '.join(sorted(columns))}")
    left_out, problems, seen = Counter(), [], set()
    for index, row in enumerate(rows):
        try:
            messages, answer, demonstration, part = read_problem(row)
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (ValueError, jinja2.TemplateError) as error:
            left_out[str(error)] += 1
            continue
        prompt = []
        if len(text) <= 100 * max_prompt:  # a tokenizer may take minutes for megabytes
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not 0 < len(prompt) <= max_prompt:
            left_out[f"with a prompt of more than --max_prompt {max_prompt} tokens"] += 1
        elif (text, row.get("response")) in seen:
            left_out["that another row repeats"] += 1
        else:
            seen.add((text, row.get("response")))
            problems.append(Problem(index, text, prompt, answer, demonstration, part, row))
    answers = sorted({problem.answer for problem in problems})
    verdicts = dict(zip(answers, verifier(answers, [f"</think>\\boxed{{{answer}}}" for answer in answers])))
    unboxed = 0
    for problem in problems:
        if verdicts[problem.answer] != RIGHT:
            left_out["whose answer math-verify does not find equal to itself"] += 1
        if problem.demonstration and boxed_answer(str(problem.demonstration)) is None:
            unboxed += 1
            problem.demonstration = ""
    problems = [problem for problem in problems if verdicts[problem.answer] == RIGHT]
    for reason, count in left_out.items():
        print(f"{source}: left out {count} of {len(rows)} rows {reason}")
    if unboxed:
        print(f"{source}: left out {unboxed} demonstrations that box no answer after </think>")
    if not problems:
        fail(f"{source}: none of its {len(rows)} rows can be used")
    return problems


# ------------------------------------------------------------------------------------------------ rollout
class Recorder(transformers.LogitsProcessor):
    """Keeps the log-prob of each token that `generate` samples, without (rows, tokens, vocabulary) scores."""

    def __init__(self, temperature: float):
        self.temperature, self.logp, self.sampled = temperature, None, []

    def __call__(self, tokens, logits):  # called before each token is sampled
        self.take(tokens)
        self.logp = (logits.float() / self.temperature).log_softmax(dim=-1)  # (rows, vocabulary)
        return logits

    def take(self, tokens):
        """Of the last column of tokens, which the distribution of the call before has sampled."""
        if self.logp is not None:
            self.sampled.append(self.logp.gather(1, tokens[:, -1:]))


class TransformersSampler:
    """Rollout with transformers, on the trainer's own model and so always in step with it."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], max_tokens: int, temperature: float, seed: int):
        """One response to each prompt: (token ids, with EOS unless it was cut; log-probs of these tokens)."""
        self.model.eval()
        torch.manual_seed(seed)
        pad, eos, width = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, max(map(len, prompts))
        tokens = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        valid = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        recorder = Recorder(temperature)
        tokens = self.model.generate(
            input_ids=tokens.to(self.model.device), attention_mask=valid.to(self.model.device),
            max_new_tokens=max_tokens, do_sample=True, temperature=temperature, top_p=1.0, top_k=0,
            repetition_penalty=1.0, logits_processor=[recorder], pad_token_id=pad, eos_token_id=eos)
        recorder.take(tokens)
        responses = []
        for response, logp in zip(tokens[:, width:].tolist(), torch.cat(recorder.sampled, dim=1).tolist()):
            length = response.index(eos) + 1 if eos in response else len(response)
            responses.append((response[:length], logp[:length]))
        return responses

    def update(self, model):
        """Hands the trainer's weights over: here they are the same."""


class VLLMSampler:
    """Rollout with vLLM, in this process. While the trainer works it sleeps: they share a GPU's memory."""

    def __init__(self, model, tokenizer, max_model_len: int, gpu_memory_utilization: float):
        """An engine for the model's architecture. Its weights are random until update() hands them over."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the import reads both
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            import vllm
        except ImportError as error:
            fail(f"--rollout vllm: vLLM cannot be imported: {error}")
        self.settings, self.eos = vllm.SamplingParams, tokenizer.eos_token_id
        self.on_cpu = model.device.type == "cpu"
        if self.on_cpu:  # after a chunk of a prompt a seed's generator is rewound, which only CUDA's can
            options = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 30,
                       "enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, max_model_len)}
        else:
            options = {"dtype": "bfloat16", "enable_sleep_mode": True,
                       "gpu_memory_utilization": gpu_memory_utilization}
        positions = ("rope_parameters", "max_position_embeddings")  # which the trainer may have changed
        try:
            self.engine = vllm.LLM(
                model.name_or_path, load_format="dummy", skip_tokenizer_init=True,
                hf_overrides={name: getattr(model.config, name) for name in positions},
                logprobs_mode="processed_logprobs",  # processed: after the temperature
                max_model_len=max_model_len, **options)
        except Exception as error:  # whatever vLLM says of the model, the card and its memory is passed on
            fail(f"--rollout vllm, --gpu_memory_utilization {gpu_memory_utilization}: {error}")

    def generate(self, prompts: list[list[int]], max_tokens: int, temperature: float, seed: int):
        """One response to each prompt: (token ids, with EOS unless it was cut; log-probs of these tokens)."""
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        settings = [self.settings(
            temperature=temperature, max_tokens=max_tokens, logprobs=0, detokenize=False,
            seed=(seed * 1_000_003 + index) % 2**63,     # of its own, whatever else is in the batch
            ignore_eos=True, stop_token_ids=[self.eos],  # the trainer's, and none of generation_config.json
        ) for index in range(len(prompts))]
        self.engine.wake_up()
        results = self.engine.generate(requests, settings, use_tqdm=False)
        # Level 1 keeps the weights in host memory, so that the engine always wakes with the last hand-over's.
        # Level 2 drops them: a rollout after an evaluation, without a hand-over between, would be noise.
        self.engine.sleep(level=1)
        responses = []
        for result in results:
            tokens, steps = result.outputs[0].token_ids, result.outputs[0].logprobs
            responses.append((list(tokens), [step[token].logprob for token, step in zip(tokens, steps)]))
        return responses

    def update(self, model):
        """Hands the trainer's weights over, cast and in place."""
        self.engine.wake_up(["weights"])
        weights = ((name, parameter.detach()) for name, parameter in model.named_parameters())
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.on_cpu:  # whose kernels read a packed copy of the head, stale where the head is the embedding
            self.engine.apply_model(lambda m: m.lm_head.quant_method.process_weights_after_loading(m.lm_head))
        self.engine.reset_prefix_cache()  # keys and values of the old weights


# ------------------------------------------------------------------------------------------- verification
RIGHT, WRONG, UNPARSED, TIMEOUT, CRASH = 0, 1, 2, -signal.SIGALRM, -signal.SIGKILL


def boxed_answer(response: str) -> str | None:
    r"""Content of the last \boxed{} after the last </think>, by matching braces; None if there is none."""
    _, think, answer = response.rpartition("</think>")
    start, depth = answer.rfind(r"\boxed{") + len(r"\boxed{"), 1
    if not think or start < len(r"\boxed{"):
        return None
    for brace in re.finditer(r"\\.|[{}]", answer[start:], re.DOTALL):  # \{ and \} are no braces
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return answer[start:start + brace.start()]
    return None


def serve_verdicts(seconds: float, megabytes: int):
    """A JSON line [gold, answer] in, a verdict line out, one at a time; a fresh interpreter runs this source.

    A forked child does the work under limits that the kernel keeps: SIGALRM without a handler ends it
    `seconds` after an answer came in, whatever it computes, and whether its parents still live or not. Then
    another child takes its place.
    """
    import json, os, resource, signal, sys  # noqa: E401
    from math_verify import parse, verify

    def serve():
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        if sys.platform == "linux":  # elsewhere address space is no measure of memory
            resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
        for _ in range(500):  # then a new child, so that no cache grows
            line = sys.stdin.readline()
            if not line:
                os._exit(0)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                texts = ["\\boxed{" + text + "}" for text in json.loads(line)]
                gold, answer = [parse(text, parsing_timeout=None) for text in texts]
                verdict = 2
                if gold and answer:
                    verdict = 0 if verify(gold, answer, timeout_seconds=None) else 1
            except Exception:  # whatever math-verify stumbles over: the answer is counted as unparsed
                verdict = 2
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(verdict, flush=True)
        os._exit(3)

    parse(r"\boxed{\frac{1}{2}}", parsing_timeout=None)  # fills the parser's caches once, before the forks
    code = 3
    while code != 0:  # 0: end of input
        child = os.fork()
        if child == 0:
            serve()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code < 0:  # killed: by SIGALRM in time, or for its memory
            print(code, flush=True)


class Verifier:
    """math-verify in processes that can be killed. No answer costs more than ANSWER_SECONDS, _MEGABYTES."""

    def __init__(self, workers: int = os.cpu_count()):
        source = inspect.getsource(serve_verdicts)  # not this module: it would import torch into every worker
        command = [sys.executable, "-c", f"{source}\nserve_verdicts({ANSWER_SECONDS}, {ANSWER_MEGABYTES})"]
        self.idle = queue.SimpleQueue()
        for _ in range(workers):  # in sessions of their own: Ctrl-C is for the trainer
            self.idle.put(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           stderr=subprocess.DEVNULL, text=True, start_new_session=True))
        self.threads = ThreadPoolExecutor(workers)
        self.verdict = lru_cache(maxsize=10_000)(self.ask)
        if self.ask("1", "1") != RIGHT:
            raise RuntimeError("math-verify does not find that 1 equals 1: is it installed?")

    def ask(self, gold: str, answer: str) -> int:
        worker = self.idle.get()
        try:
            worker.stdin.write(json.dumps([gold, answer]) + "\n")
            worker.stdin.flush()
            return int(worker.stdout.readline() or CRASH)
        finally:
            self.idle.put(worker)

    def __call__(self, golds: list[str], responses: list[str]) -> list[int | None]:
        """RIGHT, WRONG, UNPARSED, TIMEOUT or another signal for each response, None for one without a box."""
        def judge(gold, response):
            answer = boxed_answer(response)
            if answer is None or len(answer) > ANSWER_CHARACTERS:
                return None if answer is None else UNPARSED
            return self.verdict(gold, answer)
        return list(self.threads.map(judge, golds, responses))

    def close(self):
        self.threads.shutdown()
        while not self.idle.empty():
            self.idle.get().communicate()  # the end of its input ends a worker


# ----------------------------------------------------------------------------------------- a batch of rows
@dataclass(eq=False)
class Row:
    """One response to one prompt: a rollout of the policy or a demonstration."""
    problem: Problem
    response: list[int]                   # token ids, with EOS unless it was cut
    sampler_logp: list[float] | None = None
    is_demo: bool = False
    reward: float = 0.0
    advantage: float = 0.0
    old_logp: torch.Tensor | None = None  # (tokens of the response,)


@dataclass
class Batch:
    """Rows as tensors: prompts and responses, right-padded to S tokens, and responses alone, to T."""
    tokens: torch.Tensor      # (B, S) ids
    valid: torch.Tensor       # (B, S) true on prompt and response
    positions: torch.Tensor   # (B, T) where in S a response token stands
    mask: torch.Tensor        # (B, T) true on response tokens, from lengths: EOS is a token like any other
    old_logp: torch.Tensor    # (B, T)
    advantages: torch.Tensor  # (B,)
    is_demo: torch.Tensor     # (B,) bool


def collate(rows: list[Row], device) -> Batch:
    start = torch.tensor([[len(row.problem.prompt)] for row in rows])
    length = torch.tensor([[len(row.response)] for row in rows])
    offset = torch.arange(int(length.max()))
    mask = offset < length
    tokens = pad_sequence([torch.tensor(row.problem.prompt + row.response) for row in rows], batch_first=True)
    old_logp = [torch.zeros(len(row.response)) if row.old_logp is None else row.old_logp for row in rows]
    batch = Batch(tokens, torch.arange(tokens.shape[1]) < start + length, (start + offset) * mask, mask,
                  pad_sequence(old_logp, batch_first=True), torch.tensor([row.advantage for row in rows]),
                  torch.tensor([row.is_demo for row in rows]))
    return Batch(**{name: tensor.to(device) for name, tensor in vars(batch).items()})


def micro_batches(rows: list[Row], micro_tokens: int) -> list[list[Row]]:
    """Rows sorted by length, cut where rows x longest would exceed the budget (a longer row stands alone)."""
    def size(row):
        return len(row.problem.prompt) + len(row.response)
    parts = []
    for row in sorted(rows, key=size):
        if not parts or (len(parts[-1]) + 1) * size(row) > micro_tokens:
            parts.append([])
        parts[-1].append(row)
    return parts


# ----------------------------------------------------------------------------------- log-probs and entropy
class TokenLogprobs(torch.autograd.Function):
    """log p of targets and entropy H, without keeping logits z: backward recomputes them.

    F.linear_cross_entropy computes gradients in its forward pass, which takes a weight per token that is known before
    the log-prob is; importance ratios are not. It has no entropy either.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, entropy):
        logp, h, lse = [], [], []
        for x, y in zip(hidden.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK)):
            z = F.linear(x, weight, bias)                                 # (chunk, V)
            z = z.to(torch.promote_types(z.dtype, torch.float32)).div_(temperature)
            lse.append(z.logsumexp(dim=-1))
            logp.append(z.gather(1, y[:, None])[:, 0] - lse[-1])          # log p = z_y - lse(z)
            p_z = (z - lse[-1][:, None]).exp_().mul_(z).sum(dim=-1) if entropy else lse[-1]
            h.append(lse[-1] - p_z)                                       # H = lse(z) - Σ p z
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(lse), torch.cat(h))
        ctx.temperature, ctx.entropy = temperature, entropy
        return torch.cat(logp), torch.cat(h)

    @staticmethod
    def backward(ctx, grad_logp, grad_h):
        hidden, weight, bias, *rows = ctx.saved_tensors
        grad_hidden, grad_weight = [], torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        weight = weight.to(hidden.dtype)
        parts = zip(*(part.split(LOGIT_CHUNK) for part in (hidden, *rows, grad_logp, grad_h)))
        for x, y, lse, h, g, g_h in parts:
            z = F.linear(x, weight, bias)
            z = z.to(lse.dtype).div_(ctx.temperature).sub_(lse[:, None])  # log p of every word
            p = z.exp()
            if ctx.entropy:
                d = z.add_(h[:, None]).mul_(-g_h[:, None]).sub_(g[:, None]).mul_(p)   # dH/dz = -p (log p + H)
            else:
                d = p.mul_(-g[:, None])                                   # d log p_y / dz = 1[y] - p
            d.scatter_add_(1, y[:, None], g[:, None])
            d = d.div_(ctx.temperature).to(weight.dtype)
            grad_hidden.append(d @ weight)
            if grad_weight.dtype == d.dtype:
                grad_weight.addmm_(d.T, x)
            else:
                grad_weight += d.T @ x
            if bias is not None:
                grad_bias += d.sum(dim=0)
        return torch.cat(grad_hidden), grad_weight, grad_bias, None, None, None


def token_logprobs(hidden, weight, bias, targets, temperature: float = 1.0, entropy: bool = False):
    """Log-prob of each target token and entropy of its distribution at the sampling temperature, in nats.

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) ids. Returns two (N,) tensors with gradient, the
    second of zeros without `entropy`. No more than LOGIT_CHUNK x V logits exist at a time.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return TokenLogprobs.apply(hidden, weight, bias, targets, temperature, entropy)


def logprobs(model, batch: Batch, temperature: float, entropy: bool = False):
    """Log-probs of response tokens and entropy (zeros without `entropy`), both (B, T); 0 outside the mask."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        output = model.base_model(input_ids=batch.tokens, attention_mask=batch.valid.long(), use_cache=False)
        row, _ = batch.mask.nonzero(as_tuple=True)            # (N,) for the N tokens in the mask
        position = batch.positions[batch.mask]                # (N,)
        hidden = output.last_hidden_state[row, position - 1]  # (N, H): what predicts them
        targets, head = batch.tokens[row, position], model.get_output_embeddings()
        flat = token_logprobs(hidden, head.weight, head.bias, targets, temperature, entropy)
    zeros = torch.zeros(batch.mask.shape, dtype=flat[0].dtype, device=model.device)
    return tuple(zeros.masked_scatter(batch.mask, part) for part in flat)


# ------------------------------------------------------------------------------ a run: its state and outputs
def load_model(args: Args, device: torch.device):
    """The model, with float32 master weights (lr 1e-6 rounds to nothing in bfloat16), and its tokenizer."""
    path = args.model
    if path == "toy":
        import toy
        path = toy.base_model()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    except (OSError, ValueError) as error:
        fail(f"--model {args.model} cannot be loaded: {error}")
    if tokenizer.eos_token_id is None:
        fail(f"--model {args.model}: its tokenizer has no EOS token, so no response could end")
    context = model.config.max_position_embeddings
    for name in ("max_response", "eval_response"):
        if args.max_prompt + getattr(args, name) > context:
            fail(f"--max_prompt {args.max_prompt} and --{name} {getattr(args, name)} are more than the "
                 f"{context} positions of {args.model}: lower one of them")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    model.generation_config = transformers.GenerationConfig(  # no top_k, min_p or penalty of the model's own
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # trainer and sampler must agree
    if device.type == "cuda":
        model.gradient_checkpointing_enable()
    return model, tokenizer


def load_data(args: Args, tokenizer, verifier) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on and held-out problems."""
    problems = load_problems(args.data, read_rows(args.data), tokenizer, verifier, args.max_prompt)
    if args.eval_data:
        rows = read_rows(args.eval_data, held_out=True)
        return problems, load_problems(args.eval_data, rows, tokenizer, verifier, args.max_prompt)
    problems = random.Random(0).sample(problems, len(problems))
    size = min(128, len(problems) // 10)
    return problems[size:], problems[:size]


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
        self.model, self.tokenizer = load_model(args, self.device)
        self.verifier = Verifier()
        self.train, self.held_out = load_data(args, self.tokenizer, self.verifier)
        self.folder = self.open_folder()
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
        """Gives the sampler the weights and has responses scored by both: a stale sampler ends the run."""
        self.sampler.update(self.model)
        if isinstance(self.sampler, TransformersSampler):  # it samples with the trainer's own weights
            return
        rows = self.generate(self.train[:1] * 8, min(32, self.args.max_response), 1.0, self.args.seed)
        batch = collate(rows, self.device)
        logp, _ = logprobs(self.model.eval(), batch, 1.0)
        sampler_logp = torch.tensor([number for row in rows for number in row.sampler_logp])
        gap, limit = float((logp[batch.mask].cpu() - sampler_logp).abs().mean()), STALE[self.device.type]
        if not gap <= limit:  # nan is a gap too
            fail(f"the sampler is stale: after step {self.step}'s hand-over its log-probs are {gap:.2g} nats "
                 f"a token from the trainer's, more than {limit}")

    def open_folder(self) -> Path:
        """runs/<name>: a new one, or with --resume that of a run with the same arguments."""
        name, number = self.args.name, 0
        while not name or not self.args.name and Path("runs", name).exists():
            number += 1
            name = f"{self.script}-{Path(self.args.model).name}-{number}"
        folder, settings = Path("runs", name), {"script": self.script} | asdict(self.args)
        if self.args.resume and not (folder / "args.json").exists():
            fail(f"--resume: {folder} holds no run; --name says which one to go on with")
        if folder.exists() and not self.args.resume:
            fail(f"{folder} exists: go on with it by --resume, or choose another --name")
        try:
            if self.args.resume:
                old = json.loads((folder / "args.json").read_text())
                fixed = sorted(settings.keys() - {"resume", "steps", "name"})
                changed = [key for key in fixed if old[key] != settings[key]]
                if changed:
                    fail(f"{folder} was begun with other arguments: "
                         + ", ".join(f"{key} {old[key]}, not {settings[key]}" for key in changed))
            folder.mkdir(parents=True, exist_ok=True)
            settings |= {"name": name, "resume": False}
            (folder / "args.json").write_text(json.dumps(settings, indent=2))
        except OSError as error:
            fail(f"{folder} cannot be written: {error.strerror}")
        return folder

    def announce(self):
        args, example = self.args, self.train[0]
        size = sum(parameter.numel() for parameter in self.model.parameters())
        demonstrated = sum(bool(problem.demonstration) for problem in self.train)
        print(f"{self.script} on {self.device}: {args.model}, {size / 1e6:.1f}M parameters; {self.folder}/")
        print(f"{len(self.train)} problems from {args.data}, {demonstrated} of them with a demonstration; "
              f"{len(self.held_out)} held out")
        print(f"{args.steps} steps of {args.prompts} prompts x {args.n} responses of at most "
              f"{args.max_response} tokens, {args.updates} optimiser steps on each")
        print(f"--- a rendered prompt\n{example.text}")
        print(f"--- its demonstration\n{example.demonstration[:1000]}\n---")

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
        if self.step == 0:
            self.write_metrics(self.evaluate())
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

    def encode(self, problem: Problem, response: str) -> list[int]:
        """Token ids of a response, with EOS, and without a leading <think> that the prompt has already."""
        if problem.text.rstrip().endswith("<think>"):
            response = response.removeprefix("<think>\n")
        return self.tokenizer(response, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]

    def judge(self, rows: list[Row]) -> list[int | None]:
        """Sets rewards: 1 for a right answer in the box after </think>, else 0; 0 if the response was cut."""
        texts = [self.text(row) if self.ended(row) else "" for row in rows]
        verdicts = self.verifier([row.problem.answer for row in rows], texts)
        for row, verdict in zip(rows, verdicts):
            row.reward = float(verdict == RIGHT)
        return verdicts

    def verify(self, rows: list[Row]) -> torch.Tensor:
        """Sets and returns the rewards (B,)."""
        with self.timer("verification"):
            verdicts = self.judge(rows)
        groups = defaultdict(list)
        for row in rows:
            self.log("reward/demonstrations" if row.is_demo else "reward", row.reward)
            if not row.is_demo:
                groups[row.problem.index].append(row.reward)
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
            for part in micro_batches(rows, self.args.micro_tokens):
                batch = collate(part, self.device)
                logp, entropy = logprobs(self.model, batch, self.args.temperature, entropy=True)
                for row, row_logp, row_entropy in zip(part, logp.cpu(), entropy.cpu()):
                    size = len(row.response)
                    row.old_logp = row_logp[:size]
                    if row.is_demo:
                        self.log("demonstrations/probability", row.old_logp.exp().sum(), size)
                    else:
                        gap = (row.old_logp - torch.tensor(row.sampler_logp)).abs()
                        self.log("sampler_gap", gap.sum(), size)
                        self.log("entropy", row_entropy.sum(), size)

    def minibatches(self, rows: list[Row]) -> list[list[Row]]:
        """The rows of each of the --updates optimiser steps."""
        return [rows[start::self.args.updates] for start in range(self.args.updates)]

    def micro_batches(self, rows: list[Row], entropy_bonus: float = 0.0):
        """Tensors of a few rows at a time; rows of advantage 0 only if a bonus gives them a gradient."""
        rows = [row for row in rows if row.advantage or entropy_bonus]
        for part in micro_batches(rows, self.args.micro_tokens):
            yield collate(part, self.device)

    def logprobs(self, batch: Batch, entropy_bonus: float = 0.0):
        """Log-probs and entropy (B, T) of the policy; the entropy is zeros if there is no bonus on it."""
        with self.timer("update"):
            return logprobs(self.model.train(), batch, self.args.temperature, entropy=entropy_bonus != 0)

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
        with self.timer("update"):
            for parameter in self.model.parameters():
                if parameter.grad is None:  # no row had an advantage: the step is taken with a gradient of 0
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
        """accuracy/<slice>: share of the held-out problems that one sampled response answers right."""
        args, rewards = self.args, defaultdict(list)
        rows = self.generate(self.held_out, args.eval_response, args.eval_temperature, args.seed)
        self.judge(rows)
        for row in rows:
            rewards[row.problem.part].append(row.reward)
        accuracy = {f"accuracy/{part}": sum(values) / len(values) for part, values in rewards.items()}
        shown = ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
        tqdm.write(f"step {self.step}: {shown}")
        return accuracy

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
        saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
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
        self.model.save_pretrained(self.folder / "model")
        self.tokenizer.save_pretrained(self.folder / "model")
        lines = [json.loads(line) for line in open(self.folder / "metrics.jsonl")]
        learnt = [f"{name.removeprefix('accuracy/')} {lines[0][name]:.2f} -> {lines[-1][name]:.2f}"
                  for name in lines[0] if name.startswith("accuracy/")]
        print(f"accuracy: {', '.join(learnt) or 'no problems were held out'}; see {self.folder}/")
