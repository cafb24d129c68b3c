"""Models and tokenizers of many families: what ends a response, the seam of prompt and response, dropout, two steps."""
import json

import pytest
import torch
import transformers
from conftest import SMALL, load, read_jsonl, save_model, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from common import Row
from runtime import toy
from runtime.rows import Codec, Problem, collate

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
GEMMA = ("{{ '<s>' }}{% for m in messages %}"
         "{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")  # noqa: E501
PLAIN = ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
QUESTIONS = "{{ '<s>' }}{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
REFUSES = "{{ raise_exception('only one turn') }}"
WORDS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>")
PAD, BOS, EOS, START, IM_END, _, TURN_END = range(len(WORDS))


def byte_tokenizer(template: str = CHATML, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A token per byte, as in GPT-2's alphabet, and two that reach over a seam: of line breaks, and of a space."""
    vocabulary = [*WORDS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "Ġy"]
    tokenizer = Tokenizer(models.BPE(vocab={word: id for id, word in enumerate(vocabulary)},
                                     merges=[("Ċ", "Ċ"), ("Ġ", "y")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template,
        additional_special_tokens=[word for word in WORDS[3:]])


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece: a text that begins with a letter gets a space, '▁', before it."""
    words = ["<unk>", "<s>", "</s>", "▁", "\n", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(models.BPE(vocab={word: id for id, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=(
        "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"))


def problem(codec: Codec, text: str, demonstration: str = "") -> Problem:
    return Problem(0, text, codec.tokens(text), "2", demonstration, "", {})


# ------------------------------------------------------------------------------------- what ends a response
def configured(ids):
    return transformers.GenerationConfig(eos_token_id=ids)


@pytest.mark.parametrize("template, ids, ends", (
    (CHATML, None, [IM_END, EOS]),                # the template closes turns with another token than EOS
    (GEMMA, [BOS, TURN_END], [TURN_END, EOS, BOS]),  # a list, as Gemma's and Llama 3's
    (PLAIN, None, [EOS]),                         # two line breaks end a turn: no special token
    (PLAIN, TURN_END, [EOS, TURN_END]),
    (REFUSES, None, [EOS]),
    (QUESTIONS, None, [EOS]),                           # renders no answer: what it renders ends none
), ids=("template", "list", "plain", "one more", "refuses", "questions"))
def test_what_ends_a_response(template, ids, ends):
    codec = Codec(byte_tokenizer(template), configured(ids))
    assert (codec.ends, codec.end) == (ends, ends[0])
    one = problem(codec, "?")
    for end in ends:
        row = Row(one, codec.tokens("yes") + [end])
        assert codec.ended(row) and codec.text(row) == "yes"
    assert not codec.ended(Row(one, codec.tokens("yes")))
    assert codec.encode(one, "yes") == [*codec.tokens("yes"), ends[0]]


def test_an_end_that_the_embedding_has_not_is_none():
    """Nobody can sample it, and a demonstration must not end with it."""
    assert Codec(byte_tokenizer(CHATML), configured([TURN_END]), IM_END).ends == [EOS]


def test_a_model_without_any_eos_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        Codec(byte_tokenizer(PLAIN), size=EOS)
    assert end.value.code == 2
    assert "no response could end" in capsys.readouterr().err


def test_every_eos_ends_a_response_and_the_saved_model_stops_there(make_run, tiny_model, coin_data, tmp_path):
    model, tokenizer = load(tiny_model, torch.float32)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(",")]
    model.generation_config.update(eos_token_id=ends[::-1], do_sample=True, temperature=0.5, top_k=3)
    run = make_run("grpo", "--model", save_model(model, tmp_path / "model"), "--data", coin_data, *SMALL)
    rows = run.rollout(run.train[:8] * 8)
    last = [row.response[-1] for row in rows]
    assert set(ends) < set(last)  # each of the two ended some, and others were cut
    assert not any(set(row.response[:-1]) & set(ends) for row in rows)
    assert all(len(row.response) == 40 for row in rows if row.response[-1] not in ends)
    assert run.record.sums["response/cut"][0] == sum(id not in ends for id in last)

    run.record.write_metrics(0, {})
    run.end()
    saved = json.loads((run.record.folder / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == ends
    assert not {"temperature", "top_k"} & saved.keys()
    model, _ = load(str(run.record.folder / "model"), torch.float32)
    torch.manual_seed(0)
    for response in generate(model, run.train[0].prompt, 30):
        ended = [id for id in response if id in ends]
        assert len(ended) <= 1
        assert not ended or set(response[response.index(ended[0]) + 1:]) <= {tokenizer.pad_token_id}


def generate(model, prompt: list[int], tokens: int) -> list[list[int]]:
    """Eight responses as a user of model/ gets them, by its own generation_config."""
    output = model.generate(torch.tensor([prompt] * 8), do_sample=True, max_new_tokens=tokens)
    return output[:, len(prompt):].tolist()


def test_a_right_answer_counts_whichever_eos_ends_it(make_run, tiny_model, coin_data, tmp_path):
    model, tokenizer = load(tiny_model, torch.float32)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(",")]
    model.generation_config.update(eos_token_id=ends)
    run = make_run("grpo", "--model", save_model(model, tmp_path / "model"), "--data", coin_data, *SMALL)
    one = run.train[0]
    text = tokenizer(f"</think>\\boxed{{{one.answer}}}")["input_ids"]
    assert run.verify([Row(one, [*text, id]) for id in (*ends, tokenizer.convert_tokens_to_ids(";"))]).tolist() == \
        [1.0, 1.0, 0.0]


# ------------------------------------------------------------------------------ the seam of prompt and response
THOUGHT = "add\n</think>\n\\boxed{2}"


@pytest.mark.parametrize("prompt", ("?<think>\n", "?<think>\r\n\n", "?<think> "))
@pytest.mark.parametrize("start", ("<think>\n", "<think>", "\n<think>\n", "<think>\r\n", " <think>\n\n"))
def test_one_think_at_the_seam_whatever_the_white_space(prompt, start):
    codec = Codec(byte_tokenizer())
    one = problem(codec, prompt)
    response = codec.encode(one, start + THOUGHT)
    assert codec.tokenizer.decode(one.prompt + response) == prompt + THOUGHT + "<|im_end|>"


@pytest.mark.parametrize("prompt, response, expected", (
    ("?<think>", "<think>\nadd", "\nadd"),   # no line break in the prompt: the response keeps its own
    ("?<think>\n", "\nadd", "\nadd"),        # nothing is repeated
    ("?", "<think>\nadd", "<think>\nadd"),
    ("?<think>\n", "<think>\n<think>add", "<think>add")))
def test_what_the_prompt_does_not_have_stays_in_the_response(prompt, response, expected):
    codec = Codec(byte_tokenizer())
    ids = codec.encode(problem(codec, prompt), response)
    assert codec.tokenizer.decode(ids[:-1]) == expected


@pytest.mark.parametrize("opening", ("", "<think>", "<think>\n", "<think>\n\n"))
def test_the_template_and_prompt_end_open_one_think(opening, make_run, tiny_model, tmp_path):
    model, tokenizer = load(tiny_model, torch.float32)
    model.save_pretrained(tmp_path / "model")
    tokenizer.chat_template = toy.TEMPLATE.replace("assistant\n'", f"assistant\n{opening}'".replace("\n", "\\n"))
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "a?", "answer": "1"}])
    run = make_run("grpo", "--model", str(tmp_path / "model"), "--data", data, *SMALL, "--prompt_end", "<think>\n")
    assert run.train[0].text.endswith("assistant\n<think>\n")
    assert run.train[0].text.count("<think>") == 1


@pytest.mark.parametrize("behind", ("", "<|im_end|>", "<|im_end|>\n", "</s>", "<|im_end|>\n<|im_start|>user\nand?"))
def test_a_demonstration_has_one_eos_which_is_last(behind):
    codec = Codec(byte_tokenizer(), configured(None))
    one = problem(codec, "?<think>\n")
    for response in (THOUGHT + behind, codec.until_end(THOUGHT + behind)):
        ids = codec.encode(one, response)
        assert ids == [*codec.tokens(THOUGHT), IM_END]
    assert codec.until_end(THOUGHT + behind) == THOUGHT


@pytest.mark.parametrize("template, adds_bos, expected", (
    (CHATML, True, 1), (CHATML, False, 0), (GEMMA, True, 1), (GEMMA, False, 1)))
def test_bos_is_in_the_prompt_once_if_the_tokenizer_or_the_template_has_it(make_run, tmp_path, template, adds_bos,
                                                                           expected):
    tokenizer = byte_tokenizer(template, adds_bos)
    build("llama", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "a?", "answer": "1"}])
    run = make_run("grpo", "--model", str(tmp_path / "model"), "--data", data, *SMALL, "--max_prompt", "200",
                   "--system", "s")
    prompt = run.train[0].prompt
    assert prompt.count(BOS) == expected and (prompt[0] == BOS) == bool(expected)
    assert tokenizer.decode(prompt) == run.train[0].text


def test_a_demonstration_has_the_tokens_that_follow_the_prompt():
    """SentencePiece puts a space before a text: not before a response, which goes on from the prompt."""
    codec = Codec(metaspace_tokenizer())
    one = problem(codec, "<s>[INST] 1+1? [/INST]<think>\n")
    assert codec.tokenizer.tokenize("yes")[0] == "▁"
    assert codec.tokenizer.convert_ids_to_tokens(codec.encode(one, "yes")) == ["y", "e", "s", "</s>"]


@pytest.mark.parametrize("text, response, tokens", (
    ("?\n", "\nyes", ["Ċ", "y", "e", "s"]),       # 'ĊĊ' would reach over the seam
    ("assistant: ", "yes", ["y", "e", "s"]),      # and so would 'Ġy'
    ("?\n", "\n\n\nyes", ["ĊĊ", "Ċ", "y", "e", "s"])))
def test_a_token_that_would_reach_over_the_seam_is_cut_there(text, response, tokens):
    codec = Codec(byte_tokenizer())
    one = problem(codec, text)
    ids = codec.encode(one, response)
    assert codec.tokenizer.convert_ids_to_tokens(ids[:-1]) == tokens
    assert codec.tokenizer.decode(one.prompt + ids[:-1]) == text + response


# ---------------------------------------------------------------------------------------------- architectures
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
LLAMA_LIKE = SIZES | {"num_key_value_heads": 2, "intermediate_size": 64, "initializer_range": 0.2}
SLIDING = LLAMA_LIKE | {"head_dim": 8, "sliding_window": 24,
                        "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 8}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA_LIKE),
    "llama with dropout": lambda: transformers.LlamaConfig(**LLAMA_LIKE, attention_dropout=0.1),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256),  # dropout 0.1
    "opt": lambda: transformers.OPTConfig(                                                     # and here
        **SIZES, ffn_dim=64, word_embed_proj_dim=32, init_std=0.2, layerdrop=0.1),
    "starcoder2": lambda: transformers.Starcoder2Config(
        **LLAMA_LIKE, attention_dropout=0.1, residual_dropout=0.1, embedding_dropout=0.1),
    "phi3": lambda: transformers.Phi3Config(**LLAMA_LIKE, resid_pdrop=0.1, attention_dropout=0.1),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SLIDING),
    "gpt-oss": lambda: transformers.GptOssConfig(**SLIDING, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**LLAMA_LIKE, **EXPERTS, num_experts=4, moe_intermediate_size=32),
    "mixtral": lambda: transformers.MixtralConfig(
        **LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.1),
    "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
}


def build(architecture: str, tokenizer):
    """A random model of the architecture for the tokenizer."""
    config = CONFIGS[architecture]()
    config.vocab_size = len(tokenizer)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.bos_token_id = None
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture
def saved(tmp_path):
    """Folder of a random model of an architecture with the toy's tokenizer."""
    def make(architecture: str) -> str:
        return save_model(build(architecture, toy.make_tokenizer()), tmp_path / "model")
    return make


@pytest.mark.parametrize("architecture", ("gpt2", "opt", "starcoder2", "phi3", "llama with dropout", "mixtral"))
def test_every_dropout_is_off(architecture, saved, make_run, coin_data):
    """Also the functional ones of which only the config knows."""
    folder = saved(architecture)
    raw = transformers.AutoModelForCausalLM.from_pretrained(folder).train()
    run = make_run("grpo", "--model", folder, "--data", coin_data, *SMALL)
    rows = run.rollout(run.train[:4])
    run.score(rows)
    batch = collate(rows, "cpu")
    raw_logits = [raw(input_ids=batch.tokens).logits for _ in range(2)]
    assert not torch.equal(*raw_logits)  # there was something to switch off
    logp, _ = run.logprobs(batch)
    assert run.policy.model.training
    torch.testing.assert_close(logp, batch.old_logp, rtol=0, atol=1e-5)


def test_a_ratio_that_is_not_1_before_any_update_ends_the_run(command_line, coin_model, coin_data, monkeypatch, capsys):
    """Dropout written into a model, which no config can switch off."""
    script = command_line("grpo", "--model", coin_model, "--data", coin_data, *SMALL)
    forward = transformers.models.qwen2.modeling_qwen2.Qwen2MLP.forward

    def noisy(self, x):
        return torch.nn.functional.dropout(forward(self, x), 0.1, self.training)

    monkeypatch.setattr(transformers.models.qwen2.modeling_qwen2.Qwen2MLP, "forward", noisy)
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and "before any update" in errors[0]


@pytest.mark.parametrize("architecture", ("llama", "opt", "phi3", "gemma3", "gpt-oss", "qwen3-moe", "bloom"))
def test_two_steps_of_many_architectures(architecture, saved, command_line, coin_data, tmp_path):
    tokenizer = toy.make_tokenizer()
    parity = ("--reward", f"{tmp_path}/reward.py:parity")  # in which random responses differ
    (tmp_path / "reward.py").write_text("def parity(row, response):\n    return response.count('a') % 2\n")
    command_line("grpo", "--model", saved(architecture), "--data", coin_data, *SMALL, "--updates", "1",
                 "--name", "x", *parity).main()
    lines = read_jsonl(tmp_path / "runs" / "x" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert line["sampler_gap"] < 1e-4
        assert abs(line["kl/old_policy"]) < 1e-5 and line["clip_fraction"] == 0  # one update: the ratio is 1
        assert line["gradient_norm"] > 0
    before, _ = load(str(tmp_path / "model"), torch.float32)
    model, _ = load(str(tmp_path / "runs" / "x" / "model"), torch.float32)
    assert not any(torch.equal(*pair) for pair in zip(before.lm_head.parameters(), model.lm_head.parameters()))
    responses = generate(model, tokenizer("a=1;a?")["input_ids"], 100)
    assert any(tokenizer.eos_token_id in response for response in responses)
    for response in responses:  # it stops at the EOS
        behind = response[response.index(tokenizer.eos_token_id) + 1:] if tokenizer.eos_token_id in response else []
        assert set(behind) <= {tokenizer.pad_token_id}


@pytest.fixture
def composite(tmp_path) -> str:
    """Folder of a random Gemma 3 that reads images too: the sizes stand in its config's text_config."""
    tokenizer = toy.make_tokenizer()
    text = dict(SLIDING, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=3,
        eos_token_id=tokenizer.eos_token_id))
    return save_model(model, tmp_path / "composite")


def test_a_composite_model_is_trained_on_text(composite, command_line, coin_data, tmp_path):
    (tmp_path / "reward.py").write_text("def parity(row, response):\n    return response.count('a') % 2\n")
    command_line("grpo", "--model", composite, "--data", coin_data, *SMALL, "--updates", "1", "--name", "x",
                 "--reward", "reward.py:parity", "--max_positions", "200", "--entropy_bonus", "0.1").main()
    lines = read_jsonl(tmp_path / "runs" / "x" / "metrics.jsonl")
    assert all(line["sampler_gap"] < 1e-4 and line["gradient_norm"] > 0 for line in lines[1:])
    model, _ = load(str(tmp_path / "runs" / "x" / "model"), torch.float32)
    assert model.config.text_config.max_position_embeddings == 200


@pytest.mark.parametrize("flags, named", (
    (["--max_positions", "100"], "--max_positions"), (["--rope_theta", "100"], "--rope_theta")))
def test_a_model_without_positions_has_none_to_change(flags, named, saved, make_run, coin_data, capsys):
    """ALiBi: any length fits, and there is nothing to stretch."""
    data = ["grpo", "--model", saved("bloom"), "--data", coin_data, *SMALL]
    make_run(*data, "--max_prompt", "10000")
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        make_run(*data, *flags)
    assert end.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert named in line and "has no such setting" in line


@pytest.mark.parametrize("question, named", (("a?", None), ("<new>?", "<new>")))
def test_a_token_that_the_embedding_has_not(question, named, make_run, tiny_model, tmp_path, capsys):
    """A padding token that was added without resizing harms nobody; one in a prompt is one line."""
    model, tokenizer = load(tiny_model, torch.float32)
    model.save_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"problem": text, "answer": "1"} for text in (question, "b+a?")])
    flags = ["grpo", "--model", str(tmp_path / "model"), "--data", data, *SMALL]
    if named is None:
        run = make_run(*flags)
        assert run.policy.tokenizer.pad_token_id == tokenizer.eos_token_id
        assert run.rollout(run.train * 4)  # of different lengths: there is padding
        return
    with pytest.raises(SystemExit) as end:
        make_run(*flags)
    assert end.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert named in line and "embedding" in line


