"""SRFT's loss against the numbers of its second authors' code and of the paper's formula; weights, rows, limits."""
import math

import pytest
import torch
from conftest import SMALL, assert_golden, golden, read_jsonl, tensors, write_jsonl

from common import Run
from grpo import group_advantages
from luffy import luffy_loss
from more.srft import srft_loss

# Not SRFT's, so not compared: srft_exp and srft_classic_rl weigh rollouts in other ways.
OFFICIAL = golden("srft", "train_srft_sh", "no_reshape", "token_mean")
OWN = golden("srft", "one_normaliser", "one_normaliser_paper")


def advantages_of(case, advantage_row: torch.Tensor) -> torch.Tensor:
    """As main() sets them: A of demonstrations, and of rollouts 1 if right, -1 if wrong."""
    rewards, is_demo = tensors(case, "rewards", "is_expert")
    return torch.where(is_demo.bool(), advantage_row, 2 * rewards - 1)


@pytest.mark.parametrize("case, variant", OFFICIAL)
def test_loss_and_gradient_equal_those_of_the_code(case, variant):
    """Its imitation is a mean over the demonstrations' tokens, the rest is a sum / T, or a mean over all tokens."""
    logp, entropy, advantages, mask, is_demo = tensors(
        case, "logp", "entropy", "advantage_row", "mask", "is_expert")
    hyper, official = variant["hyper"], variant["expected"]["metrics"]
    normaliser = mask.shape[1] if hyper["loss_remove_token_mean"] else mask.sum().item()
    demo_tokens = max(1, mask[is_demo == 1].sum().item())
    loss, metrics = srft_loss(
        logp.requires_grad_(), entropy, advantages_of(case, advantages), mask, is_demo, normaliser,
        gamma=None if hyper["off_policy_reshape"] == "no_reshape" else 0.1,
        sft_weight=0.5 * normaliser / demo_tokens)
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, logp.grad, variant["expected"]["grad_logp"])
    if demo_tokens > 1:
        total, count = metrics["weight/demonstrations"]
        weights = torch.tensor(official["sft_coef"])[is_demo == 1]
        expected = (weights * mask[is_demo == 1].sum(dim=1)).sum().item() / demo_tokens
        assert (total / count).item() * demo_tokens / normaliser == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("case, variant", OWN)
def test_loss_and_gradient_equal_the_formula(case, variant):
    logp, entropy, mask, is_demo, rewards, groups = tensors(
        case, "logp", "entropy", "mask", "is_expert", "rewards", "group")
    hyper, expected = variant["hyper"], variant["expected"]
    row = torch.tensor(expected["metrics"]["advantage_row"], dtype=logp.dtype)
    if len(set(groups.tolist())) < len(groups):  # groups of one have A = R there, which no run has
        ours = group_advantages(rewards, groups, hyper["std_normalise"])
        torch.testing.assert_close(ours, row, rtol=1e-9, atol=1e-12)
    loss, _ = srft_loss(logp.requires_grad_(), entropy, advantages_of(case, row), mask, is_demo,
                        gamma=0.1 if hyper["shaping"] else None)
    loss.backward()
    assert_golden(case, loss, expected["loss"])
    assert_golden(case, logp.grad, expected["grad_logp"])


def some_rows():
    torch.manual_seed(0)
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [5], [2], [6]])
    return (-torch.rand(6, 7, dtype=torch.float64) * 3, torch.rand(6, 7, dtype=torch.float64) * 2,
            torch.tensor([0.75, 1, -1, 0.25, 1, -1]).double(), mask, torch.tensor([1, 0, 0, 1, 0, 0]))


def test_no_gradient_goes_through_the_entropy():
    logp, entropy, *rest = some_rows()
    entropy.requires_grad_()
    loss, metrics = srft_loss(logp.requires_grad_(), entropy, *rest)
    loss.backward()
    assert entropy.grad is None
    assert not any(total.requires_grad for total, _ in metrics.values())
    assert torch.autograd.gradcheck(lambda x: srft_loss(x, entropy.detach(), *rest)[0], logp)


