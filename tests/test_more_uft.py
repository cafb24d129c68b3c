"""UFT's loss against the authors' numbers, its hints against their schedule and lines, its limits, a step of it."""
import json
from collections import Counter
from random import Random

import pytest
import torch
from conftest import SMALL, TESTS, assert_golden, golden, load, read_jsonl, tensors, write_jsonl

from grpo import grpo_loss
from more.uft import Args, hint_parts, hint_share, make_batch, separation, uft_loss
from relift import sft_loss


# ------------------------------------------------------------------------------------------------ the loss
@pytest.mark.parametrize("case, variant", golden("uft", "run_py", "coef_1", "one_normaliser_0.001",
                                                 "one_normaliser_1.0"))
def test_loss_and_gradient_equal_the_authors(case, variant):
    """Divided by the numbers of tokens as in the authors' code, or by B L. Not run_py_kl: here there is no KL term."""
    logp, old_logp, advantages, mask, hint = tensors(case, "logp", "old_logp", "advantage_row", "mask", "prefix_mask")
    hyper, whole = variant["hyper"], mask.numel()
    normalisers = (whole, whole) if variant["name"].startswith("one") else ((mask * (1 - hint)).sum(), hint.sum())
    loss, metrics = uft_loss(logp.requires_grad_(), old_logp, advantages, mask, hint, *normalisers,
                             hyper["sft_loss_coef"], hyper["cliprange"], hyper["cliprange"])
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, logp.grad, variant["expected"]["grad_logp"])
    official = variant["expected"]["metrics"]
    for ours, theirs in (("token_loss/demonstrations", "sft_loss"), ("token_loss/rollouts", "pg_loss"),
                         ("clip_fraction", "pg_clipfrac"), ("kl/old_policy", "ppo_kl")):
        if theirs in official:
            total, count = metrics[ours]
            assert float(total) / max(1, int(count)) == pytest.approx(official[theirs], rel=2e-6, abs=1e-7)


def some_rows():
    torch.manual_seed(0)
    old_logp = -torch.rand(6, 7, dtype=torch.float64) * 3
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [5], [2], [6]])
    return old_logp + 0.4 * torch.randn(6, 7, dtype=torch.float64), old_logp, torch.randn(6).double(), mask


