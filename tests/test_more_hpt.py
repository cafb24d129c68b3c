"""HPT's loss against the authors' numbers and the paper's formula, its switch against their batches, its limits."""
import json
import math

import pytest
import torch
from conftest import SMALL, TESTS, assert_golden, golden, load, read_jsonl, tensors, write_jsonl

from common import Problem, Row
from grpo import group_advantages, grpo_loss
from more.hpt import hpt_loss, switch
from relift import sft_loss
from runtime import toy


# ------------------------------------------------------------------------------------------------ the loss
def loss_of(case, variant, logp):
    """Ours with the normalisers of the variant: of the authors' code, of this file, or of the paper."""
    old_logp, advantages, mask, is_demo = tensors(case, "old_logp", "advantage_row", "mask", "is_expert")
    rollout_tokens, demo_tokens = mask[is_demo == 0].sum(), mask[is_demo == 1].sum()
    name, hyper, (rows, width) = variant["name"], variant["hyper"], mask.shape
    unclipped = hyper["cliprange"] is None or hyper.get("loss_remove_clip")
    settings = {"sft_weight": hyper["sft_loss_coef"]}
    if not unclipped:
        settings |= {"clip_low": hyper["cliprange"], "clip_high": hyper["cliprange"]}
    inputs = logp, old_logp, advantages, mask, is_demo
    if name.startswith("one_normaliser"):
        return hpt_loss(*inputs, rows * width, **settings)
    if not name.startswith("paper"):
        return hpt_loss(*inputs, width if hyper["loss_remove_token_mean"] else rollout_tokens, demo_tokens, **settings)
    # The mean over questions; of one, the sum over its rollouts' tokens / n, or the mean over its demonstration's.
    groups = case["inputs"]["group"]
    questions = len(set(groups))
    size = max(groups.count(group) for group in groups)
    parts = [hpt_loss(*[tensor[[row]] for tensor in inputs], size * questions, mask[row].sum() * questions, **settings)
             for row in range(rows)]
    return sum(loss for loss, _ in parts), {}


@pytest.mark.parametrize("case, variant", golden("hpt"))
def test_loss_and_gradient_equal_the_authors_and_the_papers(case, variant):
    logp, = tensors(case, "logp")
    loss, metrics = loss_of(case, variant, logp.requires_grad_())
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, logp.grad, variant["expected"]["grad_logp"])
    official = variant["expected"]["metrics"]
    for ours, theirs in (("token_loss/demonstrations", "sft_loss"), ("kl/old_policy", "ppo_kl")):
        if theirs in official:
            total, count = metrics[ours]
            if official[theirs] == "nan":  # the official mean over no token
                assert count == 0
            else:
                assert (total / count).item() == pytest.approx(official[theirs], rel=2e-6, abs=1e-7)


def some_rows():
    torch.manual_seed(0)
    old_logp = -torch.rand(6, 7, dtype=torch.float64) * 3
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [5], [2], [6]])
    return old_logp + 0.4 * torch.randn(6, 7, dtype=torch.float64), old_logp, torch.randn(6).double(), mask


@pytest.mark.parametrize("clip", ((0.2, 0.28), (math.inf, math.inf)))
def test_without_demonstrations_it_is_grpo_to_the_bit(clip):
    logp, old_logp, advantages, mask = some_rows()
    a, b = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss, metrics = hpt_loss(a, old_logp, advantages, mask, torch.zeros(6), 25, 25, 0.3, *clip)
    grpo, grpo_metrics = grpo_loss(b, old_logp, advantages, mask, 25, *clip)
    loss.backward()
    grpo.backward()
    assert torch.equal(loss, grpo) and torch.equal(a.grad, b.grad)
    assert metrics | grpo_metrics == metrics


