"""CHORD's schedule and loss against the numbers of the authors' own code, and its two independent streams."""
import dataclasses
import json
import math
import sys
from collections import Counter

import pytest
import torch
from conftest import SMALL, TESTS, assert_golden, golden, read_jsonl, run_script, tensors, write_jsonl
from safetensors.torch import load_file

import chord
import common
from common import Run
from chord import chord_loss, make_batch, mu_schedule
from common import Row
from grpo import grpo_loss
from relift import sft_loss
from runtime.problems import draw


def schedules() -> list:
    cases = json.loads((TESTS / "golden" / "chord_mu.json").read_text())["cases"]
    return [pytest.param(case, id=case["id"]) for case in cases]


@pytest.mark.parametrize("case", schedules())
def test_mu_equals_the_authors(case):
    config = case["config"]
    settings = [config[f"mu_{name}"] for name in ("peak", "valley", "warmup_steps", "decay_steps")]
    ours = [mu_schedule(step, *settings) for step in case["steps"]]
    assert ours == pytest.approx(case["expected_mu"], rel=0, abs=1e-12)


def test_mu_at_the_seams_of_its_schedule():
    """Warm-up starts at 0 and ends at the peak exactly; the valley is reached exactly, also without decay."""
    settings = (0.8, 0.25, 4, 6)  # peak, valley, warmup, decay
    assert mu_schedule(0, *settings) == 0
    assert mu_schedule(2, *settings) == 0.4
    assert mu_schedule(4, *settings) == 0.8
    assert mu_schedule(7, *settings) == pytest.approx(0.525)
    assert mu_schedule(10, *settings) == 0.25
    assert mu_schedule(10**9, *settings) == 0.25
    assert mu_schedule(3, 0.8, 0.25, 4, 0) == pytest.approx(0.6)
    assert mu_schedule(4, 0.8, 0.25, 4, 0) == 0.25
    assert mu_schedule(0, 0.8, 0.25, 0, 0) == 0.25
    assert mu_schedule(0, 1.0, 0.05, 0, 60) == 1.0  # then not a single rollout may be paid for


# __paper_era: of the time when the paper appeared, without the dual clip and the clamp that came later.
# Not ours by definition, so not compared: *_seq_mean*, which take the mean of each row first, cutoff, sft_is.
PAPER = golden("chord", "script_phi_sched__paper_era", "chord_mu__paper_era", "chord_phi__paper_era",
               "mu_step0_warmup__paper_era")
SFT = golden("chord", "sft_token_mean", "sft_phi_token_mean")


def inputs(case) -> list[torch.Tensor]:
    """logp, old_logp, advantages, mask, is_demo of a case; not its groups: experts belong to none."""
    ungrouped = case | {"inputs": case["inputs"] | {"group": []}}
    return tensors(ungrouped, "logp", "old_logp", "advantage_row", "mask", "is_expert")


@pytest.mark.parametrize("case, variant", PAPER)
def test_loss_gradient_and_metrics_equal_the_authors(case, variant):
    hyper, official = variant["hyper"], variant["expected"]["metrics"]
    settings = [hyper[f"mu_{name}"] for name in ("peak", "valley", "warmup_steps", "decay_steps")]
    mu = mu_schedule(hyper["step"], *settings)
    assert mu == pytest.approx(official["mu"], rel=0, abs=1e-12)
    logp, *rest = inputs(case)
    clip = hyper["clip_range"]
    loss, metrics = chord_loss(logp.requires_grad_(), *rest, mu, hyper["enable_phi_function"],
                               clip_low=clip, clip_high=clip)
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, logp.grad, variant["expected"]["grad_logp"])

    ours = {name: total / count for name, (total, count) in metrics.items() if count}
    theirs = {"usual/pg_loss": "token_loss/rollouts", "usual/pg_clipfrac": "clip_fraction",
              "usual/ppo_kl": "kl/old_policy", "expert/sft_loss": "token_loss/demonstrations",
              "expert/sft_phi_loss": "token_loss/demonstrations"}
    compared = {theirs[name]: value for name, value in official.items() if name in theirs}
    assert compared.keys() == ours.keys()  # those of each side that has rows
    for name in ours:
        assert ours[name].item() == pytest.approx(compared[name], rel=2e-6, abs=1e-9)


@pytest.mark.parametrize("case, variant", SFT)
def test_fine_tuning_alone_equals_the_authors(case, variant):
    logp, *rest = inputs(case)
    loss, _ = chord_loss(logp.requires_grad_(), *rest, mu=1, phi="phi" in variant["name"])
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, logp.grad, variant["expected"]["grad_logp"])


PHI = [parameter for parameter in PAPER + SFT if "phi_weights_expert_rows" in parameter.values[0]]


