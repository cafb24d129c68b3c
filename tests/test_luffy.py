"""LUFFY's loss against the numbers of the authors' own code, its equality with GRPO, its mixed batches."""
import math
from collections import Counter

import pytest
import torch
from conftest import SMALL, assert_golden, golden, tensors, write_jsonl

from grpo import grpo_loss
from luffy import luffy_loss, make_batch

# Not offered here, so not compared: the shapings p_logp, logp, square_root and pow, clips of the
# demonstrations' ratio, and target_probs.
LOSSES = golden("luffy", "train_sh", "clip_on", "token_mean", "clip_on_token_mean", "no_reshape",
                "p_div_p_0.5", "train_on_policy_sh")


def official_loss(case, variant, logp, is_demo):
    """Our loss at the variant's settings, times B where the official code doesn't divide by it."""
    old_logp, advantages, mask = tensors(case, "old_logp", "advantage_row", "mask")
    hyper, reshape = variant["hyper"], variant["hyper"]["off_policy_reshape"]
    constant = hyper["loss_remove_token_mean"]
    loss, metrics = luffy_loss(
        logp, old_logp, advantages, mask, is_demo, normaliser=None if constant else mask.sum(),
        gamma=None if reshape == "no_reshape" else float(reshape.removeprefix("p_div_p_")),
        clip_low=None if hyper["loss_remove_clip"] else hyper["cliprange"],
        clip_high=None if hyper["loss_remove_clip"] else hyper["cliprange"])
    return loss * len(mask) if constant else loss, metrics


@pytest.mark.parametrize("case, variant", LOSSES)
def test_loss_and_gradient_equal_the_authors(case, variant):
    logp, prefix_mask = tensors(case, "logp", "prefix_mask")
    loss, metrics = official_loss(case, variant, logp.requires_grad_(), prefix_mask)
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, logp.grad, variant["expected"]["grad_logp"])

    official = variant["expected"]["metrics"]
    for ours, theirs in (("token_loss/rollouts", "on_pg_loss"), ("token_loss/demonstrations", "off_pg_loss")):
        total, count = metrics[ours]
        if official[theirs] == "nan":
            assert count == 0  # the official mean over no token; ours is left to whoever has the whole step
        else:
            assert total.item() / max(1, count.item()) == pytest.approx(official[theirs], rel=2e-6, abs=1e-12)
    if not prefix_mask.any():  # the official ones count the tokens of demonstrations too
        for ours, theirs in (("clip_fraction", "on_pg_clipfrac"), ("kl/old_policy", "ppo_kl")):
            total, count = metrics[ours]
            assert (total / count).item() == pytest.approx(official[theirs], rel=1e-6)


@pytest.mark.parametrize("case, variant", LOSSES)
def test_whole_rows_may_be_named_instead_of_tokens(case, variant):
    logp, mask, is_expert, prefix_mask = tensors(case, "logp", "mask", "is_expert", "prefix_mask")
    if torch.equal(prefix_mask, is_expert[:, None] * mask):
        loss, _ = official_loss(case, variant, logp, is_expert)
        assert_golden(case, loss, variant["expected"]["loss"])
    else:  # a row of which only the beginning is a demonstration
        assert case["id"] == "luffy-dev-5"


def some_rows(dtype):
    torch.manual_seed(0)
    old_logp = -torch.rand(6, 7, dtype=dtype) * 3
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [5], [2], [6]])
    return old_logp + 0.4 * torch.randn(6, 7, dtype=dtype), old_logp, torch.randn(6, dtype=dtype), mask


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("normaliser", (None, 25))
@pytest.mark.parametrize("clip, grpo_clip", (
    ((0.2, 0.28), (0.2, 0.28)), ((None, None), (math.inf, math.inf))))
def test_without_demonstrations_it_is_grpo_to_the_bit(clip, grpo_clip, normaliser, dtype):
    logp, old_logp, advantages, mask = some_rows(dtype)
    a, b = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    no_demo = torch.zeros(6, dtype=bool)
    loss, metrics = luffy_loss(a, old_logp, advantages, mask, no_demo, normaliser, 0.1, *clip)
    grpo, grpo_metrics = grpo_loss(b, old_logp, advantages, mask, normaliser, *grpo_clip)
    loss.backward()
    grpo.backward()
    assert torch.equal(loss, grpo)
    assert torch.equal(a.grad, b.grad)
    assert metrics | grpo_metrics == metrics


@pytest.mark.parametrize("gamma, weight", (
    (0.1, lambda p: 0.1 * p / (p + 0.1) ** 2),
    (0.5, lambda p: 0.5 * p / (p + 0.5) ** 2),
    (None, lambda p: p),
))
def test_weight_of_a_demonstration_token(gamma, weight):
    """df/dlogp = gamma p / (p + gamma)^2, from the impossible to the certain token, and never clipped."""
    logp = torch.tensor([[-700.0, -50.0, -5.0, -1.5, -0.5, -1e-3, 0.0]], dtype=torch.float64).requires_grad_()
    old_logp = torch.full_like(logp, math.nan)  # of demonstrations it is not read
    demo, advantage = torch.ones(1, dtype=bool), torch.tensor([0.5], dtype=torch.float64)
    loss, _ = luffy_loss(logp, old_logp, advantage, torch.ones(1, 7), demo, 1, gamma, 0.2, 0.2)
    loss.backward()
    expected = -0.5 * weight(logp.detach().exp())
    torch.testing.assert_close(logp.grad, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gamma", (0.1, None))
def test_gradient_is_that_of_the_loss(gamma):
    logp, old_logp, advantages, mask = some_rows(torch.float64)
    is_demo = torch.tensor([1, 0, 0, 1, 0, 0])
    assert torch.autograd.gradcheck(
        lambda x: luffy_loss(x, old_logp, advantages, mask, is_demo, None, gamma)[0], logp.requires_grad_())


# ---------------------------------------------------------------------------------------- what is in a batch
def test_a_demonstration_takes_the_place_of_a_rollout(make_run, tiny_model, tmp_path):
    thought, long_thought = "<think>\n</think>\n\\boxed{1}", f"<think>\n{'a=1' * 50}</think>\n\\boxed{{1}}"
    rows = [{"problem": f"a=1;{name}?", "answer": "1", "demonstration": demonstration}
            for name, demonstration in zip("abcd", (thought, long_thought, None, thought))]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = make_run("luffy", "--model", tiny_model, "--data", data, *SMALL)
    problems = sorted(run.train, key=lambda problem: problem.index)
    batch = make_batch(run, run.args, [problems[i] for i in (2, 0, 1, 3)])
    assert Counter(row.problem.index for row in batch) == {0: 4, 1: 4, 2: 4, 3: 4}
    assert sorted(row.problem.index for row in batch if row.is_demo) == [0, 3]  # 1 doesn't fit, 2 has none
    assert all((row.sampler_logp is None) == row.is_demo for row in batch)
    eos = run.policy.tokenizer.eos_token_id
    assert all(row.response[-1] == eos for row in batch if row.is_demo)
    assert run.record.sums["demonstrations/left_out"][0] == 1
    # a demonstration's reward is the verifier's, and the other rewards come from what the rollouts say
    rewards = run.verify(batch)
    assert [reward for row, reward in zip(batch, rewards.tolist()) if row.is_demo] == [1.0, 1.0]
