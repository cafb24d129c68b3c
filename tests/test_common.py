"""What is not the method: log-probs, a gradient that doesn't depend on how the work is cut, rollout, data."""
import io
import json
import random
import re
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
from conftest import SMALL, load, save_model, write_jsonl
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from common import Problem, Row
from luffy import luffy_loss
from runtime import policy, sampling, toy
from runtime.problems import SYSTEM
from runtime.rows import collate, micro_batches
from runtime.stored import Experience


# ----------------------------------------------------------------------------------- log-probs and entropy
def plain_logprobs(hidden, weight, bias, targets, temperature):
    """The formula itself: log-softmax of logits / temperature, and -sum p log p."""
    logp = (torch.nn.functional.linear(hidden, weight, bias) / temperature).log_softmax(dim=-1)
    return logp[range(len(targets)), targets], -(logp.exp() * logp).sum(dim=-1)


@pytest.mark.parametrize("chunk", (1, 5, 17, 100))
@pytest.mark.parametrize("temperature", (0.3, 1.0, 1.7))
@pytest.mark.parametrize("with_entropy, with_bias", ((True, True), (True, False), (False, True)))
def test_chunked_log_probs_equal_the_plain_formula(monkeypatch, chunk, temperature, with_entropy, with_bias):
    monkeypatch.setattr(policy, "logit_chunk", lambda *_: chunk)
    torch.manual_seed(0)
    targets, weights = torch.randint(50, (17,)), torch.randn(2, 17, dtype=torch.float64)
    values, results = [torch.randn(size, dtype=torch.float64) for size in ((17, 8), (50, 8), (50,))], []
    for formula in (plain_logprobs, lambda *inputs: policy.token_logprobs(*inputs, entropy=with_entropy)):
        hidden, weight, bias = [value.clone().requires_grad_() for value in values]
        logp, entropy = formula(hidden, weight, bias if with_bias else None, targets, temperature)
        (weights[0] @ logp + (weights[1] @ entropy if with_entropy else 0)).backward()
        results.append([logp.detach(), hidden.grad, weight.grad])
        results[-1] += [entropy.detach()] if with_entropy else []
        results[-1] += [bias.grad] if with_bias else []
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_bias", (True, False))
def test_bfloat16_weights_get_gradients_that_are_summed_in_float32(monkeypatch, with_bias):
    """As on a card, whose layers are cast to bfloat16: 400 chunks, whose sum is rounded once and not 400 times."""
    monkeypatch.setattr(policy, "logit_chunk", lambda *_: 4)
    torch.manual_seed(0)
    targets, weights, results = torch.randint(50, (1600,)), torch.rand(2, 1600), []
    values = [torch.randn(size).bfloat16() for size in ((1600, 8), (50, 8), (50,))]
    for dtype in (torch.float64, torch.bfloat16):
        hidden, weight, bias = [value.to(dtype).requires_grad_() for value in values]
        logp, entropy = policy.token_logprobs(hidden, weight, bias if with_bias else None, targets, entropy=True)
        (weights[0].to(logp) @ logp + weights[1].to(logp) @ entropy).backward()
        results.append([logp.detach(), entropy.detach(), hidden.grad, weight.grad])
        results[-1] += [bias.grad] if with_bias else []
    assert [tensor.dtype for tensor in results[1][:3]] == [torch.float32, torch.float32, torch.bfloat16]
    for place, (expected, actual) in enumerate(zip(*results, strict=True)):
        bound = (0.06, 0.06, 0.02, 2 ** -8, 2 ** -8)[place]  # logits are rounded, and the sums once
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound * expected.abs().max().item())


