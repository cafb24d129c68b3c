"""Flags: what all scripts share, in groups; how they are read; and how a mistake ends in one clear line."""
import argparse
import ast
import os
import sys
import traceback
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace, TracebackType

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
TOYS = ("toy", "toy:easy")  # of --data: all of it, its easy problems
GROUPS = {  # of --help; every flag stands in one, a method's own in the last
    "model and data": "model data eval_data reward system prompt_end max_prompt rope_theta max_positions",
    "batch": "steps prompts n updates max_response mask_cut",
    "optimiser": "lr warmup weight_decay beta2 max_grad_norm entropy_bonus",
    "sampling": "temperature rollout gpu_memory_utilization",
    "evaluation": "eval_every eval_response eval_temperature eval_only",
    "run": "name resume seed save_every keep tracker",
    "machine": "device offload micro_tokens dry_run",
    "this method": "",
}


# ----------------------------------------------------------------------------------------------- messages
def say(message: str):
    """One line on stderr, above the progress bar if there is one."""
    tqdm.write(" ".join(message.split())[:600], file=sys.stderr)


def fail(message: str):
    """For the user's mistakes: one line that says what is wrong, where and what to do; exit code 2."""
    line = f"{Path(sys.argv[0]).name}: error: {message}"
    if "torch" not in sys.modules:  # flags are read before it is imported: no process waits for this one yet
        say(line)
        raise SystemExit(2)
    from runtime import processes
    processes.end_all(2, lambda: say(line))
    raise SystemExit(2)


# What is said where memory does not suffice: by vLLM at its start, of a share too small or too large.
TOO_SMALL = ("No available memory for the cache blocks", "larger than the available KV cache memory")
TOO_LARGE = ("is less than desired GPU memory utilization",)
RAN_OUT = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "MemoryError")  # CUDA, torch, Python


def out_of_memory(error: BaseException) -> str:
    """Which flag to change if memory did not suffice, on a card or a CPU; empty for any other error.

    What was at work tells the innermost method of runtime/ on the error's trace, or on that of its cause.
    """
    said, methods = "", []
    while error:
        said += f"{type(error).__name__}: {error} "
        codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
        methods += [code.co_qualname for code in codes if Path(code.co_filename).parent == ROOT / "runtime"]
        error = error.__cause__ or error.__context__
    if any(words in said for words in TOO_SMALL):
        return ("vLLM's share of the card does not hold one response of full length: raise "
                "--gpu_memory_utilization, or lower --max_response and --eval_response")
    if any(words in said for words in TOO_LARGE):
        return "less of the card is free than vLLM's share: lower --gpu_memory_utilization"
    if not any(words in said for words in RAN_OUT):
        return ""
    for method in reversed(methods):
        if method.startswith("VLLMSampler."):
            return "out of memory in vLLM: lower --gpu_memory_utilization"
        if method.startswith("TransformersSampler."):
            return ("out of memory while sampling: lower --prompts, --n or --max_response, or on a card "
                    "sample with vLLM")
        if method in ("Policy.step", "Policy.load", "Policy.__init__"):
            return "out of memory for weights and moments: use --offload or more cards"
    return "out of memory: lower --micro_tokens; if that does not help, use --offload or more cards"


def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None):
    """For what goes wrong later (sys.excepthook): one line where it is enough. The last checkpoint stays."""
    from runtime import processes
    processes.end_all(1, lambda: describe(kind, error, trace))


def describe(kind: type[BaseException], error: BaseException, trace: TracebackType | None):
    from safetensors import SafetensorError
    advice, cause = out_of_memory(error), error
    while cause and not isinstance(cause, (OSError, SafetensorError)):  # torch.save raises on top of it
        cause = cause.__context__
    if advice:
        say(f"{advice}; --resume goes on from the last checkpoint, if there is one. {error}")
    elif cause:  # a full disk, a file that may not be written, a folder that has gone
        say(f"ended by the system: {cause}; --resume goes on from the last checkpoint, if there is one")
    elif issubclass(kind, KeyboardInterrupt):
        say("interrupted")
    elif "gloo" in str(error) or "NCCL" in str(error):  # its own reason, if it had one, would stand here
        say("another process of this run was killed, perhaps for its memory; --resume goes on from the last "
            f"checkpoint, if there is one. {error}")
    else:
        sys.__excepthook__(kind, error, trace)


