"""What holds for every loss, for whoever copies it: shapes, dtypes, padding, extremes, no token, micro-batches."""
import doctest
import importlib
import inspect
import math

import pytest
import torch
from conftest import MORE, assert_parts_add_up

from chord import chord_loss, mu_schedule
from grpo import group_advantages, grpo_loss
from luffy import luffy_loss
from more.ampo import ampo_loss
from more.bapo import bapo_loss
from more.dapo import dapo_loss
from more.exgrpo import exgrpo_loss
from more.hpt import hpt_loss
from more.prefix_rft import prefix_rft_loss
from more.rec import rec_loss
from more.rl_plus import rl_plus_loss
from more.rl_sft import rl_sft_loss
from more.srft import srft_loss
from more.uft import uft_loss
from relift import hardest, rl_loss, sft_loss, take_from_buffer
from topr import pick, topr_loss

LOSSES = {  # with every setting that goes another way through them
    "grpo": (grpo_loss, {"clip_high": 0.28}),
    "grpo unclipped": (grpo_loss, {"clip_low": math.inf, "clip_high": math.inf}),
    "luffy": (luffy_loss, {}),
    "luffy clipped": (luffy_loss, {"gamma": None, "clip_low": 0.2, "clip_high": 0.28}),
    "chord": (chord_loss, {"mu": 0.3}),
    "chord phi": (chord_loss, {"mu": 0.3, "phi": True}),
    "rl": (rl_loss, {}),
    "sft": (sft_loss, {}),
    "topr": (topr_loss, {}),
    "tis": (topr_loss, {"weights": "tis"}),
    "reinforce": (topr_loss, {"weights": "reinforce"}),
    "ppo": (topr_loss, {"weights": "ppo"}),
}
for module in [importlib.import_module(script.replace("/", ".")) for script in MORE]:
    LOSSES |= {f"{module.__name__} {name}": (function, {}) for name, function in vars(module).items()
               if name.endswith("_loss") and function.__module__ == module.__name__}
LOSSES |= {  # their other settings
    "hpt clipped": (hpt_loss, {"sft_weight": 0.3, "clip_low": 0.2, "clip_high": 0.28}),
    "rl_plus clipped": (rl_plus_loss, {"gamma": 0, "uniform": 0.02, "clip_low": 0.2, "clip_high": 0.28}),
    "rl_sft clipped": (rl_sft_loss, {"sft_weight": 0.3, "clip_low": 0.2, "clip_high": 0.28}),
    "bapo narrow": (bapo_loss, {"c_low": 0.9, "c_high": 1.0}),
    "ampo unclipped": (ampo_loss, {"clip_low": math.inf, "clip_high": math.inf, "dual_clip": math.inf}),
    "exgrpo clipped": (exgrpo_loss, {"gamma": None, "clip_low": 0.2, "clip_high": 0.28}),
    "rec none": (rec_loss, {"brake": "none"}),
    "rec two_side": (rec_loss, {"brake": "two_side", "importance_weights": True}),
    "rec ring": (rec_loss, {"brake": "ring", "clip_low": 0.1, "ring_low": 0.3, "ring_high": 0.3}),
    "rec opmd": (rec_loss, {"brake": "opmd"}),
    "rec asymre": (rec_loss, {"brake": "asymre"}),
    "srft constant": (srft_loss, {"gamma": None, "constant_weights": True}),
    "uft unclipped": (uft_loss, {"sft_weight": 1.0, "clip_low": math.inf, "clip_high": math.inf}),
    "prefix_rft without dual clip": (prefix_rft_loss, {"clip_high": 0.28, "dual_clip": math.inf}),
}
IMITATE = (chord_loss, hpt_loss, rl_sft_loss, srft_loss, uft_loss)  # whose demonstrations have a gradient at A = 0
PULL = ("opmd", "asymre")  # REC's brakes with which rollouts have one there
WHOLE = ("normaliser", "sft_normaliser", "rollout_tokens", "demo_tokens", "tokens")  # what they divide by
each_loss = pytest.mark.parametrize("loss_of, settings", LOSSES.values(), ids=LOSSES)
MIXED = [name for name, (loss, _) in LOSSES.items() if "is_demo" in inspect.signature(loss).parameters]
each_mixed_loss = pytest.mark.parametrize("loss_of, settings", [LOSSES[name] for name in MIXED], ids=MIXED)