def test_rollouts_have_weights_of_their_own_whatever_their_group_did():
    """-1 exactly for wrong ones; 0.1 e^h for right ones, where uniform logits over V tokens have e^h = V."""
    logits = torch.zeros(2, 3, 11, dtype=torch.float64)
    logp = logits.log_softmax(dim=-1)
    entropy = -(logp.exp() * logp).sum(dim=-1)
    logp = logp[..., 0].clone().requires_grad_()
    loss, metrics = srft_loss(logp, entropy, torch.tensor([1.0, -1.0]), torch.ones(2, 3), torch.zeros(2), 1)
    loss.backward()
    torch.testing.assert_close(-logp.grad, torch.tensor([[1.1] * 3, [-1.0] * 3]).double(), rtol=1e-7, atol=0)
    assert torch.equal(-logp.grad[1], torch.full((3,), -1.0, dtype=torch.float64))
    assert (metrics["weight/positives"][0] / 3).item() == pytest.approx(1.1)
    assert (metrics["logp/negatives"][0] / 3).item() == pytest.approx(-math.log(11))


def test_h_is_the_rows_mean_over_its_own_tokens():
    logp, entropy, advantages, mask, is_demo = some_rows()
    logp = logp.requires_grad_()
    srft_loss(logp, entropy, advantages * 0, mask, is_demo, 1)[0].backward()
    for row in (0, 3):  # demonstrations at A = 0: imitation is left
        h = entropy[row][mask[row]].mean()
        expected = (-0.5 * (-h).exp() * mask[row]).detach()
        torch.testing.assert_close(logp.grad[row], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gamma", (0.1, None))
def test_without_imitation_a_demonstration_is_luffys(gamma):
    logp, entropy, advantages, mask, _ = some_rows()
    demo = torch.ones(6)
    loss, _ = srft_loss(logp, entropy, advantages, mask, demo, 25, gamma, sft_weight=0)
    torch.testing.assert_close(loss, luffy_loss(logp, logp, advantages, mask, demo, 25, gamma)[0])


def test_constant_weights_are_those_at_an_entropy_of_0():
    logp, entropy, *rest = some_rows()
    loss, metrics = srft_loss(logp, entropy, *rest, constant_weights=True)
    assert torch.equal(loss, srft_loss(logp, torch.zeros_like(entropy), *rest)[0])
    assert loss != srft_loss(logp, entropy, *rest)[0]
    assert metrics["entropy/demonstrations"][0] > 0


# ------------------------------------------------------------------------------------------------ in a run
def test_every_row_of_a_run_is_in_the_update(coin_model, command_line, tmp_path, monkeypatch):
    """Also demonstrations of A = 0, of groups that are all right; a prompt without one has n rollouts."""
    texts = [f"<think>\n</think>\n\\boxed{{{i % 2}}}" for i in range(24)]
    rows = [{"problem": f"a={i:02d};a?", "answer": str(i % 2), "demonstration": text if i else None}
            for i, text in enumerate(texts)]
    data, batches, minibatches = write_jsonl(tmp_path / "coins.jsonl", rows), [], []

    def watched_logprobs(run, batch, *args, logprobs=Run.logprobs, **kwargs):
        logp, entropy = logprobs(run, batch, *args, **kwargs)
        batches.append((batch, entropy.detach()))
        return logp, entropy

    def watched_step(run, minibatch, optimizer_step=Run.optimizer_step):
        minibatches.append(minibatch)
        optimizer_step(run, minibatch)

    monkeypatch.setattr(Run, "logprobs", watched_logprobs)
    monkeypatch.setattr(Run, "optimizer_step", watched_step)
    command_line("more/srft", "--model", coin_model, "--data", data, *SMALL, "--prompts", "22", "--n", "2",
                 "--steps", "1", "--entropy_bonus", "0", "--name", "x").main()
    line = read_jsonl(tmp_path / "runs" / "x" / "metrics.jsonl")[1]

    trained = [row for minibatch in minibatches for row in minibatch]
    assert sum(len(batch.mask) for batch, _ in batches) == len(trained) == 22 * 2
    assert any(row.is_demo and row.advantage == 0 for row in trained)
    assert all(row.advantage == (1 if row.reward else -1) for row in trained if not row.is_demo)
    for row in trained:
        if row.is_demo:
            group = [other.reward for other in trained if other.problem is row.problem]
            assert row.advantage == pytest.approx(1 - sum(group) / len(group))
    assert 0 < line["reward"] < 1 and line["logp/negatives"] < 0 and line["entropy/demonstrations"] > 0
    demo = torch.cat([entropy[batch.is_demo] for batch, entropy in batches])
    assert demo.min() >= 0 and demo.mean().item() == pytest.approx(line["entropy/demonstrations"], rel=1e-5)
    assert 0.1 < line["weight/positives"] < 0.2 and 0.25 < line["weight/demonstrations"] < 0.5
