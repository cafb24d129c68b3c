"""What is not the method: flags, the model, batches, log-probs.

problems.py reads problems, rollout.py samples, verification.py rewards, evaluation.py tests, run.py keeps a
run's state and outputs. Left out on purpose: several GPUs, LoRA, reward models, a KL term, experiment
trackers (metrics.jsonl loads anywhere).
"""
import argparse
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

LOGIT_CHUNK = 256  # tokens whose logits are held at once
PLAIN_TEMPLATE = (  # for a base model whose tokenizer has no chat template
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")


def say(message: str):
    """One line on stderr, above the progress bar if there is one."""
    tqdm.write(" ".join(message.split())[:600], file=sys.stderr)


def fail(message: str):
    """For the user's mistakes: one line that says what is wrong, where and what to do; exit code 2."""
    say(f"{Path(sys.argv[0]).name}: error: {message}")
    raise SystemExit(2)


def explain(kind, error, trace):
    """For what goes wrong later: one line where it is enough. The last checkpoint stays."""
    cause = error
    while cause and not isinstance(cause, (OSError, SafetensorError)):  # torch.save raises on top of it
        cause = cause.__context__
    if issubclass(kind, torch.OutOfMemoryError) or "can't allocate memory" in str(error):  # GPU, CPU
        say(f"out of memory: lower --micro_tokens, or for the rollout --prompts. {error}")
    elif cause:  # a full disk, a file that may not be written, a folder that has gone
        say(f"ended by the system: {cause}; --resume goes on from the last checkpoint, if there is one")
    elif issubclass(kind, KeyboardInterrupt):
        say("interrupted")
    else:
        sys.__excepthook__(kind, error, trace)


# ------------------------------------------------------------------------------------------------- flags
def flag(text: str, default=None, *, toy=None, real=None, choices=None, least=None, most=None):
    """A command-line flag: its line of help, one default or two (the toy's, real models'), and its limits."""
    if default is not None:
        text = f"{text} (default: {default!r})"
    elif toy is not None:
        text = f"{text} (default: toy {toy!r}, other models {real!r})"
    metadata = {"help": text, "choices": choices, "toy": toy, "real": real, "least": least, "most": most}
    return field(default=default, metadata=metadata)


@dataclass
class Args:
    """The flags that all scripts share, with their units and the toy's and real models' defaults."""
    model: str = flag("'toy', or a Hub name or local folder of a causal language model", "toy")
    data: str = flag("'toy', a Hub dataset or a jsonl/json/parquet/csv file",
                     toy="toy", real="Elliott/Openr1-Math-46k-8192")
    eval_data: str = flag("held-out problems: as --data, several with commas between, NAME@32 for 32 samples "
                          "of each; empty: a tenth of --data, at most 128 rows", toy="toy", real="")
    name: str = flag("the run's folder in runs/; empty: script, model and a number", "")
    resume: bool = flag("go on with the run --name from its last checkpoint", False)
    seed: int = flag("seed of the data's order and of sampling", 0, least=0)
    steps: int = flag("rollout batches to train on", toy=80, real=500, least=1)
    prompts: int = flag("prompts in a rollout batch", toy=16, real=128, least=1)
    n: int = flag("responses to a prompt: the size of a group", 8, least=2)
    updates: int = flag("optimiser steps on the rows of a step", toy=1, real=2, least=1)
    lr: float = flag("learning rate of AdamW", toy=2e-4, real=1e-6, least=0)
    warmup: int = flag("optimiser steps in which the learning rate rises to --lr", toy=5, real=0, least=0)
    weight_decay: float = flag("weight decay of AdamW", toy=0.0, real=0.01, least=0)
    beta2: float = flag("AdamW's decay of the second moment", toy=0.95, real=0.999, least=0, most=0.9999)
    max_grad_norm: float = flag("a longer gradient is scaled to this norm", 1.0, least=1e-6)
    entropy_bonus: float = flag("weight of the tokens' mean entropy in the objective", 0.0)
    temperature: float = flag("sampling temperature, at which log-probs are taken too", 1.0, least=0.01)
    max_prompt: int = flag("tokens; problems with a longer prompt are left out", toy=64, real=1024, least=1)
    max_response: int = flag("tokens, L in the formulas; longer ones are cut", toy=72, real=3072, least=1)
    micro_tokens: int = flag("tokens of a micro-batch with padding; sets memory, not the gradient",
                             toy=2048, real=16384, least=1)
    eval_every: int = flag("steps between evaluations on held-out problems", toy=20, real=50, least=1)
    eval_response: int = flag("tokens of a response in evaluation", toy=100, real=3072, least=1)
    eval_temperature: float = flag("sampling temperature in evaluation", toy=1.0, real=0.6, least=0.01)
    save_every: int = flag("steps between checkpoints; 0: only at the end", toy=20, real=50, least=0)
    rollout: str = flag("engine that samples", "auto", choices=("auto", "vllm", "transformers"))
    gpu_memory_utilization: float = flag("share of the GPU's memory that vLLM takes while it samples", 0.4,
                                         least=0.01, most=1)
    device: str = flag("where the model is", "auto", choices=("auto", "cpu", "cuda"))
    eval_only: bool = flag("evaluate --model on --eval_data, and train nothing", False)
    dry_run: bool = flag("say what memory a GPU needs for this run, and stop", False)
    system: str = flag("system message for data with plain columns; empty: that of --data's chat messages, "
                       "or else a request to think and to box the answer", "")
    prompt_end: str = flag("text with which every prompt ends", toy="", real="<think>\n")
    rope_theta: float = flag("base of RoPE; 0: the model's own (the papers: 40000)", 0.0, least=0)
    max_positions: int = flag("longest context; 0: the model's own (the papers: 16384)", 0, least=0)


def parse(cls, doc: str):
    """Args of class `cls` from the command line; what cannot be right is one line and exit code 2."""
    sys.excepthook = explain
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; --help lists the flags")
    for f in fields(cls):
        options = {"default": f.default, "help": f.metadata["help"]}
        if f.type is bool:
            parser.add_argument(f"--{f.name}", action="store_true", **options)
        else:
            parser.add_argument(f"--{f.name}", type=f.type, choices=f.metadata["choices"], **options)
    args = cls(**vars(parser.parse_args()))
    sources = {args.model, args.data, *(args.eval_data or "").replace("@", ",").split(",")}
    is_toy = not sources.isdisjoint({"toy", "toy:easy"})
    for f in fields(cls):
        if getattr(args, f.name) is None:
            setattr(args, f.name, f.metadata["toy" if is_toy else "real"])
        check(f"--{f.name}", getattr(args, f.name), f.metadata["least"], f.metadata["most"])
    return args


def check(name: str, value: float | None, least: float | None, most: float | None = None):
    """Ends the program if a value that is given is not within the limits that are given (nan never is)."""
    if value is None:
        return
    if least is not None and not value >= least:
        fail(f"{name} is {value}: it must be at least {least}")
    if most is not None and not value <= most:
        fail(f"{name} is {value}: it must be at most {most}")


# --------------------------------------------------------------------------------------------- the model
def load_config(args: Args):
    """The model's config with --rope_theta and --max_positions, in which prompts and responses fit."""
    path = args.model
    if path == "toy":
        import toy
        path = toy.base_model()
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        fail(f"--model {args.model} cannot be loaded: {error}")
    if args.rope_theta:
        if "rope_theta" not in (getattr(config, "rope_parameters", None) or {}):
            fail(f"--rope_theta: {args.model} has no such setting")
        config.rope_parameters = config.rope_parameters | {"rope_theta": args.rope_theta}
    config.max_position_embeddings = args.max_positions or config.max_position_embeddings
    for name in ("max_response", "eval_response"):
        if args.max_prompt + getattr(args, name) > config.max_position_embeddings:
            fail(f"--max_prompt {args.max_prompt} and --{name} {getattr(args, name)} are more than the "
                 f"{config.max_position_embeddings} positions of {args.model}: lower one of them, or see "
                 "--rope_theta and --max_positions")
    return config


def load_model(args: Args, device: torch.device):
    """The model, with float32 master weights (lr 1e-6 rounds to nothing in bfloat16), and its tokenizer."""
    config = load_config(args)
    path = config.name_or_path
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        fail(f"--model {args.model} cannot be loaded: {error}")
    model.to(device)
    if tokenizer.eos_token_id is None:
        fail(f"--model {args.model}: its tokenizer has no EOS token, so no response could end")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # trainer and sampler must agree
    if device.type == "cuda":
        model.gradient_checkpointing_enable()
    return model, tokenizer


# ----------------------------------------------------------------------------------------- a batch of rows
@dataclass(eq=False)
class Problem:
    index: int          # row of the dataset; names the group
    text: str           # the prompt rendered with the chat template
    prompt: list[int]   # its token ids
    answer: str         # the reference answer
    demonstration: str  # an expert's response, empty if there is none
    part: str           # slice of the held-out problems to which the row belongs
    row: dict           # as it was read
    samples: int = 1    # responses to it in an evaluation


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
    batch = Batch(tokens, (start + offset) * mask, mask, pad_sequence(old_logp, batch_first=True),
                  torch.tensor([row.advantage for row in rows]), torch.tensor([row.is_demo for row in rows]))
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

    F.linear_cross_entropy computes gradients in its forward pass: weights of tokens must be known before
    their log-probs are, and importance ratios are not. It has no entropy either.
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
        weight, bias = [part if part is None else part.to(hidden.dtype) for part in (weight, bias)]
        parts = zip(*(part.split(LOGIT_CHUNK) for part in (hidden, *rows, grad_logp, grad_h)))
        for x, y, lse, h, g, g_h in parts:
            z = F.linear(x, weight, bias)
            z = z.to(lse.dtype).div_(ctx.temperature).sub_(lse[:, None])  # log p of every word
            p = z.exp() if ctx.entropy else z.exp_()
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
                grad_bias += d.sum(dim=0, dtype=grad_bias.dtype)
        return torch.cat(grad_hidden), grad_weight, grad_bias, None, None, None


def token_logprobs(hidden, weight, bias, targets, temperature: float = 1.0, entropy: bool = False):
    """Log-prob of each target token and entropy of its distribution at the sampling temperature, in nats.

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) ids. Returns two (N,) tensors with gradient,
    the second of zeros without `entropy`. No more than LOGIT_CHUNK x V logits exist at a time.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return TokenLogprobs.apply(hidden, weight, bias, targets, temperature, entropy)


def logprobs(model, batch: Batch, temperature: float, entropy: bool = False):
    """Log-probs of response tokens and entropy (zeros without `entropy`), both (B, T); 0 outside the mask."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        # Without a mask, which flash kernels do not take: padding is on the right, where no token looks.
        output = model.base_model(input_ids=batch.tokens, use_cache=False)
        row, _ = batch.mask.nonzero(as_tuple=True)            # (N,) for the N tokens in the mask
        position = batch.positions[batch.mask]                # (N,)
        hidden = output.last_hidden_state[row, position - 1]  # (N, H): what predicts them
        targets, head = batch.tokens[row, position], model.get_output_embeddings()
        flat = token_logprobs(hidden, head.weight, head.bias, targets, temperature, entropy)
    zeros = torch.zeros(batch.mask.shape, dtype=flat[0].dtype, device=model.device)
    return tuple(zeros.masked_scatter(batch.mask, part) for part in flat)