class Watch(TorchDispatchMode):
    """Notes the name, shape and dtype of all that an operation returns, in backward too."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if torch.is_tensor(tensor):
                self.seen.append((str(function), tensor.shape, tensor.dtype))
        return result


@pytest.mark.parametrize("with_entropy", (True, False))
def test_logits_exist_for_a_chunk_of_tokens_at_a_time(monkeypatch, with_entropy):
    monkeypatch.setattr(policy, "logit_chunk", lambda *_: 4)
    hidden, weight = torch.randn(64, 2, requires_grad=True), torch.randn(1000, 2, requires_grad=True)
    with Watch() as watch:
        logp, entropy = policy.token_logprobs(hidden, weight, None, torch.arange(64), entropy=with_entropy)
        (logp + (entropy if with_entropy else 0)).sum().backward()
    assert max(shape.numel() for _, shape, _ in watch.seen) == 4 * 1000


@pytest.mark.parametrize("device, vocabulary, rows", (
    ("cuda", 151_936, 1024), ("cuda", 32_000, 4096), ("cpu", 151_936, 256), ("cpu", 1 << 26, 1), ("cpu", 1 << 27, 1)))
def test_a_chunk_of_logits_goes_by_memory(device, vocabulary, rows):
    assert policy.logit_chunk(vocabulary, device) == rows
    assert rows == 1 or rows * 12 * vocabulary <= policy.LOGIT_BYTES[device] < 2 * rows * 12 * vocabulary


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_logits_are_divided_by_a_temperature_only_if_it_is_not_1(temperature):
    hidden, weight = torch.randn(8, 2, requires_grad=True), torch.randn(1000, 2, requires_grad=True)
    with Watch() as watch:
        logp, _ = policy.token_logprobs(hidden, weight, None, torch.arange(8), temperature)
        logp.sum().backward()
    divided = [name for name, shape, _ in watch.seen if "div" in name and shape == (8, 1000)]
    assert len(divided) == (0 if temperature == 1 else 2)  # forward and backward


@pytest.mark.parametrize("with_bias", (True, False))
@pytest.mark.parametrize("device, product", (("cuda", "aten.mm.dtype"), ("cpu", "aten.mm.default")))
def test_on_a_card_logits_are_never_in_bfloat16(device, product, with_bias):
    """Without a card: which operations there would be, on which shapes and dtypes."""
    with FakeTensorMode(), Watch() as watch, torch.device(device):
        hidden, weight, bias = [torch.empty(size, dtype=torch.bfloat16) for size in ((40, 8), (1000, 8), (1000,))]
        logits = policy.compute_logits(hidden, weight, bias if with_bias else None, 0.7)
    assert (logits.dtype, logits.shape) == (torch.float32, (40, 1000))
    made = [(name, dtype) for name, shape, dtype in watch.seen if shape == (40, 1000)]
    assert made[0][0] == (product if device == "cuda" or not with_bias else "aten.addmm.default")
    assert (torch.bfloat16 in {dtype for _, dtype in made}) == (device == "cpu")


# ------------------------------------------------------------------------------------------ a batch of rows
def random_rows(tokenizer, number=12) -> list[Row]:
    """Rows of random tokens, prompts of 3 to 20 and responses of 1 to 30; each fourth is a demonstration."""
    rng, rows = random.Random(0), []
    for i in range(number):
        prompt = rng.choices(range(len(tokenizer)), k=rng.randint(3, 20))
        response = rng.choices(range(len(tokenizer)), k=rng.randint(0, 29)) + [tokenizer.eos_token_id]
        rows.append(Row(SimpleNamespace(prompt=prompt), response, is_demo=i % 4 == 0,
                        advantage=rng.choice((-0.75, -0.25, 0.5)),
                        old_logp=-3 - torch.rand(len(response), dtype=torch.float64)))
    return rows


def row_logprobs(model, row: Row, temperature=1.0):
    """Log-probs and entropy of one row, alone and so without padding, from the whole model's logits."""
    tokens = torch.tensor([row.problem.prompt + row.response])
    logp = (model(input_ids=tokens).logits[0] / temperature).log_softmax(dim=-1)
    logp = logp[len(row.problem.prompt) - 1:-1]  # what predicts each token of the response
    return logp[range(len(row.response)), row.response], -(logp.exp() * logp).sum(dim=-1)