def test_with_demonstrations_alone_it_is_fine_tuning():
    logp, _, advantages, mask = some_rows()
    loss, _ = hpt_loss(logp, torch.full((6, 7), math.nan), advantages * math.nan, mask, torch.ones(6), 42, 25, 0.3)
    torch.testing.assert_close(loss, 0.3 * sft_loss(logp, mask, 25)[0], rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------ the switch
@pytest.mark.parametrize("case", json.loads((TESTS / "golden" / "hpt_batch.json").read_text())["cases"],
                         ids=lambda case: case["id"])
def test_the_batch_is_the_authors(case):
    """But for two faults of their code: a demonstration of L tokens or more is cut and has no EOS then, and a
    prompt without one loses its rollouts to a row of padding. Here both keep their rollouts."""
    inputs, expected = case["inputs"], case["expected"]["rows"]
    problems = [Problem(question, "", [1, 1], "", "", "", {}) for question in inputs["questions"]]
    rows = [Row(problem, response, reward=float(reward))
            for problem, responses, rewards in zip(problems, inputs["rollouts"], inputs["rewards"])
            for response, reward in zip(responses, rewards)]
    groups = torch.tensor([row.problem.index for row in rows])
    for row, advantage in zip(rows, group_advantages(torch.tensor([row.reward for row in rows]), groups).tolist()):
        row.advantage = advantage
    demos = {problem: Row(problem, demo + [inputs["eos_id"]], is_demo=True) for problem, demo in
             zip(problems, inputs["demos"]) if demo and len(demo) < inputs["response_length"]}
    kept, missing = switch(rows, inputs["switch_gate"], demos.get)

    gated = [problem for problem, is_gated in zip(problems, case["expected"]["gated"]) if is_gated]
    faulty = [problem.index for problem in gated if problem not in demos]
    assert missing == len(faulty) == {"hptb-dev-3": 2, "hptb-dev-4": 1}.get(case["id"], 0)
    for question in faulty:
        assert [row for row in kept if row.problem.index == question] == rows_of(rows, question)
    ours = [row for row in kept if row.problem.index not in faulty]
    theirs = [row for row in expected if row["question"] not in faulty]
    assert len(ours) == len(theirs) > 0
    for row, official in zip(ours, theirs):
        assert row.problem.index == official["question"] and row.is_demo == official["is_demo"]
        size = sum(official["response_mask"])
        assert row.response == official["response"][:size]
        assert row.advantage == (1 if row.is_demo else pytest.approx(official["advantage"], rel=1e-6))


def rows_of(rows: list[Row], question: int) -> list[Row]:
    return [row for row in rows if row.problem.index == question]


def test_the_gate_is_a_count_of_right_rollouts():
    rewards = {"A": [0, 0, 0], "B": [1, 0, 0], "C": [1, 1, 0], "D": [1, 1, 1], "E": [0.5, 0.5, 0.5]}
    rows = [Row(problem, [], reward=reward) for problem, group in rewards.items() for reward in group]
    for gate, gated in ((-1, ""), (0, "AE"), (1, "ABE"), (2, "ABCE"), (3, "ABCDE")):  # half a reward is not right
        kept, missing = switch(rows, gate, lambda problem: Row(problem, [], is_demo=True))
        assert [row.problem for row in kept if row.is_demo] == list(gated) and missing == 0
        assert [row for row in kept if not row.is_demo] == [row for row in rows if row.problem not in gated]
        assert switch(rows, gate, {}.get) == (rows, len(gated))


# ---------------------------------------------------------------------------------------------------- runs
@pytest.fixture
def coins(tmp_path) -> str:
    """Problems for the coin model; a third it never answers. One has no demonstration, one too long a one."""
    rows = [{"problem": f"a={i:02d};a?", "answer": str(i % 3),
             "demonstration": f"<think>\n</think>\n\\boxed{{{i % 3}}}"} for i in range(24)]
    rows[5]["demonstration"], rows[8]["demonstration"] = None, f"<think>\n{'a=1' * 50}</think>\n\\boxed{{2}}"
    return write_jsonl(tmp_path / "coins.jsonl", rows)


def train(command_line, tmp_path, script: str, *flags: str):
    """Final weights, and metrics without times."""
    name = script.replace("/", "-")
    command_line(script, *SMALL, "--updates", "2", "--eval_every", "9", "--name", name, *flags).main()
    lines = read_jsonl(tmp_path / "runs" / name / "metrics.jsonl")
    metrics = [{key: value for key, value in line.items() if not key.startswith("seconds/")} for line in lines]
    return load(str(tmp_path / "runs" / name / "model"), torch.float32)[0].state_dict(), metrics


def test_a_gate_of_minus_1_is_grpo_to_the_bit(coin_model, coins, command_line, tmp_path):
    flags = "--model", coin_model, "--data", coins, "--entropy_bonus", "0.001"
    weights, logs = train(command_line, tmp_path, "grpo", *flags)
    ours, our_logs = train(command_line, tmp_path, "more/hpt", *flags, "--gate", "-1", "--clip")
    assert all(torch.equal(weights[name], ours[name]) for name in weights)
    for line, our_line in zip(logs, our_logs):
        assert line.items() <= our_line.items()
    assert 0 < logs[1]["reward"] < 1 and logs[1]["gradient_norm"] > 0 and our_logs[1]["hpt/imitated"] == 0


def test_a_gate_of_n_is_fine_tuning(coin_model, coins, command_line, tmp_path):
    flags = "--model", coin_model, "--data", coins, "--prompts", "22", "--steps", "1", "--lr", "0"
    _, logs = train(command_line, tmp_path, "more/hpt", *flags, "--gate", "4", "--sft_weight", "0.3")
    line = logs[1]
    without = line["hpt/without_demonstration"]
    assert without == 2 == line["demonstrations/left_out"] + 1
    assert line["hpt/imitated"] == pytest.approx(20 / 22) and line["hpt/rows"] == 20 + 2 * 4
    assert line["token_loss/demonstrations"] > 0 and line["sampler_gap"] < 1e-5  # rollouts are scored before they go


def test_the_loss_of_a_step_is_divided_by_its_rows(coin_model, coins, command_line, tmp_path):
    """Every prompt is imitated: the loss is c / (B L) times the sum of -log π over the demonstrations' tokens."""
    rows = [row for number, row in enumerate(read_jsonl(tmp_path / "coins.jsonl")) if number not in (5, 8)]
    data = write_jsonl(tmp_path / "whole.jsonl", rows)
    flags = "--model", coin_model, "--data", data, "--steps", "1", "--gate", "4", "--entropy_bonus", "0"
    _, logs = train(command_line, tmp_path, "more/hpt", *flags, "--sft_weight", "0.3", "--lr", "0")
    line = logs[1]
    assert line["hpt/imitated"] == 1 and line["hpt/rows"] == 4
    tokens = 4 * (len(toy.make_tokenizer()(rows[0]["demonstration"])["input_ids"]) + 1)  # with EOS
    # Two updates, each on two of the four rows: the metric sums their losses.
    expected = 0.3 * line["token_loss/demonstrations"] * tokens / (2 * 40)
    assert line["loss"] == pytest.approx(expected, rel=1e-5)
