"""What memory a run needs on cards and machine: an estimate from the model's config, without either.

Update and sampling take turns. In the update vLLM sleeps; while it samples, there are no gradients and no
layer is at work, and its share has to fit beside the weights and moments that stay on the card.
"""
import math
import os

import torch
import transformers
from transformers import PretrainedConfig

from runtime import policy, processes
from runtime.flags import Args, fail

GIB = 1 << 30
CARDS = (24, 48, 80)  # GiB, shown where there is no GPU
TWO_OPTIMIZERS = ("relift",)  # scripts whose optimizer_step() names moments of its own for fine-tuning


def usable(card: float) -> float:
    """Bytes of a card that are counted on: all but a tenth, and all but 3 GiB.

    The rest is for the CUDA context, vLLM's CUDA graphs, which stay while it sleeps, and fragmentation.
    """
    return card - max(0.1 * card, 3 * GIB)


def parts(config: PretrainedConfig, parameters: int, micro_tokens: int, optimizers: int = 1, cards: int = 1,
          offload: bool = False) -> dict[str, int]:
    """{what: bytes} on one of `cards` at the peak of an update on micro-batches of `micro_tokens` tokens.

    FSDP2: a card keeps its part of the float32 weights, gradients and moments, or with offload none of it.
    Embedding and head are whole in bfloat16 during a pass, of the layers two, the next being fetched.
    Gradients come in bfloat16 and are summed over cards in float32. Of a layer only its input is kept; in
    backward one at a time is computed again. 20 H + 8 I bytes a token is what autograd then keeps of a Qwen2
    layer (tests/test_memory.py counts them); the rest are gradients.
    """
    hidden, layers, share = config.hidden_size, config.num_hidden_layers, 0 if offload else 1 / cards
    inner = getattr(config, "intermediate_size", 4 * hidden)
    ends = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    layer = max(0, parameters - ends) // layers
    return {
        "weights, float32": int(4 * parameters * share),
        "their gradients": int(4 * parameters * share),
        "moments of AdamW" + ", of both" * (optimizers == 2): int(8 * parameters * optimizers * share),
        "embedding, head and two layers in bfloat16": 2 * ends + 2 * 2 * layer,
        "their gradients, in bfloat16 and in float32": 6 * ends + 6 * layer,
        "inputs of the layers": 2 * layers * hidden * micro_tokens,
        "inside one layer": (28 * hidden + 14 * inner) * micro_tokens,
        "logits of a chunk": 12 * policy.logit_chunk(config.vocab_size, "cuda") * config.vocab_size,
    }


def largest_micro_tokens(
    config: PretrainedConfig, parameters: int, card: float, optimizers: int = 1, cards: int = 1,
    offload: bool = False,
) -> int:
    """The largest --micro_tokens for cards of `card` bytes; 0 or less: the model cannot be trained there."""
    fixed = sum(parts(config, parameters, 0, optimizers, cards, offload).values())
    per_token = sum(parts(config, parameters, 1, optimizers, cards, offload).values()) - fixed
    return int((usable(card) - fixed) / per_token)


def largest_share(parameters: int, card: float, optimizers: int = 1, cards: int = 1,
                  offload: bool = False) -> float:
    """The largest --gpu_memory_utilization, in hundredths, beside what the trainer holds while vLLM samples.

    That is from the first step on its weights and the moments of each of its optimisers; before, the weights.
    """
    stays = 0 if offload else (4 + 8 * optimizers) * parameters / cards
    return max(0, math.floor(100 * (usable(card) - stays) / card)) / 100


def cache_tokens(config: PretrainedConfig, parameters: int, share: float, card: float) -> int:
    """Tokens of keys and values (bfloat16) in vLLM's share of a card, beside its weights and work.

    Its work is measured by vLLM at start, with as many tokens (and rows of logits) at once as it reads (and
    samples) on a card of this size: gate, up and their product in bfloat16; logits, log-probs and noise in
    float32. Half a GiB is for CUDA graphs.
    """
    tokens, rows = (16384, 1024) if card >= 70 * GIB else (8192, 256)
    inner = getattr(config, "intermediate_size", 4 * config.hidden_size)
    work = 6 * inner * tokens + 12 * config.vocab_size * rows + GIB // 2
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    per_token = 2 * 2 * config.num_hidden_layers * heads * size
    return int((share * card - 2 * parameters - work) / per_token)


def refusal(
    config: PretrainedConfig, parameters: int, card: float, args: Args, optimizers: int = 1, cards: int = 1,
    offload: bool = False,
) -> str:
    """What of a run with these args does not fit on `card` bytes, and what to change; empty if all does."""
    row = args.max_prompt + args.max_response
    longest = args.max_prompt + max(args.max_response, args.eval_response)
    largest = largest_micro_tokens(config, parameters, card, optimizers, cards, offload)
    share = largest_share(parameters, card, optimizers, cards, offload)
    given = args.gpu_memory_utilization or share
    if largest <= args.max_prompt:
        advice = "more or larger cards" if offload else "more cards, or --offload"
        return f"too small for this model: it takes {advice}"
    if largest < row:
        return f"too small for a row of {row} tokens: lower --max_response"
    if largest < args.micro_tokens:
        return f"lower --micro_tokens to at most {largest}"
    if args.rollout == "transformers":
        return ""
    if cache_tokens(config, parameters, share, card) < longest:
        return f"too small for vLLM beside what stays there, even with --gpu_memory_utilization {share:.2f}"
    if given > share:
        return f"--gpu_memory_utilization at most {share:.2f}"
    if cache_tokens(config, parameters, given, card) < longest:
        return f"raise --gpu_memory_utilization, up to {share:.2f}"
    return ""


