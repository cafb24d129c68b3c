"""A data set is verified once: verdicts in the cache folder, by what decides them; a spoiled file does no harm."""
import json
import threading
from pathlib import Path

import pytest
from conftest import SMALL, write_jsonl

from runtime import cache, normalise, toy, verification
from runtime.cache import kept_verdicts, read_verdicts, verdict_file, write_verdicts
from runtime.problems import load_problems
from runtime.rows import Codec, Problem
from runtime.verification import CRASH, RIGHT, TIMEOUT, UNPARSED, WRONG

ROWS = [{"problem": f"a={i};a?", "answer": str(i), "demonstration": f"<think>\n</think>\n\\boxed{{{answer}}}"}
        for i, answer in enumerate(("0.0", "1.0", "7", "3"))] + [{"problem": "b?", "answer": r"\frac{1}{"}]
QUESTIONS = {("0",), ("1",), ("2",), ("3",), ("0", "0.0"), ("1", "1.0"), ("2", "7")}  # "3" is its reference


@pytest.fixture
def codec():
    return Codec(toy.make_tokenizer())


@pytest.fixture
def start(codec, verifier, tmp_path, monkeypatch):
    """Loads rows as a program that has just started does; returns its problems, and what math-verify was asked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "WORTH_KEEPING", 1)
    ask = verifier.ask

    def load(rows=ROWS):
        asked = set()
        monkeypatch.setattr(verifier, "known", {})
        monkeypatch.setattr(verifier, "ask", lambda *texts: asked.add(texts) or ask(*texts))
        problems = load_problems("rows", rows, codec, verifier, 60)
        return [(problem.index, problem.answer, problem.demonstration) for problem in problems], asked

    return load


def test_a_second_start_asks_nothing_and_finds_the_same(start, tmp_path, capsys):
    problems, asked = start()
    assert asked == QUESTIONS
    first = capsys.readouterr().out
    assert "left out 1 of 4 demonstrations whose answer is not the reference" in first and "earlier" not in first
    file, = (tmp_path / "cache" / "minimal-luffy").iterdir()
    assert start() == (problems, set())
    said, *rest = capsys.readouterr().out.splitlines(keepends=True)
    assert said == f"rows: 7 verdicts on its answers are those of an earlier start, in {file}\n"
    assert "".join(rest) == first
    assert [*(tmp_path / "cache" / "minimal-luffy").iterdir()] == [file]


def test_other_data_another_math_verify_or_other_code_is_verified_again(start, tmp_path, monkeypatch):
    start()
    assert start(ROWS[:3])[1]
    assert start([ROWS[0] | {"demonstration": "<think></think>\\boxed{0.00}"}, *ROWS[1:]])[1]
    with monkeypatch.context() as patch:
        patch.setattr(cache, "version", lambda package: "0.1" if package == "math-verify" else "1")
        assert start()[1] == QUESTIONS
    for module in (normalise, verification):
        changed = tmp_path / "changed.py"
        changed.write_text(Path(module.__file__).read_text() + "\n")
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(changed))
            assert start()[1] == QUESTIONS
    assert start()[1] == set()


SPOILED = {
    "cut": lambda text: text[:len(text) // 2], "empty": lambda text: "", "a list": lambda text: "[1, 2]",
    "no verdict": lambda text: text.replace(": 1", ": 5"), "no number": lambda text: text.replace(": 1", ": []"),
    "no key": lambda text: '{"x": 1}', "deep": lambda text: "[" * 100_000, "not UTF-8": None}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_file_is_one_line_and_written_anew(start, how, tmp_path, capsys):
    expected = start()
    file, = (tmp_path / "cache" / "minimal-luffy").iterdir()
    whole = file.read_text()
    file.write_bytes(SPOILED[how](whole).encode() if SPOILED[how] else b"\xff\xfe")
    capsys.readouterr()
    assert start() == expected
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{file} cannot be read, so its data are verified again: ")
    assert json.loads(file.read_text()) == json.loads(whole)


def test_a_cache_that_cannot_be_written_is_one_line(start, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    expected = start()
    line, = capsys.readouterr().err.splitlines()
    assert "cannot be written, so the next start verifies these data again" in line
    assert expected[1] == start()[1] == QUESTIONS


def test_without_a_home_directory_nothing_is_kept(start, monkeypatch, capsys):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", home)
    assert start()[1] == QUESTIONS
    line, = capsys.readouterr().err.splitlines()
    assert line == "verdicts are not kept: Could not determine home directory."


def test_writers_at_the_same_time_leave_a_whole_file(tmp_path, capsys):
    path, stop, seen = tmp_path / "new" / "verdicts.json", threading.Event(), set()
    versions = [{bytes([number] * 16): verdict for number in range(200)} for verdict in (RIGHT, WRONG)]

    def write(verdicts):
        while not stop.is_set():
            write_verdicts(path, verdicts)

    threads = [threading.Thread(target=write, args=(verdicts,)) for verdicts in versions]
    for thread in threads:
        thread.start()
    while len(seen) < 2:
        verdicts = read_verdicts(path)
        assert verdicts in ({}, *versions)
        seen |= set(verdicts.values())
    stop.set()
    for thread in threads:
        thread.join()
    assert [*path.parent.iterdir()] == [path]
    assert capsys.readouterr().err == ""


def test_what_depends_on_the_machine_is_little_or_is_anothers_is_not_kept(verifier, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "WORTH_KEEPING", 3)
    problems = [Problem(0, "", [], "1", "", "", {})]
    for before, new, kept in (
            ({}, (RIGHT, WRONG), ()), ({}, (RIGHT, WRONG, UNPARSED, TIMEOUT, CRASH, -6), (RIGHT, WRONG, UNPARSED)),
            ({b"9": RIGHT}, (), (RIGHT, WRONG, UNPARSED))):  # those of another data set
        monkeypatch.setattr(verifier, "known", before)
        with kept_verdicts("rows", problems, verifier):
            verifier.known |= {bytes([number]): verdict for number, verdict in enumerate(new)}
        assert (*read_verdicts(verdict_file(problems)).values(),) == kept


def test_nothing_is_kept_of_a_reward_of_ones_own(make_run, coin_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "WORTH_KEEPING", 0)
    (tmp_path / "own.py").write_text("def reward(row, text):\n    return 1.0\n")
    make_run("grpo", "--model", coin_model, "--data", write_jsonl(tmp_path / "rows.jsonl", ROWS), *SMALL,
             "--reward", f"{tmp_path}/own.py:reward")
    assert not (tmp_path / "cache").exists()
