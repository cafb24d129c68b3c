"""What memory a GPU needs for a run: an estimate from the model's config, which needs no GPU and no weights.

Only the update counts. Who has 18 bytes a parameter for it (below) has 6 left while vLLM samples, since then
there are no gradients and no cast weights: enough for its 2 bytes a parameter and a cache of twice that. So
nothing is moved off the card but vLLM itself, which sleeps during the update.
"""
import torch
import transformers

from runtime import policy

GIB = 1 << 30
CARDS = (24, 48, 80)  # GiB, shown where there is no GPU
USABLE = 0.9          # of a card; the rest goes to the CUDA context and to fragmentation


def parts(config, parameters: int, micro_tokens: int, optimizers: int = 1) -> dict[str, int]:
    """{what: bytes} at the peak of an update on micro-batches of `micro_tokens` tokens with padding.

    Mixed precision: float32 weights, gradients and moments, bfloat16 matrix products. Of a layer only its
    input is kept; in backward one layer at a time is computed again. 31 H + 8 I bytes a token is what
    autograd then keeps of a Qwen2 layer (tests/test_memory.py counts them); the rest are gradients.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", 4 * hidden)
    head = config.vocab_size * hidden
    return {
        "weights, float32": 4 * parameters,
        "their gradients": 4 * parameters,
        "moments of AdamW" + ", of both" * (optimizers == 2): 8 * parameters * optimizers,
        "weights cast to bfloat16": 2 * parameters,
        "inputs of the layers": 4 * layers * hidden * micro_tokens,
        "inside one layer": (40 * hidden + 14 * inner) * micro_tokens,
        "logits of a chunk, gradient of the head": 12 * policy.LOGIT_CHUNK * config.vocab_size + 8 * head,
    }


def largest_micro_tokens(config, parameters: int, card: float, optimizers: int = 1) -> int:
    """The largest --micro_tokens for a card of `card` bytes; 0 or less: the model cannot be trained on it."""
    fixed = sum(parts(config, parameters, 0, optimizers).values())
    per_token = sum(parts(config, parameters, 1, optimizers).values()) - fixed
    return int((USABLE * card - fixed) / per_token)


def cache_tokens(config, parameters: int, share: float) -> int:
    """Tokens of keys and values (bfloat16) in vLLM's share, in bytes, beside its weights."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    per_token = 2 * 2 * config.num_hidden_layers * heads * size
    return int((share - 2 * parameters) / per_token)


def count_parameters(config) -> int:
    """Of a model of this config, without its weights."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def dry_run(args, script: str, device: torch.device):
    """Prints the estimate for a run of `script` and ends the program."""
    if args.model == "toy":
        print("the toy needs no GPU: a CPU and less than 2 GiB of memory")
        raise SystemExit(0)
    config = policy.load_config(args)
    parameters, optimizers = count_parameters(config), 2 if script == "relift" else 1
    config = config.get_text_config()  # of a composite model: what reads text
    estimate = parts(config, parameters, args.micro_tokens, optimizers)
    print(f"{script} on {args.model}, {parameters / 1e6:.0f}M parameters: GiB at the peak of an update")
    for name, size in (estimate | {"in all": sum(estimate.values())}).items():
        print(f"{size / GIB:7.1f}  {name}")
    cards = [torch.cuda.get_device_properties(device).total_memory] if device.type == "cuda" else \
            [card * GIB for card in CARDS]
    row = args.max_prompt + args.max_response
    for card in cards:
        largest = largest_micro_tokens(config, parameters, card, optimizers)
        cache = cache_tokens(config, parameters, card * args.gpu_memory_utilization)
        if largest >= args.micro_tokens:
            verdict = "enough"
        elif largest >= row:
            verdict = "lower --micro_tokens"
        elif largest > args.max_prompt:
            verdict = f"too small for a row of {row} tokens: lower --max_response"
        else:
            verdict = "too small for this model"
        print(f"a card of {card / GIB:.0f} GiB: {verdict}; --micro_tokens up to {max(0, largest):,}; "
              f"vLLM's cache holds {max(0, cache) // row} responses of full length at once")
    raise SystemExit(0)
