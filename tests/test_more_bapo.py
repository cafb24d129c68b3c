"""BAPO's search and loss against Algorithm 1 and the authors' code; what the search can do; whose tokens it sees."""
import pytest
import torch
from conftest import SMALL, assert_golden, golden, read_jsonl, tensors

import more.bapo
from grpo import grpo_loss
from more.bapo import bapo_bounds, bapo_loss

RATES = ("trainer_yaml", "run_example_sh", "paper_ranges_in_code", "trainer_yaml_const_norm", "fixed_bounds")


def flat(logp, old_logp, advantages, mask, clamp: float = torch.inf):
    """What the search gets: ratio and advantage of each token."""
    ratio = (logp - old_logp).clamp(-clamp, clamp).exp()
    return ratio[mask.bool()], advantages[:, None].repeat(1, mask.shape[1])[mask.bool()]


# ----------------------------------------------------------------------------------- the authors' numbers
@pytest.mark.parametrize("case, variant", golden("bapo", "paper_algorithm1"))
def test_bounds_loss_and_gradient_equal_the_papers_algorithm(case, variant):
    rows = tensors(case, "logp", "old_logp", "advantage_row", "mask")
    hyper, expected = variant["hyper"], variant["expected"]["metrics"]
    low, high = [tuple(hyper[f"{side}_{name}"] for name in ("start", "max", "step")) for side in ("c_low", "c_high")]
    bounds = bapo_bounds(*flat(*rows), hyper["rho_0"], low, high)
    assert bounds == pytest.approx([expected[name] for name in ("clip_low", "clip_high", "rho")], rel=1e-9)
    assert bapo_bounds(*flat(*rows)) == bounds  # these are the defaults
    assert (bounds[0] - low[0]) / low[2] == pytest.approx(expected["clip_low_steps"], abs=1e-9)
    assert (bounds[1] - high[0]) / high[2] == pytest.approx(expected["clip_high_steps"], abs=1e-9)
    rows[0].requires_grad_()
    loss, _ = bapo_loss(*rows, rows[3].sum(), *bounds[:2])
    loss.backward()
    assert_golden(case, loss, variant["expected"]["loss"])
    assert_golden(case, rows[0].grad, variant["expected"]["grad_logp"])


@pytest.mark.parametrize("case, variant", golden("bapo", *RATES))
def test_in_the_other_order_they_equal_the_authors(case, variant):
    """Their target is P / N. Where their second clip acts (dev-4) the bounds are compared alone."""
    rows = tensors(case, "logp", "old_logp", "advantage_row", "mask")
    hyper, expected = variant["hyper"], variant["expected"]["metrics"]
    low, high = [tuple(hyper[f"ratio_{side}_{name}"] for name in ("start", "max", "step"))
                 for side in ("lower", "upper")]
    target = hyper["adv_ratio_target"] / (1 + hyper["adv_ratio_target"])
    c_low, c_high, share = bapo_bounds(*flat(*rows, clamp=20), target, low, high, lower_first=True)
    assert [c_low, c_high] == pytest.approx([expected["clip_low"], expected["clip_high"]], rel=1e-9)
    right, wrong = expected["positive_contribution"], expected["negative_contribution"]
    assert share == pytest.approx(right / (right + wrong), rel=1e-6)
    rows[0].requires_grad_()
    if expected["pg_clipfrac_lower"] == 0:
        per_row = hyper["loss_agg_mode"] == "seq-mean-token-sum-norm"  # a sum over L and not over B
        loss, metrics = bapo_loss(*rows, rows[3].shape[1] if per_row else rows[3].sum(), c_low, c_high)
        loss.backward()
        assert_golden(case, loss, variant["expected"]["loss"])
        assert_golden(case, rows[0].grad, variant["expected"]["grad_logp"])
        total, count = metrics["clip_fraction"]
        assert (total / count).item() == pytest.approx(expected["pg_clipfrac"], rel=1e-6)
    else:
        assert case["id"] == "bapo-dev-4"


# ------------------------------------------------------------------------------------------------ its limits
def test_between_fixed_bounds_it_is_grpo_to_the_bit():
    torch.manual_seed(0)
    old_logp = -torch.rand(6, 7, dtype=torch.float64) * 3
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [5], [2], [6]])
    rows = old_logp + torch.randn(6, 7, dtype=torch.float64), old_logp, torch.randn(6).double(), mask
    a, b = [rows[0].clone().requires_grad_() for _ in range(2)]
    loss, metrics = bapo_loss(a, *rows[1:], 30, 0.8, 1.2)
    expected, expected_metrics = grpo_loss(b, *rows[1:], 30)
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected) and torch.equal(a.grad, b.grad) and metrics == expected_metrics


