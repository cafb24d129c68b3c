"""The policy: loading the model, FSDP2, log-probs of response tokens, optimisers, writing the model out."""
import os
import types
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch.autograd.function import FunctionCtx
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from runtime import processes
from runtime.flags import Args, fail
from runtime.rows import Batch, Codec

LOGIT_BYTES = {"cpu": 1 << 29, "cuda": 1 << 31}  # of a chunk's logits and of what is computed from them
ROUNDING = {"cpu": 1e-3, "cuda": 0.1}  # mean nats a token by which two passes may differ: float32, bfloat16
SMALL = 5_000_000  # parameters up to which a CPU gets one thread by default, see bench/threads.py
LARGE = 200_000_000  # parameters from which on nobody wants a CPU without having said so
PLAIN_TEMPLATE = (  # for a base model whose tokenizer has no chat template
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")


# --------------------------------------------------------------------------------------------- the model
def choose_device(args: Args) -> torch.device:
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch sees no CUDA device")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if args.offload and device.type == "cpu" and not args.dry_run:
        fail("--offload: without a card everything is in host memory: leave it out")
    return device


def load_config(args: Args) -> PretrainedConfig:
    """The model's config with --rope_theta and --max_positions, in which prompts and responses fit."""
    path = args.model
    if path == "toy":
        from runtime import toy
        path = toy.EMBEDDED
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        fail(f"--model {args.model} cannot be loaded: {error}")
    text = config.get_text_config()  # of a composite model, itself of others
    if args.rope_theta:
        if "rope_theta" not in (getattr(text, "rope_parameters", None) or {}):
            fail(f"--rope_theta: {args.model} has no such setting")
        text.rope_parameters = text.rope_parameters | {"rope_theta": args.rope_theta}
    positions = getattr(text, "max_position_embeddings", None)  # None: no limit, as with ALiBi
    if args.max_positions:
        if positions is None:
            fail(f"--max_positions: {args.model} has no such setting")
        positions = text.max_position_embeddings = args.max_positions
    for name in ("max_response", "eval_response"):
        if positions is not None and args.max_prompt + getattr(args, name) > positions:
            fail(f"--max_prompt {args.max_prompt} and --{name} {getattr(args, name)} are more than the "
                 f"{positions} positions of {args.model}: lower one of them, or see --rope_theta and "
                 "--max_positions")
    return config


def switch_off_dropout(config: PretrainedConfig):
    """Sets every probability of dropout and every noise of a router to 0, in the configs inside it too."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            switch_off_dropout(value)
        elif ("drop" in name or "jitter" in name) and type(value) in (int, float):
            setattr(config, name, type(value)(0))


def load_model(args: Args, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, with float32 master weights (lr 1e-6 rounds to nothing in bfloat16), and its tokenizer."""
    config = load_config(args)
    path = config.name_or_path
    switch_off_dropout(config)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        fail(f"--model {args.model} cannot be loaded: {error}")
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0  # trainer and sampler must agree
    if device.type == "cuda":
        model.gradient_checkpointing_enable()
    return model, tokenizer


def shard(model: PreTrainedModel, device: torch.device, offload: bool):
    """FSDP2: a process keeps its part of every weight, and has a layer whole only while that is at work.

    On a card matrix products are in bfloat16; the weights that are kept, their gradients and what is summed
    over processes are float32. offload: what is kept is in host memory, where the optimiser's step is taken.
    """
    from torch.distributed.fsdp import (  # here, since a CPU alone can do without and waits for it
        CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method)
    options = {"mesh": init_device_mesh(device.type, (processes.world(),)),
               "reshard_after_forward": True}  # the root's too: parameters() are those that are kept
    if device.type == "cuda":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for module in list(model.modules()):
        if isinstance(module, GradientCheckpointingLayer):  # a decoder's layer
            fully_shard(module, **options)
    fully_shard(model, **options)  # embedding, last norm and head, whole in its forward methods:
    register_fsdp_forward_method(model, "logprobs")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which each process may have a part. If so, all of them have to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# ----------------------------------------------------------------------------------- log-probs and entropy
def logit_chunk(vocabulary: int, device: str) -> int:
    """Tokens whose logits are held at once: as many as LOGIT_BYTES have room for, a power of 2.

    12 bytes a logit: there are at most three tensors of that size at a time, in float32.
    """
    return 1 << max(0, (LOGIT_BYTES[device] // (12 * vocabulary)).bit_length() - 1)


def compute_logits(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float,
) -> torch.Tensor:
    """Logits (chunk, V) of hidden states x (chunk, H), divided by the temperature, at least in float32.

    On a card the product of bfloat16 is not rounded to bfloat16, which would move logits of 16 to 32 by up to
    0.06: nor is vLLM's, whose head_dtype makes the same call of mm.
    """
    if x.is_cuda and x.dtype == torch.bfloat16:
        z = torch.mm(x, weight.T, out_dtype=torch.float32)  # which has no gradient and no CPU kernel
        z = z if bias is None else z.add_(bias)
    else:
        z = F.linear(x, weight, bias)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z if temperature == 1 else z.div_(temperature)


class TokenLogprobs(torch.autograd.Function):
    """log p of targets and entropy H, without keeping logits z: backward recomputes them.

    F.linear_cross_entropy computes gradients in its forward pass: weights of tokens must be known before
    their log-probs are, and importance ratios are not. It has no entropy either.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        targets: torch.Tensor, temperature: float, entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logp, h, lse, chunk = [], [], [], logit_chunk(len(weight), hidden.device.type)
        for x, y in zip(hidden.split(chunk), targets.split(chunk)):
            z = compute_logits(x, weight, bias, temperature)              # (chunk, V)
            lse.append(z.logsumexp(dim=-1))
            logp.append(z.gather(1, y[:, None])[:, 0] - lse[-1])          # log p = z_y - lse(z)
            p_z = (z - lse[-1][:, None]).exp_().mul_(z).sum(dim=-1) if entropy else lse[-1]
            h.append(lse[-1] - p_z)                                       # H = lse(z) - Σ p z
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(lse), torch.cat(h))
        ctx.temperature, ctx.entropy, ctx.chunk = temperature, entropy, chunk
        return torch.cat(logp), torch.cat(h)

    @staticmethod
    def backward(
        ctx: FunctionCtx, grad_logp: torch.Tensor, grad_h: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, *rows = ctx.saved_tensors
        dtype = rows[1].dtype  # float32 also for bfloat16 weights: it sums over many chunks
        grad_hidden, grad_weight = [], torch.zeros_like(weight, dtype=dtype)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=dtype)
        rows += [grad_logp / ctx.temperature, grad_h / ctx.temperature]   # z is divided by it: so is d
        for x, y, lse, h, g, g_h in zip(*(part.split(ctx.chunk) for part in (hidden, *rows))):
            z = compute_logits(x, weight, bias, ctx.temperature).sub_(lse[:, None])  # log p of every word
            p = z.exp() if ctx.entropy else z.exp_()
            if ctx.entropy:
                d = z.add_(h[:, None]).mul_(-g_h[:, None]).sub_(g[:, None]).mul_(p)   # dH/dz = -p (log p + H)
            else:
                d = p.mul_(-g[:, None])                                   # d log p_y / dz = 1[y] - p
            d.scatter_add_(1, y[:, None], g[:, None])
            d = d.to(weight.dtype)
            grad_hidden.append(d @ weight)
            if grad_weight.dtype == d.dtype:
                grad_weight.addmm_(d.T, x)
            else:
                grad_weight += d.T @ x
            if bias is not None:
                grad_bias += d.sum(dim=0, dtype=grad_bias.dtype)
        grad_bias = None if bias is None else grad_bias.to(bias.dtype)
        return torch.cat(grad_hidden), grad_weight.to(weight.dtype), grad_bias, None, None, None


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
    temperature: float = 1.0, entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target token and entropy of its distribution at the sampling temperature, in nats.

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) ids. Returns two (N,) tensors with gradient,
    the second of zeros without `entropy`. Of no more than logit_chunk() tokens do logits exist at a time.
    """
    return TokenLogprobs.apply(hidden, weight, bias, targets, temperature, entropy)


def logprobs(
    model: PreTrainedModel, batch: Batch, temperature: float, entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of response tokens and entropy (0 without `entropy`), both (rows, T); 0 outside the mask."""
    # Without a mask, which flash kernels do not take: padding is on the right, where no token looks.
    output = model.base_model(input_ids=batch.tokens, use_cache=False)
    row, _ = batch.mask.nonzero(as_tuple=True)            # (N,) for the N tokens in the mask
    position = batch.positions[batch.mask]                # (N,)
    hidden = output.last_hidden_state[row, position - 1]  # (N, H): what predicts them
    targets, head = batch.tokens[row, position], model.get_output_embeddings()
    flat = token_logprobs(hidden, head.weight, head.bias, targets, temperature, entropy)
    zeros = torch.zeros(batch.mask.shape, dtype=flat[0].dtype, device=hidden.device)
    return tuple(zeros.masked_scatter(batch.mask, part) for part in flat)


# -------------------------------------------------------------------------------------------- the policy
class Policy:
    """The model that is trained, its tokenizer and its optimisers.

    On a card, and wherever there are several processes, FSDP2 holds it; on a CPU alone it is the plain model.
    """

    def __init__(self, args: Args, device: torch.device):
        self.args, self.device = args, device
        with processes.first_of_machine_ahead():
            self.dtype = load_config(args).dtype or torch.float32  # in which it came, and model/ is written
            self.model, self.tokenizer = load_model(args, device)
        size = self.model.get_input_embeddings().weight.shape[0]
        self.codec = Codec(self.tokenizer, self.model.generation_config, size)
        if self.tokenizer.pad_token_id is None or self.tokenizer.pad_token_id >= size:
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(self.codec.end)
        if device.type == "cpu" and args.device == "auto" and self.size() >= LARGE:
            why = ("this torch is built for CPUs alone" if torch.version.cuda is None else
                   f"its CUDA {torch.version.cuda} needs a driver that has it; nvidia-smi says what is there")
            fail(f"--model {args.model}: torch sees no CUDA device ({why}), and {self.size() / 1e6:.0f}M "
                 "parameters take a CPU days: --device cpu if that is meant")
        if device.type == "cpu" and self.size() <= SMALL and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # more wait for each other, for long where another process has a core
        self.model.logprobs = types.MethodType(logprobs, self.model)
        self.sharded = device.type == "cuda" or processes.world() > 1
        if self.sharded:
            shard(self.model, device, args.offload)
        self.updates = 0       # optimiser steps so far
        self.optimizers = {}   # by name: each has moments of its own over the same parameters

    def size(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def logprobs(
        self, batch: Batch, entropy: bool = False, temperature: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropy (rows, T), both at the sampling temperature or another."""
        return self.model.logprobs(batch, temperature or self.args.temperature, entropy)

    def backward(self, loss: torch.Tensor):
        """Adds a loss's gradient. FSDP2 takes the mean over processes, but a mini-batch's loss is a sum."""
        (loss * processes.world()).backward()

    def check_ratio(self, batch: Batch, logp: torch.Tensor):
        """Ends the run if before any update logp (rows, T) is not what Run.score saw: the ratio is not 1."""
        scored = batch.mask & (batch.old_logp != 0).any(dim=1, keepdim=True)
        if self.updates or not scored.any():
            return
        gap = float((logp.detach() - batch.old_logp)[scored].abs().mean())
        if not gap <= ROUNDING[self.device.type]:  # nan is a gap too
            fail(f"before any update, log-probs in training are {gap:.2g} nats a token from those at "
                 f"scoring: {self.args.model} has dropout or noise that its config does not name, or what it "
                 "computes for a row depends on the rows beside it")

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        """The AdamW of this name, made at its first step."""
        if name not in self.optimizers:
            args = self.args
            self.optimizers[name] = torch.optim.AdamW(
                self.model.parameters(), lr=args.lr, betas=(0.9, args.beta2), weight_decay=args.weight_decay,
                fused=self.sharded)
        return self.optimizers[name]

    def step(self, name: str, max_grad_norm: float) -> torch.Tensor:
        """Scales the gradient down to max_grad_norm and takes a step with it; returns its norm before that.

        No step is taken with a norm that is not finite.
        """
        for parameter in self.model.parameters():
            if parameter.grad is None:  # no row had an advantage: the step is taken with a gradient of 0
                parameter.grad = torch.zeros_like(parameter)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm))
        optimizer = self.optimizer(name)
        self.updates += 1
        for group in optimizer.param_groups:
            group["lr"] = self.args.lr * min(1.0, self.updates / max(1, self.args.warmup))
        if norm.isfinite():
            optimizer.step()
        optimizer.zero_grad()
        return norm

    def weights(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of these parameters or all, whole, on the device, one by one, a tied one once."""
        for name, parameter in self.model.named_parameters():
            if names is None or name in names:
                yield name, whole(parameter.detach().to(self.device))

    def plain_model(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
        """A model of the same architecture and settings, without FSDP2 and without its weights."""
        with torch.device(device):
            return transformers.AutoModelForCausalLM.from_config(self.model.config, dtype=dtype)

    def state(self) -> dict[str, dict]:
        """What a checkpoint keeps in tensors, of which each process has its part: weights, and moments."""
        moments = {name: get_optimizer_state_dict(self.model, optimizer)
                   for name, optimizer in self.optimizers.items()}
        return {"model": get_model_state_dict(self.model)} | moments

    def load(self, updates: int, optimizers: list[str], read: Callable[[dict[str, dict]], None]):
        """Goes on from a checkpoint, whose tensors read() puts in the place of those of state()."""
        self.updates = updates
        for name in optimizers:
            self.optimizer(name)
        state = self.state()  # which gives new optimisers their moments
        read(state)
        for name, optimizer in self.optimizers.items():
            set_optimizer_state_dict(self.model, optimizer, state[name])

    def save(self, folder: Path):
        """Model and tokenizer in Hugging Face format, by one process, in the dtype the model came in."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.model, options=options)  # on the first process
        if processes.first():
            model = self.plain_model(self.dtype, "meta")
            cast = {name: weight.to(self.dtype) for name, weight in weights.items()}
            model.load_state_dict(cast, assign=True)
            model.tie_weights()
            model.generation_config = transformers.GenerationConfig(  # no sampling of its own
                eos_token_id=self.codec.ends, pad_token_id=self.tokenizer.pad_token_id)
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        processes.gather()
