"""REC's losses against the numbers of the authors' code and the papers' formulas; their limits; what brakes what."""
import pytest
import torch
from conftest import SMALL, assert_golden, golden, read_jsonl, tensors, write_jsonl

import common
from grpo import group_advantages, grpo_loss
from more.rec import rec_loss

BRAKES = {"none": "none", "one-side": "one_side", "two-side": "two_side", "ring": "ring"}
REGULARISERS = {"k2": "opmd", "forward-kl": "asymre"}


# ------------------------------------------------------------------------------------------------ the loss
# Not compared, since they are not here: rec_gspo_* (ratios of whole rows) and red_* (other data weights).
@pytest.mark.parametrize("case, variant", golden(
    "rec", "reinforce", "rec_oneside_nois", "rec_oneside_nois_wide", "rec_oneside_is", "rec_twoside_nois",
    "rec_twoside_is", "rec_ring_nois", "rec_ring_is", "rep_opmd_k2", "rep_asymre_forward_kl"))
def test_loss_and_gradient_equal_the_authors(case, variant):
    """Their means are over tokens. Their OPMD squares tokens: ours does in rows of one token."""
    logp, old_logp, advantages, mask = tensors(case, "logp", "old_logp", "advantage_row", "mask")
    hyper = variant["hyper"]
    brake = REGULARISERS.get(hyper["regularizer"], BRAKES[hyper["clip_mode"]])
    settings = [brake, hyper["weight"] == "importance_sampling", hyper["epsilon_low"], hyper["epsilon_high"],
                hyper["epsilon_low_prime"], hyper["epsilon_high_prime"], hyper["regularizer_coef"]]
    logp.requires_grad_()
    rows = logp, old_logp, advantages[:, None].repeat(1, mask.shape[1]), mask
    if brake == "opmd":
        rows = [tensor.reshape(-1, 1) for tensor in rows]
        settings[-1] *= 2  # it takes in the half
    loss, metrics = rec_loss(*rows, mask.sum(), *settings)
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, logp.grad, variant["expected"]["grad_logp"])
    if brake not in ("two_side", "ring") or (advantages != 0).all():  # there tokens of A = 0 count for the authors
        total, count = metrics["clip_fraction"]
        assert (total / count).item() == pytest.approx(variant["expected"]["metrics"]["pg_clipfrac"], rel=1e-6)


@pytest.mark.parametrize("case, variant", golden(
    "rec", "opmd_paper_sequence", "asymre_paper_sequence", "opmd_trinity_tau_1", "asymre_trinity_tau_0"))
def test_opmd_and_asymre_equal_the_papers_and_the_authors(case, variant):
    logp, old_logp, advantages, mask = tensors(case, "logp", "old_logp", "advantage_row", "mask")
    hyper, paper = variant["hyper"], variant["name"].endswith("_paper_sequence")
    brake = variant["name"].partition("_")[0]
    tau = hyper.get("beta", hyper.get("tau")) if paper else -hyper.get("baseline_shift", 0.0)
    normaliser = len(mask) if paper else mask.sum()
    if variant["name"] == "opmd_trinity_tau_1":  # no square: REINFORCE, divided by 1 + tau
        brake, normaliser = "none", normaliser * 2
    loss, _ = rec_loss(logp.requires_grad_(), old_logp, advantages, mask, normaliser, brake, tau=tau)
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, logp.grad, variant["expected"]["grad_logp"])


@pytest.mark.parametrize("case, variant", golden("rec", "rec_nostd", "opmd_mean", "asymre"))
def test_advantages_equal_the_authors(case, variant):
    """Not rec_std, whose deviation is the population's. Groups of one, where they crash or have A = R, are not."""
    if variant["expected"]["advantage_row"] is None:
        assert "error" in variant["expected"]
        return
    rewards, groups = tensors(case, "rewards", "group")
    several = torch.tensor([(groups == group).sum() > 1 for group in groups])
    advantages = group_advantages(rewards, groups) - variant["hyper"].get("baseline_shift", 0.0)
    expected = torch.tensor(variant["expected"]["advantage_row"])[several]
    torch.testing.assert_close(advantages[several], expected, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------- its limits
def some_rows(drift: float = 1.0):
    torch.manual_seed(0)
    old_logp = -torch.rand(6, 7, dtype=torch.float64) * 3
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [5], [2], [6]])
    return old_logp + drift * torch.randn(6, 7, dtype=torch.float64), old_logp, torch.randn(6).double(), mask


def gradient(loss_of, rows, **settings) -> torch.Tensor:
    logp = rows[0].clone().requires_grad_()
    loss_of(logp, *rows[1:], **settings)[0].backward()
    return logp.grad


def test_the_clip_of_grpo_is_a_one_sided_brake_with_importance_weights():
    rows, clip = some_rows(), {"clip_low": 0.2, "clip_high": 0.28}
    weighed = gradient(rec_loss, rows, importance_weights=True, **clip)
    torch.testing.assert_close(weighed, gradient(grpo_loss, rows, **clip), rtol=1e-12, atol=0)
    unweighed = gradient(rec_loss, rows, **clip)
    assert ((unweighed == 0) == (weighed == 0)).all() and not torch.allclose(unweighed, weighed)


@pytest.mark.parametrize("brake", ("one_side", "two_side", "ring", "opmd"))
@pytest.mark.parametrize("weights", (False, True))
def test_on_policy_all_are_reinforce(brake, weights):
    rows = some_rows(drift=0.0)
    assert torch.equal(gradient(rec_loss, rows, brake=brake, importance_weights=weights),
                       gradient(rec_loss, rows, brake="none"))


