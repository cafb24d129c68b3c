"""ReLIFT's losses and buffer against the numbers and traces of the authors' own code, and its loop."""
import json
import math

import pytest
import torch
from conftest import SMALL, TESTS, assert_golden, golden, load, read_jsonl, tensors, write_jsonl
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import relift
from common import Problem, Row
from grpo import grpo_loss
from relift import hardest, rl_loss, sft_loss, take_from_buffer


# Not ours by definition, so not compared: rl_only_train_rl_sh clips.
@pytest.mark.parametrize("case, variant", golden("relift", "rl_train_sh"))
def test_rl_loss_and_gradient_equal_the_authors(case, variant):
    logp, old_logp, advantages, mask = tensors(case, "logp", "old_logp", "advantage_row", "mask")
    loss, metrics = rl_loss(logp.requires_grad_(), old_logp, advantages, mask)
    loss = loss * len(mask)  # the official code doesn't divide by it
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, logp.grad, variant["expected"]["grad_logp"])
    official = variant["expected"]["metrics"]
    for ours, theirs in (("token_loss/rollouts", "on_pg_loss"), ("kl/old_policy", "ppo_kl")):
        total, count = metrics[ours]
        assert (total / count).item() == pytest.approx(official[theirs], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("case, variant", golden("relift", "sft"))
def test_sft_loss_and_gradient_equal_the_authors(case, variant):
    logp, mask = tensors(case, "logp", "mask")
    loss, metrics = sft_loss(logp.requires_grad_(), mask)
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, logp.grad, variant["expected"]["grad_logp"])
    total, count = metrics["token_loss/demonstrations"]
    assert (total / count).item() == pytest.approx(variant["expected"]["loss"], rel=2e-6)


def some_rows():
    torch.manual_seed(0)
    old_logp = -torch.rand(5, 7, dtype=torch.float64) * 3
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [5], [2]])
    logp = old_logp + 0.4 * torch.randn(5, 7, dtype=torch.float64)
    return logp, old_logp, torch.randn(5, dtype=torch.float64), mask


def test_the_rl_loss_is_that_of_grpo_without_clip():
    logp, old_logp, advantages, mask = some_rows()
    ours, _ = rl_loss(logp, old_logp, advantages, mask, 200)
    clipped, _ = grpo_loss(logp, old_logp, advantages, mask, 200)
    assert ours != clipped  # the rows have ratios that GRPO clips
    torch.testing.assert_close(ours, grpo_loss(logp, old_logp, advantages, mask, 200, math.inf, math.inf)[0])


# ---------------------------------------------------------------------------------------------- the buffer
def traces() -> list:
    cases = json.loads((TESTS / "golden" / "relift_buffer.json").read_text())["cases"]
    return [pytest.param(case, id=case["id"]) for case in cases]


def rows_of(step: list[dict]) -> list[Row]:
    """A step of the authors' trace as rows, in its order."""
    rows = []
    for group in step:
        problem = Problem(0, group["prompt"], [], "", "", "", {})
        rows += [Row(problem, [], reward=reward) for reward in group["rewards"]]
    return rows


@pytest.mark.parametrize("case", traces())
def test_buffer_equals_the_authors_trace(case):
    """Only groups whose rewards are all `fail_value` 0 enter it; those of `format_value` -1 alone do not."""
    inputs, ours, buffer = case["inputs"], [], []
    for step in inputs["steps"]:
        new = [problem.text for problem in hardest(rows_of(step))]
        sft, buffer = take_from_buffer(buffer, new, inputs["sft_data_size"])
        ours.append((new, sft, buffer))
    theirs = [(entry["solve_none"], entry["sft_batch"] or [], entry["buffer_after_step"] or [])
              for entry in case["expected"]["trace"] if not entry["error"]]
    if case["id"] == "rbuf-dev-2":  # theirs crashes in its first step, when nothing has come; ours goes on
        theirs = [([], [], []), ([f"s1q{i}" for i in range(4)], ["s1q0", "s1q1", "s1q2"], ["s1q3"]),
                  ([], [], ["s1q3"])]
    assert ours == theirs


def test_an_empty_buffer_is_fine():
    assert hardest([]) == []
    assert take_from_buffer([], [], 4) == ([], [])
    assert take_from_buffer([], [7], 4) == ([], [7])
    assert take_from_buffer([7], [], 4) == ([], [7])


def test_newest_first_and_what_is_left_stays():
    assert take_from_buffer([5, 6], [8, 9], 4) == ([8, 9, 5, 6], [])
    assert take_from_buffer([5, 6], [8, 9], 3) == ([8, 9, 5], [6])
    assert take_from_buffer([5, 6], [8, 9], 1) == ([8], [9, 5, 6])  # one batch at most
    assert take_from_buffer([5, 6], [8, 9], 5) == ([], [8, 9, 5, 6])


def test_a_prompt_that_waits_is_not_added_twice():
    assert take_from_buffer([5, 6, 7], [6, 9], 4) == ([6, 9, 5, 7], [])
    assert take_from_buffer([5, 6, 7], [6, 9], 5) == ([], [6, 9, 5, 7])
    assert take_from_buffer([5], [5], 2) == ([], [5])  # two of the same would not do for a batch of two


