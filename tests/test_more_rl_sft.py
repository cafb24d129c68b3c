"""RL with SFT loss against the authors' numbers; its limits, GRPO and fine-tuning; who is compared with whom."""
from collections import Counter, defaultdict

import pytest
import torch
from conftest import SMALL, assert_golden, golden, load, read_jsonl, tensors, write_jsonl

from common import Run
from grpo import group_advantages, grpo_loss
from more.rl_sft import rl_sft_loss
from relift import sft_loss


@pytest.mark.parametrize("case, variant", golden("luffy_multitask"))
def test_loss_and_gradient_equal_the_authors(case, variant):
    """All of theirs. RL is a sum / T or a mean over rollout tokens, imitation a mean over demonstration tokens.

    Their clip_fraction is not compared: with the clip it is always 0, without it what the clip would have done.
    """
    logp, old_logp, advantages, mask, is_demo = tensors(
        case, "logp", "old_logp", "advantage_row", "mask", "is_expert")
    hyper, official = variant["hyper"], variant["expected"]["metrics"]
    rollout_tokens, demo_tokens = mask[is_demo == 0].sum(), mask[is_demo == 1].sum()
    normaliser = mask.shape[1] if hyper["loss_remove_token_mean"] else rollout_tokens
    clip = (torch.inf, torch.inf) if hyper["loss_remove_clip"] else (hyper["clip_ratio"], hyper["clip_ratio"])
    loss, metrics = rl_sft_loss(logp.requires_grad_(), old_logp, advantages, mask, is_demo, normaliser, demo_tokens,
                                hyper["sft_loss_coef"], *clip)
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, logp.grad, variant["expected"]["grad_logp"])
    for ours, theirs in (("token_loss/demonstrations", "sft_loss"), ("kl/old_policy", "ppo_kl")):
        total, count = metrics[ours]
        assert (total / count.clamp(min=1)).item() == pytest.approx(official[theirs], rel=2e-6, abs=1e-7)


def some_rows():
    torch.manual_seed(0)
    old_logp = -torch.rand(6, 7, dtype=torch.float64) * 3
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [5], [2], [6]])
    return old_logp + 0.4 * torch.randn(6, 7, dtype=torch.float64), old_logp, torch.randn(6).double(), mask


def test_it_is_grpo_on_the_rollouts_plus_fine_tuning_on_the_demonstrations():
    logp, old_logp, advantages, mask = some_rows()
    is_demo = torch.tensor([0, 1, 0, 1, 0, 0]).bool()
    a, b = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss, _ = rl_sft_loss(a, old_logp, advantages, mask, is_demo, 25, 9, 0.3, 0.2, 0.28)
    rollouts, demonstrations = ~is_demo, is_demo
    grpo, _ = grpo_loss(b[rollouts], old_logp[rollouts], advantages[rollouts], mask[rollouts], 25, 0.2, 0.28)
    total = grpo + 0.3 * sft_loss(b[demonstrations], mask[demonstrations], 9)[0]
    loss.backward()
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------ in a run
@pytest.fixture
def coins(tmp_path):
    """Writes problems for the coin model, which never answers a third of them; every fourth lacks a demonstration."""
    def write(demonstrated: bool) -> str:
        rows = [{"problem": f"a={i:02d};a?", "answer": str(i % 3),
                 "demonstration": f"<think>\n</think>\n\\boxed{{{i % 3}}}" if demonstrated and i % 4 else None}
                for i in range(24)]
        return write_jsonl(tmp_path / "coins.jsonl", rows)
    return write


def test_rollouts_are_compared_with_rollouts_alone(coin_model, coins, command_line, monkeypatch):
    """The demonstration takes a rollout's place in the batch, and no place in the group. It always counts."""
    steps = []

    def watched_score(run, rows, score=Run.score):
        steps.append(rows)
        score(run, rows)

    monkeypatch.setattr(Run, "score", watched_score)
    command_line("more/rl_sft", "--model", coin_model, "--data", coins(True), *SMALL, "--name", "x").main()
    for rows in steps:
        assert set(Counter(row.problem.index for row in rows).values()) == {4}
        groups = defaultdict(list)
        for row in rows:
            groups[row.problem].append(row)
        for problem, group in groups.items():
            rollouts = [row for row in group if not row.is_demo]
            assert len(rollouts) == (3 if problem.demonstration else 4)
            mean = sum(row.reward for row in rollouts) / len(rollouts)
            for row in rollouts:
                assert row.advantage == pytest.approx(row.reward - mean, abs=1e-6)
            assert all(row.advantage == 1 and row.reward == 1 for row in group if row.is_demo)
    rows = sum(steps, [])
    assert {row.is_demo for row in rows} == {True, False}
    assert any(row.advantage for row in rows if not row.is_demo)


def train(command_line, tmp_path, script: str, *flags: str):
    """Final weights, and metrics without times."""
    name = f"run {len(list(tmp_path.glob('runs/*')))}"
    command_line(script, *SMALL, "--updates", "2", "--eval_every", "9", "--name", name, *flags).main()
    lines = read_jsonl(tmp_path / "runs" / name / "metrics.jsonl")
    metrics = [{key: value for key, value in line.items() if not key.startswith("seconds/")} for line in lines]
    return load(str(tmp_path / "runs" / name / "model"), torch.float32)[0].state_dict(), metrics


def test_without_demonstrations_it_is_grpo_to_the_bit(coin_model, coins, command_line, tmp_path):
    flags = ["--model", coin_model, "--data", coins(False), "--entropy_bonus", "0.001"]
    weights, logs = train(command_line, tmp_path, "grpo", *flags)
    ours, our_logs = train(command_line, tmp_path, "more/rl_sft", *flags, "--clip")
    assert all(torch.equal(weights[name], ours[name]) for name in weights)
    for line, our_line in zip(logs, our_logs, strict=True):
        assert line | our_line == our_line


def test_what_token_mean_divides_by(coin_model, coins, command_line, tmp_path, monkeypatch):
    """Each sum by its own tokens in the whole mini-batch, whatever the micro-batches; else both by B L."""
    seen, module = [], command_line("more/rl_sft")
    monkeypatch.setattr(module, "rl_sft_loss", lambda *inputs: seen.append(inputs) or rl_sft_loss(*inputs))
    flags = ["--model", coin_model, "--data", coins(True), "--updates", "1", "--steps", "1"]
    for mean in ([], ["--token_mean"]):
        seen.clear()
        _, logs = train(command_line, tmp_path, "more/rl_sft", *flags, "--entropy_bonus", "0.001", *mean)
        tokens = [[inputs[3][inputs[4] == kind].sum().item() for inputs in seen] for kind in (False, True)]
        assert len(seen) > 1
        expected = [sum(counts) for counts in tokens] if mean else [16 * 40, 16 * 40]
        assert {inputs[5:7] for inputs in seen} == {tuple(expected)}


def test_advantages_are_the_authors():
    """Of rollouts; that of a demonstration is not used."""
    cases = {pair.values[0]["id"]: pair.values[0] for pair in golden("luffy_multitask")}.values()
    for case in cases:
        rewards, groups, is_demo, expected = tensors(case, "rewards", "group", "is_expert", "advantage_row")
        ours = group_advantages(rewards, torch.where(is_demo.bool(), -1, groups))
        torch.testing.assert_close(ours[is_demo == 0], expected[is_demo == 0], rtol=1e-6, atol=1e-7)
