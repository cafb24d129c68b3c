"""The embedded default: its tokenizer, its problems and demonstrations, and the cache of its base model."""
import random
import re
import sys
from collections import Counter
from dataclasses import fields

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
from runtime import sampling, toy, verification

sys.path.append(str(ROOT / "bench"))
import curves  # noqa: E402

TRAIN, HELD_OUT = toy.make_rows()
ROWS = TRAIN + HELD_OUT


def question(row: dict) -> str:
    return row["prompt"][0]["content"]


def demonstration(row: dict) -> str:
    return row["target"][0]["content"]


def evaluate(value: int, steps: str) -> int:
    """`-3*3` from a value, one operation after the other (not by precedence), modulo 100."""
    for operator, operand in re.findall(r"([-+*])(\d)", steps):
        number = int(operand)
        value = {"+": value + number, "-": value - number, "*": value * number}[operator] % 100
    return value


def values(row: dict) -> list[int]:
    """The values of a question's names, in their order."""
    assignments, asked = question(row).removesuffix("?").split(";")
    known = {}
    for number, assignment in enumerate(assignments.split(",")):
        name, expression = assignment.split("=")
        assert name == toy.LETTERS[number]
        known[name] = evaluate(known[expression[0]], expression[1:]) if number else int(expression)
    assert asked == name
    return list(known.values())


# ---------------------------------------------------------------------------------------------- tokenizer
def test_tokenizer_loses_nothing():
    tokenizer = toy.make_tokenizer()
    for row in ROWS:
        conversation = row["prompt"] + row["target"]
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        assert text == (f"<|im_start|>user\n{question(row)}<|im_end|>\n"
                        f"<|im_start|>assistant\n{demonstration(row)}<|im_end|>\n")
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize(r"<think>=</think>\boxed{07}<|im_end|>") == [
        "<think>", "=", "</think>", r"\boxed{", "0", "7", "}", "<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"


def test_a_prompt_is_the_beginning_of_its_conversation():
    """Token by token, so that what is learnt from demonstrations is asked for in a rollout."""
    tokenizer = toy.make_tokenizer()
    for row in ROWS[::50]:
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["target"], tokenize=False)
        ids = tokenizer(prompt)["input_ids"]
        assert tokenizer(whole)["input_ids"][:len(ids)] == ids
        assert tokenizer(whole.removeprefix(prompt))["input_ids"] == tokenizer(whole)["input_ids"][len(ids):]


def test_tokenizer_reloads_as_itself(tmp_path):
    tokenizer = toy.make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [tokenizer.apply_chat_template(row["prompt"] + row["target"], tokenize=False)
             for row in ROWS[::50]]
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(loaded) == len(tokenizer)


# ---------------------------------------------------------------------------------------------- problems
def test_answers_are_right():
    for row in ROWS:
        assert row["reward_model"]["ground_truth"] == f"{values(row)[-1]:02d}"


def test_no_answer_comes_early():
    """A model that stops at an earlier value must not be right by luck."""
    for row in ROWS:
        assert values(row)[-1] not in values(row)[:-1]


def test_operands():
    for row in ROWS:
        for operator, operand in re.findall(r"[a-z]([-+*])(\d)", question(row)):
            assert operand in ("379" if operator == "*" else "123456789")


def test_lengths_of_the_slices():
    def lengths(rows, name):
        return {len(values(row)) - 1 for row in rows if row["data_source"] == name}

    assert [lengths(TRAIN, name) for name in ("easy", "hard", "ood")] == [{1}, {4, 5}, set()]
    assert [lengths(HELD_OUT, name) for name in ("easy", "hard", "ood")] == [{1}, {4, 5}, {6, 7}]
    assert Counter(row["data_source"] for row in TRAIN)["easy"] == len(TRAIN) / 2
    # accuracies on that many are known to about 0.05
    assert min(Counter(row["data_source"] for row in HELD_OUT).values()) >= 100


def test_held_out_problems_are_not_in_training_and_none_comes_twice():
    assert len({question(row) for row in ROWS}) == len(ROWS)


def test_the_same_rows_every_time():
    assert toy.make_rows() == (TRAIN, HELD_OUT)


def test_the_second_teacher_has_the_other_kind_of_working():
    for row in TRAIN + HELD_OUT:
        steps = len(values(row)) - 1
        said = [message["content"] for message in row["target_lst"]]
        assert row["target_lst"][:1] == row["target"] and len(set(said)) == len(said) == min(steps, 2)
        lines = [text.partition("</think>")[0].count("\n") - 1 for text in said]
        assert sorted(lines) == ([steps, steps + 1] if steps > 1 else [steps + 1])
        assert all(text.endswith(f"\\boxed{{{values(row)[-1]:02d}}}") for text in said)


