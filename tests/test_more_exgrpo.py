"""ExGRPO's loss, its store and its draws against the authors' numbers; what is replayed in a run; its limits."""
import json
from collections import Counter

import pytest
import torch
from conftest import SMALL, TESTS, assert_golden, golden, load, read_jsonl, tensors

from common import Problem, Row, Run
from luffy import luffy_loss
from more.exgrpo import bucket_weights, choose, exgrpo_loss, make_batch, sort_groups, surest
from runtime.stored import Experience


def cases(name: str, key: str) -> list[dict]:
    """The cases of golden data that have this among what is expected."""
    found = json.loads((TESTS / "golden" / f"{name}.json").read_text())["cases"]
    return [pytest.param(case, id=case["id"]) for case in found if key in case["expected"]]


# ------------------------------------------------------------------------------------------------ the loss
@pytest.mark.parametrize("case, variant", golden("exgrpo"))
def test_loss_and_gradient_equal_the_authors(case, variant):
    """All of theirs; of their metrics those that can be compared.

    Their KL is of rollouts and replayed rows together, their ratio the shaped one, and their clip_fraction
    without the clip what it would have done.
    """
    logp, old_logp, advantages, mask, is_demo = tensors(
        case, "logp", "old_logp", "advantage_row", "mask", "is_expert")
    hyper, official = variant["hyper"], variant["expected"]["metrics"]
    normaliser = mask.shape[1] if hyper["loss_remove_token_mean"] else mask.sum()
    clip = (None, None) if hyper["loss_remove_clip"] else (hyper["cliprange"], hyper["cliprange"])
    gamma = None if hyper["off_policy_reshape"] == "no_reshape" else 0.1
    loss, metrics = exgrpo_loss(logp.requires_grad_(), old_logp, advantages, mask, is_demo, normaliser, gamma, *clip)
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, logp.grad, variant["expected"]["grad_logp"])
    named = [("ratio/demonstrations", "off_ratio_mean")] if gamma is None else []
    named += [] if is_demo.any() else [("kl/old_policy", "ppo_kl")]
    for ours, theirs in named:
        total, count = metrics[ours]
        assert (total / count.clamp(min=1)).item() == pytest.approx(official[theirs], rel=2e-6, abs=1e-7)


@pytest.mark.parametrize("gamma", (0.1, None))
def test_on_a_policy_that_was_sure_of_everything_it_is_luffy_to_the_bit(gamma):
    """Where log π_past is 0, w is p."""
    torch.manual_seed(0)
    old_logp = -torch.rand(6, 7, dtype=torch.float64) * 3
    old_logp[:2] = 0
    logp, mask = old_logp - torch.rand(6, 7).double(), torch.arange(7) < torch.tensor([[7], [1], [4], [5], [2], [6]])
    inputs = old_logp, torch.randn(6).double(), mask, torch.arange(6) < 2, 25, gamma, 0.2, 0.2
    a, b = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss, metrics = exgrpo_loss(a, *inputs)
    luffy, luffy_metrics = luffy_loss(b, *inputs)
    loss.backward()
    luffy.backward()
    assert torch.equal(loss, luffy) and torch.equal(a.grad, b.grad)
    assert metrics | luffy_metrics == metrics


def test_the_figures_of_its_docstring():
    """The gradient of a replayed token, per unit of A; 4 right of 8 against 1."""
    w = torch.tensor([[1.0, 0.1, 0.05, 0.2, 1e-9]], dtype=torch.float64)
    logp = w.log().requires_grad_()
    loss, _ = exgrpo_loss(logp, torch.zeros(1, 5), torch.ones(1).double(), torch.ones(1, 5), torch.ones(1), 1)
    loss.backward()
    assert -logp.grad[0, 0].item() == pytest.approx(0.083, abs=5e-4)
    assert -logp.grad[0, 1].item() == pytest.approx(0.25, rel=1e-12) and (-logp.grad < 0.25).sum() == 4
    assert -logp.grad[0, -1] < 1e-7
    four, one = bucket_weights([4, 1], 8)
    assert four / one == pytest.approx(90, abs=0.1)