def test_without_hints_it_is_grpo_and_with_hints_alone_fine_tuning():
    logp, old_logp, advantages, mask = some_rows()
    a, b = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss, metrics = uft_loss(a, old_logp, advantages, mask, torch.zeros(6, 7), 25, 25, 0.3)
    grpo, grpo_metrics = grpo_loss(b, old_logp, advantages, mask, 25)
    loss.backward()
    grpo.backward()
    assert torch.equal(loss, grpo) and torch.equal(a.grad, b.grad)
    assert metrics | grpo_metrics == metrics
    nothing = torch.full((6, 7), torch.nan)
    loss, _ = uft_loss(logp, nothing, nothing, mask, mask, 42, 25, 0.3)
    torch.testing.assert_close(loss, 0.3 * sft_loss(logp, mask, 25)[0], rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------ the hint
HINTS = json.loads((TESTS / "golden" / "uft_hint.json").read_text())["cases"]


@pytest.mark.parametrize("case", HINTS[:2])
def test_the_share_of_a_step_is_the_authors(case):
    config = case["config"]
    for step, share in zip(case["steps"], case["expected_prob"], strict=True):
        ours = hint_share(step, config["hint_steps"], config["lower_prob"], config["upper_prob"])
        assert ours == pytest.approx(share, rel=1e-12, abs=1e-15)


def test_the_parts_are_the_authors():
    for lines, expected in HINTS[2]["expected_separation"].items():
        assert separation(list(range(1, int(lines) + 1))) == expected


def test_a_sampled_hint_is_the_authors_prompt_and_its_tokens_are_marked():
    """Whatever the number of heads, which is random: it decides all else."""
    inputs, trace = HINTS[3]["inputs"], HINTS[3]["expected"]["trace"]
    for given in trace:
        sentences = inputs["sentences"][given["row"]]
        tokens = sum(sentences, [])
        ends = separation([len(sum(sentences[:number], [])) for number in range(1, len(sentences) + 1)])
        size = len(sum(sentences[:given["hint_sentences"]], []))
        assert size in ends and inputs["prompt"] + tokens[:size] == given["prompt_and_hint"]
        marked = [place + 1 - len(inputs["prompt"]) for place, is_marked in enumerate(given["predicts_hint_token"])
                  if is_marked]
        assert marked == list(range(size))  # they mark what predicts a token of the hint, we the token
    assert len(trace) > 8


def test_the_stages_are_the_authors():
    case = HINTS[4]
    args, ends = Args(schedule="stages", hint_steps=case["hint_steps"]), separation(list(range(1, 8)))
    parts = [hint_parts(len(ends) - 1, step, args, None) for step in case["steps"]]
    assert [ends[number] for number in parts] == case["expected_hint_sentences"]


def test_heads_are_binomial_and_uniform_is_uniform():
    args = Args(schedule="cosine", hint_steps=100, hint_low=0.05, hint_high=0.95)
    for step, share in ((50, 0.5), (100, 0.05), (101, 0.0)):
        draws = Random(0)
        counts = Counter(hint_parts(4, step, args, draws) for _ in range(4000))
        for heads, ways in enumerate((1, 4, 6, 4, 1)):
            expected = ways * share ** heads * (1 - share) ** (4 - heads)
            assert counts[heads] / 4000 == pytest.approx(expected, abs=5 * (expected / 4000) ** 0.5)
    args, draws = Args(schedule="uniform"), Random(0)
    counts = Counter(hint_parts(4, step, args, draws) for step in range(4000))
    assert sorted(counts) == [0, 1, 2, 3, 4] and min(counts.values()) > 650


# --------------------------------------------------------------------------------------- what is in a batch
def test_all_rollouts_of_a_prompt_go_on_from_the_same_lines(make_run, tiny_model, shared_verifier, tmp_path):
    lines = ["<think>\n", "a=1\n", "b=1\n\n", "</think>\n", "\\boxed{1}"]  # a blank line belongs to the one before
    long = f"<think>\n{'a=1' * 50}</think>\n\\boxed{{1}}"
    rows = [{"problem": f"a=1;{name}?", "answer": "1", "demonstration": demonstration}
            for name, demonstration in zip("abcdefgh", ("".join(lines), long, None, *["".join(lines)] * 5))]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = make_run("more/uft", "--model", tiny_model, "--data", data, *SMALL, "--hint_steps", "10",
                   "--hint_high", "0.8")
    problems = sorted(run.train, key=lambda problem: problem.index)
    decode, hints = run.policy.tokenizer.decode, []
    for run.step in (1, 5, 10, 11):
        run.record.sums.clear()
        batch = make_batch(run, run.args, problems)
        assert [row.problem.index for row in batch] == [index for index in range(8) for _ in range(4)]
        for problem in problems:
            group = [row for row in batch if row.problem is problem]
            assert len({(row.prefix, *row.response[:row.prefix]) for row in group}) == 1
            assert all(len(row.response) <= run.args.max_response for row in group)
        hints.append([decode(row.response[:row.prefix]) for row in batch[::4]])
        assert hints[-1][1:3] == ["", ""]  # one doesn't fit, one isn't there
        assert set(hints[-1]) <= {"".join(lines[:number]) for number in range(6)}
        assert run.record.sums["uft/without_demonstration"] == [2, 0]
        assert run.record.sums["demonstrations/left_out"] == [1, 0]
    assert len(set(hints[0] + hints[1])) > 3 and set(hints[3]) == {""}
    run.args.hint_low = run.args.hint_high = 1.0  # all but EOS, for which there is room
    run.step = 10
    assert [decode(row.response[:row.prefix]) for row in make_batch(run, run.args, problems)[::4]] == [
        "".join(lines) if index not in (1, 2) else "" for index in range(8)]


# ---------------------------------------------------------------------------------------------------- runs
@pytest.fixture
def coins(tmp_path) -> str:
    """Problems for the coin model, with demonstrations; a third it never answers by itself."""
    rows = [{"problem": f"a={i:02d};a?", "answer": str(i % 3),
             "demonstration": f"<think>\n</think>\n\\boxed{{{i % 3}}}"} for i in range(24)]
    return write_jsonl(tmp_path / "coins.jsonl", rows)


def test_without_hints_a_run_is_grpo_with_its_standard_deviation_to_the_bit(coin_model, coins, command_line,
                                                                            shared_verifier, tmp_path):
    weights, logs = [], []
    for script, *own in (("grpo", "--std_normalise"), ("more/uft", "--hint_low", "0", "--hint_high", "0")):
        name = script.replace("/", "-")
        command_line(script, "--model", coin_model, "--data", coins, *SMALL, "--updates", "2", "--eval_every", "9",
                     "--entropy_bonus", "0.001", "--name", name, *own).main()
        weights.append(load(str(tmp_path / "runs" / name / "model"), torch.float32)[0].state_dict())
        logs.append(read_jsonl(tmp_path / "runs" / name / "metrics.jsonl"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for grpo, ours in zip(*logs):
        assert all(value == ours[name] for name, value in grpo.items() if not name.startswith("seconds/"))
    assert 0 < logs[0][1]["reward"] < 1 and logs[1][1]["response/prefix"] == 0


def test_hints_are_learnt_where_no_row_has_an_advantage(coin_model, coins, command_line, shared_verifier, tmp_path):
    """All is given but EOS: every row is right, unless a rare one doesn't stop, and J is imitation alone.

    The entropy bonus is over sampled tokens: of a hint's it would be another.
    """
    losses = {}
    for weight, bonus in (("0.5", "0"), ("0.5", "-1"), ("0", "0")):
        name = f"{weight} {bonus}"
        command_line("more/uft", "--model", coin_model, "--data", coins, *SMALL, "--steps", "1", "--lr", "0",
                     "--eval_every", "9", "--hint_low", "1", "--hint_high", "1", "--sft_weight", weight,
                     "--entropy_bonus", bonus, "--name", name).main()
        losses[name] = read_jsonl(tmp_path / "runs" / name / "metrics.jsonl")[1]
    line = losses["0.5 0"]
    assert line["reward"] == line["reward/prefixed"] == 1 and line["response/length"] == 1
    assert line["response/prefix"] == 7 and line["token_loss/demonstrations"] > 0
    # Two updates, of 8 rows each, which have 7 given tokens and L = 40.
    assert line["loss"] == pytest.approx(0.5 * line["token_loss/demonstrations"] * 7 / 40 * 2, rel=1e-5)
    assert losses["0.5 -1"]["loss"] - line["loss"] == pytest.approx(2 * line["entropy"], rel=1e-3)
    assert losses["0 0"]["loss"] == losses["0 0"]["gradient_norm"] == 0 and line["gradient_norm"] > 0