# ---------------------------------------------------------------------------------------- demonstrations
def test_demonstrations_are_right_line_by_line():
    """Each line copies an assignment, or a terse one two of them, and gives its value."""
    for row in ROWS:
        known = values(row)
        given, *lines = demonstration(row).removeprefix("<think>\n").partition("</think>")[0].splitlines()
        assert given == f"a={known[0]:02d}"
        at, copied = 0, question(row).partition(",")[2].partition(";")[0]
        steps = re.findall(r"[a-z]=[a-z]([-+*]\d)", copied)
        sizes = []
        for line in lines:
            name, before, done, value = re.fullmatch(r"([a-z])=([a-z])((?:[-+*]\d)+)=(\d\d)", line).groups()
            size = len(done) // 2
            assert before == toy.LETTERS[at]
            assert done == "".join(steps[at:at + size])
            at += size
            assert name == toy.LETTERS[at]
            assert int(value) == known[at]
            sizes.append(size)
        assert at == len(steps)
        assert sorted(sizes) in ([1] * at, [1] * (at - 2) + [2])  # at most one leap
        assert demonstration(row).endswith(f"</think>\n\\boxed{{{known[-1]:02d}}}")


def test_demonstrations_verify(verifier):
    golds = [row["reward_model"]["ground_truth"] for row in ROWS[::10]]
    verdicts = verifier(golds, [demonstration(row) for row in ROWS[::10]])
    assert set(verdicts) == {verification.RIGHT}


def test_share_of_terse_demonstrations():
    long = [row for row in ROWS if row["data_source"] != "easy"]
    terse = [row for row in long if demonstration(row).count("\n") < len(values(row)) + 2]
    assert len(terse) / len(long) == pytest.approx(toy.TERSE, abs=0.05)  # four standard deviations
    leaps = {name for row in terse for name in re.findall(r"\n(\w)=\w[-+*]\d[-+*]\d", demonstration(row))}
    assert leaps == set("cdefgh")  # anywhere in the working


def test_everything_fits_the_toys_lengths():
    limit = {field.name: field.metadata["toy"] for field in fields(common.Args)}
    tokenizer = toy.make_tokenizer()
    for row in ROWS:
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        assert len(tokenizer(prompt)["input_ids"]) <= limit["max_prompt"]
        if row in TRAIN[::20]:
            assert len(tokenizer(demonstration(row))["input_ids"]) + 1 <= limit["max_response"]