# -------------------------------------------------------------------------------------- sampling and the update
def test_evaluation_at_temperature_0_takes_the_likeliest_token(make_run, tiny_model, coin_data):
    run = make_run("grpo", "--model", tiny_model, "--data", coin_data, *SMALL, "--eval_temperature", "0")
    run.evaluate()
    answers = read_jsonl(run.record.folder / "answers.jsonl")
    run.args.seed = 5
    run.evaluate()
    assert read_jsonl(run.record.folder / "answers.jsonl") == answers * 2  # whatever the seed
    for problem in run.held_out:
        row, = run.sampler.rows([problem], 20, 0.0, 0)
        logits = run.policy.model(input_ids=torch.tensor([problem.prompt + row.response])).logits[0]
        assert logits[len(problem.prompt) - 1:-1].argmax(dim=-1).tolist() == row.response


@pytest.mark.parametrize("bonus", (0.0, 0.1))
def test_masked_responses_have_no_gradient_and_count_in_their_group(make_run, tiny_model, coin_data, bonus):
    run = make_run("grpo", "--model", tiny_model, "--data", coin_data, *SMALL, "--mask_cut")
    eos = run.policy.tokenizer.eos_token_id
    rows = [Row(run.train[0], response, advantage=0.5) for response in ([4, eos], [4, 5], [6, eos], [6, 7, 8])]
    batches = list(run.micro_batches(rows, bonus))
    assert [batch.tokens[0, -2:].tolist() for batch in batches] == [[4, eos]]  # and the other in the same batch
    assert sum(len(batch.tokens) for batch in batches) == 2
    assert run.record.sums["response/masked"] == [2, 0]
    run.args.mask_cut = False
    assert sum(len(batch.tokens) for batch in run.micro_batches(rows, bonus)) == 4


@pytest.mark.parametrize("flags", ([], ["--mask_cut"]))
def test_a_step_of_which_all_responses_are_cut(flags, command_line, coin_model, coin_data, tmp_path):
    (tmp_path / "reward.py").write_text("seen = []\n\n\ndef alternating(row, response):\n"
                                        "    seen.append(response)\n    return len(seen) % 2\n")
    command_line("grpo", "--model", coin_model, "--data", coin_data, *SMALL, "--max_response", "2", "--name", "x",
                 "--entropy_bonus", "0.1", "--reward", "reward.py:alternating", *flags).main()
    line = read_jsonl(tmp_path / "runs" / "x" / "metrics.jsonl")[1]
    assert line["response/cut"] == 1 and 0 < line["reward"] < 1
    assert (line["gradient_norm"] == 0) == bool(flags)
    assert line.get("response/masked") == (16 if flags else None)