@pytest.mark.parametrize("case, variant", PHI)
def test_phi_equals_the_authors(case, variant):
    """The weight of a token is what its gradient is multiplied by; where phi is off, 1."""
    logp, old_logp, advantages, mask, is_expert = inputs(case)
    demo = (mask * is_expert[:, None]).bool()
    phi = variant["hyper"].get("enable_phi_function", "phi" in variant["name"])
    loss, _ = chord_loss(logp.requires_grad_(), old_logp, advantages, mask, is_expert, 1, phi, demo_tokens=1)
    loss.backward()
    official = torch.tensor(case["phi_weights_expert_rows"], dtype=torch.float64)
    official = official[mask[is_expert.bool()].bool()]
    assert_golden(case, -logp.grad[demo], (official if phi else torch.ones_like(official)).tolist())


def some_rows(dtype=torch.float64):
    """logp, old_logp, advantages, mask, is_demo of six rows; log-probs are multiples of 1/64."""
    torch.manual_seed(0)
    old_logp, noise = -torch.randint(1, 192, (6, 7)), torch.randint(-32, 32, (6, 7))
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [5], [2], [6]])
    is_demo = torch.tensor([0, 1, 0, 0, 1, 0]).bool()
    advantages = torch.randn(6, dtype=dtype)
    return (old_logp + noise).to(dtype) / 64, old_logp.to(dtype) / 64, advantages, mask, is_demo


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("phi", (False, True))
def test_without_imitation_it_is_grpo_to_the_bit(phi, dtype):
    """mu = 0: the demonstrations might as well not be there; their old_logp and advantages are not read."""
    logp, old_logp, advantages, mask, is_demo = some_rows(dtype)
    for rows in (slice(None), ~is_demo):  # with and without demonstrations in the batch
        a, b = logp.clone().requires_grad_(), logp.clone().requires_grad_()
        loss, metrics = chord_loss(a[rows], old_logp.masked_fill(is_demo[:, None], math.nan)[rows],
                                   advantages.masked_fill(is_demo, math.nan)[rows], mask[rows], is_demo[rows],
                                   0, phi, 19, 3, 0.2, 0.28)
        grpo, grpo_metrics = grpo_loss(b[rows], old_logp[rows], advantages[rows],
                                       (mask & ~is_demo[:, None])[rows], 19, 0.2, 0.28)
        loss.backward()
        grpo.backward()
        assert torch.equal(loss, grpo)
        assert torch.equal(a.grad, b.grad)
        assert metrics | grpo_metrics == metrics


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_without_rl_it_is_the_token_mean_of_fine_tuning_exactly(dtype):
    """mu = 1, from its definition; sums of multiples of 1/64 are the same in every order."""
    logp, old_logp, advantages, mask, is_demo = some_rows(dtype)
    for tokens in (None, 3):  # 1 + 2 tokens: by default those of the batch
        x = logp.clone().requires_grad_()
        loss, _ = chord_loss(x, old_logp, advantages, mask, is_demo, 1, demo_tokens=tokens)
        loss.backward()
        assert torch.equal(loss, -(logp[1, 0] + logp[4, 0] + logp[4, 1]) / 3)
        assert torch.equal(loss, sft_loss(logp[is_demo], mask[is_demo])[0])
        expected = torch.zeros_like(logp)
        expected[1, 0] = expected[4, 0] = expected[4, 1] = -1 / torch.tensor(3, dtype=dtype)
        assert torch.equal(x.grad, expected)