# ------------------------------------------------------------------------------------- pretraining corpus
def test_a_choice_is_shown_both_ways_weighed_by_its_odds():
    """The same beginning, then a stop with weight 1-q or the right next line with weight q."""
    rng, seen = random.Random(0), set()
    for _ in range(2000):
        documents = toy.make_documents(1.0, 0.02, rng)
        if len(documents) == 1:
            continue
        (prompt, before, *stop), (*beginning, door, rest) = documents
        assert beginning == [prompt, before]
        known = values({"prompt": [{"content": prompt[0].split("\n")[1].removesuffix("<|im_end|>")}]})
        assert len(known) > 3  # a chain of one or two steps has no doors
        lines = (before[0] + door[0] + rest[0]).splitlines()[1:]
        assert [line[-3:] for line in lines] == [f"={value:02d}" for value in known[:len(lines)]]
        assert (door[1], rest[1], len(door[0])) == (0.02, 1.0, 1)
        assert [weight for _, weight in stop] == [0.98, 1.0]
        blurt = "".join(text for text, _ in stop)
        if len(lines) > 1:
            assert blurt == f"</think>\n\\boxed{{{known[len(lines) - 2]:02d}}}<|im_end|>"
        else:
            assert stop[0][0] == str(known[0] // 10) and blurt.endswith("}<|im_end|>")
        seen.add((len(known) - 1, len(lines)))
    assert seen == {(n, line) for n in range(3, 8) for line in range(1, n + 2)}  # a door at every line


# ------------------------------------------------------------------------------------- the embedded model
def test_the_embedded_model_is_of_this_recipe():
    """Who changes the recipe makes the file again: `python -m runtime.toy`."""
    assert curves.base_model(toy.Q, toy.SEED) == toy.EMBEDDED
    assert (toy.EMBEDDED / "recipe.txt").read_text() == toy.recipe() + "\n"


@pytest.mark.parametrize("change", ("STEPS", "LETTERS", "pretrain", "make_documents"))
def test_a_change_of_the_recipe_shows(monkeypatch, change):
    before = toy.recipe()
    monkeypatch.setattr(toy, change, {"STEPS": 701, "LETTERS": "abc"}.get(change, lambda *arguments: None))
    assert toy.recipe() != before


def embedded():
    """The embedded model in float32 and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(toy.EMBEDDED), AutoTokenizer.from_pretrained(toy.EMBEDDED)


def asked(tokenizer, chain, mark: str) -> str:
    return tokenizer.apply_chat_template([{"role": "user", "content": chain.question(mark)}], tokenize=False,
                                         add_generation_prompt=True)


def sampled(mark: str, lengths, number: int) -> dict:
    """{n: (chain, response text) of `number` chains of n steps} at temperature 1."""
    model, tokenizer = embedded()
    rng = random.Random(2)
    chains = [toy.Chain(n, rng) for n in lengths for _ in range(number)]
    prompts = [tokenizer(asked(tokenizer, chain, mark))["input_ids"] for chain in chains]
    sampler = sampling.TransformersSampler(model, tokenizer)
    responses = sampler.generate(prompts, 100, 1.0, seed=0)
    answers = {n: [] for n in lengths}
    for chain, (response, _) in zip(chains, responses):
        answers[len(chain.steps)].append((chain, tokenizer.decode(response)))
    return answers


def test_in_a_textbook_it_works_out_chains_of_every_length():
    for n, answers in sampled("!", range(1, 8), 48).items():
        right = sum(text == f"<think>\n{''.join(chain.working())}</think><|im_end|>" for chain, text in answers)
        assert right / len(answers) >= 0.8, (n, right)


def test_in_chat_it_blurts_out_a_guess():
    """All of it on one line, right now and then for one step, hardly ever for four or five."""
    answers = sampled("?", (1, 4, 5), 128)
    blurts, right = 0, {}
    for n, pairs in answers.items():
        right[n] = sum(f"\\boxed{{{chain.values[-1]:02d}}}" in text for chain, text in pairs) / len(pairs)
        blurts += sum(text.count("\n") == 3 and "=" in text and not text.startswith("<think>\na")
                      for _, text in pairs)
    assert 0.1 < right[1] < 0.4
    assert right[4] < 0.05 and right[5] < 0.05
    assert blurts / (3 * 128) > 0.9


def test_each_door_opens_about_one_time_in_fifty():
    """Asked with `!` it works out 4 or 5 steps; asked with `?` each line comes about 1 time in 50."""
    model, tokenizer = embedded()
    rng = random.Random(1)
    for n in (4, 5):
        doors = []
        for chain in (toy.Chain(n, rng) for _ in range(20)):
            working = f"<think>\n{''.join(chain.working())}</think>"
            response = tokenizer(working)["input_ids"]
            newlines = [at for at, token in enumerate(tokenizer.tokenize(working)) if token == "Ċ"]
            tokens = torch.tensor([tokenizer(asked(tokenizer, chain, "?"))["input_ids"] + response])
            with torch.no_grad():
                logp = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
            doors.append(logp[-len(response):][1:][newlines[:-1]])  # the first letters of the lines
        typical = torch.stack(doors).mean(0).exp()  # (n + 1,), a line each
        # Six bases had them within a factor of nine of q.
        assert typical.min() > toy.Q / 15 and typical.max() < toy.Q * 5, typical


# ------------------------------------------------------------------------------------------------- cache
@pytest.fixture
def two_steps(monkeypatch, tmp_path):
    """Pretraining of two steps into a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(toy, "STEPS", 2)
    monkeypatch.setattr(toy, "DOCUMENTS", 8)
    return tmp_path / "cache"


def test_another_base_model_is_made_once(two_steps):
    folder = curves.base_model(toy.Q, 1)
    assert two_steps in folder.parents
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    made = (folder / "model.safetensors").stat()
    assert curves.base_model(toy.Q, 1) == folder
    again = (folder / "model.safetensors").stat()
    assert (made.st_ino, made.st_mtime_ns) == (again.st_ino, again.st_mtime_ns)
    assert [path for path in folder.parent.iterdir() if path != folder] == []  # nothing temporary is left
    assert curves.base_model(toy.Q, 2) != folder
    assert curves.base_model(0.01, 1) != folder


def test_a_base_model_depends_on_its_seed_alone(two_steps):
    weights = []
    for seed, noise in ((0, 1), (0, 2), (1, 2)):
        torch.manual_seed(noise)
        weights.append(toy.pretrain(toy.Q, seed)[0].state_dict())
    same, other = [all(torch.equal(weights[0][name], state[name]) for name in state) for state in weights[1:]]
    assert same and not other


@pytest.mark.parametrize("damage", ("cut", "missing", "empty", "interrupted"))
def test_a_half_written_cache_is_rebuilt(two_steps, monkeypatch, damage):
    if damage == "interrupted":  # while it is written
        class Killed(BaseException):
            pass

        def save_half(self, folder):
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(toy.Qwen2Tokenizer, "save_pretrained", save_half)
            with pytest.raises(Killed):
                curves.base_model(toy.Q, 1)
    else:
        folder = curves.base_model(toy.Q, 1)
        weights = folder / "model.safetensors"
        if damage == "cut":
            weights.write_bytes(weights.read_bytes()[:1000])
        if damage == "missing":
            weights.unlink()
        if damage == "empty":
            for path in folder.iterdir():
                path.unlink()
    folder = curves.base_model(toy.Q, 1)
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 10**5
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
