"""Rollout with vLLM: its log-probs and greedy outputs are the trainer's, before and after the weights change.

One engine serves the tests of this process, since on a GPU there can be no second; runs are processes of their own.
Without a GPU they run on a CPU build of vLLM; the engine is in float32 on both. On a card, which the other tests do not
see: REQUIRE_VLLM=1 python -m pytest -n 0 -m "" tests/test_vllm.py
"""
import copy
import json
import os
import subprocess
import sys
import types
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import SMALL, read_jsonl, run_script, save_model, write_jsonl

from common import Row
from runtime import policy, sampling, toy
from runtime.flags import out_of_memory
from runtime.rows import collate

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")  # before the import that reads them
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # compiling vLLM's sampler takes longer than these tests
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # on a card attention would round float32 to 10 bits
if os.environ.get("REQUIRE_VLLM"):  # in CI these tests must not be skipped
    import vllm  # noqa: F401
else:
    pytest.importorskip("vllm", reason="vLLM cannot be imported; README.md says how to install it",
                        exc_type=ImportError)
    from vllm.platforms import current_platform
    if not current_platform.is_cpu():
        pytest.skip('vLLM needs the card, which is hidden from the other tests: REQUIRE_VLLM=1 python -m pytest -n 0 '
                    '-m "" tests/test_vllm.py', allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = 1e-3  # nats, for a single token, in float32
TOKENIZER = toy.make_tokenizer()
EOS, COMMA = TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids(",")
SHORT = [[3 + (5 * i + j * j) % 40 for j in range(8 + i)] for i in range(24)]
LONG = [[3 + (7 * i + j * j) % 40 for j in range(300 + i)] for i in range(4)]  # of more than two cache blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A random model with weights so large that most of its next tokens are certain: an error is seen in its text.

    Heads of 32, the smallest of vLLM's CPU kernels. Its generation_config names a second EOS, as Qwen's do.
    """
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(TOKENIZER), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=EOS, pad_token_id=TOKENIZER.pad_token_id, initializer_range=0.2)
    model = transformers.Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = [EOS, COMMA]
    return save_model(model, tmp_path_factory.mktemp("models") / "peaked")


@pytest.fixture(scope="module")
def engine(folder):
    """The sampler and the trainer's model, and the weights with which both begin."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    sampler = sampling.VLLMSampler(model, TOKENIZER, max_model_len=400, gpu_memory_utilization=0.3,
                                   on_cpu=DEVICE == "cpu", dtype="float32")
    model.logprobs = types.MethodType(policy.logprobs, model)
    return SimpleNamespace(sampler=sampler, model=model, weights=copy.deepcopy(model.state_dict()))


def hand_over(sampler, model):
    sampler.update((name, parameter.detach()) for name, parameter in model.named_parameters())


@pytest.fixture
def pair(engine):
    """(sampler, model), in step."""
    engine.model.load_state_dict(engine.weights)
    hand_over(engine.sampler, engine.model)
    return engine.sampler, engine.model


def change(model):
    """Another model, as far from the first as training would hardly take it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@torch.no_grad()
def gap(model, prompts, responses, temperature=1.0) -> float:
    """The largest difference of a token's log-prob between sampler and trainer, in nats."""
    rows = [Row(SimpleNamespace(prompt=prompt), *response) for prompt, response in zip(prompts, responses)]
    logp, _ = policy.logprobs(model.eval(), collate(rows, DEVICE), temperature)
    return max((expected[:len(row.response)].cpu() - torch.tensor(row.sampler_logp)).abs().max().item()
               for expected, row in zip(logp, rows))


def greedy(model, prompts, max_tokens) -> list[list[int]]:
    """What transformers generates without sampling."""
    responses = []
    for prompt in prompts:
        tokens = model.eval().generate(torch.tensor([prompt], device=DEVICE), max_new_tokens=max_tokens,
                                       do_sample=False, eos_token_id=EOS, pad_token_id=TOKENIZER.pad_token_id)
        responses.append(tokens[0, len(prompt):].tolist())
    return responses


def test_a_response_ends_with_the_tokenizers_eos_or_is_cut(pair):
    sampler, _ = pair
    responses = [tokens for tokens, _ in sampler.generate(SHORT * 4, 30, 1.0, seed=0)]
    ended = [tokens for tokens in responses if tokens[-1] == EOS]
    assert 0 < len(ended) < len(responses)
    assert all(EOS not in tokens[:-1] for tokens in responses)
    assert all(len(tokens) == 30 for tokens in responses if tokens not in ended)
    assert any(COMMA in tokens[:-1] for tokens in responses)  # the EOS that only generation_config.json names


def test_each_prompt_may_have_a_limit_of_its_own(pair):
    """As where prompts are followed by a response's first tokens."""
    sampler, _ = pair
    limits = [1, 7, 30, 15] * 6
    whole = [tokens for tokens, _ in sampler.generate(SHORT, 30, 0.0, seed=0)]
    responses = sampler.generate(SHORT, limits, 0.0, seed=0)
    assert [tokens for tokens, _ in responses] == [tokens[:limit] for tokens, limit in zip(whole, limits)]
    assert all(len(tokens) == len(logp) for tokens, logp in responses)


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_log_probs_are_the_trainers(pair, temperature):
    sampler, model = pair
    responses = sampler.generate(SHORT, 40, temperature, seed=1)
    assert gap(model, SHORT, responses, temperature) < CLOSE
    assert gap(model, SHORT, responses, temperature + 0.3) > 2 * CLOSE


