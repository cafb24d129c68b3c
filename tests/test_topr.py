"""TOPR's loss against numbers of the paper's definition, its sets of old responses, and training offline."""
import math
from collections import Counter

import pytest
import torch
from conftest import SMALL, SMALL_OFFLINE, assert_golden, golden, read_jsonl, run_script, tensors

from common import Row
from runtime.rows import collate
from relift import sft_loss
from topr import pick, topr_loss

WEIGHTS = ("topr", "tis", "reinforce", "ppo")


# Not the paper's definition, so not compared: ROLL and Trinity weigh each token by itself.
@pytest.mark.parametrize("case, variant", golden("topr", "paper_trajectory_level"))
def test_loss_and_gradient_equal_the_paper(case, variant):
    ungrouped = case | {"inputs": case["inputs"] | {"group": []}}  # there is no group in it
    logp, old_logp, rewards, mask = tensors(ungrouped, "logp", "old_logp", "rewards", "mask")
    loss, metrics = topr_loss(logp.requires_grad_(), old_logp, rewards, mask)
    loss.backward()
    expected = variant["expected"]
    assert_golden(case, loss, expected["loss"])
    assert_golden(case, logp.grad, expected["grad_logp"])
    assert_golden(case, topr_loss(logp, old_logp, rewards, mask, 1)[0], expected["loss_sum"])

    total, count = metrics["weight/negatives"]
    weights = [weight for weight, reward in zip(expected["weight"], rewards) if reward < 0]
    assert count == len(weights)
    assert total.item() == pytest.approx(sum(weights), rel=1e-9)
    total, count = metrics["kl/old_policy"]
    assert count == mask.sum()
    assert total.item() == pytest.approx(-sum(expected["seq_log_ratio"]), rel=1e-9, abs=1e-12)


def some_rows(dtype=torch.float64):
    """logp, old_logp, rewards, mask of eight rows, of either sign with ratios above and below 1."""
    torch.manual_seed(1)
    old_logp = -torch.rand(8, 7, dtype=dtype) * 3
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [5], [2], [6], [3], [7]])
    drift = torch.tensor([0.2, 0.2, -0.2, -0.2, 0.2, 0.2, -0.2, -0.2], dtype=dtype)[:, None]
    logp = old_logp + drift + 0.3 * torch.randn(8, 7, dtype=dtype)
    rewards = torch.tensor([1, 0.5, 1, 0.7, -1, -0.3, -1, -1], dtype=dtype)
    return logp, old_logp, rewards, mask


def plain(weights, logp, old_logp, reward, clip):
    """The formula for one response, in plain floats: its loss, and the derivative by each log-prob."""
    if weights == "ppo":
        loss, gradient = 0.0, []
        for new, old in zip(logp, old_logp):
            ratio = math.exp(new - old)
            unclipped, clipped = reward * ratio, reward * min(max(ratio, 1 - clip), 1 + clip)
            loss -= min(unclipped, clipped)
            gradient.append(-unclipped if unclipped <= clipped else 0.0)
        return loss, gradient
    ratio = math.exp(math.fsum(logp) - math.fsum(old_logp))
    tapered = weights == "tis" or weights == "topr" and reward < 0
    weight = min(1.0, ratio) if tapered else 1.0
    return -weight * reward * math.fsum(logp), [-weight * reward] * len(logp)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_choice_of_weights_equals_its_plain_formula(weights):
    logp, old_logp, rewards, mask = some_rows()
    loss, _ = topr_loss(logp.requires_grad_(), old_logp, rewards, mask, 3.0, weights, 0.15, 0.15)
    loss.backward()
    total, gradient = 0.0, torch.zeros_like(logp)
    for i, size in enumerate(mask.sum(dim=1).tolist()):
        row_loss, row_gradient = plain(weights, logp[i, :size].tolist(), old_logp[i, :size].tolist(),
                                       rewards[i].item(), 0.15)
        total += row_loss / 3.0
        gradient[i, :size] = torch.tensor(row_gradient, dtype=torch.float64) / 3.0
    assert loss.item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(logp.grad, gradient, rtol=1e-12, atol=0)


