"""Rollout with transformers on many architectures: their caches differ, what is sampled may not."""
import random
from collections import Counter

import pytest
import torch
import transformers

from runtime import sampling, toy

TOKENIZER = toy.make_tokenizer()
IDS = {"vocab_size": len(TOKENIZER), "bos_token_id": 1, "eos_token_id": TOKENIZER.eos_token_id,
       "pad_token_id": TOKENIZER.pad_token_id}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "max_position_embeddings": 128, "initializer_range": 0.2, **IDS}
KV = {"num_key_value_heads": 2}
WINDOW = 8  # tokens: less than prompts and responses have
CONFIGS = {
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, **KV),
    "llama": lambda: transformers.LlamaConfig(**SIZES, **KV),
    "phi3": lambda: transformers.Phi3Config(**SIZES, **KV, sliding_window=WINDOW),
    "mistral": lambda: transformers.MistralConfig(**SIZES, **KV, sliding_window=WINDOW),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, **KV, head_dim=8, sliding_window=WINDOW,
                                                    layer_types=["sliding_attention", "full_attention"]),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(n_positions=128, n_embd=32, n_layer=2, n_head=4,  # absolute positions
                                            initializer_range=0.2, **IDS),
    "opt": lambda: transformers.OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
                                          word_embed_proj_dim=32, max_position_embeddings=128, init_std=0.2, **IDS),
    "falcon": lambda: transformers.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                                alibi=True, initializer_range=0.2, **IDS),
    "mamba": lambda: transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8,  # recurrent
                                              initializer_range=0.2, **IDS),
    "lfm2": lambda: transformers.Lfm2Config(**SIZES, **KV, layer_types=["conv", "full_attention"]),
    # without a cache in the output, and with one derived from DynamicCache: these sample by model.generate
    "recurrent_gemma": lambda: transformers.RecurrentGemmaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, intermediate_size=96,
        lru_width=32, attention_window_size=WINDOW, **IDS),
    "minimax": lambda: transformers.MiniMaxConfig(
        **SIZES, **KV, head_dim=8, num_local_experts=2, num_experts_per_tok=1, block_size=16,
        layer_types=["linear_attention", "full_attention"]),
}
BY_GENERATE = ("recurrent_gemma", "minimax")
# These compute parts in float32, or all: MiniMax's experts know no float64, and generate returns float32.
ROUNDED = ("mamba", *BY_GENERATE)


def make(kind: str):
    """A random model in float64, where it can be, and its sampler."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    model = model.to(torch.float32 if kind == "minimax" else torch.float64)
    # what instruction-tuned models bring in generation_config.json must not bend the sampling
    model.generation_config.update(top_k=3, top_p=0.5, temperature=0.2, repetition_penalty=1.5, min_p=0.3)
    return model, sampling.TransformersSampler(model, TOKENIZER)


def make_prompts(lengths) -> list[list[int]]:
    """Random prompts of these lengths, which contain EOS and padding like any other token."""
    rng = random.Random(0)
    return [[rng.randrange(len(TOKENIZER)) for _ in range(length)] for length in lengths]


def plain_logp(model, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """Of all words for each token of a response (T, V): a forward pass without cache, padding or other rows."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1:-1]
    return (logits / temperature).log_softmax(dim=-1)


@pytest.mark.parametrize("kind", CONFIGS)
def test_log_probs_are_those_of_a_plain_forward_pass(kind, monkeypatch):
    """Prompts of many lengths in one batch, in mixed order; some responses end, others are cut."""
    model, sampler = make(kind)
    calls, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: calls.append(1) or generate(**inputs))
    lengths = [7] * 4 if kind == "minimax" else [3, 12, 1, 20]  # MiniMax sees its padding
    prompts = make_prompts(lengths) * 9
    responses = sampler.generate(prompts, 40, 0.9, seed=0)
    assert len(calls) == (kind in BY_GENERATE)
    assert len(responses) == len(prompts)
    eos = TOKENIZER.eos_token_id
    for prompt, (response, logp) in zip(prompts, responses):
        assert response.count(eos) == (response[-1] == eos)
        assert response[-1] == eos or len(response) == 40
        expected = plain_logp(model, prompt, response, 0.9)[range(len(response)), response]
        torch.testing.assert_close(torch.tensor(logp, dtype=expected.dtype), expected, rtol=0,
                                   atol=1e-5 if kind in ROUNDED else 1e-12)
    ends = [response[-1] == eos for response, _ in responses]
    assert any(ends) and not all(ends)


