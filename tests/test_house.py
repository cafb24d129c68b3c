"""The house: its floors, imports run down only; flags in groups, and none that does nothing; what common.py says."""
import ast
import doctest
import inspect
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import fields

import pytest
import torch
from conftest import MORE, ROOT, SCRIPTS, SMALL, optional, run_script

import common
from runtime.flags import GROUPS

FLOORS = ("more", "", "runtime")  # in the root: the five methods, and under them common.py
LOCAL = {path.stem: path for floor in FLOORS for path in (ROOT / floor).glob("*.py")}


def imported(path) -> set[str]:
    """Names of this repository's modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if bare(name) in LOCAL}


def bare(name: str) -> str:
    return name.removeprefix("runtime.").removeprefix("more.")


def test_imports_run_down():
    for script in MORE:
        assert imported(ROOT / f"{script}.py") <= {"common", *SCRIPTS}, script
    for script in SCRIPTS:
        assert imported(ROOT / f"{script}.py") <= {"common", "grpo"}, script
    assert all(name.startswith("runtime.") for name in imported(ROOT / "common.py"))
    for path in (ROOT / "runtime").glob("*.py"):
        assert all(name.startswith("runtime.") for name in imported(path)), path


def test_no_imports_in_a_circle():
    below = {name: {bare(other) for other in imported(path)} for name, path in LOCAL.items()}
    while below:
        lowest = {name for name, others in below.items() if not others & below.keys()}
        assert lowest, f"a circle among {sorted(below)}"
        below = {name: others for name, others in below.items() if name not in lowest}


def test_run_has_the_steps_of_the_loop_in_their_order():
    methods = list(vars(common.Run))
    order = ["steps", "next_problems", "rollout", "verify", "score", "minibatches", "micro_batches", "logprobs",
             "backward", "optimizer_step", "end_step", "end"]
    assert [name for name in methods if name in order] == order
    assert len((ROOT / "common.py").read_text().splitlines()) <= 350
    for name in order:
        source = inspect.getsource(getattr(common.Run, name))
        body = ast.parse(inspect.cleandoc("\n" + source)).body[0]
        assert len(source.splitlines()) - len((ast.get_docstring(body) or "").splitlines()) <= 26, name


def test_the_walk_through_of_a_step_is_true():
    results = doctest.testmod(common)
    assert results.attempted > 10 and not results.failed


# ------------------------------------------------------------------------------------------------- flags
def test_every_flag_stands_in_a_group_in_the_order_of_help():
    named = " ".join(GROUPS.values()).split()
    assert named == [field.name for field in fields(common.Args)]


@pytest.mark.parametrize("script, flags, flag, reason", (
    ("luffy", ["--clip_low", "0.2"], "--clip_low", "without --clip"),
    ("luffy", ["--clip_high", "0.2"], "--clip_high", "without --clip"),
    ("luffy", ["--gamma", "0.2", "--shaping", "none"], "--gamma", "with --shaping none"),
    ("topr", ["--clip_low", "0.2"], "--clip_low", "without --weights ppo"),
    ("topr", ["--clip_high", "0.2", "--weights", "tis"], "--clip_high", "without --weights ppo"),
    ("topr", ["--offline", "x.jsonl", "--iterations", "2"], "--iterations", "with --offline"),
    ("topr", ["--offline", "x.jsonl", "--prompts", "2"], "--prompts", "with --offline"),
    ("topr", ["--offline", "x.jsonl", "--n", "2"], "--n", "with --offline"),
    ("topr", ["--offline", "x.jsonl", "--data", "toy"], "--data", "with --offline"),
    ("topr", ["--offline", "x.jsonl", "--save_rollouts"], "--save_rollouts", "with --offline"),
    ("grpo", ["--rollout", "transformers", "--gpu_memory_utilization", "0.5"], "--gpu_memory_utilization",
     "with --rollout transformers"),
))
def test_a_flag_that_does_nothing_is_one_line(script, flags, flag, reason, command_line, capsys):
    module = command_line(script, *flags)
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"{script}.py: error: {flag} does nothing {reason}: leave it out\n"


@pytest.mark.parametrize("script, flags", (
    ("luffy", ["--clip", "--clip_low", "0.1"]), ("luffy", ["--gamma", "0.2"]),
    ("topr", ["--weights", "ppo", "--clip_low", "0.1"]), ("topr", ["--offline", "x.jsonl", "--minibatch", "4"])))
def test_a_flag_that_does_something_is_not_refused(script, flags, command_line):
    module = command_line(script, *flags)
    assert common.parse(module.Args, module.__doc__)


@pytest.mark.parametrize("flags, expected", (
    ([], (0.9, 0.05)), (["--preset", "phi"], (0.1, 0.1)), (["--mu_peak", "0.1", "--mu_valley", "0.1"], (0.1, 0.1)),
    (["--mu_valley", "0"], (0.9, 0.0)), (["--preset", "phi", "--mu_peak", "0"], (0.0, 0.1))))
def test_an_explicit_value_beats_the_preset(flags, expected, command_line, monkeypatch):
    """Also one that is 0."""
    seen, module = [], command_line("chord", *flags)

    class Started(Exception):
        pass

    def run(args):
        seen.append((args.mu_peak, args.mu_valley))
        raise Started

    monkeypatch.setattr(module, "Run", run)
    with pytest.raises(Started):
        module.main()
    assert seen == [expected]


# --------------------------------------------------------------------------------------- what topr.py says
def test_topr_says_what_it_does(coin_model, coin_data, tmp_path):
    flags = ["--model", coin_model, "--data", coin_data, *SMALL, "--name", "x", "--minibatch", "6",
             "--epochs_per_iteration", "1", "--iterations", "1"]
    steps = flags.index("--steps")
    process = run_script("topr.py", *flags[:steps], *flags[steps + 2:], cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "3 steps on mini-batches of 6, of sets of 16 rows" in process.stdout
    assert json.loads((tmp_path / "runs" / "x" / "args.json").read_text())["steps"] == 3
    lines = (tmp_path / "runs" / "x" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]


# --------------------------------------------------------------------------------------------- what is read
def test_no_line_is_longer_than_110_characters():
    """Outside tests and benches, where ruff lets it be 120."""
    paths = [path for place in (".", "more", "runtime") for path in (ROOT / place).glob("*.py")]
    assert len(paths) > 20
    assert [f"{path}: {line}" for path in paths for line in path.read_text().splitlines() if len(line) > 110] == []


# ------------------------------------------------------------------------------------------- how it starts
def test_a_script_runs_from_any_folder_by_its_path(tmp_path):
    command = [sys.executable, str(ROOT / "luffy.py"), "--help"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0
    assert [f"\n{group}:\n" in process.stdout for group in GROUPS] == [True] * len(GROUPS)


def test_the_verifiers_processes_import_nothing_heavy():
    """They start in a moment: no torch, no transformers, none of this repository's modules."""
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
             for node in ast.walk(ast.parse((ROOT / "runtime" / "verification.py").read_text()))
             if isinstance(node, (ast.Import, ast.ImportFrom))}
    assert not {"torch", "transformers", "datasets", "tqdm"} & {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("script", SCRIPTS + MORE)
@pytest.mark.parametrize("flags, code", ((["--help"], 0), (["--modle", "toy"], 2), (["--n", "0"], 2)))
def test_help_and_a_typo_wait_for_no_heavy_import(script, flags, code, tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / f"{script}.py"), *flags]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == code
    modules = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines() if "|" in line}
    assert "argparse" in modules
    assert not {"torch", "transformers", "datasets"} & modules