def some_rows(dtype=torch.float64) -> dict:
    """Rows of no to seven tokens, A of either sign, ratios on both sides of the clip, two demonstrations."""
    torch.manual_seed(1)
    old_logp = -torch.rand(8, 7, dtype=dtype) * 3
    drift = torch.tensor([0.2, 0.2, -0.2, -0.2, 0.2, 0.2, -0.2, -0.2], dtype=dtype)[:, None]
    return {"logp": old_logp + drift + 0.4 * torch.randn(8, 7, dtype=dtype), "old_logp": old_logp,
            "advantages": torch.tensor([1, 0.5, 1, -0.7, -1, -0.3, -1, 0.6], dtype=dtype),
            "mask": torch.arange(7) < torch.tensor([[7], [1], [4], [5], [2], [6], [3], [0]]),
            "is_demo": torch.tensor([1, 0, 0, 1, 0, 0, 0, 0]).bool(), "entropy": 2 * torch.rand(8, 7, dtype=dtype)}


def evaluate(loss_of, settings: dict, rows: dict, whole=None):
    """Loss, gradient and metrics. A loss gets what it has an argument for; `whole` is what it divides by."""
    rows = dict.fromkeys(WHOLE, whole) | rows | {"logp": rows["logp"].clone().requires_grad_()}
    names = inspect.signature(loss_of).parameters
    loss, metrics = loss_of(**{name: value for name, value in rows.items() if name in names}, **settings)
    loss.backward()
    return loss.detach(), rows["logp"].grad, metrics


def assert_same(results, expected):
    """To the bit."""
    for result, value in zip(results[:2], expected[:2], strict=True):
        assert result.dtype == value.dtype
        assert torch.equal(result, value)
    assert results[2] == expected[2]


# ------------------------------------------------------------------------------------------------- copying
def copy_of(function, **imported):
    """The function from its own source, where nothing is imported but what is named."""
    exec(inspect.getsource(function), imported)
    return imported[function.__name__]


@each_loss
def test_a_loss_copied_alone_needs_torch_alone(loss_of, settings):
    copied = evaluate(copy_of(loss_of, torch=torch), settings, some_rows())
    assert_same(copied, evaluate(loss_of, settings, some_rows()))


def test_the_other_functions_can_be_copied_alone():
    rewards, groups = torch.rand(6), torch.tensor([0, 0, 1, 1, 1, 2])
    copied = copy_of(group_advantages, torch=torch)
    for std in (False, True):
        assert torch.equal(copied(rewards, groups, std), group_advantages(rewards, groups, std))
    copied = copy_of(mu_schedule, math=math)
    assert [copied(i, 0.9, 0.1, 3, 5) for i in range(10)] == [mu_schedule(i, 0.9, 0.1, 3, 5) for i in range(10)]
    assert copy_of(take_from_buffer)([5, 6], [8], 2) == take_from_buffer([5, 6], [8], 2)


@pytest.mark.parametrize("function", (group_advantages, grpo_loss, luffy_loss, chord_loss, mu_schedule, rl_loss,
                                      sft_loss, hardest, take_from_buffer, topr_loss, pick))
def test_the_numbers_of_its_docstring(function):
    example, = doctest.DocTestFinder().find(function, globs=dict(function.__globals__))
    report = []
    results = doctest.DocTestRunner().run(example, out=report.append)
    assert results.attempted > 0
    assert not results.failed, "".join(report)


# ---------------------------------------------------------------------------------------- shapes and dtypes
@each_loss
def test_advantages_may_have_three_shapes(loss_of, settings):
    rows = some_rows()
    expected, advantages = evaluate(loss_of, settings, rows), rows["advantages"][:, None]
    assert_same(evaluate(loss_of, settings, rows | {"advantages": advantages}), expected)
    assert_same(evaluate(loss_of, settings, rows | {"advantages": advantages.repeat(1, 7)}), expected)