def test_log_probs_do_not_depend_on_padding(tiny_model):
    model, tokenizer = load(tiny_model)
    rows = random_rows(tokenizer)
    batch = collate(rows, "cpu")
    logp, entropy = policy.logprobs(model, batch, 0.8, entropy=True)
    assert logp.shape == entropy.shape == batch.mask.shape
    assert not logp[~batch.mask].any() and not entropy[~batch.mask].any()
    for i, row in enumerate(rows):
        for actual, expected in zip((logp[i], entropy[i]), row_logprobs(model, row, 0.8)):
            torch.testing.assert_close(actual[:len(row.response)], expected, rtol=1e-9, atol=1e-9)


def step_gradient(model, rows, micro_tokens):
    """Gradient and sums of metrics of an optimiser step on the rows, as in a script's loop."""
    model.zero_grad()
    tokens, normaliser, sums = sum(len(row.response) for row in rows), len(rows) * 40, Counter()
    for part in micro_batches(rows, micro_tokens):
        batch = collate(part, "cpu")
        logp, entropy = policy.logprobs(model, batch, 0.9, entropy=True)
        loss, metrics = luffy_loss(logp, batch.old_logp, batch.advantages, batch.mask, batch.is_demo,
                                   normaliser)
        (loss - 0.01 * entropy.sum() / tokens).backward()
        sums.update({name: total.item() for name, (total, _) in metrics.items()})
        sums.update({f"{name} tokens": count.item() for name, (_, count) in metrics.items()})
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}, sums


@pytest.mark.parametrize("micro_tokens", (1, 60, 170, 10_000))
def test_gradient_is_the_same_for_every_micro_batch_budget(tiny_model, micro_tokens):
    model, tokenizer = load(tiny_model)
    rows = random_rows(tokenizer)
    whole, metrics = step_gradient(model, rows, 10**9)
    gradient, sums = step_gradient(model, rows[::-1], micro_tokens)
    assert sums == pytest.approx(metrics, rel=1e-9)
    for name in whole:
        assert whole[name].abs().max() > 1e-6
        torch.testing.assert_close(gradient[name], whole[name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("micro_tokens", (1, 25, 60, 100, 170, 10_000))
def test_micro_batches_hold_every_row_once_and_keep_the_budget(micro_tokens):
    rows = random_rows(toy.make_tokenizer(), 40)
    parts = micro_batches(rows, micro_tokens)
    assert Counter(id(row) for part in parts for row in part) == Counter(id(row) for row in rows)
    for part in parts:
        assert len(part) == 1 or collate(part, "cpu").tokens.numel() <= micro_tokens


@pytest.mark.parametrize("number, micro_tokens, scale", ((512, 16384, 600), (64, 16384, 600), (128, 2048, 30)))
def test_padding_costs_little_on_lengths_of_every_size(number, micro_tokens, scale):
    """Log-normal lengths, sigma 1: few responses are many times longer than most."""
    rng = random.Random(0)
    rows = [Row(SimpleNamespace(prompt=[0] * 20), [0] * max(1, round(scale * rng.lognormvariate(0, 1))))
            for _ in range(number)]
    padded = sum(collate(part, "cpu").tokens.numel() for part in micro_batches(rows, micro_tokens))
    assert padded / sum(20 + len(row.response) for row in rows) <= 1.15


def test_rows_without_advantage_are_left_out_and_not_missed(make_run, tiny_model, coin_data):
    run = make_run("grpo", "--model", tiny_model, "--data", coin_data, *SMALL)
    rows = random_rows(run.policy.tokenizer)
    for row in rows[::2]:
        row.advantage = 0.0
    for bonus, all_rows, used in ((0.0, False, 6), (0.1, False, 12), (0.0, True, 12)):  # a gradient in every row
        assert sum(len(batch.tokens) for batch in run.micro_batches(rows, bonus, all_rows)) == used


# ---------------------------------------------------------------------------------------------------- EOS
@pytest.mark.parametrize("pad_is_eos", (False, True))  # as in many tokenizers: no mask may come from tokens
def test_eos_is_trained_on(tiny_model, pad_is_eos):
    model, tokenizer = load(tiny_model)
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    rows = [row for row in random_rows(tokenizer) if len(row.response) > 1]
    batch = collate(rows, "cpu")
    logp, _ = policy.logprobs(model, batch, 1.0)
    logp.retain_grad()
    loss, _ = luffy_loss(logp, batch.old_logp, batch.advantages, batch.mask, batch.is_demo)
    loss.backward()
    for i, row in enumerate(rows):
        last = len(row.response) - 1
        assert batch.mask[i].sum() == last + 1
        assert batch.tokens[i, batch.positions[i, last]] == tokenizer.eos_token_id
        assert logp.grad[i, last] != 0
        assert not logp.grad[i, last + 1:].any()


def test_a_cut_response_has_no_eos_and_no_reward(make_run, coin_model, coin_data):
    """The coin model's answers take 8 tokens with EOS: cut to 7 they have a box, sometimes the right one."""
    flags = ("--model", coin_model, "--data", coin_data, *SMALL)
    for limit, right in ((8, True), (7, False)):
        run = make_run("grpo", *flags, "--max_response", str(limit), "--name", f"limit-{limit}")
        rows = run.rollout([run.train[0]] * 32)
        whole = [row for row in rows if row.response[-1] == run.policy.tokenizer.eos_token_id]
        assert any(r"\boxed{" + run.train[0].answer in run.codec.text(row) for row in rows)
        assert bool(run.verify(rows).any()) == right
        assert (len(whole) > 16) == right  # now and then one ends earlier, without an answer
        assert max(len(row.response) for row in rows) == limit
        assert run.record.sums["response/cut"] == [32 - len(whole), 32]
        batch = collate(rows, "cpu")
        assert batch.mask.sum(dim=1).tolist() == [len(row.response) for row in rows]


# ------------------------------------------------------------------------------------------------ rollout
def rendered(tokenizer, number: int) -> list[list[int]]:
    """Prompts of many lengths; in ChatML they contain EOS, so that no mask may come from tokens."""
    rng = random.Random(0)
    questions = [toy.Chain(rng.randint(1, 7), rng).question("?") for _ in range(number)]
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                           add_generation_prompt=True) for question in questions]
    return tokenizer(texts)["input_ids"]


