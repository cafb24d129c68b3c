"""Every script as its user meets it: its help, two steps of it, its errors, and its difference to grpo.py."""
import ast
import difflib
import json
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import MORE, ROOT, SCRIPTS, SMALL, load, read_jsonl, run_command, run_script, write_jsonl

import common

# What metrics.jsonl holds, whatever the method ...
METRICS = {"reward", "groups/all_right", "groups/all_wrong", "response/length", "response/cut", "response/thought",
           "response/boxed", "entropy", "gradient_norm", "sampler_gap", "verifier/no_box", "verifier/unparsed",
           "verifier/timeouts", "verifier/crashes", "seconds/rollout", "seconds/verification", "seconds/scoring",
           "seconds/update"}
# ... and where demonstrations stand among the rollouts.
MIXED = {"luffy": {"demonstrations/probability", "demonstrations/left_out", "reward/demonstrations",
                   "token_loss/rollouts", "token_loss/demonstrations"}}
ACCURACIES = {"accuracy/easy", "accuracy/hard", "accuracy/ood"}


# --------------------------------------------------------------------------------------------------- help
@pytest.mark.parametrize("script", SCRIPTS + MORE)
def test_help_shows_every_flag_with_its_default(script, command_line, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")  # no line is broken
    module = command_line(script, "--help")
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    shown = {part.split()[0].rstrip(","): part for part in capsys.readouterr().out.split("\n  --")[1:]}
    for field in fields(module.Args):
        defaults = (field.default, field.metadata["toy"], field.metadata["real"])
        assert "(default: " in shown[field.name]
        assert all(repr(value) in shown[field.name] for value in defaults if value is not None)


@pytest.mark.parametrize("flags, lr", [
    ("", 2e-4), ("--model m --data toy", 2e-4), ("--model m --eval_data d.jsonl,toy@4", 2e-4),
    ("--model m", 1e-6), ("--model m --data toys.jsonl", 1e-6), ("--model toys --eval_data toy.csv@4", 1e-6)])
def test_the_defaults_are_the_toys_where_the_toy_takes_part(command_line, flags, lr):
    module = command_line("grpo", *flags.split())
    assert common.parse(module.Args, module.__doc__).lr == lr


# ---------------------------------------------------------------------------------------------- two steps
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_steps_in_an_empty_folder(script, tiny_model, tmp_path):
    process = run_script(
        f"{script}.py", "--model", tiny_model, "--data", "toy", "--eval_data", "toy", "--steps", "2",
        "--prompts", "4", "--n", "4", "--eval_response", "16", "--name", "test", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    folder = tmp_path / "runs" / "test"
    assert "<|im_start|>assistant" in process.stdout  # a rendered prompt ...
    assert "</think>" in process.stdout               # ... and its demonstration
    assert "runs/test" in process.stdout.splitlines()[-1]
    assert all(f"{name} " in process.stdout.splitlines()[-1] for name in ("easy", "hard", "ood"))

    args = json.loads((folder / "args.json").read_text())
    assert {"model": tiny_model, "data": "toy", "steps": 2, "prompts": 4, "n": 4}.items() <= args.items()
    assert args["lr"] and args["max_response"]  # defaults are filled in

    lines = read_jsonl(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert ACCURACIES <= lines[0].keys()
    assert ACCURACIES <= lines[2].keys()
    assert METRICS | MIXED.get(script, set()) <= lines[1].keys() | lines[2].keys()
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[1]["sampler_gap"] < 1e-5
    documented = re.findall(r"`([^`]+)`", (ROOT / "docs" / "metrics.md").read_text())
    for name in (lines[1].keys() | lines[2].keys()) - {"step"}:
        assert name.replace(name.partition("/")[2], "<slice>") in documented or name in documented, name

    samples = read_jsonl(folder / "samples.jsonl")
    assert samples and all({"step", "prompt", "response", "reward"} <= sample.keys() for sample in samples)
    model, tokenizer = load(str(folder / "model"), torch.float32)
    assert model(torch.tensor([tokenizer("a=1")["input_ids"]])).logits.isfinite().all()


def test_luffy_without_demonstrations_is_grpo_to_the_bit(coin_model, coin_data, command_line, tmp_path):
    """Two updates on each of two rollout batches, so that ratios leave 1; --clip is the other difference."""
    weights, logs = [], []
    for script, *flags in (("grpo",), ("luffy", "--clip")):
        command_line(script, "--model", coin_model, "--data", coin_data, *SMALL, "--updates", "2",
                     "--entropy_bonus", "0.001", "--name", script, *flags).main()
        weights.append(load(str(tmp_path / "runs" / script / "model"), torch.float32)[0].state_dict())
        logs.append(read_jsonl(tmp_path / "runs" / script / "metrics.jsonl"))
    before = load(coin_model, torch.float32)[0].state_dict()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in before)
    assert not any(torch.equal(weights[0][name], before[name]) for name in before)
    for grpo, luffy in zip(*logs):
        assert all(value == luffy[name] for name, value in grpo.items() if not name.startswith("seconds/"))
    assert 0 < logs[0][1]["reward"] < 1  # groups with both rewards: there was something to learn
    assert max(line.get("clip_fraction", 0) for line in logs[0]) > 0


@pytest.mark.parametrize("script", ("grpo", "luffy"))
def test_a_handful_of_problems_is_enough(script, coin_model, command_line, tmp_path):
    """Of five none is held out, and a batch of eight goes through them more than once."""
    data = write_jsonl(tmp_path / "rows.jsonl", [{"problem": f"a={i};a?", "answer": "1"} for i in range(5)])
    flags = ("--model", coin_model, "--data", data, *SMALL, "--prompts", "8", "--name", "few")
    command_line(script, *flags).main()
    assert [line["step"] for line in read_jsonl(tmp_path / "runs" / "few" / "metrics.jsonl")][-2:] == [1, 2]


# ----------------------------------------------------------------------------------------------- bad input
FILES = {
    "rows.jsonl": '{"problem": "a=1;a?", "answer": "1"}\n{"problem": "a=2;a?", "answer": "2"}\n',
    "column.jsonl": '{"text": "a=1;a?", "answer": "1"}\n',
    "broken.jsonl": '{"problem": "a=1;a?", "answer": "1"}\n{"problem": \n',
    "empty.jsonl": "",
    "empty.json": "[]",
    "header.csv": "problem,answer\n",
    "long.csv": f"problem,answer\n{'a' * 100},1\n",
    "text.csv": "prompt,reward_model\na=1;a?,1\n",
    "notes.txt": "a=1;a?",
}
MISTAKES = {  # flags, and what the line must name
    "missing file": (["--data", "missing.jsonl"], "missing.jsonl"),
    "missing column": (["--data", "column.jsonl"], "answer, text"),
    "broken file": (["--data", "broken.jsonl"], "broken.jsonl"),
    "empty file": (["--data", "empty.jsonl"], "empty.jsonl"),
    "empty list": (["--data", "empty.json"], "empty.json"),
    "no row": (["--data", "header.csv"], "header.csv"),
    "other kind of file": (["--data", "notes.txt"], "notes.txt"),
    "cells instead of messages": (["--data", "text.csv"], "text.csv"),
    "all prompts too long": (["--data", "long.csv"], "long.csv"),
    "prompt longer than the context": (["--max_prompt", "300"], "256"),
    "response longer than the context": (["--max_response", "250"], "256"),
    "missing model": (["--model", "missing/folder"], "missing/folder"),
    "folder without a model": (["--model", "."], "--model ."),
}
WRONG_FLAGS = {
    "no group": (["--n", "0"], "--n"),
    "no step": (["--steps", "0"], "--steps"),
    "temperature 0": (["--temperature", "0"], "--temperature"),
    "unknown flag": (["--unknown", "3"], "--unknown"),
    "word for a number": (["--steps", "many"], "many"),
}


def flags_of(mistake: list[str], folder, model: str) -> list[str]:
    """A command line that is right but for the mistake, which comes last and so wins."""
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return ["--model", model, "--data", "rows.jsonl", *SMALL, *mistake]


def assert_refused(script: str, module, named: str, capfd):
    with pytest.raises(SystemExit) as end:
        module.main()
    stderr = capfd.readouterr().err
    assert end.value.code == 2
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith(f"{Path(script).name}.py: error: ")
    assert named in stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_input_is_one_line(mistake, tiny_model, command_line, tmp_path, capfd):
    flags, named = MISTAKES[mistake]
    module = command_line("luffy", *flags_of(flags, tmp_path, tiny_model))
    assert_refused("luffy", module, named, capfd)  # by code that is the same in every script
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", SCRIPTS + MORE)
@pytest.mark.parametrize("mistake", WRONG_FLAGS)
def test_a_wrong_flag_is_one_line(script, mistake, tiny_model, command_line, tmp_path, capfd):
    flags, named = WRONG_FLAGS[mistake]
    assert_refused(script, command_line(script, *flags_of(flags, tmp_path, tiny_model)), named, capfd)


@pytest.mark.parametrize("script", SCRIPTS + MORE)
def test_every_number_is_kept_within_its_limits(script, command_line, capfd):
    module = command_line(script)
    numbers = {field.name: field.metadata for field in fields(module.Args) if field.type in (int, float)}
    assert {name for name in numbers if numbers[name]["least"] is None} == {"entropy_bonus"}  # of either sign
    for name, limits in numbers.items():
        for limit, step in (("least", -1), ("most", 1)):
            if limits[limit] is not None:
                command_line(script, f"--{name}={limits[limit] + step}")
                assert_refused(script, module, f"it must be at {limit} {limits[limit]}", capfd)


@pytest.mark.parametrize("script", [script for script in SCRIPTS + MORE if script != "topr"])  # it compares none
def test_a_group_of_one_is_refused(script, tiny_model, command_line, tmp_path, capfd):
    module = command_line(script, *flags_of(["--n", "1"], tmp_path, tiny_model))
    assert_refused(script, module, "--n is 1", capfd)


@pytest.mark.parametrize("mistake", ("missing column", "missing model"))
def test_a_mistake_as_the_shell_sees_it(mistake, tiny_model, tmp_path):
    flags, named = MISTAKES[mistake]
    process = run_command("luffy.py", *flags_of(flags, tmp_path, tiny_model), cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.startswith("luffy.py: error: ")
    assert process.stderr.count("\n") == 1, process.stderr
    assert named in process.stderr


# ------------------------------------------------------------------------------------------------- shape
def code_lines(script: str) -> list[str]:
    """The lines of a script without docstrings and blank lines."""
    source = (ROOT / f"{script}.py").read_text()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            text = node.body[0]
            lines[text.lineno - 1:text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
    return [line for line in lines if line.strip()]


def changed_lines(script: str, parent: str = "grpo") -> list[str]:
    """Lines added and removed against another script."""
    diff = list(difflib.unified_diff(code_lines(parent), code_lines(script), n=0, lineterm=""))
    return [line for line in diff[2:] if line[0] in "+-"]


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "grpo"])
def test_a_method_is_a_small_diff_to_grpo(script):
    assert len(changed_lines(script)) <= 80


@pytest.mark.parametrize("script", SCRIPTS + MORE)
def test_a_script_is_read_in_ten_minutes(script):
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    assert len(lines) <= (220 if script == "grpo" else 280)
    assert max(map(len, lines)) <= 110


LOOP = """\
    run = Run(args)
    for step in run.steps(
        for minibatch in run.minibatches(rows):
            for batch in run.micro_batches(minibatch
                logp,
            run.optimizer_step(minibatch)
        run.end_step()
    run.end()
if __name__ == "__main__":
""".splitlines()


@pytest.mark.parametrize("script", SCRIPTS + MORE)
def test_the_loop_is_the_same_text_in_every_script(script):
    lines = iter((ROOT / f"{script}.py").read_text().splitlines())
    for expected in LOOP:  # in this order, to the byte
        assert any(line.startswith(expected) for line in lines), expected