@each_loss
def test_each_token_may_have_an_advantage_of_its_own(loss_of, settings):
    """A token whose A is c > 0 times as large has c times the gradient, but for what it has at A = 0."""
    rows, factor = some_rows(), torch.rand(8, 7, dtype=torch.float64) + 0.1
    _, gradient, _ = evaluate(loss_of, settings, rows, 50)
    _, scaled, _ = evaluate(loss_of, settings, rows | {"advantages": rows["advantages"][:, None] * factor}, 50)
    _, imitation, _ = evaluate(loss_of, settings, rows | {"advantages": torch.zeros(8)}, 50)
    torch.testing.assert_close(scaled - imitation, factor * (gradient - imitation), rtol=1e-12, atol=1e-16)
    if loss_of is not sft_loss:
        assert (gradient != imitation)[~rows["is_demo"]].any()
        everywhere = settings.get("brake") in PULL
        assert bool(imitation[~rows["is_demo"]].any()) == everywhere
        assert bool(imitation.any()) == (everywhere or loss_of in IMITATE)


@each_loss
@pytest.mark.parametrize("dtype", (torch.int64, torch.uint8, torch.float32, torch.bfloat16))
def test_masks_may_have_any_dtype(dtype, loss_of, settings):
    rows = some_rows()
    masks = {name: rows[name].to(dtype) for name in ("mask", "is_demo")}
    assert_same(evaluate(loss_of, settings, rows | masks), evaluate(loss_of, settings, rows))


@each_mixed_loss
def test_demonstrations_may_be_named_in_three_shapes(loss_of, settings):
    rows = some_rows()
    expected, is_demo = evaluate(loss_of, settings, rows), rows["is_demo"][:, None]
    assert_same(evaluate(loss_of, settings, rows | {"is_demo": is_demo}), expected)
    assert_same(evaluate(loss_of, settings, rows | {"is_demo": is_demo.repeat(1, 7)}), expected)