@pytest.mark.parametrize("temperature", (0.6, 1.0, 1.4))
def test_log_probs_of_generation_equal_those_of_training(tiny_model, temperature):
    """Prompts of different lengths in one batch (left padding) against each row alone in the trainer."""
    model, tokenizer = load(tiny_model, torch.float32)
    # what instruction-tuned models bring in generation_config.json must not bend the sampling
    model.generation_config.update(top_k=3, top_p=0.5, temperature=0.2, repetition_penalty=1.5, min_p=0.3)
    prompts = rendered(tokenizer, 24)
    assert len({len(prompt) for prompt in prompts}) > 3
    responses = sampling.TransformersSampler(model, tokenizer).generate(prompts, 60, temperature, seed=1)
    assert len(responses) == len(prompts)
    for prompt, (response, sampler_logp) in zip(prompts, responses):
        row = Row(SimpleNamespace(prompt=prompt), response)
        logp, _ = policy.logprobs(model, collate([row], "cpu"), temperature)
        torch.testing.assert_close(torch.tensor(sampler_logp), logp[0].detach(), rtol=0, atol=1e-5)
        alone, _ = row_logprobs(model, row, temperature)
        torch.testing.assert_close(logp[0], alone, rtol=0, atol=1e-5)
    ends = [response[-1] == tokenizer.eos_token_id for response, _ in responses]
    assert any(ends) and not all(ends)  # both kinds were there
    for (response, _), ended in zip(responses, ends):
        assert response.count(tokenizer.eos_token_id) == ended  # nothing behind EOS
        assert ended or len(response) == 60


