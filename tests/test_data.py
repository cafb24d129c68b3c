"""Data as people have them: numbers, names of files, demonstrations; data that change; rewards of one's own."""
import contextlib
import io
import json
import re
import sys

import pyarrow
import pyarrow.parquet
import pytest
from conftest import SCRIPTS, SMALL, load, read_jsonl, write_jsonl

from common import Row
from runtime.evaluation import summarise
from runtime.files import Written, as_text, read_file
from runtime.problems import fingerprint, load_problems, read_demonstration, slice_names
from runtime.reward import OwnReward
from runtime.rows import Codec, Problem
from runtime.verification import RIGHT, WRONG

THOUGHT = "<think>\na=1\n</think>\n\\boxed{1}"
ROWS = [{"problem": f"a={i};a?", "answer": "1", "demonstration": THOUGHT} for i in range(4)]


@pytest.fixture
def refused(capsys):
    """Runs something that must end in one line, and returns this line."""
    def run(start, *arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            start(*arguments)
        assert end.value.code == 2
        line, = [line for line in capsys.readouterr().err.splitlines() if "step/s" not in line]
        return line
    return run


# ------------------------------------------------------------------------------------------------ numbers
NUMBERS = '[1e-7, 1e20, 2.50, 9007199254740993, 123456789012345678901234567890, -3, 0.1234567890123456789, NaN]'
TEXTS = ["1 \\times 10^{-7}", "1 \\times 10^{20}", "2.50", "9007199254740993", "123456789012345678901234567890", "-3",
         "0.1234567890123456789"]


@pytest.mark.parametrize("kind", ("jsonl", "json", "columns.json", "csv"))
def test_numbers_keep_their_text(kind, tmp_path):
    written = NUMBERS[1:-1].split(", ")
    lines = [f'{{"problem": "{i}", "answer": {number}}}' for i, number in enumerate(written)]
    text = {"jsonl": "\n".join(lines), "json": f"[{','.join(lines)}]", "csv": "problem,answer\n" + "".join(
        f"{i},{number}\n" for i, number in enumerate(written)),
        "columns.json": f'{{"problem": {json.dumps([*map(str, range(8))])}, "answer": {NUMBERS}}}'}[kind]
    path = tmp_path / f"rows.{kind}"
    path.write_text(text)
    rows = read_file(path)
    assert [row["problem"] for row in rows] == [str(i) for i in range(8)]
    assert [as_text(row["answer"]) for row in rows[:7]] == TEXTS
    assert rows[7]["answer"] == ("NaN" if kind == "csv" else None)  # which JSON has not: a gap
    assert json.loads(json.dumps(rows[:1]))[0]["problem"] == "0"    # rows can be written again


@pytest.mark.parametrize("number, text", (
    (1e-7, "1 \\times 10^{-7}"), (1e20, "1 \\times 10^{20}"), (3.0, "3"), (-3.0, "-3"), (2.5, "2.5"), (7, "7"),
    (Written("3.0"), "3.0"), ("1E+5", "1 \\times 10^{5}"), (".5e3", ".5 \\times 10^{3}"), ("2e", "2e"), ("e-7", "e-7"),
    ("x=1e-7", "x=1e-7"), ("1e-7 m", "1e-7 m"), (" 5 ", "5")))
def test_a_number_as_text(number, text):
    assert as_text(number) == text


def test_numbers_are_compared_as_such(verifier):
    """1e-7 is not e minus 7."""
    golds = [as_text(1e-7), as_text(1e-7), as_text(1e20), as_text(1e-7)]
    answers = ["10^{-7}", "0.0000001", "100000000000000000000", "e-7"]
    assert verifier(golds, [f"</think>\\boxed{{{answer}}}" for answer in answers]) == [RIGHT, RIGHT, RIGHT, WRONG]


def test_an_integer_column_with_a_gap_stays_one_of_integers(make_run, tiny_model, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("problem,answer\na=1;a?,3\na=2;a?,\na=3;a?,9007199254740993\n")
    run = make_run("grpo", "--model", tiny_model, "--data", str(tmp_path / "rows.csv"), *SMALL)
    assert sorted(problem.answer for problem in run.train) == ["3", "9007199254740993"]
    assert "left out 1 of 3 rows without an answer" in capsys.readouterr().out


def test_parquet_columns_of_numbers(make_run, tiny_model, tmp_path):
    """A gap has made floats of the integers; decimals are numbers too."""
    for name, column in (("floats", pyarrow.array([3.0, None, 1e-7])),
                         ("decimals", pyarrow.array([3, None, 2]).cast(pyarrow.decimal128(21, 1)))):
        table = pyarrow.table({"problem": ["a=1;a?", "a=2;a?", "a=3;a?"], "answer": column})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        run = make_run("grpo", "--model", tiny_model, "--data", str(tmp_path / f"{name}.parquet"), *SMALL)
        assert {problem.answer for problem in run.train} == (
            {"3", "1 \\times 10^{-7}"} if name == "floats" else {"3.0", "2.0"})


@pytest.mark.parametrize("name, text, named", (
    ("a.jsonl", '{"problem": "p", "answer": 1}\n\n5\n', "not every row is an object"),
    ("a.json", '{"problem": ["p"], "answer": [1, 2]}', "not of one length"),
    ("a.json", '["p"]', "not every row is an object"), ("a.json", "[1, ", "a.json, line 1"),
    ("a.csv", 'problem,answer\n"p,1\n', "a.csv, line"), ("a.jsonl", "[" * 100_000, "a.jsonl, line 1")))
def test_a_file_that_is_no_table_is_one_line(name, text, named, tmp_path, refused):
    (tmp_path / name).write_text(text)
    assert named in refused(read_file, tmp_path / name)


def test_a_row_may_leave_columns_out_and_a_line_may_hold_any_letter(tmp_path):
    rows = [{"problem": "a\u2028b\x85", "answer": "1"}, {"problem": "c", "answer": 2, "demonstration": ["x"]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read_file(path) == [rows[0] | {"demonstration": None}, rows[1]]
    (tmp_path / "rows.csv").write_text('problem,answer\n"a\nb","{long}"\nc\n'.replace("{long}", "1" * 200_000))
    assert read_file(tmp_path / "rows.csv") == [{"problem": "a\nb", "answer": "1" * 200_000},
                                                {"problem": "c", "answer": None}]


def test_half_of_a_surrogate_pair_is_counted(make_run, tiny_model, tmp_path, capsys):
    """JSON can hold it: somebody has cut a text in the middle of a letter."""
    rows = [ROWS[0] | {name: "\ud83d"} for name in ("problem", "answer", "demonstration")]
    run = make_run("grpo", "--model", tiny_model, "--data", write_jsonl(tmp_path / "rows.jsonl", rows + ROWS[1:]),
                   *SMALL)
    assert sorted(problem.index for problem in run.train) == [3, 4, 5]
    assert "left out 3 of 6 rows with half of a surrogate pair" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- data that have changed
CHANGES = {
    "another answer": lambda rows: rows[:3] + [rows[3] | {"answer": "2"}],
    "another demonstration": lambda rows: rows[:3] + [rows[3] | {"demonstration": THOUGHT + " "}],
    "another order": lambda rows: rows[::-1], "fewer rows": lambda rows: rows[:3],
    "more rows": lambda rows: rows + [rows[0] | {"problem": "b?"}]}


@pytest.mark.parametrize("change", CHANGES)
def test_other_rows_have_another_fingerprint(change):
    changed, same = CHANGES[change](ROWS), json.loads(json.dumps(ROWS))
    assert fingerprint(ROWS, [("test", 1, ROWS)]) == fingerprint(same, [("test", 1, same)])
    assert fingerprint(ROWS, []) != fingerprint(changed, [])
    assert fingerprint(ROWS, [("test", 1, ROWS)]) != fingerprint(ROWS, [("test", 1, changed)])


@pytest.mark.parametrize("which", ("--data", "--eval_data"))
def test_a_run_whose_data_have_changed_does_not_go_on(which, make_run, tiny_model, tmp_path, refused):
    """ReLIFT's buffer may name rows that are gone."""
    other, data = [write_jsonl(tmp_path / name, ROWS) for name in ("other.jsonl", "rows.jsonl")]
    flags = ["--model", tiny_model, "--data", other, "--eval_data", other, *SMALL, "--name", "x", which, data]
    run = make_run("relift", *flags)
    run.state["buffer"] = [3]
    run.record.write_metrics(0, {"precious": 1})
    run.save()
    write_jsonl(tmp_path / "rows.jsonl", ROWS[:3])
    line = refused(make_run, "relift", *flags, "--resume")
    assert "runs/x was begun with other data" in line
    assert read_jsonl(run.record.folder / "metrics.jsonl") == [{"step": 0, "precious": 1}]
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert make_run("relift", *flags, "--resume").state["buffer"] == [3]  # they are back


# ------------------------------------------------------------------------------------------ names of slices
@pytest.mark.parametrize("sources, names", (
    (["d/a.jsonl", "b.csv"], ["a", "b"]), (["a/test.jsonl", "b/test.jsonl"], ["a/test", "b/test"]),
    (["x/a/test.jsonl", "y/a/test.jsonl", "c.jsonl"], ["x/a/test", "y/a/test", "c"]),
    (["test.jsonl", "test.csv"], ["test.jsonl", "test.csv"]), (["one/aime", "two/aime"], ["one/aime", "two/aime"]),
    (["test.jsonl", "a/test.jsonl"], ["test.jsonl", "a/test"]), ([], [])))
def test_every_source_has_a_name_of_its_own(sources, names):
    assert list(slice_names(sources).values()) == names


def test_two_files_of_one_name_are_two_slices(make_run, tiny_model, coin_data, tmp_path):
    files = []
    for folder in "ab":
        (tmp_path / folder).mkdir()
        files.append(write_jsonl(tmp_path / folder / "test.jsonl", [{"problem": f"{folder}?", "answer": "1"}]))
    run = make_run("grpo", "--model", tiny_model, "--data", coin_data, *SMALL, "--eval_data", "@2,".join(files))
    assert [(problem.part, problem.samples) for problem in run.held_out] == [("a/test", 2), ("b/test", 1)]
    assert {"accuracy/a/test", "accuracy/b/test"} <= run.evaluate().keys()


@pytest.mark.parametrize("eval_data, flags, named", (
    ("{0},{0}@4", [], "twice"), ("{0}@4", ["--eval_temperature", "0"], "all 4 responses are the same")))
def test_samples_that_mean_nothing_are_one_line(eval_data, flags, named, make_run, tiny_model, coin_data, refused):
    line = refused(make_run, "grpo", "--model", tiny_model, "--data", coin_data, *SMALL, "--eval_data",
                   eval_data.format(coin_data), *flags)
    assert named in line


# ------------------------------------------------------------------------------- responses without a </think>
@pytest.mark.parametrize("thinking, rewards, said", (
    (0, [1, 0, 1, 0], "none of 4 responses has a </think>"),
    (2, [1, 0, 0, 0], "2 of 4 responses have no </think>: they count as wrong"),
    (4, [1, 0, 1, 0], None)))
def test_offline_responses_without_thinking_are_judged_or_counted(thinking, rewards, said, make_run, tiny_model,
                                                                  tmp_path, capsys):
    rows = [{"problem": f"a={i};a?", "answer": "1", "response": "</think>" * (i < thinking) + f"\\boxed{{{1 - i % 2}}}"}
            for i in range(4)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = make_run("topr", "--model", tiny_model, "--data", data, "--eval_data", data, *SMALL)
    kept = run.kept.read(data, 40)
    assert run.verify(kept).tolist() == rewards
    output = capsys.readouterr().out
    assert ("</think>:" in output) == bool(said) and (said or "") in output


# ---------------------------------------------------------------------------------------------- demonstrations
SAID = {"role": "assistant", "content": THOUGHT}


@pytest.mark.parametrize("value, text", (
    (THOUGHT, THOUGHT), ([SAID], THOUGHT), (SAID, THOUGHT), ([{"content": THOUGHT}], THOUGHT),
    ([{"role": "user", "content": "a?"}, SAID], THOUGHT),
    ([SAID | {"content": "first"}, {"role": "user", "content": "really?"}, SAID], THOUGHT),
    ([SAID, {"role": "user", "content": "thanks"}], THOUGHT),
    ([SAID | {"content": [{"type": "text", "text": THOUGHT[:9]}, {"type": "text", "text": THOUGHT[9:]}]}], THOUGHT),
    ("", ""), (None, ""), ([], ""), ([{"role": "user", "content": "a?"}], None), (5, None), (["x"], None), ({}, "")))
def test_a_demonstration_is_text_or_chat_messages(value, text):
    assert read_demonstration(value) == text


def test_demonstrations_as_messages_are_used_and_what_is_neither_is_counted(make_run, tiny_model, tmp_path, capsys):
    rows = [row | {"demonstration": value} for row, value in zip(ROWS, ([SAID], THOUGHT, 7, None))]
    run = make_run("luffy", "--model", tiny_model, "--data", write_jsonl(tmp_path / "rows.jsonl", rows), *SMALL)
    assert sorted(problem.index for problem in run.train if problem.demonstration) == [0, 1]
    assert "left out 1 demonstrations that are neither text nor chat messages" in capsys.readouterr().out


def test_several_demonstrations_of_a_problem(verifier, tiny_model, capsys):
    """One column's, then a list's, each once; the first that is right is the one for methods that take one."""
    one, two, three = [f"<think>\n{working}</think>\n\\boxed{{1}}" for working in ("", "a=1\n", "1;1\n")]
    several = [one.replace("{1}", "{2}"), two, SAID | {"content": three}, two + "<|im_end|>", 5, None]
    rows = [{"problem": "a?", "answer": "1", "demonstrations": several},
            {"problem": "b?", "answer": "1", "demonstration": one, "demonstrations": two},
            {"prompt": [{"role": "user", "content": "c?"}], "reward_model": {"ground_truth": "1"},
             "target": [SAID | {"content": one}], "target_lst": several}]
    problems = load_problems("rows", rows, Codec(load(tiny_model)[1]), verifier, 60)
    assert [problem.demonstrations for problem in problems] == [[two, three], [one, two], [one, two, three]]
    assert [problem.demonstration for problem in problems] == [two, one, one]
    output = capsys.readouterr().out
    assert "left out 2 of 9 demonstrations whose answer is not the reference" in output
    assert "left out 2 demonstrations that are neither text nor chat messages" in output


def test_a_demonstration_that_goes_on_behind_its_eos_is_judged_by_what_is_before(make_run, tiny_model, tmp_path):
    ends = ("<|im_end|>\n", "<|im_end|>\n\\boxed{2}", "")
    rows = [row | {"demonstration": THOUGHT + end} for row, end in zip(ROWS, ends)]
    rows.append(ROWS[3] | {"demonstration": "<think>\n<|im_end|></think>\\boxed{1}"})
    run = make_run("luffy", "--model", tiny_model, "--data", write_jsonl(tmp_path / "rows.jsonl", rows), *SMALL)
    assert [problem.demonstration for problem in sorted(run.train, key=lambda problem: problem.index)] == \
        [THOUGHT] * 3 + [""]


@pytest.mark.parametrize("script", SCRIPTS)
def test_demonstrations_that_do_not_fit_are_counted_at_the_start(script, make_run, tiny_model, tmp_path, capsys):
    run = make_run(script, "--model", tiny_model, "--data", write_jsonl(tmp_path / "rows.jsonl", ROWS), *SMALL)
    length = len(run.codec.encode(run.train[0], THOUGHT))
    assert "demonstrations" not in capsys.readouterr().out
    rows = ROWS[:3] + [ROWS[3] | {"demonstration": "<think>\na=1\na=1\n</think>\n\\boxed{1}"}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    for limit, said in ((length, "1 of 4 demonstrations have more than --max_response"),
                        (length - 1, "4 of 4 demonstrations have more than --max_response")):
        run = make_run(script, "--model", tiny_model, "--data", data, *SMALL, "--max_response", str(limit))
        output = capsys.readouterr().out
        assert said in output
        assert ("no problem has a demonstration that can be used" in output) == (limit < length)


@pytest.mark.parametrize("flags, demonstrated, named", (
    ([], False, "no problem has a demonstration that fits"), (["--max_response", "3"], True, "--max_response 3"),
    (["--expert_share", "0.03", "--prompts", "2"], True, "--expert_share 0.03: beside 8 rollouts"),
    (["--expert_share", "0"], True, "--expert_share 0.0: beside 16 rollouts")))
def test_chord_without_demonstrations_ends_before_its_first_step(flags, demonstrated, named, command_line, tiny_model,
                                                                 tmp_path, refused):
    rows = [row if demonstrated else row | {"demonstration": ""} for row in ROWS]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    script = command_line("chord", "--model", tiny_model, "--data", data, *SMALL, "--name", "x", *flags)
    assert named in refused(script.main)
    assert not (tmp_path / "runs" / "x" / "metrics.jsonl").exists()


# ---------------------------------------------------------------------------------------------- system message
CHAT = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "b?"}],
        "reward_model": {"ground_truth": "1"}}


@pytest.mark.parametrize("system", ("none", " "))
@pytest.mark.parametrize("row", (ROWS[0], CHAT), ids=("plain", "chat"))
def test_no_system_message_for_a_template_that_refuses_one(system, row, make_run, tiny_model, tmp_path, refused):

    model, tokenizer = load(tiny_model)
    tokenizer.chat_template = ("{% for m in messages %}"
                               "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ m['role'] + m['content'] }}{% endfor %}{{ 'assistant' }}")  # noqa: E501
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["grpo", "--model", str(tmp_path / "model"), "--data", write_jsonl(tmp_path / "rows.jsonl", [row]), *SMALL]
    run = make_run(*flags, "--system", system)
    assert run.train[0].text == f"user{row.get('problem', 'b?')}assistant"
    assert "none of its 1 rows can be used" in refused(make_run, *flags)


# ---------------------------------------------------------------------------------------------------- locale
@pytest.mark.parametrize("flags, shown", (
    ([], "\\u6c42 a?"), (["--help"], "\\u03b5_low"), (["--model", "ε"], "--model \\u03b5 cannot be loaded")))
def test_output_in_a_locale_without_the_letters(flags, shown, command_line, tiny_model, tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "求 a?", "answer": "1"}])
    script = command_line("grpo", "--model", tiny_model, "--data", data, *SMALL, *flags)
    streams = [io.TextIOWrapper(io.BytesIO(), "ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with contextlib.suppress(SystemExit):  # of --help and of the error
        script.main()
    for stream in streams:
        stream.flush()
    assert shown in "".join(stream.buffer.getvalue().decode("ascii") for stream in streams)


# ---------------------------------------------------------------------------------------- rewards of one's own
OWN = """
seen = []


def length(row, response):
    seen.append((row, response))
    return len(response) / 100


def boxed(row, response):
    return row["answer"] in response


def short(response):
    return 1.0


def none(row, response):
    pass


def fails(row, response):
    return 1 / (int(row["answer"]) - 1)


def nothing_finite(row, response):
    return float("nan")


number = 5
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return lambda name: f"{tmp_path}/own.py:{name}"


def test_a_reward_of_ones_own(own, make_run, tiny_model, coin_data):
    run = make_run("grpo", "--model", tiny_model, "--data", coin_data, *SMALL, "--reward", own("length"))
    rows = run.rollout(run.train[:4] * 4)
    texts = [run.codec.text(row) for row in rows]
    assert run.verify(rows).tolist() == pytest.approx([len(text) / 100 for text in texts])
    seen = run.verifier.function.__globals__["seen"]
    assert seen == [(row.problem.row, text) for row, text in zip(rows, texts)]  # also those that were cut
    assert any(not run.codec.ended(row) for row in rows)
    assert {"problem", "answer"} <= seen[0][0].keys()


def test_every_reference_can_be_used_with_a_reward_of_ones_own(own):
    """Also those that math-verify leaves out: it is not asked."""
    assert OwnReward(own("boxed")).check_golds(["no number {", "", "7"]) == [RIGHT] * 3


def test_what_is_right_by_a_reward_of_ones_own(own, make_run, tiny_model, tmp_path, capsys):
    """Math-verify is not asked: neither of the references nor of the demonstrations."""
    rows = [row | {"answer": "no number {", "demonstration": "anything"} for row in ROWS]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = make_run("luffy", "--model", tiny_model, "--data", data, "--eval_data", f"{data}@4", *SMALL,
                   "--reward", own("boxed"))
    assert len(run.train) == 4 and all(problem.demonstration for problem in run.train)
    assert "left out" not in capsys.readouterr().out.replace("left out 0", "")
    right, wrong = [Row(run.train[0], run.policy.tokenizer(text)["input_ids"]) for text in ("no number {", "1")]
    right.problem.row["answer"] = "n"
    assert run.verify([right, wrong, right]).tolist() == [1.0, 0.0, 1.0]
    metrics = run.evaluate()
    assert 0 <= metrics["pass@2/rows"] <= 1
    answers = read_jsonl(run.record.folder / "answers.jsonl")
    assert {answer["verdict"] for answer in answers} <= {"right", "wrong"} and len(answers) == 16


@pytest.mark.parametrize("name, named", (
    ("short", "it is called with a problem's row and a response's text"), ("missing", "has no function missing"),
    ("number", "has no function number"), ("", "has no function")))
def test_a_reward_that_cannot_be_called_is_one_line(name, named, own, make_run, tiny_model, coin_data, refused):
    line = refused(make_run, "grpo", "--model", tiny_model, "--data", coin_data, *SMALL, "--reward", own(name))
    assert "--reward" in line and named in line


@pytest.mark.parametrize("source, text, named", (
    ("other.py:f", "", "no such file"), ("bad.py:f", "def f(:", "SyntaxError"),
    ("bad.py:f", "1/0", "ZeroDivisionError"), ("bad.py", "", "FILE.py:function"),
    ("bad.txt:f", "", "FILE.py:function")))
def test_a_file_without_a_reward_is_one_line(source, text, named, make_run, tiny_model, coin_data, tmp_path, refused):
    (tmp_path / "bad.py").write_text(text)
    (tmp_path / "bad.txt").write_text(text)
    assert named in refused(make_run, "grpo", "--model", tiny_model, "--data", coin_data, *SMALL, "--reward", source)


@pytest.mark.parametrize("name, named", (
    ("fails", "ZeroDivisionError: division by zero"), ("none", "it returns None, not a finite number"),
    ("nothing_finite", "it returns nan, not a finite number")))
def test_a_reward_that_fails_is_one_line_that_names_the_row(name, named, own, make_run, tiny_model, tmp_path, refused):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    run = make_run("grpo", "--model", tiny_model, "--data", data, *SMALL, "--reward", own(name))
    problem, = [problem for problem in run.train if problem.index == 2]
    line = refused(run.verify, [Row(problem, [5])])
    assert re.search(r"--reward .*own.py:\w+, row 2 of rows: ", line) and named in line


def test_only_a_reward_of_1_is_right_for_pass_at_k():
    problem = Problem(0, "", [], "", "", "mine", {})
    rows = [Row(problem, [5], reward=reward) for reward in (0.5, 0.75, -3.0, 1.0)]
    figures = summarise(rows)["mine"]
    assert (figures["accuracy"], figures["pass@2"]) == (-0.1875, 0.5)  # a mean of rewards; 1 of 4 is right
