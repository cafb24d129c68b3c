"""DAPO's loss against the numbers of other code, its rewards, and which groups a step is made of."""
import math

import pytest
import torch
from conftest import SMALL, assert_golden, golden, read_jsonl, tensors, write_jsonl

from common import Row, Run
from grpo import group_advantages, grpo_loss
from more.dapo import dapo_loss, length_penalty, make_batch, mixed


# ------------------------------------------------------------------------------------------------ the loss
# TRL's `dapo` and verl's mean over tokens. The other variants of the file are not DAPO: other normalisers, no
# clip, a second clip.
@pytest.mark.parametrize("case, variant", golden("policy_loss", "trl_dapo", "verl_token_mean_clip"))
def test_loss_and_gradient_equal_the_authors(case, variant):
    logp, old_logp, advantages, mask = tensors(case, "logp", "old_logp", "advantage_row", "mask")
    hyper = variant["hyper"]
    clip = [hyper.get(name, hyper.get("cliprange")) for name in ("eps_low", "eps_high")]
    given = [] if clip == [0.2, 0.28] else [None, *clip]  # DAPO's are the defaults
    loss, metrics = dapo_loss(logp.requires_grad_(), old_logp, advantages, mask, *given)
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, logp.grad, variant["expected"]["grad_logp"])
    official = variant["expected"]["metrics"]
    if "clip_ratio/region_mean" in official:
        total, count = metrics["clip_fraction"]
        assert total / count == pytest.approx(official["clip_ratio/region_mean"], rel=1e-6)


def test_with_one_clip_and_a_constant_normaliser_it_is_grpo_to_the_bit():
    torch.manual_seed(0)
    old_logp = -torch.rand(6, 7, dtype=torch.float64) * 3
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [5], [2], [6]])
    rows = old_logp + torch.randn(6, 7, dtype=torch.float64), old_logp, torch.randn(6).double(), mask
    a, b = [rows[0].clone().requires_grad_() for _ in range(2)]
    loss, metrics = dapo_loss(a, *rows[1:], 42, clip_high=0.2)
    expected, expected_metrics = grpo_loss(b, *rows[1:])
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected) and torch.equal(a.grad, b.grad) and metrics == expected_metrics


# ----------------------------------------------------------------------------------------------- the reward
def test_the_reward_falls_in_the_last_tokens_alone():
    lengths = torch.tensor([1, 16384, 16385, 18432, 20479, 20480])  # the paper's: L = 20480, L_cache = 4096
    expected = [0, 0, -1 / 4096, -0.5, -4095 / 4096, -1]
    assert length_penalty(lengths, 20480, 4096).tolist() == expected
    assert length_penalty(torch.tensor([20481, 90000]), 20480, 4096).tolist() == [-1, -1]
    assert not length_penalty(lengths, 20480, 0).any()  # 0: there is none


@pytest.mark.parametrize("case, variant", golden("grpo_advantage", "verl_std"))
def test_advantages_do_not_change_with_the_scale_of_rewards(case, variant):
    """±1 in place of 1 and 0: beside the length penalty it matters, without one it does not."""
    rewards, groups = tensors(case, "rewards", "group")
    alone = torch.tensor([(groups == group).sum() == 1 for group in groups])
    expected = torch.tensor(variant["expected"]["advantage_row"]).where(~alone, 0.0)
    assert_golden(case, group_advantages(2 * rewards - 1, groups, True), expected.tolist(), rtol=5e-6)


# ---------------------------------------------------------------------------------------- dynamic sampling
def test_groups_of_equal_rewards_go_in_their_order():
    rewards = {"A": (0, 0, 1), "B": (1, 1, 1), "C": (0, 0, 0), "D": (1, 0, 1), "E": (0.5, 0.5, 0.25)}
    rows = [Row(problem, [place], reward=group[place]) for place in range(3) for problem, group in rewards.items()]
    assert [row.problem + str(row.response[0]) for row in mixed(rows)] == [
        "A0", "D0", "E0", "A1", "D1", "E1", "A2", "D2", "E2"]
    assert mixed([]) == []


@pytest.fixture
def third_solved(tmp_path) -> str:
    """Problems for the coin model, which answers 0 or 1: of three it solves the first now and then."""
    rows = [{"problem": f"a={i:02d};a?", "answer": "0" if i % 3 == 0 else "7"} for i in range(24)]
    return write_jsonl(tmp_path / "thirds.jsonl", rows)