def test_sampling_is_from_the_whole_distribution_and_repeats_with_its_seed(tiny_model):
    model, tokenizer = load(tiny_model, torch.float32)
    model.generation_config.update(top_k=3, top_p=0.5, temperature=0.2, repetition_penalty=1.5, min_p=0.3)
    sampler, prompts = sampling.TransformersSampler(model, tokenizer), rendered(tokenizer, 1) * 3000
    responses = sampler.generate(prompts, 1, 1.3, seed=0)
    p = (model(input_ids=torch.tensor(prompts[:1])).logits[0, -1] / 1.3).softmax(dim=-1).detach()
    counts = Counter(response[0] for response, _ in responses)
    frequencies = torch.tensor([counts[token] / len(prompts) for token in range(len(p))])
    torch.testing.assert_close(frequencies, p, rtol=0, atol=0.04)  # four standard deviations at p = 0.5
    assert sampler.generate(prompts[:50], 9, 1.0, seed=7) == sampler.generate(prompts[:50], 9, 1.0, seed=7)
    assert sampler.generate(prompts[:50], 9, 1.0, seed=7) != sampler.generate(prompts[:50], 9, 1.0, seed=8)


def test_a_rollout_goes_on_from_a_prefix(make_run, coin_model, coin_data, shared_verifier):
    """Given nothing, all up to the answer, or all but EOS of a right or a wrong response of eight tokens."""
    run = make_run("grpo", "--model", coin_model, "--data", coin_data, *SMALL, "--max_response", "8")
    problem = run.train[0]
    right, wrong = [run.codec.encode(problem, f"<think>\n</think>\n\\boxed{{{box}}}")[:-1]
                    for box in (problem.answer, "9")]
    prefixes = [[]] * 20 + [right[:5]] * 20 + [right] * 20 + [wrong] * 20
    rows = run.rollout([problem] * 80, prefixes)
    for row, prefix in zip(rows, prefixes):
        assert row.response[:row.prefix] == prefix and row.prefix == len(prefix)
        assert len(row.sampler_logp) == len(row.response) - len(prefix) and len(row.response) <= 8
    rewards, sums = run.verify(rows), run.record.sums
    for part, lowest, highest in ((slice(0, 40), 5, 35), (slice(40, 60), 15, 20), (slice(60, 80), 0, 0)):
        assert lowest <= rewards[part].sum() <= highest
    sampled, given = sum(len(row.sampler_logp) for row in rows), 20 * (5 + 7 + 7)
    assert sums["response/length"] == [sampled, 80] and sums["response/prefix"] == [given, 60]
    assert sums["reward/prefixed"] == [rewards[20:].sum(), 60] and sums["reward"] == [rewards.sum(), 80]

    run.score(rows)
    with torch.no_grad():
        expected = [row_logprobs(run.policy.model, row) for row in rows]
    for row, (logp, entropy) in zip(rows, expected):
        torch.testing.assert_close(row.old_logp, logp, rtol=0, atol=1e-4)
        if row.prefix:
            torch.testing.assert_close(row.prefix_entropy, entropy[:row.prefix], rtol=0, atol=1e-4)
    total, count = run.record.own_sums["sampler_gap"]
    assert count == sampled and total < 1e-4 * sampled
    total, count = run.record.own_sums["entropy"]
    assert count == sampled
    assert total == pytest.approx(sum(float(h[row.prefix:].sum()) for row, (_, h) in zip(rows, expected)), rel=1e-3)
    total, count = run.record.own_sums["demonstrations/probability"]
    assert count == given
    assert total == pytest.approx(sum(float(logp[:row.prefix].exp().sum())
                                      for row, (logp, _) in zip(rows, expected)), rel=1e-3)

    rows[50].weights, rows[50].advantage = torch.rand(len(rows[50].response)), 1.0
    run.kept.keep(rows[50:51] + rows[:1], in_file=False)
    values = torch.load(io.BytesIO(saved(run.state["kept"])), weights_only=True)
    run.state["kept"] = [values[0], {name: values[1][name] for name in values[1].keys() - OF_PREFIXES}]
    batch = collate(run.kept.rows(), "cpu")
    assert batch.is_demo.shape == batch.weights.shape == batch.mask.shape
    assert batch.is_demo.int().sum(dim=1).tolist() == [7, 0] and batch.is_demo[0, :7].all()
    assert torch.equal(batch.weights[0, batch.mask[0]], rows[50].weights)
    assert torch.equal(batch.weights[1], batch.mask[1].float())

    demonstration = Row(problem, right + [run.codec.end], is_demo=True)
    run.score([demonstration])
    with torch.no_grad():
        logp, entropy = row_logprobs(run.policy.model, demonstration)
    torch.testing.assert_close(demonstration.old_logp, logp, rtol=0, atol=1e-4)
    torch.testing.assert_close(demonstration.prefix_entropy, entropy, rtol=0, atol=1e-4)


