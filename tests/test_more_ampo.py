"""AMPO's loss against the numbers of the authors' code, its limits; who makes way for which demonstration."""
import math

import pytest
import torch
from conftest import SMALL, assert_golden, golden, load, read_jsonl, tensors, write_jsonl

from common import Row, Run
from grpo import grpo_loss
from luffy import luffy_loss
from more.ampo import ampo_loss, answer_likelihood, likeliest, make_batch


# ------------------------------------------------------------------------------------------------ the loss
@pytest.mark.parametrize("case, variant", golden("ampo"))
def test_loss_and_gradient_equal_the_authors(case, variant):
    """All variants. Their script's loss is B times ours, whether a demonstration is a sum of tokens or a row."""
    logp, old_logp, advantages, mask, is_demo = tensors(
        case, "logp", "old_logp", "advantage_row", "mask", "prefix_mask")
    hyper, official = variant["hyper"], variant["expected"]["metrics"]
    settings = [hyper[name] for name in (
        "off_policy_reshape_weight", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c")]
    normaliser = mask.shape[1] if hyper["loss_remove_token_mean"] else mask.sum()
    loss, metrics = ampo_loss(logp.requires_grad_(), old_logp, advantages, mask, is_demo, normaliser, *settings)
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, logp.grad, variant["expected"]["grad_logp"])
    means = {name: total.item() / max(1, count.item()) for name, (total, count) in metrics.items()}
    assert means["token_loss/rollouts"] == pytest.approx(official["on_pg_loss"], rel=2e-6)
    assert means["token_loss/demonstrations"] == pytest.approx(official["off_pg_loss"], rel=2e-6)
    luffy, _ = luffy_loss(logp, old_logp, advantages, mask, is_demo, normaliser, *settings[:3])
    assert (loss == luffy) == is_demo.any()
    if not is_demo.any():  # the official fractions count the tokens of demonstrations too
        assert official["on_pg_clipfrac_lower"] > 0  # the second clip acts
        clipped = official["on_pg_clipfrac"] + official["on_pg_clipfrac_lower"]
        assert means["clip_fraction"] == pytest.approx(clipped, rel=2e-6)


def some_rows():
    torch.manual_seed(0)
    old_logp = -torch.rand(6, 7, dtype=torch.float64) * 3
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [5], [2], [6]])
    return old_logp + torch.randn(6, 7, dtype=torch.float64), old_logp, torch.randn(6).double(), mask


def test_without_the_second_clip_it_is_luffy_and_without_demonstrations_grpo():
    rows, is_demo = some_rows(), torch.tensor([1, 0, 0, 1, 0, 0])
    a, b, c, d = [rows[0].clone().requires_grad_() for _ in range(4)]
    pairs = [(ampo_loss(a, *rows[1:], is_demo, 25, 0.3, 0.2, 0.28, math.inf),
              luffy_loss(b, *rows[1:], is_demo, 25, 0.3, 0.2, 0.28)),
             (ampo_loss(c, *rows[1:], torch.zeros(6), 25, 0.1, 0.2, 0.28, math.inf),
              grpo_loss(d, *rows[1:], 25, 0.2, 0.28))]
    for (ours, metrics), (other, other_metrics) in pairs:
        ours.backward()
        other.backward()
        assert torch.equal(ours, other)
        assert metrics | other_metrics == metrics
    assert torch.equal(a.grad, b.grad) and torch.equal(c.grad, d.grad)


def test_the_second_clip_bounds_wrong_tokens_alone():
    ratio = torch.tensor([[0.5, 1.0, 2.9, 3.1, 50.0]], dtype=torch.float64)
    losses, gradients = [], []
    for advantage in (-0.5, 0.5, 0.0):
        logp = ratio.log().requires_grad_()
        loss, metrics = ampo_loss(
            logp, torch.zeros(1, 5), torch.tensor([advantage]), torch.ones(1, 5), torch.zeros(1), 1, dual_clip=3.0)
        loss.backward()
        losses.append(loss.item())
        gradients.append(logp.grad[0].tolist())
    assert losses == pytest.approx([0.5 * (0.8 + 1 + 2.9 + 3 + 3), -0.5 * (0.5 + 1 + 3 * 1.2), 0])
    assert gradients[0] == pytest.approx([0, 0.5, 0.5 * 2.9, 0, 0])
    assert gradients[1] == pytest.approx([-0.25, -0.5, 0, 0, 0])
    assert gradients[2] == [0] * 5


# ---------------------------------------------------------------------------------------------- the choice
def test_the_likelihood_is_a_geometric_mean():
    assert answer_likelihood(torch.tensor([0.9, 0.001]).log()) == pytest.approx(0.03)  # the arithmetic one: 0.45
    assert answer_likelihood(torch.tensor([1e-7, 0.0])) == 1.0
    assert answer_likelihood(torch.tensor([-1e4])) == 0.0