@each_mixed_loss
def test_a_row_may_be_a_demonstration_in_part(loss_of, settings):
    """Its two parts are as good as two rows."""
    rows, beginning = some_rows(), torch.arange(7) < 3
    rows["entropy"] = rows["entropy"][:, :1].repeat(1, 7)  # its mean over a row may be read
    mixed = rows | {"is_demo": beginning & rows["is_demo"][:, None]}
    parts = {name: torch.cat([rows[name], rows[name]]) for name in ("logp", "old_logp", "advantages", "entropy")}
    demo = torch.cat([rows["is_demo"], torch.zeros(8, dtype=bool)])
    parts |= {"mask": torch.cat([rows["mask"] & mixed["is_demo"], rows["mask"] & ~mixed["is_demo"]])}
    loss, gradient, metrics = evaluate(loss_of, settings, parts | {"is_demo": demo}, 50)
    mixed_loss, mixed_gradient, mixed_metrics = evaluate(loss_of, settings, mixed, 50)
    torch.testing.assert_close(mixed_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(mixed_gradient, gradient[:8] + gradient[8:], rtol=1e-12, atol=0)
    for name, (total, count) in metrics.items():
        assert mixed_metrics[name][0].item() == pytest.approx(total.item(), rel=1e-12)
        assert mixed_metrics[name][1] == count


@each_loss
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_computed_in_float32(dtype, loss_of, settings):
    half = some_rows()
    half |= {name: half[name].to(dtype) for name in ("logp", "old_logp", "advantages")}
    single = half | {name: half[name].float() for name in ("logp", "old_logp", "advantages")}
    loss, gradient, metrics = evaluate(loss_of, settings, half)
    expected, expected_gradient, expected_metrics = evaluate(loss_of, settings, single)
    assert_same((loss, gradient, metrics), (expected, expected_gradient.to(dtype), expected_metrics))
    assert loss.dtype == torch.float32


@each_loss
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_other_precision_stays(dtype, loss_of, settings):
    loss, gradient, metrics = evaluate(loss_of, settings, some_rows(dtype))
    assert loss.dtype == gradient.dtype == dtype
    assert all(total.dtype in (dtype, torch.int64) for total, _ in metrics.values())


@each_loss
def test_metrics_hold_no_graph(loss_of, settings):
    """Whoever adds them up over micro-batches would keep the activations of all of them."""
    _, _, metrics = evaluate(loss_of, settings, some_rows())
    assert metrics
    assert not any(total.requires_grad or count.requires_grad for total, count in metrics.values())


# --------------------------------------------------------------------------------- what must not do any harm
@each_loss
@pytest.mark.parametrize("garbage", (math.nan, math.inf, -math.inf, 1e30, -1e30))
def test_what_stands_outside_the_mask_changes_nothing(garbage, loss_of, settings):
    rows = some_rows()
    outside, advantages = ~rows["mask"], rows["advantages"][:, None].repeat(1, 7)
    expected = evaluate(loss_of, settings, rows)
    for sign in (1, -1):
        filled = rows | {"logp": rows["logp"].masked_fill(outside, garbage),
                         "old_logp": rows["old_logp"].masked_fill(outside, sign * garbage),
                         "entropy": rows["entropy"].masked_fill(outside, garbage)}
        filled["advantages"] = rows["advantages"].masked_fill(outside.all(dim=1), garbage)  # of the empty row
        assert_same(evaluate(loss_of, settings, filled), expected)
        filled["advantages"] = advantages.masked_fill(outside, garbage)
        filled["is_demo"] = rows["is_demo"][:, None] ^ outside
        assert_same(evaluate(loss_of, settings, filled), expected)
    assert not expected[1][outside].any()


def one_row(log_ratio, advantage, dtype=torch.float64, is_demo=False) -> dict:
    """Two tokens, the first of which has this log-ratio; the other one's is 0."""
    logp = torch.tensor([[-1 + min(log_ratio, 0), -1]], dtype=dtype)
    return {"logp": logp, "old_logp": logp - torch.tensor([log_ratio, 0], dtype=dtype),
            "advantages": torch.tensor([advantage], dtype=dtype), "mask": torch.ones(1, 2),
            "is_demo": torch.tensor([is_demo]), "entropy": torch.tensor([[0, 12.0]], dtype=dtype)}


@each_loss
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("is_demo", (False, True))
@pytest.mark.parametrize("advantage", (1.0, 0.0, -1.0))
@pytest.mark.parametrize("log_ratio", (61.0, 100.0, 1e4, -61.0, -100.0, -1e4))
def test_extreme_ratios_are_finite(log_ratio, advantage, is_demo, dtype, loss_of, settings):
    loss, gradient, metrics = evaluate(loss_of, settings, one_row(log_ratio, advantage, dtype, is_demo))
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert all(total.isfinite() for total, _ in metrics.values())
    pulled = loss_of is sft_loss or settings.get("brake") in PULL or loss_of in IMITATE and is_demo
    if advantage == 0 and not pulled:
        assert loss == 0
        assert not gradient.any()


@pytest.mark.parametrize("name", ("grpo", "luffy clipped", "chord", "ppo"))
@pytest.mark.parametrize("log_ratio", (61.0, 100.0, 1e4, -61.0, -100.0, -1e4))
def test_where_the_clip_decides_an_extreme_ratio_is_like_any_other(log_ratio, name):
    sign = math.copysign(1.0, log_ratio)
    loss, gradient, _ = evaluate(*LOSSES[name], one_row(log_ratio, sign))
    moderate, moderate_gradient, _ = evaluate(*LOSSES[name], one_row(sign, sign))
    assert loss == moderate
    assert torch.equal(gradient, moderate_gradient)
    assert gradient[0, 0] == 0
    assert gradient[0, 1] != 0


@each_loss
@pytest.mark.parametrize("whole", (None, 0))  # also where no token of the whole step is counted
def test_no_token_is_a_loss_of_0_and_no_gradient(whole, loss_of, settings):
    rows = some_rows()
    loss, gradient, metrics = evaluate(loss_of, settings, rows | {"mask": torch.zeros(8, 7)}, whole)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros(8, 7, dtype=torch.float64))
    assert all(total == count == 0 for total, count in metrics.values())