OF_PREFIXES = {"prefix", "prefix_entropy", "weights"}  # what rows in checkpoints from before prefixes have not


def saved(values) -> bytes:
    torch.save(values, file := io.BytesIO())
    return file.getvalue()


def test_experience_keeps_a_response_once_with_its_first_log_probs_until_its_problem_is_retired():
    one, two = [Problem(index, "", [1], "", "", "", {}) for index in (4, 9)]
    state, logged = {}, {}
    experience = Experience([one, two], state, logged.__setitem__)
    rows = [Row(one, response, old_logp=torch.tensor(logp)) for response, logp in (
        ([5, 9], [-1.0, -2.0]), ([60_000, 9], [-3.0, -4.0]), ([5, 9], [-5.0, -6.0]), ([5], [-7.0]))]
    experience.add({one: rows[:2], two: [Row(two, [7, 9], old_logp=torch.zeros(2))]})
    experience.add({one: rows[2:]})
    assert experience.right == {one: 2, two: 1} and experience.retired == []
    assert logged == {"experience/problems": 2, "experience/responses": 4}
    values = torch.load(io.BytesIO(saved(state)), weights_only=True)  # as a checkpoint does
    resumed = Experience([one, two], values, logged.__setitem__)
    for row, kept in zip([rows[0], rows[1], rows[3]], resumed.rows(one), strict=True):
        assert kept.problem is one and kept.is_demo and kept.response == row.response
        assert torch.equal(kept.old_logp, row.old_logp)
    resumed.rows(one)[0].response.append(3)  # these are copies
    assert resumed.rows(one)[0].response == [5, 9]
    for _ in range(2):
        resumed.retire([one])
        assert resumed.retired == [one] and resumed.right == {two: 1}
        assert logged["experience/retired"] == 1 and list(values["experience"]["responses"]) == [9]


