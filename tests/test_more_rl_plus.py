"""RL-PLUS's loss against the numbers of the authors' code; its weight, its limits, and what of a run it reads."""
import math
from collections import Counter

import pytest
import torch
from conftest import SMALL, assert_golden, golden, read_jsonl, tensors, write_jsonl

from common import Run
from grpo import grpo_loss
from luffy import luffy_loss
from more.rl_plus import make_batch, rl_plus_loss


# ------------------------------------------------------------------------------------------------ the loss
@pytest.mark.parametrize("case, variant", golden("rlplus"))
def test_loss_and_gradient_equal_the_authors(case, variant):
    """All variants. Their script's loss is B times ours; with a mean over tokens it is ours."""
    logp, old_logp, advantages, mask, is_demo = tensors(
        case, "logp", "old_logp", "advantage_row", "mask", "prefix_mask")
    hyper, official = variant["hyper"], variant["expected"]["metrics"]
    clip = (None, None) if hyper["loss_remove_clip"] else (hyper["cliprange"], hyper["cliprange"])
    normaliser = mask.shape[1] if hyper["loss_remove_token_mean"] else mask.sum()
    loss, metrics = rl_plus_loss(
        logp.requires_grad_(), old_logp, advantages, mask, is_demo, normaliser, 0.5, 1.0, *clip)
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, logp.grad, variant["expected"]["grad_logp"])
    _, unexplored = rl_plus_loss(logp, old_logp, advantages, mask, is_demo, gamma=0)
    for (total, count), theirs in ((metrics["token_loss/rollouts"], "on_pg_loss"),
                                   (metrics["token_loss/demonstrations"], "off_pg_loss"),
                                   (unexplored["weight/demonstrations"], "off_ratio_mean")):
        assert count > 0
        assert (total / count).item() == pytest.approx(official[theirs], rel=2e-6)


def some_rows():
    torch.manual_seed(0)
    old_logp = -torch.rand(6, 7, dtype=torch.float64) * 3
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [5], [2], [6]])
    logp = (old_logp + 0.4 * torch.randn(6, 7, dtype=torch.float64)).clamp(max=-1e-3)
    return logp, old_logp, torch.randn(6).double(), mask


@pytest.mark.parametrize("clip", ((0.2, 0.28), (None, None)))
def test_without_demonstrations_it_is_luffy_and_grpo_to_the_bit(clip):
    rows = some_rows()
    losses = [(rl_plus_loss, (25, 0.5, 1.0, *clip)), (luffy_loss, (25, 0.1, *clip))]
    a, b, c = [rows[0].clone().requires_grad_() for _ in range(3)]
    results = [loss_of(logp, *rows[1:], torch.zeros(6), *settings)
               for logp, (loss_of, settings) in zip((a, b), losses)]
    results.append(grpo_loss(c, *rows[1:], 25, *(math.inf if side is None else side for side in clip)))
    for loss, _ in results:
        loss.backward()
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][0], results[2][0])
    assert torch.equal(a.grad, b.grad) and torch.equal(a.grad, c.grad)
    assert results[0][1] | results[2][1] == results[0][1]


@pytest.mark.parametrize("gamma", (0.0, 0.5, 2.0))
@pytest.mark.parametrize("uniform", (1.0, 1 / 150_000))
def test_weight_of_a_demonstration_token(gamma, uniform):
    """The gradient is A w (1-p)^gamma and no more: neither 1 - p nor the mixture have one. Nothing explodes."""
    p = torch.tensor([[0.0, 1e-12, 1e-3, 1e-3, 0.3, 0.9, 1.0]], dtype=torch.float64)
    old_p = torch.tensor([[0.0, 1e-3, 1e-3, 0.0, 0.1, 0.95, 1.0]], dtype=torch.float64)
    logp = p.log().clamp(min=-800).requires_grad_()
    advantage, demo = torch.tensor([-0.5], dtype=torch.float64), torch.ones(1)
    loss, _ = rl_plus_loss(logp, old_p.log(), advantage, torch.ones(1, 7), demo, 1, gamma, uniform, 0.2, 0.2)
    loss.backward()
    stand_in = (old_p + uniform) / 2
    expected = 0.5 * p / ((stand_in + old_p) / 2) * (1 - p) ** gamma
    torch.testing.assert_close(logp.grad, expected, rtol=1e-12, atol=1e-300)
    assert (logp.grad <= 0.5 * 4 * p / uniform * (1 + 1e-12)).all()  # where pi_old is 0 too
    assert (logp.grad[0, -1] == 0) == (gamma > 0)


