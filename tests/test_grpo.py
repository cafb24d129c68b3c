"""GRPO's advantages and loss against the numbers of the authors' own code, and what must hold beside them."""
import math

import pytest
import torch
from conftest import assert_golden, golden, tensors

from grpo import group_advantages, grpo_loss


# Not ours by definition, so not compared: trl_group adds 1e-4 to the std, trl_batch takes the batch's std,
# luffy_split_* leave demonstrations out of the group's mean.
ADVANTAGES = golden("grpo_advantage", "verl_std", "verl_nostd", "trl_none", "trinity_grpo")


@pytest.mark.parametrize("case, variant", ADVANTAGES)
def test_advantages_equal_the_authors(case, variant):
    rewards, groups = tensors(case, "rewards", "group")
    std = variant["name"] in ("verl_std", "trinity_grpo")
    expected = torch.tensor(variant["expected"]["advantage_row"])
    alone = torch.tensor([(groups == group).sum() == 1 for group in groups])
    expected = torch.where(alone, 0.0, expected)  # verl gives a group of one A = R; here, as in TRL, it has 0
    # 1e-6: the official code has float32 constants even on float64 inputs
    assert_golden(case, group_advantages(rewards, groups, std), expected.tolist(), rtol=1e-6)


@pytest.mark.parametrize("std", (False, True))
@pytest.mark.parametrize("reward", (0.0, 1.0))
def test_a_group_of_equal_rewards_teaches_exactly_nothing(reward, std):
    rewards, groups = torch.full((9,), reward), torch.tensor([0] * 7 + [1, 2])
    assert not group_advantages(rewards, groups, std).any()  # not even a rounding error


# All variants of verl and ReLIFT, and those of TRL that divide one sum by one number.
# Not ours by definition: trl_grpo and trinity_seq_mean_token_mean take the mean of each row first;
# trinity_token_mean_dualclip has a second clip (which acts in pg-dev-2 alone).
LOSSES = golden(
    "policy_loss", "verl_token_mean_clip", "verl_token_mean_noclip", "verl_const_norm_clip",
    "verl_const_norm_noclip", "relift_const_norm_noclip", "relift_token_mean_clip", "trl_bnpo", "trl_dr_grpo",
    "trl_dapo")


def official_loss(case, variant, logp, old_logp, advantages, mask):
    """Our loss at the variant's settings, times B where the official code doesn't divide by it."""
    hyper, rows = variant["hyper"], len(mask)
    if "cliprange" in hyper:
        clip = (math.inf, math.inf) if hyper["loss_remove_clip"] else (hyper["cliprange"],) * 2
        constant = hyper["loss_remove_token_mean"]
        loss, metrics = grpo_loss(logp, old_logp, advantages, mask, None if constant else mask.sum(), *clip)
        return loss * rows if constant else loss, metrics
    constant = rows * hyper["max_completion_length"] if hyper["loss_type"] == "dr_grpo" else mask.sum()
    return grpo_loss(logp, old_logp, advantages, mask, constant, hyper["eps_low"], hyper["eps_high"])


@pytest.mark.parametrize("case, variant", LOSSES)
def test_loss_and_gradient_equal_the_authors(case, variant):
    logp, old_logp, advantages, mask = tensors(case, "logp", "old_logp", "advantage_row", "mask")
    loss, metrics = official_loss(case, variant, logp.requires_grad_(), old_logp, advantages, mask)
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, logp.grad, variant["expected"]["grad_logp"])

    official = variant["expected"]["metrics"]
    total, count = metrics["clip_fraction"]
    if "clip_ratio/region_mean" in official:
        assert total / count == pytest.approx(official["clip_ratio/region_mean"], rel=1e-6)
    if "ppo_kl" in official:
        total, count = metrics["kl/old_policy"]
        assert (total / count).item() == pytest.approx(official["ppo_kl"], rel=1e-6, abs=1e-9)