@pytest.mark.parametrize("scaling", (1.0, 4.0))
def test_a_model_that_scales_its_logits_is_refused(make_run, coin_data, tmp_path, capsys, scaling):
    """Granite divides them after its head, of which token_logprobs knows nothing."""
    torch.manual_seed(0)
    tokenizer = toy.make_tokenizer()
    model = save_model(transformers.GraniteForCausalLM(transformers.GraniteConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=256, initializer_range=0.2,
        logits_scaling=scaling, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)), tmp_path / "granite")
    flags = ["grpo", "--model", model, "--data", coin_data, *SMALL]
    if scaling == 1:
        make_run(*flags)
        return
    with pytest.raises(SystemExit) as stop:
        make_run(*flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "scales logits" in error


# --------------------------------------------------------------------------------------------------- data
THOUGHT = "<think>\na=1\n</think>\n\\boxed{1}"
PLAIN_ROWS = [{"problem": f"a={i};a?", "answer": i, "demonstration": i and THOUGHT or None} for i in range(3)]


def openr1_row(question: str) -> dict:
    """A row with the columns of Elliott/Openr1-Math-46k-8192."""
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": question}]
    return {"data_source": "math", "prompt": messages,
            "target": [{"role": "assistant", "content": THOUGHT}], "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "1"}, "extra_info": {"index": 4}}


def write(path, rows) -> str:
    table = datasets.Dataset.from_list(rows)
    writers = {".csv": table.to_csv, ".parquet": table.to_parquet, ".jsonl": table.to_json,
               ".json": lambda name: path.write_text(json.dumps(rows))}
    writers[path.suffix](path)
    return str(path)


@pytest.fixture
def load_problems(make_run, tiny_model):
    """The problems of a file, as a run loads them."""
    def load_file(data: str, *flags: str) -> list:
        return sorted(make_run("luffy", "--model", tiny_model, "--data", data, *SMALL, *flags).train,
                      key=lambda problem: problem.index)
    return load_file


@pytest.mark.parametrize("kind", ("jsonl", "json", "csv", "parquet"))
def test_plain_columns_in_every_kind_of_file(load_problems, tmp_path, kind):
    problems = load_problems(write(tmp_path / f"rows.{kind}", PLAIN_ROWS))
    assert [problem.index for problem in problems] == [0, 1, 2]
    assert [problem.answer for problem in problems] == ["0", "1", "2"]
    assert [problem.demonstration for problem in problems] == ["", THOUGHT, ""]  # the last one's is wrong
    assert problems[2].text == "<|im_start|>user\na=2;a?<|im_end|>\n<|im_start|>assistant\n"
    assert toy.make_tokenizer().decode(problems[2].prompt) == problems[2].text


@pytest.mark.parametrize("kind", ("jsonl", "json", "parquet"))
def test_the_schema_of_the_real_data(load_problems, tmp_path, kind):
    problem = load_problems(write(tmp_path / f"rows.{kind}", [openr1_row("a?"), openr1_row("b?")]))[1]
    assert (problem.index, problem.answer, problem.demonstration, problem.part) == (1, "1", THOUGHT, "math")
    assert problem.text == "<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n"


def test_demonstrations_that_nobody_should_imitate_are_left_out(load_problems, tmp_path, capsys):
    boxes = ("\\boxed{2}", "\\boxed{\\frac{4}{2}}", "\\boxed{3}", "2", "\\boxed{\\frac{4}{")
    texts = [f"<think>\na=2\n</think>\n{box}" for box in boxes] + ["\\boxed{2}"]
    rows = [{"problem": f"a={i};a?", "answer": 2, "demonstration": text} for i, text in enumerate(texts)]
    problems = load_problems(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert [problem.demonstration for problem in problems] == [*texts[:2], *[""] * 4]
    output = capsys.readouterr().out
    assert "left out 3 of 6 demonstrations that box no answer after </think>" in output
    assert "left out 1 of 6 demonstrations whose answer is not the reference" in output


def test_rows_that_are_left_out_are_counted_and_named(load_problems, tmp_path, capsys):
    rows = PLAIN_ROWS + [{"problem": "a" * 200, "answer": 1}, {"problem": "b" * 200, "answer": 1},
                         {"problem": None, "answer": 1}, {"problem": "a?", "answer": None}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert [problem.index for problem in load_problems(data)] == [0, 1, 2]
    left_out = dict(re.findall(r"left out (\d) of 7 rows (.*)", capsys.readouterr().out))
    assert sorted(left_out) == ["1", "2"]
    assert "--max_prompt 40" in left_out["2"]  # and two other lines, each with a reason and a count of 1


def test_a_tokenizer_without_template_gets_the_plain_one(make_run, tiny_model, coin_data, tmp_path):
    model, tokenizer = load(tiny_model, torch.float32)
    tokenizer.chat_template = None
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    problem = make_run("grpo", "--model", str(tmp_path / "base"), "--data", coin_data, *SMALL,
                       "--max_prompt", "200").train[0]
    question = f"a={problem.index:02d};a?"
    assert problem.text == f"system: {SYSTEM}\n\nuser: {question}\n\nassistant: "
    assert "<think>" in SYSTEM and "</think>" in SYSTEM and r"\boxed{}" in SYSTEM


@pytest.mark.parametrize("opened", (False, True))
def test_a_demonstration_as_the_policy_would_write_it(make_run, tiny_model, tmp_path, opened):
    """With EOS, without the <think> that the prompt has already, and not at all if it is longer than L."""
    model, tokenizer = load(tiny_model, torch.float32)
    if opened:
        tokenizer.chat_template = toy.TEMPLATE.replace("assistant\n'", "assistant\n<think>\n'")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", PLAIN_ROWS)
    run = make_run("luffy", "--model", str(tmp_path / "model"), "--data", data, *SMALL)
    problem, = [problem for problem in run.train if problem.index == 1]
    row = run.demonstrations.of(problem)
    assert row.is_demo and row.response[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row.response[:-1]) == (THOUGHT.removeprefix("<think>\n") if opened else THOUGHT)
    assert (problem.text + tokenizer.decode(row.response)).count("<think>") == 1
    assert run.verify([row]).tolist() == [1.0]

    run.args.max_response = len(row.response)
    assert run.demonstrations.of(problem).response == row.response
    assert run.record.sums["demonstrations/left_out"][0] == 0
    run.args.max_response -= 1
    assert run.demonstrations.of(problem) is None
    assert run.record.sums["demonstrations/left_out"][0] == 1


def order(run, steps: int) -> list[int]:
    indices = []
    for run.step in range(1, steps + 1):
        indices += [problem.index for problem in run.next_problems()]
    return indices


def test_every_epoch_has_every_problem_once_in_the_seeds_order(make_run, tiny_model, tmp_path):
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, [{"problem": f"a={i};a?", "answer": str(i)} for i in range(7)])
    flags = ("--model", tiny_model, "--data", str(data), *SMALL, "--prompts", "3")
    run = make_run("grpo", *flags, "--name", "a")
    epochs = [order(run, 7)[start:start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert order(make_run("grpo", *flags, "--name", "b"), 7) == sum(epochs, [])
    assert order(make_run("grpo", *flags, "--name", "c", "--seed", "1"), 7) != sum(epochs, [])


def test_problems_that_are_done_with_are_passed_over(make_run, tiny_model, tmp_path):
    """The others come in the order in which they would have come."""
    data = write_jsonl(tmp_path / "rows.jsonl", [{"problem": f"a={i};a?", "answer": str(i)} for i in range(7)])
    flags = ("--model", tiny_model, "--data", data, *SMALL, "--prompts", "3")
    run = make_run("grpo", *flags, "--name", "a")
    whole = order(run, 14)
    done, indices = [problem for problem in run.train if problem.index in whole[:2]], []
    for run.step in range(2, 8):
        indices += [problem.index for problem in run.next_problems(without=done)]
        run.state = torch.load(io.BytesIO(saved(run.state)), weights_only=True)  # as if it were resumed
    assert indices == [index for index in whole[3:] if index not in whole[:2]][:18]
    run.step = 8
    passed = run.state["passed_over"]
    assert [problem.index for problem in run.next_problems(without=run.train)] == whole[21 + passed:24 + passed]


def test_held_out_problems_are_not_trained_on(make_run, tiny_model, coin_data, tmp_path, capsys):
    flags = ("--model", tiny_model, "--data", coin_data, *SMALL)
    run = make_run("grpo", *flags, "--name", "a")
    assert len(run.held_out) == 2  # a tenth
    assert sorted(problem.index for problem in run.train + run.held_out) == list(range(20))
    rows = [{"problem": f"a={i % 10};a?", "answer": "1", "response": str(i)} for i in range(40)]
    responses = write_jsonl(tmp_path / "responses.jsonl", rows)  # four to each problem
    run = make_run("topr", *flags[:2], "--data", responses, *SMALL, "--name", "c")
    assert len(run.held_out) == 1 and len(run.train) == 36
    assert run.held_out[0].text not in {problem.text for problem in run.train}
    rows = [{"problem": "a?", "answer": "1", "data_source": "mine"}]
    other = write_jsonl(tmp_path / "held_out.jsonl", rows)
    run = make_run("grpo", *flags, "--name", "b", "--eval_data", other)
    assert [problem.part for problem in run.held_out] == ["mine"]
    assert len(run.train) == 20
    assert "trained on too" not in capsys.readouterr().out
    make_run("grpo", *flags, "--name", "d", "--eval_data", f"{other},{coin_data}")
    assert "20 of the 21 held-out problems are trained on too" in capsys.readouterr().out
