"""What a run says while something takes time, what it says of its first step, and that what is quick says nothing."""
import doctest
import io
import sys
import time

import huggingface_hub.utils
import pytest
import transformers
from conftest import SMALL, write_jsonl
from tqdm import tqdm

from runtime import diagnosis, progress
from runtime.diagnosis import diagnose


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def impatient(monkeypatch):
    for name in ("PATIENCE", "FILE_EVERY"):
        monkeypatch.setattr(progress, name, 0.05)
    monkeypatch.setattr(progress, "AGAIN", 0.1)


# --------------------------------------------------------------------------------------------- bars and lines
@pytest.mark.parametrize("stream", (io.StringIO, Terminal))
@pytest.mark.parametrize("seconds", (0.0, 0.03))
def test_a_bar_appears_when_it_takes_time_and_leaves_the_runs_own_bar_alone(stream, seconds, impatient, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    own = tqdm(total=2, desc="own")
    start = len(sys.stderr.getvalue())
    for item in progress.bar(range(10), desc="parts"):
        time.sleep(seconds)
    shown = sys.stderr.getvalue()[start:]
    assert ("parts:" in shown) == (seconds > 0)
    own.update()
    own.close()
    assert "own:  50%" in sys.stderr.getvalue().rpartition("parts")[2]
    assert ("\x1b" in shown) == (stream is Terminal and seconds > 0)  # no moves of a cursor go to a file


def test_a_bar_that_is_left_early_is_gone(impatient, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for item in progress.bar(range(100), desc="parts"):
        time.sleep(0.02)
        if item == 5:
            break
    assert "parts:" in sys.stderr.getvalue()
    assert not sys.stderr.getvalue().rpartition("\r")[0].rpartition("\r")[2].strip()  # spaces stand in its place


def test_a_bar_takes_what_vllm_gives_it():
    bar = progress.bar(total=3, desc="Processed prompts", dynamic_ncols=True, postfix="est. speed input: 0.00 toks/s")
    bar.postfix = "est. speed input: 1.00 toks/s"
    bar.update(3)
    bar.close()
    assert list(progress.bar([1, 2], desc="Adding requests")) == [1, 2]


def test_a_line_says_what_takes_time_and_says_it_again(impatient, capsys):
    with progress.waiting("reading a book"):
        time.sleep(0.3)
    with pytest.raises(ValueError), progress.waiting("failing"):
        raise ValueError
    quick = progress.waiting("what is quick")(lambda number: number + 1)
    assert quick(1) == 2 and quick(2) == 3
    time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("reading a book ... (") for line in lines)


def test_every_part_of_a_run_is_shown(command_line, coin_model, tmp_path, monkeypatch, capsys):
    """Without any patience; with it, none of them is."""
    rows = [{"problem": f"a={i};a?", "answer": str(i % 2), "demonstration": f"<think>\n</think>\n\\boxed{{{i + 2}}}"}
            for i in range(12)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    parts = ("reading data", "loading ", f"{data}: prompts", "rows.jsonl: verifying the references and",
             "verifying:", "starting the sampler", "sampling:", "scoring:", "update:", "writing the checkpoint",
             "writing model/")
    for patience in (60.0, 0.0):
        for name in ("PATIENCE", "FILE_EVERY"):
            monkeypatch.setattr(progress, name, patience)
        command_line("grpo", "--model", coin_model, "--data", data, "--eval_data", data, *SMALL, "--steps", "1").main()
        shown = capsys.readouterr().err
        assert [part for part in parts if part in shown] == ([] if patience else list(parts))


def test_downloads_have_their_bars_and_transformers_has_none(make_run, coin_model, coin_data, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    huggingface_hub.utils.enable_progress_bars()
    try:
        make_run("grpo", "--model", coin_model, "--data", coin_data, *SMALL)
        for _ in huggingface_hub.utils.tqdm(range(3), desc="model.safetensors", name="huggingface_hub.http_get"):
            pass
        for _ in transformers.utils.logging.tqdm(range(3), desc="Loading weights"):
            pass
        assert "model.safetensors: 100%" in sys.stderr.getvalue()
        assert "Loading weights" not in sys.stderr.getvalue()
        transformers.utils.logging.disable_progress_bar()  # the user does not want to see any
        progress.show_only_downloads()
        assert huggingface_hub.utils.are_progress_bars_disabled()
    finally:
        transformers.utils.logging.disable_progress_bar()


# --------------------------------------------------------------------------------------------- the first step
HEALTHY = {"response/cut": 0.1, "response/thought": 0.8, "response/boxed": 0.7, "reward": 0.2, "groups/all_wrong": 0.6,
           "groups/all_right": 0.1, "sampler_gap": 3e-7, "gradient_norm": 0.1}
WRONG = {"groups/all_wrong": 1.0, "groups/all_right": 0.0, "reward": 0.0, "gradient_norm": 0.0}


@pytest.mark.parametrize("changed, options, said", (
    ({}, {}, []),
    (WRONG, {}, ["No response is right", "There are boxes, and none is right"]),
    (WRONG | {"gradient_norm": 0.3}, {}, ["No response is right", "There are boxes, and none is right"]),  # TOPR
    (WRONG | {"response/cut": 0.9, "response/thought": 0.1}, {}, ["No response is right", "raise --max_response"]),
    (WRONG | {"response/thought": 0.1}, {}, ["No response is right", "no </think>"]),
    (WRONG | {"response/boxed": 0.1}, {}, ["No response is right", r"no \boxed{}"]),
    ({"response/cut": 0.9, "response/thought": 0.1, "response/boxed": 0.05}, {}, []),  # few, but some are right
    ({"groups/all_wrong": 0.9, "groups/all_right": 0.0}, {}, []),
    (WRONG, {"imitates": True}, []),  # demonstrations show the way
    (WRONG | {"response/cut": 1.0, "response/thought": 0.0}, {"imitates": True}, ["raise --max_response"]),
    ({"groups/all_wrong": 0.0, "groups/all_right": 1.0, "gradient_norm": 0.0}, {}, ["Every response is right"]),
    ({"groups/all_wrong": 0.7, "groups/all_right": 0.3, "gradient_norm": 0.0}, {}, ["Every group is all right or all"]),
    ({"groups/all_wrong": 0.7, "groups/all_right": 0.3, "gradient_norm": 0.2}, {}, []),  # TOPR compares no groups
    ({"groups/all_wrong": 0.7, "groups/all_right": 0.3, "gradient_norm": 0.0}, {"imitates": True}, []),
    (WRONG, {"own_reward": True}, ["tells no response of a group from another"]),
    (WRONG | {"gradient_norm": 0.1}, {"own_reward": True}, []),  # rewards below 0
    ({"sampler_gap": 0.01}, {}, ["0.01 nats a token apart"]),
    ({"sampler_gap": 0.01}, {"device": "cuda"}, []),
    ({"sampler_gap": 0.06}, {"device": "cuda"}, ["0.06 nats a token apart"]),
    (WRONG | {"sampler_gap": 0.5}, {}, ["No response is right", "There are boxes", "0.5 nats a token apart"]),
))
def test_the_first_steps_diagnosis(changed, options, said):
    """One line if all is well; what else is said is said in this order."""
    first, *lines = diagnose(HEALTHY | changed, **{"device": "cpu", "imitates": False, "own_reward": False} | options)
    assert first.startswith("first step: ")
    assert len(lines) == len(said), lines
    for line, part in zip(lines, said):
        assert line.startswith("- ") and part in line


def test_without_rollouts_there_is_nothing_to_say():
    for name in ("response/cut", "response/thought"):  # a step without rollouts; without verification
        metrics = {key: value for key, value in HEALTHY.items() if key != name}
        assert diagnose(metrics, "cpu", imitates=True, own_reward=False) == []


def test_the_example_of_a_diagnosis_is_true():
    results = doctest.testmod(diagnosis)
    assert results.attempted > 1 and not results.failed


@pytest.mark.parametrize("script, answer, demonstration, said", (
    ("grpo", "1", "", 0), ("grpo", "7", "", 2), ("grpo", "7", "7", 2), ("luffy", "7", "7", 0), ("relift", "7", "7", 0),
    ("chord", "7", "7", 0), ("luffy", "7", "", 2)))
def test_a_run_says_it_once_and_only_where_nothing_can_be_learnt(
        script, answer, demonstration, said, command_line, coin_model, tmp_path, capsys):
    """The coin model answers 0 or 1."""
    demonstration = demonstration and f"<think>\n</think>\n\\boxed{{{demonstration}}}"
    rows = [{"problem": f"a={i};a?", "answer": answer, "demonstration": demonstration} for i in range(12)]
    flags = ["--expert_share", "0.2"] if script == "chord" else []
    command_line(script, "--model", coin_model, "--data", write_jsonl(tmp_path / "rows.jsonl", rows), *SMALL,
                 *flags).main()
    lines = capsys.readouterr().out.splitlines()
    place, = [number for number, line in enumerate(lines) if line.startswith("first step: ")]
    assert [line.startswith("- ") for line in lines].count(True) == said
    assert all(line.startswith("- ") for line in lines[place + 1:place + 1 + said])
