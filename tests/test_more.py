"""The methods around the five: every file in more/, and so a new one too, each a small diff of the one it names.

What the five are held to beside this, they are held to in test_scripts.py, test_house.py and test_losses.py.
"""
import doctest
import importlib
import json
import math
import os
import re
import subprocess
import sys

import pytest
from conftest import MORE, ROOT, SCRIPTS, SMALL, load, read_jsonl, run_script, write_jsonl
from test_scripts import changed_lines

from runtime import memory

sys.path.append(str(ROOT / "bench"))
import curves  # noqa: E402

each_script = pytest.mark.parametrize("script", MORE)
README = (ROOT / "more" / "README.md").read_text()


def parent(script: str) -> str:
    """The script that the first line of its docstring names."""
    first = (ROOT / f"{script}.py").read_text().splitlines()[0]
    return re.fullmatch(r'""".+ A diff of (\w+)\.py\.', first).group(1)


# ------------------------------------------------------------------------------------------------- shape
@each_script
def test_a_method_is_a_small_diff_of_its_parent(script):
    assert parent(script) in SCRIPTS
    assert len(changed_lines(script, parent(script))) <= 80


@each_script
def test_it_finds_the_root_in_the_same_words(script):
    """Before the imports; so it starts from any folder."""
    source = (ROOT / f"{script}.py").read_text()
    found = source.index("sys.path.insert(0, str(Path(__file__).parent.parent))  # where common.py and the five are\n")
    assert found < source.index("\nimport common  # first: it reads the flags")


@each_script
def test_every_function_but_the_loop_has_an_example_that_is_true(script):
    module = importlib.import_module(script.replace("/", "."))
    functions = {name for name, value in vars(module).items()
                 if callable(value) and value.__module__ == module.__name__} - {"Args", "make_batch", "main"}
    examples = {example.name.rpartition(".")[2]: example for example in doctest.DocTestFinder().find(module)}
    assert any(name.endswith("_loss") for name in functions)
    for name in functions:
        report = []
        results = doctest.DocTestRunner().run(examples[name], out=report.append)
        assert results.attempted > 0, name
        assert not results.failed, "".join(report)


@each_script
def test_memory_is_estimated_for_as_many_optimisers_as_it_has(script):
    names = re.findall(r"moments=(\"\w+\")", (ROOT / f"{script}.py").read_text())
    assert (script.removeprefix("more/") in memory.TWO_OPTIMIZERS) == bool(names)


# --------------------------------------------------------------------------------------------------- runs
@each_script
def test_it_starts_as_a_module_too(script):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run([sys.executable, "-m", script.replace("/", "."), "--help"], cwd=ROOT, env=env,
                             text=True, capture_output=True)
    assert process.returncode == 0, process.stderr
    assert "\nthis method:\n" in process.stdout


@each_script
def test_two_steps_in_an_empty_folder(script, tiny_model, tmp_path):
    process = run_script(
        f"{script}.py", "--model", tiny_model, "--data", "toy", "--eval_data", "toy", "--steps", "2",
        "--prompts", "4", "--n", "4", "--eval_response", "16", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    folder = tmp_path / "runs" / f"{script.removeprefix('more/')}-tiny-1"  # the name that it gives itself
    assert json.loads((folder / "args.json").read_text())["script"] == script.removeprefix("more/")
    assert (folder / "model" / "config.json").exists()
    lines = read_jsonl(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    if script == "more/dapo":  # no rollout is right, so no group is left to be scored
        assert lines[1]["dapo/in_vain"] == 1
    else:
        assert lines[1]["sampler_gap"] < 1e-5
    documented = re.findall(r"`([^`]+)`", (ROOT / "docs" / "metrics.md").read_text())
    for name in (lines[1].keys() | lines[2].keys()) - {"step"}:
        assert name.replace(name.partition("/")[2], "<slice>") in documented or name in documented, name


@pytest.fixture
def demonstrated_coins(tmp_path) -> str:
    """Problems for the coin model, which never answers a third of them, with demonstrations."""
    rows = [{"problem": f"a={i:02d};a?", "answer": str(i % 3),
             "demonstration": f"<think>\n</think>\n\\boxed{{{i % 3}}}"} for i in range(24)]
    return write_jsonl(tmp_path / "coins.jsonl", rows)


@each_script
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit_and_micro_batches_change_nothing(
        script, coin_model, demonstrated_coins, command_line, tmp_path):
    def run(name: str, *flags: str) -> list[dict]:
        command_line(script, "--model", coin_model, "--data", demonstrated_coins, *SMALL, "--name", name, *flags).main()
        return [{key: value for key, value in line.items() if not key.startswith("seconds/")}
                for line in read_jsonl(tmp_path / "runs" / name / "metrics.jsonl")]

    whole = run("whole")
    run("resumed", "--steps", "1")
    assert run("resumed", "--resume")[-1] == whole[-1]
    weights = [load(str(tmp_path / "runs" / name / "model"))[0].state_dict() for name in ("whole", "resumed")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])

    one_by_one = run("one by one", "--micro_tokens", "1", "--steps", "1")[1]
    assert 0 < one_by_one["reward"] < 1 and one_by_one["gradient_norm"] > 0
    for name in whole[1].keys() - {"step"}:
        assert one_by_one[name] == pytest.approx(whole[1][name], rel=1e-3, abs=1e-5), name


# ------------------------------------------------------------------------------------------------- README
def test_the_table_has_every_file_and_counts_its_lines():
    rows = re.findall(r"^\| \[`(\w+)\.py`\]\(\1\.py\) \|.*\| `(\w+)\.py` \| (\d+) \|", README, re.MULTILINE)
    assert sorted(f"more/{name}" for name, _, _ in rows) == MORE
    for name, above, changed in rows:
        assert above == parent(f"more/{name}")
        assert int(changed) == len(changed_lines(f"more/{name}", above)), name
    assert set(re.findall(r"`(?:more/)?(\w+\.py)`", README)) <= {
        f"{name.rpartition('/')[2]}.py" for name in MORE + SCRIPTS + ["common"]}


def test_the_table_of_the_field_is_that_of_the_measured_curves():
    lines = curves.read(curves.FIELD_RESULTS)
    assert set(curves.FIELD) == {line["method"] for line in lines}
    assert f"<!-- table -->\n{curves.make_table(lines, curves.FIELD, 'hard', time=False)}\n<!-- end -->\n" in README
