"""The embedded default: its tokenizer, its problems and demonstrations, and the cache of its base model."""
import random
import re
from collections import Counter
from dataclasses import fields

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
from runtime import toy, verification

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


def test_demonstrations_verify():
    verifier = verification.Verifier()
    golds = [row["reward_model"]["ground_truth"] for row in ROWS[::10]]
    verdicts = verifier(golds, [demonstration(row) for row in ROWS[::10]])
    verifier.close()
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


# ------------------------------------------------------------------------------------------------- cache
@pytest.fixture
def two_steps(monkeypatch, tmp_path):
    """Pretraining of two steps into a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(toy, "STEPS", 2)
    monkeypatch.setattr(toy, "DOCUMENTS", 8)
    return tmp_path / "cache"


def test_the_base_model_is_made_once(two_steps):
    folder = toy.base_model()
    assert two_steps in folder.parents
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    made = (folder / "model.safetensors").stat()
    assert toy.base_model() == folder
    again = (folder / "model.safetensors").stat()
    assert (made.st_ino, made.st_mtime_ns) == (again.st_ino, again.st_mtime_ns)
    assert [path for path in folder.parent.iterdir() if path != folder] == []  # nothing temporary is left
    assert toy.base_model(seed=1) != folder
    assert toy.base_model(q=0.01) != folder


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
                toy.base_model()
    else:
        folder = toy.base_model()
        weights = folder / "model.safetensors"
        if damage == "cut":
            weights.write_bytes(weights.read_bytes()[:1000])
        if damage == "missing":
            weights.unlink()
        if damage == "empty":
            for path in folder.iterdir():
                path.unlink()
    folder = toy.base_model()
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 10**5
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