# -------------------------------------------------------------------------------------------------- flags
def flag(
    text: str, default: str | float | bool | None = None, *,
    toy: str | float | None = None, real: str | float | None = None, choices: tuple[str, ...] | None = None,
    least: float | None = None, most: float | None = None, only_with: str = "", not_with: str = "",
) -> Field:
    """A command-line flag: its line of help, one default or two (the toy's, real models'), and its limits.

    only_with, not_with: 'name' or 'name=value' of another flag without which, or with which, this one does
    nothing; to give it then is an error. Of several values: 'name=one|other'.
    """
    if only_with:
        text = f"{text}; only with --{only_with.replace('=', ' ')}"
    if default is not None:
        text = f"{text} (default: {default!r})"
    elif toy is not None:
        text = f"{text} (default: toy {toy!r}, other models {real!r})"
    return field(default=default, metadata={
        "help": text, "choices": choices, "toy": toy, "real": real, "least": least, "most": most,
        "only_with": only_with, "not_with": not_with})


@dataclass
class Args:
    """The flags that all scripts share, with their units and the toy's and real models' defaults."""
    # model and data
    model: str = flag("'toy', or a Hub name or local folder of a causal language model", "toy")
    data: str = flag("'toy', a Hub dataset or a jsonl/json/parquet/csv file",
                     toy="toy", real="Elliott/Openr1-Math-46k-8192")
    eval_data: str = flag("held-out problems: as --data, several with commas between, NAME@32 for 32 samples "
                          "of each; empty: a tenth of --data, at most 128 rows", toy="toy", real="")
    reward: str = flag("FILE.py:function, your own code: called with a problem's row (dict) and a response's "
                       "text, it returns a number; it runs here without any limits; empty: math-verify", "")
    system: str = flag("system message for data with plain columns; empty: that of --data's chat messages, "
                       "or else a request to think and to box the answer; 'none': no system message", "")
    prompt_end: str = flag("text with which every prompt ends", toy="", real="<think>\n")
    max_prompt: int = flag("tokens; problems with a longer prompt are left out", toy=64, real=1024, least=1)
    rope_theta: float = flag("base of RoPE; 0: the model's own (LUFFY, ReLIFT: 40000)", 0.0, least=0)
    max_positions: int = flag("longest context; 0: the model's own (LUFFY, ReLIFT: 16384)", 0, least=0)

    # batch
    steps: int = flag("rollout batches to train on", toy=80, real=500, least=1)
    prompts: int = flag("prompts in a rollout batch", toy=16, real=128, least=1)
    n: int = flag("responses to a prompt: the size of a group", 8, least=2)
    updates: int = flag("optimiser steps on a rollout batch, each on a mini-batch of its rows; with 1 the "
                        "ratio to the policy that sampled is 1 and no clip acts", toy=1, real=2, least=1)
    max_response: int = flag("L: tokens of a response; a longer one is cut", toy=72, real=3072, least=1)
    mask_cut: bool = flag("give responses that were cut no gradient; they still count in the group's mean "
                          "and in what the loss is divided by", False)

    # optimiser
    lr: float = flag("learning rate of AdamW", toy=2e-4, real=1e-6, least=0)
    warmup: int = flag("optimiser steps in which the learning rate rises to --lr", toy=5, real=0, least=0)
    weight_decay: float = flag("weight decay of AdamW", toy=0.0, real=0.01, least=0)
    beta2: float = flag("AdamW's decay of the second moment", toy=0.95, real=0.999, least=0, most=0.9999)
    max_grad_norm: float = flag("a longer gradient is scaled to this norm", 1.0, least=1e-6)
    entropy_bonus: float = flag("β: weight of the tokens' mean entropy in the objective", 0.0)

    # sampling
    temperature: float = flag("of sampling, and of log-probs: logits are divided by it", 1.0, least=0.01)
    rollout: str = flag("engine that samples", "auto", choices=("auto", "vllm", "transformers"))
    gpu_memory_utilization: float = flag("share of the GPU's memory that vLLM takes while it samples; 0: "
                                         "the largest that fits beside the trainer, by an estimate", 0.0,
                                         least=0, most=1, not_with="rollout=transformers")

    # evaluation
    eval_every: int = flag("steps between evaluations on held-out problems", toy=20, real=50, least=1)
    eval_response: int = flag("tokens of a response in evaluation", toy=100, real=3072, least=1)
    eval_temperature: float = flag("sampling temperature in evaluation; 0: the likeliest token each time",
                                   toy=1.0, real=0.6, least=0)
    eval_only: bool = flag("evaluate --model on --eval_data, and train nothing", False)

    # run
    name: str = flag("the run's folder in runs/; empty: script, model and a number", "")
    resume: bool = flag("go on with the run --name from its last checkpoint", False)
    seed: int = flag("seed of the data's order and of sampling", 0, least=0)
    save_every: int = flag("steps between checkpoints; 0: only at the end", toy=20, real=50, least=0)
    keep: int = flag("checkpoints that are kept, the newest; --resume goes on from the last", 1, least=1)
    tracker: str = flag("package that gets metrics and samples too; pip install it first", "none",
                        choices=("none", "trackio", "wandb"))

    # machine
    device: str = flag("where the model is", "auto", choices=("auto", "cpu", "cuda"))
    offload: bool = flag("weights, gradients and moments in host memory: slower, for a model too large for "
                         "the cards", False)
    micro_tokens: int = flag("tokens of a micro-batch with padding; sets memory, not the gradient",
                             toy=2048, real=16384, least=1)
    dry_run: bool = flag("say what memory a GPU needs for this run, and stop", False)


