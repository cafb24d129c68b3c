"""Prefix-RFT's loss, advantages and schedule against the authors' numbers; its batch, its limits, its masked tokens."""
import json
import math
from collections import Counter

import pytest
import torch
from conftest import SMALL, TESTS, assert_golden, golden, load, read_jsonl, tensors, write_jsonl

from common import Row
from grpo import group_advantages, grpo_loss
from more import prefix_rft
from more.prefix_rft import lowest_share, make_batch, prefix_length, prefix_rft_loss, train_uncertain


# ------------------------------------------------------------------------------------------------ the loss
@pytest.mark.parametrize("case, variant", golden("prefix_rft"))
def test_loss_and_gradient_equal_the_authors(case, variant):
    """All variants, on their advantages: the code divides by T, or in one of them by the number of tokens."""
    logp, old_logp, mask = tensors(case, "logp", "old_logp", "mask")
    advantages = torch.tensor(variant["expected"]["advantages"], dtype=torch.float64)
    prefix, hyper = torch.tensor(case["inputs"]["prefix_mask"]), variant["hyper"]
    normaliser = mask.sum() if hyper["loss_agg_mode"] == "token-mean" else mask.shape[1]
    loss, metrics = prefix_rft_loss(logp.requires_grad_(), old_logp, advantages, mask, prefix, normaliser,
                                    hyper["cliprange_low"], hyper["cliprange_high"])
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, logp.grad, variant["expected"]["grad_logp"])
    if not prefix.any():  # the code's metrics are over prefixes too
        for ours, theirs in (("kl/old_policy", "ppo_kl"), ("clip_fraction", "pg_clipfrac")):
            total, count = metrics[ours]
            assert (total / count).item() == pytest.approx(variant["expected"]["metrics"][theirs], rel=2e-6)


@pytest.mark.parametrize("case, variant", golden("prefix_rft", "paper", "no_entropy_clip", "half", "frozen_prefix"))
def test_advantages_and_the_tokens_that_keep_them_are_the_authors(case, variant):
    """The other variants have other advantages, which are not here. The authors' means are rounded to float32."""
    rewards, groups, mask, entropy = tensors(case, "rewards", "group", "mask", "entropy")
    sizes = torch.tensor(case["inputs"]["prefix_mask"]).sum(dim=1).tolist()
    rows = [Row(None, [0] * int(size), prefix=prefix, prefix_entropy=h[:prefix])
            for size, prefix, h in zip(mask.sum(dim=1), sizes, entropy)]
    masked = variant["hyper"]["entropy_mask_ratio"] or 0.0
    train_uncertain(rows, 1 - masked)
    kept = sum(int(row.weights[:row.prefix].sum()) for row in rows if row.prefix)
    assert kept == sum(sizes) - int(masked * sum(sizes))
    for row, advantage, expected in zip(rows, group_advantages(rewards, groups), variant["expected"]["advantages"]):
        size = len(row.response)
        weights = torch.ones(size) if row.weights is None else row.weights
        torch.testing.assert_close((advantage * weights).double(), torch.tensor(expected[:size]).double(),
                                   rtol=2e-7, atol=1e-12)


def some_rows():
    torch.manual_seed(0)
    old_logp = -torch.rand(6, 7, dtype=torch.float64) * 3
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [5], [2], [6]])
    logp = old_logp + 0.4 * torch.randn(6, 7, dtype=torch.float64)
    return logp, old_logp, torch.tensor([1, -1, 0.5, -0.5, 2, -2]).double(), mask