@pytest.mark.parametrize("advantages, bounds, share", (
    ([1.0, 0.5], (0.6, 1.2), 1.0), ([-1.0, -0.5], (0.9, 3.0), 0.0), ([0.0, 0.0], (0.6, 1.2), None)))
def test_of_one_kind_alone(advantages, bounds, share):
    """All right, all wrong, neither. The ends are reached: 15 steps of 0.02 and 36 of 0.05."""
    result = bapo_bounds(torch.tensor([0.5, 2.0]), torch.tensor(advantages))
    assert result[:2] == pytest.approx(bounds, rel=1e-12)
    assert result[2] == share if share is not None else result[2] != result[2]


def test_a_higher_lower_bound_never_raises_the_share():
    """So in the paper's order it leaves its start only where the whole of c_high's range is not enough."""
    torch.manual_seed(0)
    between = ends = 0
    for _ in range(200):
        ratio = torch.exp(torch.randn(50, dtype=torch.float64))
        advantages = torch.randn(50, dtype=torch.float64) - 0.3 + torch.randn(1).double() / 3
        shares = [bapo_bounds(ratio, advantages, 0.0, (c_low, c_low, 0.02))[2] for c_low in (0.6, 0.7, 0.8, 0.9)]
        assert shares == sorted(shares, reverse=True)
        c_low, c_high, share = bapo_bounds(ratio, advantages)
        if share < 0.4:
            ends += 1
            assert (c_low, c_high) == pytest.approx((0.9, 3.0))
        else:
            assert c_low == 0.6
            between += c_high > 1.2
    assert between > 10 and ends > 10


def test_a_start_at_its_end_or_beyond_stays():
    ratio, advantages = torch.tensor([1.0, 1.0]), torch.tensor([0.1, -1.0])
    assert bapo_bounds(ratio, advantages, 0.4, (0.8, 0.8, 0.02), (1.2, 1.0, 0.05))[:2] == (0.8, 1.2)


# ------------------------------------------------------------------------------------------------ in a run
def test_bounds_are_found_on_the_whole_mini_batch_before_its_gradient(
        coin_model, coin_data, command_line, tmp_path, monkeypatch):
    """Not on micro-batches, which are single rows here; in the first update every ratio is 1, then no more."""
    searches, used, sizes = [], [], []

    def watched_bounds(ratio, *rest):
        searches.append((ratio, *bapo_bounds(ratio, *rest)))
        sizes.append(0)
        return searches[-1][1:]

    def watched_loss(logp, old_logp, advantages, mask, normaliser, *bounds):
        used.append((len(searches) - 1, bounds))
        sizes[-1] += int(mask.sum())
        return bapo_loss(logp, old_logp, advantages, mask, normaliser, *bounds)

    monkeypatch.setattr(more.bapo, "bapo_bounds", watched_bounds)
    monkeypatch.setattr(more.bapo, "bapo_loss", watched_loss)
    flags = ("--model", coin_model, "--data", coin_data, *SMALL, "--steps", "1", "--updates", "2",
             "--micro_tokens", "1")
    command_line("more/bapo", *flags, "--target", "0.9", "--name", "searched").main()
    assert len(searches) == 2 and len(used) > 4
    assert [len(ratio) for ratio, *_ in searches] == sizes
    assert all(bounds == searches[number][1:3] for number, bounds in used)
    assert (searches[0][0] - 1).abs().max() < 1e-4 < 1e-2 < (searches[1][0] - 1).abs().max()
    line = read_jsonl(tmp_path / "runs" / "searched" / "metrics.jsonl")[1]
    for place, name in enumerate(("bapo/c_low", "bapo/c_high", "bapo/share"), start=1):
        assert line[name] == pytest.approx((searches[0][place] + searches[1][place]) / 2)

    assert line["bapo/moved"] == sum(bounds[1:3] != (0.6, 1.2) for bounds in searches) / 2
    assert line["bapo/at_ends"] == sum(bounds[3] < 0.9 for bounds in searches) / 2

    command_line("more/bapo", *flags, "--fixed_bounds", "--name", "fixed").main()
    fixed = read_jsonl(tmp_path / "runs" / "fixed" / "metrics.jsonl")[1]
    assert len(searches) == 2 and used[-1][1] == (0.6, 1.2) and "bapo/share" not in fixed
    assert fixed["entropy"] == line["entropy"]  # before the updates: the search does not log it
