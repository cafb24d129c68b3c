"""bench/growth.py: both sides of a ratio do the same work, and the memory is that of a run."""
import sys

import pytest
import torch
import transformers
from conftest import ROOT

import common
from runtime.policy import Policy

sys.path.append(str(ROOT / "bench"))
import growth  # noqa: E402


def test_both_updates_have_the_same_gradient(tmp_path, monkeypatch):
    model = growth.random_model(tmp_path / "model", positions=64)
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--model", model, "--device", "cpu", "--max_prompt", "16",
                                      "--max_response", "40", "--eval_response", "1"])
    policy = Policy(common.parse(common.Args, "bench"), torch.device("cpu"))
    bare = transformers.AutoModelForCausalLM.from_pretrained(model)
    rows = growth.make_rows(40, 50)
    growth.update(policy, rows, 2 * 56)
    growth.bare_update(bare, rows, 2 * 56)
    for ours, theirs in zip(policy.model.parameters(), bare.parameters(), strict=True):
        assert theirs.grad.abs().max() > 0
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_a_ratio_is_of_ours_to_the_models_own(monkeypatch):
    monkeypatch.setattr(growth, "seconds", lambda function, *arguments: 3.0 if "bare" in str(function) else 6.0)
    update, rollout = growth.measure([8], repeats=2, micro_tokens=100)
    assert update == {"part": "update", "tokens": 8, "ratio": 2.0, "least": 2.0, "most": 2.0}
    assert rollout["part"] == "rollout" and rollout["ratio"] == 1.0  # two samplers of one class


@pytest.mark.slow
def test_the_memory_of_a_run_is_read_off():
    memory = growth.watch(10)
    assert list(memory) == ["megabytes after step 1", "megabytes after step 5", "megabytes after step 10"]
    assert all(100 < megabytes < 10_000 for megabytes in memory.values())