@each_mixed_loss
def test_no_token_of_one_kind_leaves_the_other(loss_of, settings):
    for is_demo in (True, False):
        rows = some_rows() | {"is_demo": torch.tensor([is_demo] * 8)}
        loss, gradient, metrics = evaluate(loss_of, settings, rows)
        assert loss.isfinite() and loss != 0
        assert gradient.isfinite().all() and gradient.any()
        assert {"token_loss/rollouts", "token_loss/demonstrations"} <= metrics.keys()
        for name, (total, count) in metrics.items():
            if name.endswith("/demonstrations") != is_demo:
                assert total == count == 0, name
            elif name in ("token_loss/demonstrations", "token_loss/rollouts", "clip_fraction", "kl/old_policy"):
                assert count == rows["mask"].sum(), name  # others may count right or wrong rows alone
        counts = {"rollout_tokens": 0 if is_demo else 28, "demo_tokens": 28 if is_demo else 0}  # CHORD's
        assert_same(evaluate(loss_of, settings, rows | counts), (loss, gradient, metrics))


# ------------------------------------------------------------------------------------------- what is divided
@each_loss
@pytest.mark.parametrize("parts", ([[0, 3], [1], [2, 4, 6], [7], [5]], [[0, 1, 7], [5, 3], [2, 6, 4]]))
def test_micro_batches_add_up(parts, loss_of, settings):
    """Demonstrations alone, rollouts alone, both; rows without a token alone and among others."""
    rows = some_rows()
    whole = {name: 77 for name in WHOLE if name in inspect.signature(loss_of).parameters}
    names = [name for name in inspect.signature(loss_of).parameters if name in rows]
    assert_parts_add_up(lambda *part: loss_of(**dict(zip(names, part)), **whole, **settings),
                        [rows[name] for name in names], parts)


@each_loss
def test_what_is_divided_by_where_nothing_is_said(loss_of, settings):
    rows = some_rows()
    demo = rows["mask"] & rows["is_demo"][:, None]
    by_row = loss_of is topr_loss and settings.get("weights") != "ppo"
    normaliser = 8 if by_row else rows["mask"].sum() if loss_of is dapo_loss else 8 * 7
    whole = {"normaliser": normaliser, "sft_normaliser": 8 * 7, "tokens": rows["mask"].sum(),
             "rollout_tokens": (rows["mask"] & ~demo).sum(), "demo_tokens": demo.sum()}
    assert_same(evaluate(loss_of, settings, rows | whole), evaluate(loss_of, settings, rows))
    assert evaluate(loss_of, settings, rows, 3)[0] != evaluate(loss_of, settings, rows)[0]


def test_ppo_beside_topr_is_grpo_to_the_bit():
    rows = some_rows()
    loss, gradient, _ = evaluate(topr_loss, {"weights": "ppo", "clip_low": 0.1, "clip_high": 0.3}, rows)
    expected, expected_gradient, metrics = evaluate(grpo_loss, {"clip_low": 0.1, "clip_high": 0.3}, rows)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient)
    assert metrics["clip_fraction"][0] > 0


# ---------------------------------------------------------------------------------------------- advantages
@pytest.mark.parametrize("std", (False, True))
@pytest.mark.parametrize("garbage", (math.nan, math.inf))
def test_a_reward_that_is_no_number_spoils_its_group_alone(garbage, std):
    rewards, groups = torch.tensor([1.0, 0, 1, 0, 0, 1]), torch.tensor([2, 2, 9, 9, 9, 4])
    advantages = group_advantages(rewards.index_fill(0, torch.tensor([1]), garbage), groups, std)
    assert not advantages[:2].isfinite().any()
    assert torch.equal(advantages[2:], group_advantages(rewards, groups, std)[2:])


@pytest.mark.parametrize("std", (False, True))
@pytest.mark.parametrize("dtype", (torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16))
def test_rewards_may_have_any_dtype(dtype, std):
    rewards, groups = torch.tensor([1, 0, 1, 0, 0, 1]), torch.tensor([2, 2, 9, 9, 9, 4])
    advantages = group_advantages(rewards.to(dtype), groups, std)
    expected = group_advantages(rewards.double(), groups, std)
    assert advantages.dtype == torch.float32
    assert expected.dtype == torch.float64
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-6, atol=1e-7)