# --------------------------------------------------------------------------------------- what is replayed
@pytest.mark.parametrize("case", cases("exgrpo_sampling", "bucket_probability"))
def test_buckets_are_drawn_as_the_authors_draw_them(case):
    """Their probability, and what cannot be otherwise in a draw. The laws that they do not use are left out."""
    n, sizes = case["inputs"]["n_rollout"], {int(k): size for k, size in case["inputs"]["bucket_sizes"].items()}
    expected = {int(k): value for k, value in case["expected"]["bucket_probability"]["normal"].items()}
    assert dict(zip(sizes, bucket_weights(list(sizes), n))) == pytest.approx(expected, rel=1e-12)

    right = {100 * bucket + place: bucket for bucket, size in sizes.items() for place in range(size)}
    seen = Counter(right[choose(right, 1, n, str(seed))[0]] for seed in range(2000))
    for bucket, probability in expected.items():
        deviation = (probability * (1 - probability) / 2000) ** 0.5
        assert abs(seen[bucket] / 2000 - probability) <= 4 * deviation, bucket
    for draw in case["expected"]["draws"]:
        chosen = choose(right, draw["n"], n, str(draw["seed"]))
        assert len(set(chosen)) == len(chosen) == len(draw["questions"]) == draw["n"]
        assert set(chosen) | set(draw["questions"]) <= right.keys()
    assert set(choose(right, len(right), n, "all")) == right.keys()
    assert choose(right, 0, n, "none") == []


def test_within_a_bucket_all_are_as_likely():
    right = {"A": 4, "B": 4, "C": 4, "D": 1}
    seen = Counter(choose(right, 1, 8, str(seed))[0] for seed in range(1500))
    assert all(abs(seen[problem] - 500) < 75 for problem in "ABC") and seen["D"] < 30


def test_buckets_far_from_the_middle_can_be_drawn():
    """Where the density itself is 0 in floating point."""
    assert bucket_weights([1], 128) == [1.0] and choose({"A": 1, "B": 2}, 2, 128, "") == ["A", "B"]


@pytest.mark.parametrize("case", cases("exgrpo_sampling", "chosen"))
def test_the_response_of_the_lowest_entropy_is_the_authors(case):
    for question, means in case["inputs"]["entropy"].items():
        rows = [Row(None, [1, 9], prefix_entropy=torch.tensor([mean, mean])) for mean in means]
        assert surest(rows) == case["expected"]["chosen"][question]


@pytest.mark.parametrize("case", cases("exgrpo_buffer", "trace"))
def test_what_is_stored_and_retired_is_the_authors(case):
    """Step by step. Their texts have no EOS; here ids have it."""
    inputs, state = case["inputs"], {}
    steps = [[Row(group["question"], response, reward=reward) for group in step
              for response, reward in zip(group["responses"], group["rewards"])] for step in inputs["steps"]]
    problems = {row.problem: Problem(row.problem, "", [], "", "", "", {}) for row in sum(steps, [])}
    experience, started = Experience([*problems.values()], state, lambda *value: None), False
    for rows, expected in zip(steps, case["expected"]["trace"], strict=True):
        for row in rows:
            row.problem = problems[row.problem]
        solved, right = sort_groups(rows)
        experience.retire(solved)
        experience.add(right if started else {})
        started = started or sum(row.reward for row in rows) / len(rows) > inputs["start_ratio"]
        assert started == expected["mixed_from_next_step"] and len(solved) == expected["solve_all"]
        assert sorted(problem.index for problem in experience.retired) == expected["retired"]
        assert {str(index): [tokens.tolist()[:-1] for tokens, _ in responses]
                for index, responses in state["experience"]["responses"].items()} == expected["pool"]
        buckets = {}
        for problem, count in experience.right.items():
            buckets.setdefault(str(count), []).append(problem.index)
        assert {count: sorted(indices) for count, indices in buckets.items()} == expected["buckets"]