@pytest.mark.skipif(bool(os.environ.get("REQUIRE_VLLM")), reason="vLLM's tests may use a card")
def test_no_card_is_seen_by_the_tests_or_by_what_they_start(tmp_path):
    show = tmp_path / "show.py"
    show.write_text("import os; print(repr(os.environ.get('CUDA_VISIBLE_DEVICES')))")
    assert run_script(show, cwd=tmp_path).stdout == "''\n"
    assert subprocess.check_output([sys.executable, str(show)], text=True) == "''\n"
    assert torch.cuda.device_count() == 0


# ------------------------------------------------------------------------------------- what is installed
@pytest.mark.parametrize("script", SCRIPTS + MORE)
def test_uv_run_installs_what_requirements_txt_says(script):
    """The comment block of PEP 723, read as the standard says."""
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    start = lines.index("# /// script")
    block = lines[start + 1:lines.index("# ///", start)]
    metadata = tomllib.loads("\n".join(line[2:] for line in block))
    required = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    tests_alone = ("pytest", "hypothesis")
    assert metadata == {
        "requires-python": ">=3.11",
        "dependencies": [line for line in required if not line.startswith(("#", *tests_alone))]}


def test_ruff_has_nothing_to_say():
    optional("ruff")
    process = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, text=True,
                             capture_output=True)
    assert process.returncode == 0, process.stdout