@pytest.mark.parametrize("prefix", (0, 3, 7))
def test_without_the_dual_clip_it_is_grpo_to_the_bit_whatever_was_given(prefix):
    logp, old_logp, advantages, mask = some_rows()
    logp[5, 2] = old_logp[5, 2] + 2  # A < 0, a ratio of e²
    is_demo, results = torch.arange(7) < torch.tensor([[prefix]] * 6), []
    for dual_clip in (math.inf, 3.0):
        a, b = logp.clone().requires_grad_(), logp.clone().requires_grad_()
        loss, _ = prefix_rft_loss(a, old_logp, advantages, mask, is_demo, 25, 0.2, 0.28, dual_clip)
        expected, _ = grpo_loss(b, old_logp, advantages, mask, 25, 0.2, 0.28)
        loss.backward()
        expected.backward()
        results.append((loss, expected, a.grad, b.grad))
    assert torch.equal(*results[0][:2]) and torch.equal(*results[0][2:])
    assert (results[1][1] - results[1][0]).item() == pytest.approx(2 * (math.exp(2) - 3) / 25)
    assert (results[1][2] != results[1][3]).nonzero().tolist() == [[5, 2]] and results[1][2][5, 2] == 0


def test_a_tie_of_entropies_is_broken_by_order():
    rows = [Row(None, [0] * 4, prefix=3, prefix_entropy=torch.tensor([0.5, 0.5, 0.5])),
            Row(None, [0] * 2, prefix=1, prefix_entropy=torch.tensor([0.5]))]
    for share, kept in ((0, [0, 0, 0, 0]), (0.25, [0, 0, 0, 1]), (0.6, [0, 1, 1, 1]), (1, [1, 1, 1, 1])):
        train_uncertain(rows, share)
        assert torch.cat([row.weights[:row.prefix] for row in rows]).tolist() == kept
        assert all(row.weights[row.prefix:].tolist() == [1.0] for row in rows)
    train_uncertain([Row(None, [0])], 0.2)  # no prefix at all


# -------------------------------------------------------------------------------------------- the schedule
SCHEDULE = json.loads((TESTS / "golden" / "prefix_rft_schedule.json").read_text())["cases"]


def test_the_lowest_share_and_what_is_drawn_are_the_authors():
    case, config = SCHEDULE[0], SCHEDULE[0]["config"]
    settings = config["n_steps"], config["low_init"], config["low_target"]
    for step, low in zip(case["steps"], case["expected_low"], strict=True):
        assert lowest_share(step, *settings) == pytest.approx(low, rel=1e-12)
    for drawn in case["draws"]:
        low = lowest_share(drawn["step"], *settings)
        assert low + (config["high"] - low) * drawn["u"] == pytest.approx(drawn["ratio"], rel=1e-12)


@pytest.mark.parametrize("case", SCHEDULE[1:])
def test_the_length_of_a_prefix_is_the_authors(case):
    for given in case["expected"]:
        length = prefix_length(given["ratio"], given["demo_length"], case["min_prefix_len"])
        assert length == given["prefix_length"]


# --------------------------------------------------------------------------------------- what is in a batch
def test_one_row_of_a_group_goes_on_from_a_prefix(make_run, tiny_model, shared_verifier, tmp_path):
    thought = "<think>\na=1\nb=1\n</think>\n\\boxed{1}"
    long_thought = f"<think>\n{'a=1' * 50}</think>\n\\boxed{{1}}"
    rows = [{"problem": f"a=1;{name}?", "answer": "1", "demonstration": demonstration}
            for name, demonstration in zip("abcdefg", (thought, long_thought, None, *[thought] * 4))]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = make_run("more/prefix_rft", "--model", tiny_model, "--data", data, *SMALL, "--decay_steps", "10",
                   "--min_prefix", "2")
    problems = sorted(run.train, key=lambda problem: problem.index)
    ids, lengths = run.codec.encode(problems[0], thought), []
    for run.step in (1, 10):
        run.record.sums.clear()
        batch = make_batch(run, run.args, problems)
        assert Counter(row.problem.index for row in batch) == dict.fromkeys(range(7), 4)
        given = [row for row in batch if row.prefix]
        assert sorted(row.problem.index for row in given) == [0, 3, 4, 5, 6]  # 1 doesn't fit, 2 has none
        assert all(row.response[:row.prefix] == ids[:row.prefix] for row in given)
        assert all(len(row.response) <= run.args.max_response for row in batch)
        assert run.record.sums["prefix_rft/without_prefix"] == [2, 0]
        assert run.record.sums["demonstrations/left_out"] == [1, 0]
        assert {batch.index(row) % 2 for row in given} == {0, 1}  # with --updates 2 each mini-batch has some
        lengths.append([row.prefix for row in given])
    size = len(ids) - 1
    low = lowest_share(1, 10, 0.95, 0.05)
    assert all(math.floor(low * size) <= length <= math.floor(0.95 * size) for length in lengths[0])
    assert all(2 <= length <= math.floor(0.95 * size) for length in lengths[1])
    assert min(lengths[1]) < min(lengths[0]) and len(set(lengths[1])) > 2  # each prompt draws its own