@pytest.mark.parametrize("kind, size", (("qwen2", 20_000), ("recurrent_gemma", 2_000)))
def test_the_first_token_is_from_the_whole_softmax(kind, size):
    model, sampler = make(kind)
    prompts = make_prompts([4, 9])
    responses = sampler.generate(prompts * size, 1, 1.3, seed=0)
    for index, prompt in enumerate(prompts):
        counts = Counter(response[0] for response, _ in responses[index::2])
        with torch.no_grad():
            p = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 1.3).softmax(dim=-1)
        frequencies = torch.tensor([counts[token] / size for token in range(len(p))], dtype=p.dtype)
        assert ((frequencies - p).abs() < 5 * (p / size).sqrt() + 5 / size).all()


def test_sampling_at_the_edges_of_the_distribution():
    """The smallest and the largest random number find the first and the last token that has a probability."""
    logp = torch.tensor([[0, 0.3, 0, 0.7 - 1e-12, 1e-12, 0], [0, 0, 1, 0, 0, 0]], dtype=torch.float64).log()
    for number, tokens in ((0.0, [1, 2]), (0.29, [1, 2]), (0.31, [3, 2]), (1 - 2**-53, [4, 2])):
        noise = torch.full((2,), number, dtype=torch.float64)
        assert sampling.sample(logp, noise, 1.0).tolist() == [[token] for token in tokens]


@pytest.mark.parametrize("kind", ("qwen2", "mamba", "recurrent_gemma"))
def test_a_seed_repeats(kind):
    _, sampler = make(kind)
    prompts = make_prompts([3, 12, 6]) * 3
    first = sampler.generate(prompts, 20, 1.0, seed=7)
    assert sampler.generate(prompts, 20, 1.0, seed=7) == first
    assert sampler.generate(prompts, 20, 1.0, seed=8) != first


@pytest.mark.parametrize("kind", ("qwen2", "mistral", "gpt2", "recurrent_gemma"))
def test_greedy_responses_are_those_of_each_prompt_alone(kind):
    """Rows that leave take none of the others' places, and come back in the order of the prompts."""
    model, sampler = make(kind)
    sampler.eos = model.generation_config.eos_token_id = list(range(0, len(TOKENIZER), 5))  # so that some end
    prompts = make_prompts([3, 12, 1, 20, 5, 9, 2, 16, 7, 4])
    batch = sampler.generate(prompts, 25, 0.0, seed=0)
    assert len({len(response) for response, _ in batch}) > 2
    for prompt, (response, logp) in zip(prompts, batch):
        [(alone, alone_logp)] = sampler.generate([prompt], 25, 0.0, seed=1)
        assert response == alone
        assert logp == pytest.approx(alone_logp, abs=1e-5)
        likeliest = plain_logp(model, prompt, response, 1.0).max(dim=-1)
        assert response == likeliest.indices.tolist()
        assert logp == pytest.approx(likeliest.values.tolist(), abs=1e-5)


def test_a_prompt_is_read_once_and_ended_rows_leave():
    model, sampler = make("qwen2")
    sampler.eos.append(20)
    prompts, seen = make_prompts([3, 12, 5]), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append((*inputs[0].shape,)))
    responses = sampler.generate(prompts * 8, 30, 1.0, seed=0)
    lengths = [len(response) for response, _ in responses]
    going = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert len(set(going)) > 3
    assert seen == [(3, 12)] + [(rows, 1) for rows in going]


def test_any_token_of_a_set_ends_a_response():
    _, sampler = make("qwen2")
    sampler.eos = [TOKENIZER.eos_token_id, 20, 30]
    responses = sampler.generate(make_prompts([3, 12]) * 30, 30, 1.0, seed=0)
    assert {response[-1] for response, _ in responses} > set(sampler.eos)
    for response, _ in responses:
        assert not set(response[:-1]) & set(sampler.eos)
        assert response[-1] in sampler.eos or len(response) == 30


@pytest.mark.parametrize("kind, longest", (("qwen2", 100), ("gpt2", 100), ("recurrent_gemma", 12)))
def test_each_prompt_may_have_a_limit_of_its_own(kind, longest):
    """And none goes beyond it: GPT-2 here has 128 positions and no more."""
    _, sampler = make(kind)
    prompts, limits = make_prompts([3, longest, 2, 7]) * 6, [longest, 28, 7, 1] * 6
    whole = [sampler.generate([prompt], limit, 1.0, 0, [number])[0]
             for number, (prompt, limit) in enumerate(zip(prompts, limits))]
    responses = sampler.generate(prompts, limits, 1.0, seed=0)
    assert sum(len(response) == limit > 1 for (response, _), limit in zip(responses, limits)) > 3
    for (response, logp), (alone, alone_logp), limit in zip(responses, whole, limits):
        assert response == alone and len(response) <= limit
        assert logp == pytest.approx(alone_logp, abs=1e-5)