def host_bytes(parameters: int, optimizers: int = 1, cards: int = 1, offload: bool = False,
               local: int = 1) -> int:
    """Bytes of host memory on a machine with `local` of all `cards`.

    Each process loads the whole model in float32 before it keeps its part. Later there are vLLM's weights,
    which sleep there during the update, and with offload weights, gradients and moments.
    """
    kept = (8 + 8 * optimizers) * parameters * local // cards if offload else 0
    return max(4 * parameters * local, 2 * parameters * local + kept)


def disk_bytes(
    config: PretrainedConfig, parameters: int, optimizers: int = 1, keep: int = 1,
) -> tuple[int, int]:
    """Bytes of a run's folder: the most at once, while a checkpoint is written beside `keep` others; at last.

    A checkpoint has weights and moments in float32, and a head that is the embedding once more; model/ is in
    the model's own dtype. What is logged is small beside them.
    """
    head = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    checkpoint = (4 + 8 * optimizers) * parameters + 4 * head
    model = (config.dtype or torch.float32).itemsize * parameters
    return max((keep + 1) * checkpoint, keep * checkpoint + model), keep * checkpoint + model


def count_parameters(config: PretrainedConfig) -> int:
    """Of a model of this config, without its weights."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def fit(args: Args, script: str, card: int):
    """Ends the program with one line if by the estimate the run does not fit on cards of `card` bytes.

    Without --gpu_memory_utilization it is set: to the largest share beside what the trainer keeps there.
    """
    config, cards, local = policy.load_config(args), processes.world(), processes.local_world()
    parameters, optimizers = count_parameters(config), 1 + (script in TWO_OPTIMIZERS)
    place = (parameters, card, args, optimizers, cards, args.offload)
    reason = refusal(config.get_text_config(), *place)
    if reason:
        fail(f"--model {args.model} on {cards} card(s) of {card / GIB:.0f} GiB, by the estimate of "
             f"--dry_run: {reason}")
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = host_bytes(parameters, optimizers, cards, args.offload, local)
    if args.offload and needed > host:
        fail(f"--offload: {args.model} needs {needed / GIB:.0f} GiB of host memory, and this machine has "
             f"{host / GIB:.0f}")
    args.gpu_memory_utilization = args.gpu_memory_utilization or largest_share(
        parameters, card, optimizers, cards, args.offload)


def dry_run(args: Args, script: str, device: torch.device):
    """Prints the estimate for a run of `script` and ends the program."""
    if args.model == "toy":
        print("the toy needs no GPU: a CPU and less than 2 GiB of memory")
        raise SystemExit(0)
    config = policy.load_config(args)
    parameters, optimizers = count_parameters(config), 1 + (script in TWO_OPTIMIZERS)
    config = config.get_text_config()  # of a composite model: what reads text
    numbers = [processes.world()] if processes.world() > 1 else [1, 8]
    estimate = parts(config, parameters, args.micro_tokens, optimizers, numbers[0], args.offload)
    print(f"{script} on {args.model}, {parameters / 1e6:.0f}M parameters: GiB at the peak of an update on "
          f"{numbers[0]} card(s){', with --offload' * args.offload}")
    for name, size in (estimate | {"in all": sum(estimate.values())}).items():
        print(f"{size / GIB:7.1f}  {name}")
    cards = [torch.cuda.get_device_properties(device).total_memory] if device.type == "cuda" else \
            [card * GIB for card in CARDS]
    row = args.max_prompt + args.max_response
    for number in numbers:
        for card in cards:
            largest = largest_micro_tokens(config, parameters, card, optimizers, number, args.offload)
            share = largest_share(parameters, card, optimizers, number, args.offload)
            used = min(share, args.gpu_memory_utilization or share)
            cache = cache_tokens(config, parameters, used, card)
            said = refusal(config, parameters, card, args, optimizers, number, args.offload) or "enough"
            print(f"{'a card' if number == 1 else f'{number} cards'} of {card / GIB:.0f} GiB: {said}; "
                  f"--micro_tokens up to {max(0, largest):,}; --gpu_memory_utilization up to {share:.2f}; "
                  f"with {used:.2f} vLLM's cache holds {max(0, cache) // row} responses of full length at "
                  "once on each")
        host = host_bytes(parameters, optimizers, number, args.offload, min(8, number))
        print(f"host memory of a machine with {min(8, number)} card(s): {host / GIB:.0f} GiB")
    most, end = (size / GIB for size in disk_bytes(config, parameters, optimizers, args.keep))
    print(f"disk for runs/: {most:.0f} GiB while a checkpoint is written, {end:.0f} GiB at the end")
    raise SystemExit(0)