def test_the_likeliest_first_of_equal_ones_the_shorter():
    rows = [Row("prompt", [0] * size) for size in (4, 3, 2, 1)]
    assert likeliest(rows, dict(zip(rows, (0.5, 0.9, 0.5, 0.1))), 3) == [rows[1], rows[2], rows[0]]
    assert likeliest(rows, {}, 9) == rows[::-1]


def text(working: str, box: str) -> str:
    return f"<think>\n{working}</think>\n\\boxed{{{box}}}"


WORKINGS = ("", "a=2\n", "b=a+1=0\n", "1;1\n")


@pytest.fixture
def teachers(tmp_path) -> str:
    """Problems for the coin model, which answers 0 or 1. Those whose answer is 2 it never solves."""
    rows = [{"problem": f"a={i:02d};a?", "answer": str(answer), "demonstrations": demonstrations}
            for i, (answer, demonstrations) in enumerate((
                (2, [text(working, "02") for working in WORKINGS]),
                (2, [text(working, "2") for working in WORKINGS[:2]]),
                (2, [text("", "2"), text("a=1" * 50, "2")]), (2, []), (1, [text(WORKINGS[1], "1")])))]
    return write_jsonl(tmp_path / "teachers.jsonl", rows)


def run_of(make_run, model: str, data: str, *flags: str) -> tuple[Run, list]:
    run = make_run("more/ampo", "--model", model, "--data", data, *SMALL, "--n", "16", *flags)
    run.step = 1
    return run, sorted(run.train, key=lambda problem: problem.index)


def test_where_all_fail_the_easiest_demonstrations_stand_in(make_run, coin_model, teachers):
    run, problems = run_of(make_run, coin_model, teachers, "--replace", "2")
    rows = make_batch(run, run.args, problems)
    groups = [[row for row in rows if row.problem is problem] for problem in problems]
    assert [len(group) for group in groups] == [16] * 5
    assert [sum(row.is_demo for row in group) for group in groups] == [2, 2, 1, 0, 0]
    assert all(row.reward == row.is_demo for group in groups[:4] for row in group)
    assert 0 < sum(row.reward for row in groups[4]) < 16
    assert not any(row.is_demo for row in rows[:75]) and all(row.is_demo for row in rows[75:])

    model, tokenizer = load(coin_model)
    likelihoods = {}
    for working in WORKINGS:  # of the reference 2, where the demonstration says 02
        before, after = [tokenizer(problems[0].text + said)["input_ids"] for said in
                         (text(working, "")[:-1], text(working, "2")[:-1])]
        logits = model(torch.tensor([after])).logits[0, len(before) - 1:-1] / run.args.temperature
        likelihoods[text(working, "02")] = logits.log_softmax(dim=-1)[0, after[-1]].exp().item()
        assert len(after) == len(before) + 1
    best = sorted(likelihoods, key=likelihoods.get)[::-1]
    assert [run.codec.text(row) for row in groups[0] if row.is_demo] == best[:2]
    sums = run.record.sums
    assert sums["likelihood/taken"] == pytest.approx([sum(map(likelihoods.get, best[:2])), 2], rel=1e-4)
    assert sums["likelihood/left"] == pytest.approx([sum(map(likelihoods.get, best[2:])), 2], rel=1e-4)
    assert sums["ampo/guided"] == [3, 5] and sums["ampo/replaced"] == [5, 0]
    assert sums["ampo/without_demonstration"] == [1, 0]
    assert sums["demonstrations/left_out"] == [1, 0]


def test_one_rollout_stays_at_least(make_run, coin_model, teachers):
    run, problems = run_of(make_run, coin_model, teachers, "--n", "3", "--replace", "8")
    rows = make_batch(run, run.args, problems[:1])
    assert [row.is_demo for row in rows] == [False, True, True]


def test_a_step_compares_the_demonstration_with_the_rollouts_that_failed(
        coin_model, teachers, command_line, tmp_path, monkeypatch):
    minibatches = []

    def watched_step(run, minibatch, optimizer_step=Run.optimizer_step):
        minibatches.append(minibatch)
        optimizer_step(run, minibatch)

    monkeypatch.setattr(Run, "optimizer_step", watched_step)
    command_line("more/ampo", "--model", coin_model, "--data", teachers, *SMALL, "--n", "4", "--steps", "1",
                 "--replace", "1", "--name", "x").main()
    rows = [row for minibatch in minibatches for row in minibatch]
    demonstrations = [row for row in rows if row.is_demo]
    assert demonstrations and all(row.advantage == 0.75 for row in demonstrations)
    for demonstration in demonstrations:
        group = [row for row in rows if row.problem is demonstration.problem]
        assert len(group) == 4 and sum(row.advantage for row in group) == 0
    line = read_jsonl(tmp_path / "runs" / "x" / "metrics.jsonl")[1]
    assert line["ampo/replaced"] == len(demonstrations) == 4 * line["ampo/guided"]
    assert 0 < line["likelihood/left"] < line["likelihood/taken"] <= 1