@pytest.fixture
def coin_run(make_run, coin_model, coin_data):
    return make_run("more/exgrpo", "--model", coin_model, "--data", coin_data, *SMALL)


def remember(run, problems: list[Problem], *answers: str) -> list[Row]:
    """Stores responses to each, with log-probs that no policy gives."""
    rows = [Row(problem, run.codec.encode(problem, f"<think>\n</think>\n\\boxed{{{answer}}}"))
            for problem in problems for answer in answers]
    for row in rows:
        row.old_logp = -torch.arange(1.0, len(row.response) + 1)
    run.experience.add({problem: [row for row in rows if row.problem is problem] for problem in problems})
    return rows


@pytest.mark.parametrize("case", cases("exgrpo_sampling", "n_replayed"))
def test_the_make_up_of_a_batch_is_the_authors(case, coin_run):
    """How many are replayed and which are asked anew; a group has n rows either way."""
    inputs, expected, args = case["inputs"], case["expected"], coin_run.args
    asked, others = coin_run.train[:inputs["batch_size"]], iter(coin_run.train[inputs["batch_size"]:])
    pool = {question: next(others) for question in inputs["pool_questions"]}
    remember(coin_run, [*pool.values()], "0")
    coin_run.experience.retire([pool[question] for question in inputs["retired"]])
    args.prompts, args.replay = inputs["batch_size"], inputs["ratio"]
    rows = make_batch(coin_run, args, asked)
    replayed = [row for row in rows if row.is_demo]
    assert len(replayed) == expected["n_replayed"]
    assert {row.problem for row in replayed} <= {pool[question] for question in expected["replayed_is_subset_of"]}
    assert list(dict.fromkeys(row.problem for row in rows))[:expected["n_fresh"]] == asked[:len(expected["fresh"])]
    sizes = Counter(row.problem.index for row in rows)
    assert len(sizes) == inputs["batch_size"] and set(sizes.values()) == {args.n}


def test_the_surest_response_is_replayed_with_the_log_probs_it_was_stored_with(coin_run):
    """Whatever the policy thinks of it now. A problem that is asked anew is not replayed beside it."""
    problem, other = coin_run.train[:2]
    stored = remember(coin_run, [problem, other], "0", "57", "1")
    scored = coin_run.experience.rows(problem)
    coin_run.score(scored)
    means = [row.prefix_entropy.mean() for row in scored]
    assert [len(row.prefix_entropy) for row in scored] == [len(row.response) for row in scored]
    row, = [row for row in make_batch(coin_run, coin_run.args, [other, *coin_run.train[2:5]]) if row.is_demo]
    best = stored[min(range(3), key=means.__getitem__)]
    assert row.problem is problem and row.response == best.response
    assert torch.equal(row.old_logp, best.old_logp) and not torch.equal(scored[0].old_logp, best.old_logp)


# ---------------------------------------------------------------------------------------------------- runs
def train(command_line, tmp_path, script: str, name: str, *flags: str):
    """Final weights, and metrics without times."""
    command_line(script, *SMALL, "--eval_every", "9", "--name", name, *flags).main()
    lines = read_jsonl(tmp_path / "runs" / name / "metrics.jsonl")
    metrics = [{key: value for key, value in line.items() if not key.startswith("seconds/")} for line in lines]
    return load(str(tmp_path / "runs" / name / "model"), torch.float32)[0].state_dict(), metrics