def parse(cls: type[Args], doc: str) -> Args:
    """Args of class `cls` from the command line; what cannot be right is one line and exit code 2.

    With torchrun this process joins the others.
    """
    from runtime import processes
    processes.start()
    sys.excepthook = explain  # after torch's, which puts a rank before every line
    return read(cls, doc)


def read(cls: type[Args], doc: str) -> Args:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a letter that the locale has not is written as its number
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]", description=doc.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; --help lists the flags")
    named = {name: group for group, names in GROUPS.items() for name in names.split()}
    groups = {group: parser.add_argument_group(group) for group in GROUPS}
    for f in fields(cls):
        group = groups[named.get(f.name, "this method")]
        options = {"default": argparse.SUPPRESS, "help": f.metadata["help"]}
        if f.type is bool:
            options |= {"action": "store_true"}
        else:
            options |= {"type": f.type, "choices": f.metadata["choices"]}
        group.add_argument(f"--{f.name}", **options)
    given = vars(parser.parse_args())
    args = cls(**given)
    sources = {args.model, args.data, *(args.eval_data or "").replace("@", ",").split(",")}
    is_toy = not sources.isdisjoint(TOYS)
    for f in fields(cls):
        if getattr(args, f.name) is None:
            setattr(args, f.name, f.metadata["toy" if is_toy else "real"])
        check(f"--{f.name}", getattr(args, f.name), f.metadata["least"], f.metadata["most"])
    for f in fields(cls):
        only_with, not_with = f.metadata["only_with"], f.metadata["not_with"]
        if f.name in given and only_with and not holds(args, only_with):
            fail(f"--{f.name} does nothing without --{only_with.replace('=', ' ')}: leave it out")
        if f.name in given and not_with and holds(args, not_with):
            fail(f"--{f.name} does nothing with --{not_with.replace('=', ' ')}: leave it out")
    return args


def parse_early():
    """Reads the flags of the script that is run before it imports torch: --help or a typo wait for nothing.

    Its class Args is taken from its source; main() parses again. Of several processes the first does it.
    """
    script = Path(sys.argv[0]).resolve()
    ours = script.suffix == ".py" and script.is_relative_to(ROOT) and script.is_file()
    if not ours or os.environ.get("RANK", "0") != "0":
        return
    tree = ast.parse(script.read_text(encoding="utf-8"))
    if not any(isinstance(node, ast.ClassDef) and node.name == "Args" for node in tree.body):
        return  # no method: a bench, a test
    needed = [node for node in tree.body if isinstance(node, (ast.Assign, ast.ClassDef))]
    names = {"common": SimpleNamespace(Args=Args), "dataclass": dataclass, "flag": flag}
    exec(compile(ast.Module(needed, []), str(script), "exec"), names)
    read(names["Args"], ast.get_docstring(tree))


def holds(args: Args, condition: str) -> bool:
    """Is the flag of this name given, or does it have this value, or one of these?"""
    name, _, values = condition.partition("=")
    return getattr(args, name) in values.split("|") if values else bool(getattr(args, name))


def check(name: str, value: float | None, least: float | None, most: float | None = None):
    """Ends the program if a value that is given is not within the limits that are given (nan never is)."""
    if value is None:
        return
    if least is not None and not value >= least:
        fail(f"{name} is {value}: it must be at least {least}")
    if most is not None and not value <= most:
        fail(f"{name} is {value}: it must be at most {most}")