def test_phi_has_no_gradient_of_its_own():
    """sg(p (1 - p)): the loss falls for ever as p rises to 1, instead of having a minimum in between."""
    logp = torch.linspace(-5, -1e-3, 7, dtype=torch.float64).reshape(1, 7).requires_grad_()
    loss, _ = chord_loss(logp, logp.detach(), torch.ones(1), torch.ones(1, 7), torch.ones(1), 1, phi=True)
    loss.backward()
    p = logp.detach().exp()
    torch.testing.assert_close(logp.grad, -p * (1 - p) / 7, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------- what is in a batch
THOUGHT = "<think>\n</think>\n\\boxed{%d}"
USABLE = sorted(set(range(20)) - {0, 5, 10, 15})


@pytest.fixture(scope="module")
def shared_run(tiny_model, tmp_path_factory):
    """A run on 20 problems. Of their demonstrations 0 and 5 do not fit, and 10 and 15 are missing."""
    folder = tmp_path_factory.mktemp("chord")
    texts = [THOUGHT % i if i % 5 else None for i in range(20)]
    for i in (0, 5):
        texts[i] = "<think>\n" + "a=2\n" * 50 + f"</think>\n\\boxed{{{i}}}"
    rows = [{"problem": f"a={i};a?", "answer": str(i), "demonstration": text} for i, text in enumerate(texts)]
    data = write_jsonl(folder / "rows.jsonl", rows)
    held_out = write_jsonl(folder / "held_out.jsonl", rows[:1])
    flags = ("--model", tiny_model, "--data", data, "--eval_data", held_out, *SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["chord.py", *flags, "--max_response", "12", "--expert_share", "0.2"])
        run = Run(common.parse(chord.Args, chord.__doc__))
    yield run
    run.verifier.close()


@pytest.fixture
def run(shared_run, monkeypatch):
    """The run as if new. With its share of 0.2 there are 4 demonstrations beside 4 x 4 rollouts."""
    monkeypatch.setattr(shared_run, "args", dataclasses.replace(shared_run.args))
    monkeypatch.setattr(shared_run.demonstrations, "args", shared_run.args)
    monkeypatch.setattr(shared_run.sampler, "engine", shared_run.sampler.engine)
    shared_run.state.clear()
    shared_run.record.sums.clear()
    return shared_run


def indices(rows) -> list[int]:
    return [row.problem.index for row in rows]


def demonstrations(run, steps: int, prompts=slice(0, 4)) -> list[int]:
    """Those of some steps, at mu = 1: rollouts are of no interest here."""
    batches = [make_batch(run, run.args, run.train[prompts], 1) for _ in range(steps)]
    return [index for _, experts in batches for index in indices(experts)]


def test_rollouts_and_demonstrations_stand_side_by_side(run):
    problems = run.train[:4]
    rollouts, experts = make_batch(run, run.args, problems, 0.5)
    assert indices(rollouts) == [problem.index for problem in problems for _ in range(4)]
    assert not any(row.is_demo for row in rollouts)
    assert len(experts) == 4
    for row in experts:
        assert row.is_demo
        assert row.advantage  # or it would be left out of the micro-batches
        assert run.codec.text(row) == row.problem.demonstration
    run.args.prompts, run.args.expert_share = 8, 0.5
    assert len(demonstrations(run, 1)) == 8 * 4  # half of the rows


def test_demonstrations_are_a_stream_of_their_own(run):
    """It is the same for every choice of prompts, not that of the prompts, and set by the seed."""
    stream = demonstrations(run, 4)
    order = indices(map(Row, draw(run.train, "0 prompts", 0, 20), [[]] * 20))
    assert stream != [index for index in order if index in USABLE]
    run.state.clear()
    assert demonstrations(run, 4, prompts=slice(4, 12)) == stream
    run.state.clear()
    run.args.seed = 1
    assert demonstrations(run, 4) != stream


def test_all_demonstrations_are_used_before_one_comes_again(run):
    epochs = [demonstrations(run, 4) for _ in range(3)]  # 4 in each step: what cannot be used is replaced
    assert [sorted(epoch) for epoch in epochs] == [USABLE] * 3
    assert len(set(map(tuple, epochs))) == 3  # in a new order
    # the two that do not fit are counted each time that they come up, the two that are missing are not
    seen = indices(map(Row, draw(run.train, "0 experts", 0, run.state["drawn"]), [[]] * 60))
    assert run.record.sums["demonstrations/left_out"][0] == seen.count(0) + seen.count(5) >= 4
    assert [index for index in seen if index in USABLE] == sum(epochs, [])


def test_few_demonstrations_come_again_as_often_as_it_takes(run):
    run.args.prompts, run.args.expert_share = 32, 0.5
    assert Counter(demonstrations(run, 1)) == dict.fromkeys(USABLE, 8)  # 8 x 16 = 32 x 4


def test_data_without_a_usable_demonstration_ends_in_one_line(run, capsys):
    run.args.max_response = 3  # too few for each of them
    with pytest.raises(SystemExit) as error:
        demonstrations(run, 1)
    assert error.value.code == 2
    message, = capsys.readouterr().err.splitlines()
    assert "--max_response 3" in message


def test_a_side_of_weight_0_costs_nothing(run):
    rollouts, experts = make_batch(run, run.args, run.train[:4], 0)
    assert (len(rollouts), len(experts)) == (16, 0)
    assert run.state["drawn"] == 0  # none was drawn and thrown away
    assert run.record.sums["demonstrations/left_out"][0] == 0

    run.sampler.engine = None  # whoever samples now fails
    rollouts, experts = make_batch(run, run.args, run.train[:4], 1)
    assert (len(rollouts), len(experts)) == (0, 4)


# --------------------------------------------------------------------------------------------- by subprocess
def test_a_run_without_imitation_ends_with_the_weights_of_grpo(coin_model, coin_data, tmp_path):
    flags = ("--model", coin_model, "--data", coin_data, *SMALL, "--updates", "1", "--seed", "3", "--name")
    chord = run_script("chord.py", *flags, "chord", "--mu_peak", "0", "--mu_valley", "0", cwd=tmp_path)
    grpo = run_script("grpo.py", *flags, "grpo", "--std_normalise", "--token_mean", cwd=tmp_path)
    assert chord.returncode == 0, chord.stderr
    assert grpo.returncode == 0, grpo.stderr
    start = load_file(f"{coin_model}/model.safetensors")
    a, b = [load_file(tmp_path / "runs" / name / "model" / "model.safetensors") for name in ("chord", "grpo")]
    assert a.keys() == b.keys() == start.keys()
    for name in a:
        assert torch.equal(a[name], b[name])
        assert not torch.equal(a[name], start[name])  # something was learnt

    lines = [read_jsonl(tmp_path / "runs" / name / "metrics.jsonl") for name in ("chord", "grpo")]
    for chord_line, grpo_line in zip(*lines, strict=True):
        for name in grpo_line:
            assert name.startswith("seconds/") or chord_line[name] == grpo_line[name]