def test_asymre_is_a_lower_baseline():
    logp, old_logp, advantages, mask = rows = some_rows()
    shifted = logp, old_logp, advantages + 0.3, mask
    torch.testing.assert_close(gradient(rec_loss, rows, brake="asymre", tau=0.3),
                               gradient(rec_loss, shifted, brake="none"), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("brake, kept", (
    ("none", "++++++ ++++++"), ("one_side", "++++-- --++++"), ("two_side", "--++-- --++--"), ("ring", "+-++-- --++-+")))
def test_who_is_kept(brake, kept):
    """r = 0.3, 0.7, 0.9, 1.1, 2.5, 3.5, right and then wrong. The last wrong one is far above 1 + 2."""
    ratio = torch.tensor([[0.3, 0.7, 0.9, 1.1, 2.5, 3.5]] * 2, dtype=torch.float64)
    rows = ratio.log(), torch.zeros(2, 6), torch.tensor([1.0, -1.0]), torch.ones(2, 6)
    signs = ["".join("+" if number else "-" for number in row) for row in gradient(rec_loss, rows, brake=brake)]
    assert " ".join(signs) == kept


def pairs(logp, old_logp, rewards, tau):
    """1/n² Σ_{i<j} (a_i - a_j)² of one group, a = R - τ (log π - log π_old), of whole responses."""
    a = rewards - tau * (logp - old_logp).sum(dim=1)
    return (a[:, None] - a[None, :]).square().sum() / 2 / len(a) ** 2


def test_the_pairwise_surrogate_is_reinforce_and_further_away_opmd_less_its_mean():
    torch.manual_seed(0)
    old_logp, tau = -torch.rand(6, 5, dtype=torch.float64) * 3, 0.3
    rewards, mask = torch.tensor([1.0, 0, 0, 1, 0, 0], dtype=torch.float64), torch.ones(6, 5)
    for drift in (0.0, 0.5):
        logp = (old_logp + drift * torch.randn(6, 5, dtype=torch.float64)).requires_grad_()
        (surrogate,) = torch.autograd.grad(pairs(logp, old_logp, rewards, tau), logp)
        rows = logp.detach(), old_logp, rewards - rewards.mean(), mask
        opmd = gradient(rec_loss, rows, normaliser=6, brake="opmd", tau=tau)
        mean = tau * (rows[0] - old_logp).sum(dim=1).mean() / 6
        torch.testing.assert_close(surrogate / (2 * tau), opmd - mean, rtol=1e-10, atol=1e-12)


def test_without_a_brake_a_wrong_response_is_pushed_down_for_ever():
    """A policy of three responses, of which one is right, learns from the same set again and again."""
    advantages, old_logp = torch.tensor([2 / 3, -1 / 3, -1 / 3]), torch.full((3, 1), 1 / 3).log()

    def learn(steps: int, **settings) -> tuple[float, float]:
        logits = torch.zeros(3, 1, requires_grad=True)
        for _ in range(steps):
            loss, _ = rec_loss(logits.log_softmax(dim=0), old_logp, advantages, torch.ones(3, 1), **settings)
            (slope,) = torch.autograd.grad(loss, logits)
            logits = (logits - slope).detach().requires_grad_()
        return loss.item(), logits.log_softmax(dim=0).min().item()

    losses = [learn(steps, brake="none") for steps in (200, 400, 800)]
    assert losses[0][0] > losses[1][0] > losses[2][0] and losses[2][1] < -70
    assert learn(800, brake="one_side") == learn(400, brake="one_side")
    assert learn(800, brake="one_side")[1] > -1.7  # 1/3 and one step below 0.8 of it
    assert learn(800, brake="opmd", tau=1.0) == pytest.approx(learn(400, brake="opmd", tau=1.0), rel=1e-4)


# ------------------------------------------------------------------------------------------------ in a run
@pytest.mark.parametrize("brake, moves", (("asymre", True), ("one_side", False)))
def test_rows_of_advantage_0_are_in_where_they_have_a_gradient(brake, moves, coin_model, command_line, tmp_path):
    data = write_jsonl(tmp_path / "never.jsonl", [{"problem": f"a={i};a?", "answer": "7"} for i in range(9)])
    command_line("more/rec", "--model", coin_model, "--data", data, *SMALL, "--steps", "1", "--updates", "2",
                 "--brake", brake, "--name", "x").main()
    line = read_jsonl(tmp_path / "runs" / "x" / "metrics.jsonl")[1]
    assert line["groups/all_wrong"] == 1 and (line["gradient_norm"] > 0) == moves


@pytest.mark.parametrize("flags, flag, reason", (
    (["--tau", "1"], "--tau", "without --brake opmd|asymre"),
    (["--clip_low", "0.1", "--brake", "opmd"], "--clip_low", "without --brake one_side|two_side|ring"),
    (["--ring_high", "3"], "--ring_high", "without --brake ring")))
def test_a_flag_that_does_nothing_is_one_line(flags, flag, reason, command_line, capsys):
    module = command_line("more/rec", *flags)
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"rec.py: error: {flag} does nothing {reason}: leave it out\n"


@pytest.mark.parametrize("flags", (["--brake", "opmd", "--tau", "1"], ["--brake", "asymre", "--tau", "1"],
                                   ["--brake", "ring", "--clip_high", "1", "--ring_low", "1"]))
def test_a_flag_that_does_something_is_not_refused(flags, command_line):
    module = command_line("more/rec", *flags)
    assert common.parse(module.Args, module.__doc__)