def test_the_choices_differ_on_the_rows_of_these_tests():
    inputs = some_rows()
    losses = [topr_loss(*inputs, weights=weights)[0].item() for weights in WEIGHTS]
    assert len({round(loss, 6) for loss in losses}) == 4


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("weights", ("topr", "tis", "reinforce"))
@pytest.mark.parametrize("tokens", (1, 40))  # in one token, or up and down over the response
@pytest.mark.parametrize("reward", (1.0, -1.0))
@pytest.mark.parametrize("log_ratio", (2000.0, -2000.0))
def test_extreme_ratios_are_finite_and_weigh_0_or_1(log_ratio, reward, tokens, weights, dtype):
    """exp(2000) and exp(-2000) are out of the range of every float: the weight comes from logs."""
    drift = torch.full((1, tokens), log_ratio / tokens, dtype=dtype)
    drift += 1024 * (tokens > 1) * (-1) ** torch.arange(tokens)
    logp = torch.full_like(drift, -4096).requires_grad_()
    old_logp = logp.detach() - drift
    rewards = torch.tensor([reward], dtype=dtype)
    loss, metrics = topr_loss(logp, old_logp, rewards, torch.ones(1, tokens), 1, weights)
    loss.backward()
    tapered = weights == "tis" or weights == "topr" and reward < 0
    weight = 0.0 if tapered and log_ratio < 0 else 1.0
    torch.testing.assert_close(loss, -weight * reward * logp.sum())
    assert torch.equal(logp.grad, torch.full_like(drift, -weight * reward))
    assert metrics["weight/negatives"][0] == (log_ratio > 0 and reward < 0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_with_right_responses_alone_it_is_fine_tuning_on_them(dtype):
    """However unlikely they have become since they were sampled."""
    logp, old_logp, _, mask = some_rows(dtype)
    a, b = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss, _ = topr_loss(a, old_logp / 30, torch.ones(8, dtype=dtype), mask, 35)
    loss.backward()
    sft, _ = sft_loss(b, mask, 35)
    sft.backward()
    assert torch.equal(a.grad, b.grad)
    torch.testing.assert_close(loss, sft)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_on_policy_its_first_step_is_reinforce(weights):
    logp, _, rewards, mask = some_rows()
    loss, _ = topr_loss(logp.requires_grad_(), logp.detach(), rewards, mask, 8, weights)
    loss.backward()
    x = logp.detach().clone().requires_grad_()
    reinforce = -(rewards * (x * mask).sum(dim=1)).sum() / 8  # from its definition
    reinforce.backward()
    torch.testing.assert_close(logp.grad, x.grad, rtol=1e-14, atol=0)
    if weights != "ppo":  # whose loss is another number with the same gradient
        torch.testing.assert_close(loss, reinforce, rtol=1e-14, atol=0)


# ---------------------------------------------------------------------------------------- what is in a batch
@pytest.mark.parametrize("number, size", ((20, 5), (20, 6), (3, 8), (1, 1)))
def test_every_epoch_has_every_row_once_in_a_new_order(number, size):
    rows = [Row(None, [i]) for i in range(number)]
    steps, epochs = math.ceil(number / size), []
    for epoch in range(4):
        batches = [pick(rows, size, epoch * steps + i, "seed") for i in range(steps)]
        assert [len(batch) for batch in batches[:-1]] == [size] * (steps - 1)  # the last may be smaller
        epochs.append([row.response[0] for batch in batches for row in batch])
        assert sorted(epochs[-1]) == list(range(number))
    if number > 3:
        assert len(set(map(tuple, epochs))) == 4
        again = [row.response[0] for i in range(steps) for row in pick(rows, size, i, "seed")]
        assert again == epochs[0]  # a resumed run goes on with the same batches
        other = [row.response[0] for i in range(steps) for row in pick(rows, size, i, "other seed")]
        assert other != epochs[0]  # and another iteration has orders of its own


@pytest.fixture
def topr_run(make_run, coin_model, coin_data):
    return make_run("topr", "--model", coin_model, "--data", coin_data, "--eval_data", coin_data, *SMALL)


@pytest.mark.parametrize("c", (0.0, 0.5, -0.5, 0.9))
def test_a_set_has_advantages_around_the_baseline(c, coin_model, coin_data, command_line, tmp_path):
    """Rewards are 1 - c and -1 - c, and the share p~ of positives is theirs of all weight in the gradient."""
    command_line("topr", "--model", coin_model, "--data", coin_data, *SMALL, "--steps", "1", "--minibatch", "6",
                 "--baseline", str(c), "--name", "x").main()
    rows = torch.load(tmp_path / "runs" / "x" / "checkpoint" / "step-1" / "run.pt")["state"]["kept"]
    assert {row["reward"] for row in rows} == {0.0, 1.0}
    assert [row["advantage"] for row in rows] == pytest.approx([2 * row["reward"] - 1 - c for row in rows])
    positive = sum(max(0.0, row["advantage"]) for row in rows)
    share = read_jsonl(tmp_path / "runs" / "x" / "metrics.jsonl")[1]["positives/effective"]
    assert share == pytest.approx(positive / sum(abs(row["advantage"]) for row in rows), rel=1e-6)
    for row in rows:
        assert len(row["old_logp"]) == len(row["response"])
        assert row["old_logp"].max() < 0


def test_a_set_comes_back_from_a_checkpoint_as_it_was(topr_run, tmp_path):
    run = topr_run
    rows = run.rollout(run.train[:5] * 2)
    run.verify(rows)
    run.score(rows)
    run.kept.keep(rows, in_file=False)
    torch.save(run.state, tmp_path / "state.pt")
    run.state.clear()
    assert run.kept.rows() == []
    run.state.update(torch.load(tmp_path / "state.pt", weights_only=True))
    again = run.kept.rows()
    assert len(again) == len(rows)
    for old, new in zip(rows, again):
        assert new.problem is old.problem
        assert new.response == old.response
        assert new.sampler_logp == old.sampler_logp
        assert new.advantage == old.advantage
        assert torch.equal(new.old_logp, old.old_logp)
        assert not new.is_demo
    for old, new in zip(vars(collate(rows, "cpu")).values(), vars(collate(again, "cpu")).values()):
        assert torch.equal(old, new)


# --------------------------------------------------------------------------------------------- by subprocess
def checkpoint(folder) -> dict:
    return torch.load(next(folder.glob("checkpoint/*/run.pt")), weights_only=True)


def test_saved_rollouts_are_trained_on_offline_with_the_same_rewards(coin_model, coin_data, tmp_path):
    """One set, once sampled and once read: the same responses, rewards and behaviour log-probs."""
    flags = ("--model", coin_model, "--eval_data", coin_data, *SMALL_OFFLINE, "--minibatch", "8", "--name")
    online = run_script("topr.py", *flags, "online", "--data", coin_data, "--prompts", "4", "--n", "4",
                        "--save_rollouts", cwd=tmp_path)
    assert online.returncode == 0, online.stderr
    saved = tmp_path / "runs" / "online" / "rollouts.jsonl"
    rollouts = read_jsonl(saved)
    assert {"problem", "answer", "response"} <= rollouts[0].keys()
    assert list(Counter(row["problem"] for row in rollouts).values()) == [4] * 4  # n responses to each prompt

    offline = run_script("topr.py", *flags, "offline", "--offline", str(saved), cwd=tmp_path)
    assert offline.returncode == 0, offline.stderr
    a, b = [checkpoint(tmp_path / "runs" / name) for name in ("online", "offline")]
    assert a["step"] == b["step"] == 2
    assert len(a["state"]["kept"]) == len(b["state"]["kept"]) == len(rollouts) == 16
    for sampled, read, row in zip(a["state"]["kept"], b["state"]["kept"], rollouts):
        assert read["response"] == sampled["response"]
        right = f"\\boxed{{{row['answer']}}}" in row["response"]  # the coin model's only right answer
        assert read["advantage"] == sampled["advantage"] == (1.0 if right else -1.0)
        torch.testing.assert_close(read["old_logp"], sampled["old_logp"], rtol=0, atol=1e-5)
    assert {row["advantage"] for row in b["state"]["kept"]} == {1.0, -1.0}
    lines = [read_jsonl(tmp_path / "runs" / name / "metrics.jsonl")[1] for name in ("online", "offline")]
    assert lines[0]["positives/effective"] == lines[1]["positives/effective"]
    assert lines[0]["reward"] == lines[1]["reward"]
    assert "response/length" not in lines[1]  # nothing was sampled


def test_offline_data_without_responses_ends_in_one_line(coin_model, coin_data, tmp_path):
    result = run_script("topr.py", "--model", coin_model, "--offline", coin_data, *SMALL_OFFLINE, cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert coin_data in result.stderr
    assert "`response`" in result.stderr