def test_the_head_is_in_float32_as_the_trainers(pair):
    """The engine of these tests is in float32 anyway: what counts is that it was asked, and has understood."""
    config = pair[0].engine.llm_engine.model_config
    assert config.hf_config.head_dtype == "float32" and config.head_dtype == torch.float32


def test_log_probs_come_in_one_list_and_only_if_they_are_asked_for(pair, monkeypatch):
    sampler, outputs = pair[0], []
    generate = sampler.engine.generate

    def noted(*arguments, **options):
        results = generate(*arguments, **options)
        outputs.append([type(result.outputs[0].logprobs).__name__ for result in results])
        return results

    monkeypatch.setattr(sampler.engine, "generate", noted)
    asked, not_asked = [sampler.generate(SHORT, 20, 1.0, 0, None, logprobs) for logprobs in (True, False)]
    assert outputs == [["FlatLogprobs"] * len(SHORT), ["NoneType"] * len(SHORT)]
    assert all(len(tokens) == len(logp) for tokens, logp in asked)
    assert not_asked == [(tokens, None) for tokens, _ in asked]


def test_seeds_repeat_and_each_request_has_its_own(pair):
    sampler, _ = pair
    prompts = [SHORT[0]] * 8
    first, again, other = (sampler.generate(prompts, 40, 1.0, seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert len({tuple(tokens) for tokens, _ in first}) > 4
    assert [tokens for tokens, _ in sampler.generate(prompts[:3], 40, 1.0, 3)] == [tokens for tokens, _ in first[:3]]
    sampler.generate(prompts, 5, 1.0, seed=20_261_121 * 1_000_003)  # more than 64 bits with an index


def test_greedy_outputs_follow_a_hand_over(pair):
    sampler, model = pair
    before = greedy(model, SHORT, 30)
    assert [tokens for tokens, _ in sampler.generate(SHORT, 30, 0.0, seed=0)] == before
    change(model)
    after = greedy(model, SHORT, 30)
    assert sum(old != new for old, new in zip(before, after)) > len(SHORT) / 2
    assert [tokens for tokens, _ in sampler.generate(SHORT, 30, 0.0, seed=0)] == before  # the engine's are its own
    hand_over(sampler, model)
    hand_over(sampler, model)  # twice without a response between
    assert [tokens for tokens, _ in sampler.generate(SHORT, 30, 0.0, seed=0)] == after


def test_a_prompt_of_several_cache_blocks_is_read_anew_after_a_hand_over(pair):
    sampler, model = pair
    assert gap(model, LONG, sampler.generate(LONG, 20, 1.0, seed=0)) < CLOSE
    change(model)
    hand_over(sampler, model)
    assert gap(model, LONG, sampler.generate(LONG, 20, 1.0, seed=0)) < CLOSE


@pytest.mark.parametrize("broken", ("collective_rpc", "the packed head"))
def test_a_stale_engine_is_seen(pair, broken, folder, tmp_path, make_run, monkeypatch):
    if broken == "the packed head" and DEVICE == "cuda":
        pytest.skip("only a CPU's kernels pack it")
    data = write_jsonl(tmp_path / "data.jsonl", [{"problem": f"a={i:02d};a?", "answer": f"{i}"} for i in range(20)])
    run = make_run("grpo", "--model", folder, "--data", data, "--rollout", "transformers", "--device", "cpu", *SMALL)
    run.sampler.engine, run.policy.model = pair
    run.policy.device = torch.device(DEVICE)
    assert run.sampler.hand_over(1, run.train[0]) == ""
    if broken == "collective_rpc":  # of the weights that were compared one differs
        monkeypatch.setattr(run.sampler.engine.engine, broken, lambda *args, **kwargs: None)
        said = "norm.weight is not the trainer's"
    else:  # the packed copy of the head, which is no parameter
        monkeypatch.setattr(run.sampler.engine, "on_cpu", False)
        said = "nats a token from the trainer's"
    change(run.policy.model)
    stale = run.sampler.hand_over(2, run.train[0])
    assert stale.startswith("the sampler is stale") and said in stale


@pytest.mark.parametrize("ending", sampling.UNFUSED)
def test_one_bit_of_a_weight_that_did_not_arrive_is_seen(pair, ending):
    sampler, model = pair
    name, weight = [(name, weight) for name, weight in model.named_parameters() if name.endswith(ending)][-1]
    if DEVICE == "cpu" and weight.ndim == 2:
        pytest.skip("a CPU's kernels have packed it")
    assert sampler.differing({name: weight}) == []
    with torch.no_grad():
        weight[-1] *= 1.01
    assert sampler.differing({name: weight}) == [name]


def test_what_vllm_says_of_too_little_memory_is_understood():
    """Of the version that is installed: no room for the cache, not enough of it, and a card that others use."""
    from vllm.v1.core.kv_cache_utils import _check_enough_kv_cache_memory
    from vllm.v1.worker.utils import request_memory
    snapshot = SimpleNamespace(free_memory=10 << 30, total_memory=24 << 30, device_="cuda:0")
    cache = SimpleNamespace(gpu_memory_utilization=0.8)
    for call, advice in (
            (lambda: _check_enough_kv_cache_memory(0, lambda: 1, 400, lambda _: 0), "raise --gpu_memory_utilization"),
            (lambda: _check_enough_kv_cache_memory(1, lambda: 2, 400, lambda _: 9), "raise --gpu_memory_utilization"),
            (lambda: request_memory(snapshot, cache), "lower --gpu_memory_utilization")):
        with pytest.raises(ValueError) as raised:
            call()
        assert advice in out_of_memory(raised.value)


# ------------------------------------------------------------------------------------------------ whole runs
@pytest.fixture(scope="module")
def luffy(folder, tmp_path_factory):
    """Runs luffy.py with vLLM and returns the run's folder."""
    place = tmp_path_factory.mktemp("luffy")
    rows = [{"problem": f"a={i:02d};a?", "answer": f"{i}", "demonstration": toy.answered(f"a={i:02d}\n", i)}
            for i in range(20)]
    data = write_jsonl(place / "data.jsonl", rows)

    def start(name, *flags, processes=1):
        result = run_script("luffy.py", "--model", folder, "--data", data, *SMALL, "--rollout", "vllm", "--name", name,
                            "--gpu_memory_utilization", "0.3", *flags, cwd=place, processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
        return place / "runs" / name

    return start


@pytest.fixture(scope="module")
def two_steps(luffy):
    return luffy("two_steps")


def without_seconds(folder) -> list[dict]:
    return [{name: value for name, value in line.items() if not name.startswith("seconds/")}
            for line in read_jsonl(folder / "metrics.jsonl")]


def test_two_steps_of_luffy_stay_in_step_with_the_trainer(two_steps):
    gaps = [line["sampler_gap"] for line in read_jsonl(two_steps / "metrics.jsonl") if "sampler_gap" in line]
    assert len(gaps) == 2 and max(gaps) < sampling.STALE[DEVICE]


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="each process needs a card of its own")
def test_two_processes_have_an_engine_each_and_sample_what_one_does(two_steps, luffy):
    """The weights reach both engines, whole; a row's seed goes by its number in the batch of both."""
    shared = luffy("shared", processes=2)
    gaps = [line["sampler_gap"] for line in read_jsonl(shared / "metrics.jsonl") if "sampler_gap" in line]
    assert len(gaps) == 2 and max(gaps) < sampling.STALE[DEVICE]
    if DEVICE == "cpu":
        for name in ("samples.jsonl", "answers.jsonl"):
            assert (shared / name).read_text() == (two_steps / name).read_text()


def test_the_engine_has_the_positions_of_the_flags(luffy):
    """A stale engine would end the run; one with the model's own 512 positions would refuse the evaluation."""
    folder = luffy("rope", "--steps", "1", "--rope_theta", "400", "--max_positions", "600", "--eval_response", "540")
    gaps = [line["sampler_gap"] for line in read_jsonl(folder / "metrics.jsonl") if "sampler_gap" in line]
    assert len(gaps) == 1 and gaps[0] < sampling.STALE[DEVICE]


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels of a GPU need not repeat to the bit")
def test_a_resumed_run_samples_what_an_uninterrupted_one_does(two_steps, luffy):
    luffy("resumed", "--steps", "1")
    resumed = luffy("resumed", "--steps", "2", "--resume")
    assert read_jsonl(resumed / "samples.jsonl") == read_jsonl(two_steps / "samples.jsonl")
    assert without_seconds(resumed)[-1] == without_seconds(two_steps)[-1]


PLAIN = """
import json, sys
import vllm
folder, options, texts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
engine = vllm.LLM(folder, enforce_eager=True, max_model_len=400, gpu_memory_utilization=0.3, **options)
outputs = engine.generate(texts, vllm.SamplingParams(temperature=0, max_tokens=30))
print(json.dumps([output.outputs[0].token_ids for output in outputs]))
"""


def test_the_folder_that_a_run_wrote_gives_the_same_tokens_in_plain_vllm_and_in_transformers(two_steps):
    folder = str(two_steps / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": f"a={i:02d};a?"}], tokenize=False,
                                           add_generation_prompt=True) for i in range(12)]
    expected = []
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt").to(DEVICE)
        output = model.generate(**tokens, max_new_tokens=30, do_sample=False)
        expected.append(output[0, tokens["input_ids"].shape[1]:].tolist())
    options = {"dtype": "float32"} | ({"kv_cache_memory_bytes": 1 << 28} if DEVICE == "cpu" else {})
    result = subprocess.run([sys.executable, "-c", PLAIN, folder, json.dumps(options), json.dumps(texts)],
                            text=True, capture_output=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == expected
    assert len(set(map(tuple, expected))) > 1
