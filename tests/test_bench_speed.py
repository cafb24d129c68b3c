"""bench/speed.py: what it counts, what it divides by what, and its clock in a run of grpo.py."""
import json
import sys

import pytest
from conftest import ROOT, read_jsonl

sys.path.append(str(ROOT / "bench"))
import speed  # noqa: E402


def test_the_first_two_steps_and_the_last_are_not_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counted = {"tokens": 1000, "responses": 20, "right": 5, "rollout": 0.25, "verification": 0.5, "scoring": 0.125}
    other = dict.fromkeys(counted, 10_000)
    speed.write_figures("ours", [0.0, 90.0, 100.0, 101.0, 103.0], [other, other, counted, counted, other])
    figures = json.loads((tmp_path / "ours.json").read_text())
    assert figures.pop("peak megabytes") > 100  # torch alone is more
    assert figures == {"whole": 1500, "rollout": 250, "verification": 500, "scoring": 125, "update": 625,
                       "scoring and update": 750, "tokens per response": 50, "reward": 0.25}


def test_ratios_are_of_ours_to_trl_within_a_pair():
    def figures(whole):
        return dict.fromkeys((*speed.PARTS, "peak megabytes"), whole)

    pairs = [{"ours": figures(1.0), "trl": figures(2.0)}, {"ours": figures(8.0), "trl": figures(4.0)},
             {"ours": figures(3.0), "trl": figures(4.0)}]
    summary = speed.summarise(pairs)
    assert summary["ours / trl"]["whole"] == {"min": 0.5, "median": 0.75, "max": 2.0}
    assert summary["ours"]["whole"] == 3.0 and summary["trl"]["whole"] == 4.0 and summary["pairs"] == 3


@pytest.mark.slow
def test_grpo_is_measured_and_its_prompts_are_handed_on_in_order(tiny_model, tmp_path):
    speed.python("-c", f"import speed; speed.run_ours({tiny_model!r}, 4)", folder=tmp_path)
    figures = json.loads((tmp_path / "ours.json").read_text())
    step = read_jsonl(tmp_path / "runs" / "ours" / "metrics.jsonl")[3]  # the only one that is counted
    assert step["step"] == 3
    assert figures["tokens per response"] == pytest.approx(step["response/length"])
    microseconds = 1e6 / (step["response/length"] * 128)
    assert figures["rollout"] == pytest.approx(step["seconds/rollout"] * microseconds)
    assert figures["update"] > 0
    parts = figures["rollout"] + figures["verification"] + figures["scoring"] + figures["update"]
    assert parts == pytest.approx(figures["whole"])
    given = json.loads((tmp_path / "given.json").read_text())
    assert len(given["rows"]) == 4 * 16
    samples = read_jsonl(tmp_path / "runs" / "ours" / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [1, 2, 3, 4]
    for sample in samples:
        prompts = given["rows"][(sample["step"] - 1) * 16:sample["step"] * 16]
        assert {"prompt": sample["prompt"], "answer": sample["answer"]} in prompts


def test_a_process_that_fails_ends_the_bench(tmp_path):
    with pytest.raises(RuntimeError, match="no such thing"):
        speed.python("-c", "raise SystemExit('no such thing')", folder=tmp_path)