# ---------------------------------------------------------------------------------------------------- runs
@pytest.fixture
def coins(tmp_path) -> str:
    """Problems for the coin model, with demonstrations; a third it never answers by itself."""
    rows = [{"problem": f"a={i:02d};a?", "answer": str(i % 3),
             "demonstration": f"<think>\n</think>\n\\boxed{{{i % 3}}}"} for i in range(24)]
    return write_jsonl(tmp_path / "coins.jsonl", rows)


def test_without_prefixes_and_dual_clip_a_run_is_grpo_to_the_bit(coin_model, coins, command_line, shared_verifier,
                                                                 tmp_path):
    weights, logs = [], []
    for script, *flags in (("grpo",), ("more/prefix_rft", "--low_start", "0", "--low_end", "0", "--high", "0",
                                       "--dual_clip", "inf")):
        name = script.replace("/", "-")
        command_line(script, "--model", coin_model, "--data", coins, *SMALL, "--updates", "2", "--eval_every", "9",
                     "--entropy_bonus", "0.001", "--name", name, *flags).main()
        weights.append(load(str(tmp_path / "runs" / name / "model"), torch.float32)[0].state_dict())
        logs.append(read_jsonl(tmp_path / "runs" / name / "metrics.jsonl"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for grpo, ours in zip(*logs):
        assert all(value == ours[name] for name, value in grpo.items() if not name.startswith("seconds/"))
    assert 0 < logs[0][1]["reward"] < 1 and logs[1][1]["prefix_rft/without_prefix"] == 4


def test_of_a_prefix_the_uncertain_tokens_alone_have_an_advantage(coin_model, coins, command_line, shared_verifier,
                                                                  tmp_path, monkeypatch):
    seen = []

    def watched(logp, old_logp, advantages, mask, is_demo, *others):
        seen.append((advantages, mask, is_demo))
        return prefix_rft_loss(logp, old_logp, advantages, mask, is_demo, *others)

    monkeypatch.setattr(prefix_rft, "prefix_rft_loss", watched)
    command_line("more/prefix_rft", "--model", coin_model, "--data", coins, *SMALL, "--steps", "1", "--prompts", "8",
                 "--eval_every", "9", "--micro_tokens", "9999", "--trained_share", "0.5", "--name", "x").main()
    line = read_jsonl(tmp_path / "runs" / "x" / "metrics.jsonl")[1]
    kept = given = 0
    for advantages, mask, is_demo in seen:
        assert advantages[mask & ~is_demo].all()  # the rows of A = 0 are not here
        kept, given = kept + advantages[is_demo].count_nonzero(), given + is_demo.sum()
        for row, of_row, demo in zip(advantages, mask, is_demo):
            assert len(set(row[of_row & ~demo].tolist()) | set(row[demo].tolist()) - {0.0}) == 1
    assert 0 < kept < given
    assert line["reward/prefixed"] > line["reward"] and line["response/prefix"] == 6
    assert line["demonstrations/probability"] > 0 and "token_loss/demonstrations" in line