def test_the_figures_of_its_docstring():
    def weight(p: float, old_p: float, gamma: float, uniform: float) -> float:
        logp, old_logp = (torch.tensor([[value]], dtype=torch.float64).log() for value in (p, old_p))
        _, metrics = rl_plus_loss(
            logp, old_logp, torch.ones(1), torch.ones(1, 1), torch.ones(1), gamma=gamma, uniform=uniform)
        return metrics["weight/demonstrations"][0].item()

    assert weight(1e-3, 1e-3, 0, 1 / 150_000) == pytest.approx(1.33, abs=5e-3)
    assert weight(1e-3, 1e-3, 0, 1) == pytest.approx(0.004, abs=5e-4)
    weights = [weight(p / 100, p / 100, 0.5, 1) for p in range(1, 100)]
    assert max(weights) == weights[45] == pytest.approx(0.57, abs=5e-3)  # at p = 0.46
    assert weight(0.9, 0.3, 0, 1) > 1  # likelier than it was


def test_a_probability_that_rounds_above_1_is_a_certain_token():
    logp = torch.tensor([[1e-6]]).requires_grad_()
    loss, _ = rl_plus_loss(logp, torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1), torch.ones(1))
    loss.backward()
    assert loss == 0 and logp.grad == 0


# ------------------------------------------------------------------------------------------------ in a run
def test_a_demonstration_takes_the_place_of_a_rollout(make_run, tiny_model, tmp_path):
    thought, long_thought = "<think>\n</think>\n\\boxed{1}", f"<think>\n{'a=1' * 50}</think>\n\\boxed{{1}}"
    rows = [{"problem": f"a=1;{name}?", "answer": "1", "demonstration": demonstration}
            for name, demonstration in zip("abcd", (thought, long_thought, None, thought))]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = make_run("more/rl_plus", "--model", tiny_model, "--data", data, *SMALL)
    batch = make_batch(run, run.args, run.train)
    assert Counter(row.problem.index for row in batch) == {0: 4, 1: 4, 2: 4, 3: 4}
    assert sorted(row.problem.index for row in batch if row.is_demo) == [0, 3]  # 1 doesn't fit, 2 has none


def test_the_old_log_probs_of_demonstrations_are_the_policys_before_the_step(
        coin_model, command_line, tmp_path, monkeypatch):
    """In the first update of a step they are those that the loss gets; in the second no more."""
    rows = [{"problem": f"a={i:02d};a?", "answer": str(i % 2),
             "demonstration": f"<think>\n</think>\n\\boxed{{{i % 2}}}"} for i in range(24)]
    data, updates = write_jsonl(tmp_path / "coins.jsonl", rows), [[]]

    def watched_logprobs(run, batch, *args, logprobs=Run.logprobs):
        logp, entropy = logprobs(run, batch, *args)
        updates[-1].append((logp.detach() - batch.old_logp)[batch.mask & batch.is_demo])
        return logp, entropy

    def watched_step(run, minibatch, optimizer_step=Run.optimizer_step):
        optimizer_step(run, minibatch)
        updates.append([])

    monkeypatch.setattr(Run, "logprobs", watched_logprobs)
    monkeypatch.setattr(Run, "optimizer_step", watched_step)
    command_line("more/rl_plus", "--model", coin_model, "--data", data, *SMALL, "--steps", "1", "--updates", "2",
                 "--entropy_bonus", "0", "--name", "x").main()
    first, second = [torch.cat(parts) for parts in updates if parts]
    assert len(first) and first.abs().max() < 1e-5
    assert len(second) and second.abs().max() > 1e-2
    line = read_jsonl(tmp_path / "runs" / "x" / "metrics.jsonl")[1]
    assert 0 < line["weight/demonstrations"] < 1 and line["reward/demonstrations"] == 1