def test_before_the_start_it_is_grpo_to_the_bit(coin_model, coin_data, command_line, tmp_path):
    flags = "--model", coin_model, "--data", coin_data, "--entropy_bonus", "0.001", "--updates", "2"
    weights, logs = train(command_line, tmp_path, "grpo", "grpo", *flags)
    ours, our_logs = train(command_line, tmp_path, "more/exgrpo", "exgrpo", *flags, "--start", "1")
    assert all(torch.equal(weights[name], ours[name]) for name in weights)
    for line, our_line in zip(logs, our_logs, strict=True):
        assert line | our_line == our_line


def test_what_a_run_replays_and_that_it_resumes_to_the_bit(
        coin_model, coin_data, command_line, tmp_path, monkeypatch):
    """From step 3 on: step 1 starts it, step 2 stores. In the update a replayed row has what it had in its step.

    Problems that are retired are not asked again.
    """
    updates, left_out = [], []

    def watched_problems(run, without, next_problems=Run.next_problems):
        left_out.append({problem.index for problem in without})
        return next_problems(run, without=without)

    def watched_step(run, minibatch, optimizer_step=Run.optimizer_step):
        updates.append(minibatch)
        optimizer_step(run, minibatch)

    monkeypatch.setattr(Run, "next_problems", watched_problems)
    monkeypatch.setattr(Run, "optimizer_step", watched_step)
    flags = ["--model", coin_model, "--data", coin_data, "--start", "-1", "--replay", "0.8", "--updates", "1",
             "--prompts", "3", "--n", "2", "--lr", "1e-4"]
    weights, logs = train(command_line, tmp_path, "more/exgrpo", "whole", *flags, "--steps", "8")
    first, retired, waiting = {}, set(), 0
    for step, rows in enumerate(updates, start=1):
        replayed = [row for row in rows if row.is_demo]
        assert len(replayed) <= min(2, waiting) and (len(replayed) == min(2, waiting) or step > 6)
        assert logs[step]["exgrpo/replayed"] == len(replayed) / len({row.problem.index for row in rows})
        for row in replayed:
            when, past = first[row.problem.index, tuple(row.response)]
            assert 2 <= when < step and torch.equal(row.old_logp, past) and row.reward == 1
        assert left_out[step - 1] == retired and not retired & {row.problem.index for row in rows}
        for row in rows:
            group = [other for other in rows if other.problem.index == row.problem.index]
            assert len(group) == 2
            assert row.advantage == pytest.approx(row.reward - sum(other.reward for other in group) / 2, abs=1e-6)
            if step > 1 and row.reward == 1 and any(other.reward == 0 for other in group):
                first.setdefault((row.problem.index, tuple(row.response)), (step, row.old_logp))
            retired |= {row.problem.index} if all(other.reward == 1 for other in group) else set()
        assert logs[step]["experience/retired"] == len(retired)
        waiting = len({index for index, _ in first} - retired)
        assert logs[step]["experience/problems"] == waiting
    assert any(line["exgrpo/replayed"] and line["ratio/demonstrations"] != 1 for line in logs[1:7])
    assert logs[6]["experience/retired"] > 0

    train(command_line, tmp_path, "more/exgrpo", "resumed", *flags, "--steps", "6")
    resumed, resumed_logs = train(command_line, tmp_path, "more/exgrpo", "resumed", *flags, "--steps", "8", "--resume")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert resumed_logs[-2:] == logs[-2:]


def test_the_clip_acts_until_the_start_alone_unless_asked(coin_model, coin_data, command_line, tmp_path, monkeypatch):
    module, clips = command_line("more/exgrpo"), []
    monkeypatch.setattr(module, "exgrpo_loss", lambda *inputs: clips.append(inputs[7:]) or exgrpo_loss(*inputs))
    flags = ["--model", coin_model, "--data", coin_data, "--start", "-1", "--clip_high", "0.3"]
    for clip, expected in ([], [(0.2, 0.3), (None, None)]), (["--clip"], [(0.2, 0.3)]):
        clips.clear()
        train(command_line, tmp_path, "more/exgrpo", f"run {clip}", *flags, *clip)
        assert list(dict.fromkeys(clips)) == expected