def start(make_run, coin_model, data, *flags):
    run = make_run("more/dapo", "--model", coin_model, "--data", data, *SMALL, "--n", "16", "--prompts", "2", *flags)
    run.step = 1
    return run


def test_it_samples_until_enough_groups_are_mixed(make_run, coin_model, third_solved):
    run = start(make_run, coin_model, third_solved)
    asked, sampled = [], []

    def watched_rollout(problems, again, rollout=run.rollout):
        asked.append((list(dict.fromkeys(problems)), again))
        sampled.extend(rows := rollout(problems, again=again))
        return rows

    run.rollout = watched_rollout
    rows = make_batch(run, run.args)
    rounds = len(asked)
    assert rounds > 1
    assert asked == [(run.next_problems(number), number) for number in range(rounds)]  # further prompts each time
    assert len(rows) == 2 * 16 and len({row.problem for row in rows}) == 2
    assert all(row.problem.answer == "0" for row in rows)
    for problem in {row.problem for row in rows}:
        assert 0 < sum(row.reward for row in rows if row.problem is problem) < 16
    surplus = len(mixed(sampled)) - 32
    sums = run.record.sums
    assert sums["dapo/rounds"] == [rounds, 0] and sums["dapo/groups"] == [2, 1]
    assert sums["dapo/in_vain"] == [32 * rounds - 32, 32 * rounds] and sums["dapo/surplus"] == [surplus, 0]
    assert sums["reward"][1] == 32 * rounds

    run.step = 2
    make_batch(run, run.args)
    assert asked[rounds] == (run.next_problems(rounds), 0)  # goes on where the last step stopped


def test_what_is_mixed_beyond_the_batch_is_dropped_and_counted(make_run, coin_model, coin_data):
    run = start(make_run, coin_model, coin_data, "--prompts", "3")
    kept = mixed

    def rollout(problems, again):
        """One of three groups in the first round, and three in the second."""
        return [Row(problem, [7], reward=float(number % 2 and (again or number < 16)))
                for number, problem in enumerate(problems)]

    run.rollout, run.verify = rollout, lambda rows: None
    rows = make_batch(run, run.args)
    first, second = run.next_problems(0), run.next_problems(1)
    assert list(dict.fromkeys(row.problem for row in rows)) == [first[0], *second[:2]]
    assert len(rows) == 48 and len(kept(rows)) == 48
    sums = run.record.sums
    assert sums["dapo/surplus"] == [16, 0] and sums["dapo/in_vain"] == [48, 96] and sums["dapo/groups"] == [3, 1]


def test_a_step_without_a_mixed_group_has_no_gradient(coin_model, command_line, tmp_path):
    data = write_jsonl(tmp_path / "never.jsonl", [{"problem": f"a={i};a?", "answer": "7"} for i in range(9)])
    command_line("more/dapo", "--model", coin_model, "--data", data, *SMALL, "--steps", "1", "--rounds", "3",
                 "--name", "x").main()
    line = read_jsonl(tmp_path / "runs" / "x" / "metrics.jsonl")[1]
    assert line["dapo/rounds"] == 3 and line["dapo/in_vain"] == 1 and line["groups/all_wrong"] == 1
    assert line["dapo/groups"] == line["gradient_norm"] == line["loss"] == line["dapo/length_penalty"] == 0


def test_a_step_trains_on_shaped_rewards(coin_model, third_solved, command_line, tmp_path, monkeypatch):
    minibatches = []

    def watched_step(run, minibatch, optimizer_step=Run.optimizer_step):
        minibatches.append(minibatch)
        optimizer_step(run, minibatch)

    monkeypatch.setattr(Run, "optimizer_step", watched_step)
    command_line("more/dapo", "--model", coin_model, "--data", third_solved, *SMALL, "--prompts", "2", "--n", "16",
                 "--steps", "1", "--cache", "38", "--name", "x").main()
    rows = minibatches[0] + minibatches[1]
    penalties = [min(0, (40 - 38 - len(row.response)) / 38) for row in rows]
    for problem in {row.problem for row in rows}:
        group = [place for place, row in enumerate(rows) if row.problem is problem]
        rewards = torch.tensor([2 * rows[place].reward - 1 + penalties[place] for place in group])
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        assert [rows[place].advantage for place in group] == pytest.approx(expected.tolist(), rel=1e-4)
    line = read_jsonl(tmp_path / "runs" / "x" / "metrics.jsonl")[1]
    assert line["dapo/length_penalty"] == pytest.approx(math.fsum(penalties) / 32, rel=1e-5) and line["loss"] != 0