def test_a_prompt_with_one_right_answer_is_not_among_the_hardest():
    problems = [Problem(index, "", [], "", "", "", {}) for index in range(3)]
    rewards = {0: (0.0, 0.0), 1: (0.0, 1.0), 2: (0.0, 0.0)}
    rows = [Row(problems[index], [], reward=rewards[index][i]) for i in range(2) for index in (2, 1, 0)]
    assert [problem.index for problem in hardest(rows)] == [2, 0]  # in the order of the rows


# ---------------------------------------------------------------------------------------- the loop of main()
THOUGHT = "<think>\n%d\n</think>\n\\boxed{1}"


@pytest.fixture
def train(command_line, tiny_model, tmp_path):
    """Runs main() on rows that the tiny model never solves, and returns its checkpoint and metrics."""
    def train(demonstrations: list, *flags: str):
        rows = [{"problem": f"a={i};a?", "answer": "1", "demonstration": demonstration}
                for i, demonstration in enumerate(demonstrations)]
        data = write_jsonl(tmp_path / "rows.jsonl", rows)
        held_out = write_jsonl(tmp_path / "held_out.jsonl", rows[:1])
        command_line("relift", "--model", tiny_model, "--data", data, "--eval_data", held_out, *SMALL,
                     "--name", "run", "--n", "2", "--weight_decay", "0", "--max_response", "12", *flags)
        relift.main()
        folder = tmp_path / "runs" / "run"
        place, = (folder / "checkpoint").iterdir()
        dcp_to_torch_save(place, tmp_path / "tensors.pt")
        saved = torch.load(place / "run.pt", weights_only=True) | {"tensors": torch.load(tmp_path / "tensors.pt")}
        return saved, read_jsonl(folder / "metrics.jsonl")
    return train


def test_only_usable_demonstrations_wait_and_each_of_them_once(train):
    """Four prompts a step of six, all unsolved: 1 has no demonstration, 4 has one that does not fit."""
    texts = [THOUGHT % i for i in range(6)]
    texts[1], texts[4] = None, "<think>\n" + "a=2\n" * 50 + "</think>\n\\boxed{1}"
    saved, metrics = train(texts, "--steps", "3", "--sft_batch", "5")  # one more than there are
    assert [line["groups/all_wrong"] for line in metrics[1:]] == [1.0] * 3
    assert sorted(saved["state"]["buffer"]) == [0, 2, 3, 5]  # though in 12 draws each came twice
    assert (saved["state"]["used"], saved["state"]["sft_steps"]) == ([], 0)
    assert metrics[-1]["relift/buffer"] == 4
    assert sum(line["demonstrations/left_out"] for line in metrics[1:]) == 2
    assert sum(line["relift/without_demonstration"] for line in metrics[1:]) == 3  # 1 came twice in a step
    assert not any("token_loss/demonstrations" in line for line in metrics)
    assert saved["optimizers"] == ["rl"] and saved["tensors"].keys() == {"model", "rl"}  # no step of fine-tuning


def test_fine_tuning_is_the_token_mean_and_has_moments_of_its_own(train, tiny_model):
    """At a learning rate of 0 its gradient is that of the first weights, whatever RL's entropy bonus does."""
    texts = [f"<think>\n{'a=2' * (i % 4)}\n</think>\n\\boxed{{1}}" for i in range(4)]
    saved, metrics = train(texts, "--steps", "1", "--sft_batch", "3", "--updates", "2",
                           "--max_response", "40", "--sft_max_grad_norm", "1e9", "--micro_tokens", "60", "--lr", "0")
    used, waiting = saved["state"]["used"], saved["state"]["buffer"]
    assert (sorted(used + waiting), len(used)) == ([0, 1, 2, 3], 3)
    assert saved["state"]["sft_steps"] == metrics[1]["relift/sft_steps"] == 1
    assert metrics[1]["relift/used"] == 3 / 4
    assert metrics[1]["relift/buffer"] == 1
    moments = {name: saved["tensors"][name]["state"] for name in ("rl", "sft")}
    assert {entry["step"].item() for entry in moments["rl"].values()} == {2}
    assert {entry["step"].item() for entry in moments["sft"].values()} == {1}
    assert any(entry["exp_avg"].any() for entry in moments["rl"].values())  # all groups are wrong: the bonus

    # the gradient of the mean over all tokens of the three, each row alone, from the weights before the run
    model, tokenizer = load(tiny_model)
    nlls, entropies = [], []
    for index in used:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": f"a={index};a?"}], tokenize=False,
                                               add_generation_prompt=True)
        prompt, response = tokenizer([prompt, texts[index] + tokenizer.eos_token])["input_ids"]
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
        logp = logits.log_softmax(dim=-1)
        nlls.append(-logp[range(len(response)), response])
        entropies.append(-(logp.exp() * logp).sum(dim=-1))
    nll = torch.cat(nlls).mean()
    (nll - 0.001 * torch.cat(entropies).mean()).backward()
    assert metrics[1]["token_loss/demonstrations"] == pytest.approx(nll.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        first_moment = moments["sft"][name]["exp_avg"].double()  # 0.1 of the gradient after one step
        torch.testing.assert_close(first_moment, 0.1 * parameter.grad, rtol=1e-4, atol=1e-7)
