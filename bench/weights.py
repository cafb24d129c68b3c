"""Draws bench/results/weights.png: how strongly each loss pulls at a token, against the token's probability p.

    pip install matplotlib
    python bench/weights.py

The weight of a token is -dloss / dlog p: a gradient step pushes its log-prob up in proportion to it, or down
where it is negative. Nothing is derived by hand: autograd takes it from the loss functions of the scripts, for
responses of one token, with |A| = 1, normaliser 1 and CHORD's μ = 1. In a run the weight is multiplied by A, or
μ, and divided by the normaliser.
"""
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from chord import chord_loss  # noqa: E402
from grpo import grpo_loss  # noqa: E402
from luffy import luffy_loss  # noqa: E402
from relift import rl_loss, sft_loss  # noqa: E402
from topr import topr_loss  # noqa: E402

OLD = 0.2  # probability of the rollout's token under the policy that sampled it
P = torch.logspace(-4, 0, 401, dtype=torch.float64)

# name: sum of the losses of demonstrations of one token, logp (B, 1); A and mask (B, 1), is_demo (B,)
DEMONSTRATIONS = {
    "SFT; ReLIFT's and CHORD-mu's": lambda logp, one, demo: sft_loss(logp, one, tokens=1),
    "LUFFY": lambda logp, one, demo: luffy_loss(logp, logp, one, one, demo, normaliser=1),
    "LUFFY, no shaping": lambda logp, one, demo: luffy_loss(logp, logp, one, one, demo, normaliser=1, gamma=None),
    "CHORD-phi": lambda logp, one, demo: chord_loss(logp, logp, one, one, demo, mu=1, phi=True, demo_tokens=1),
}
# name: the same of rollouts, old_logp (B, 1) from the policy that sampled them
ROLLOUTS = {
    "GRPO": lambda logp, old_logp, A, one: grpo_loss(logp, old_logp, A, one, normaliser=1),
    "LUFFY, ReLIFT: no clip": lambda logp, old_logp, A, one: rl_loss(logp, old_logp, A, one, normaliser=1),
    "TOPR": lambda logp, old_logp, A, one: topr_loss(logp, old_logp, A, one, normaliser=1),
    "plain REINFORCE": lambda logp, old_logp, A, one: topr_loss(logp, old_logp, A, one, 1, weights="reinforce"),
}
STYLES = {
    "SFT; ReLIFT's and CHORD-mu's": ("tab:grey", "-"), "LUFFY": ("tab:red", "-"),
    "LUFFY, no shaping": ("lightcoral", "-"), "CHORD-phi": ("tab:cyan", "-"), "GRPO": ("black", "-"),
    "LUFFY, ReLIFT: no clip": ("tab:green", ":"), "TOPR": ("tab:orange", "-"), "plain REINFORCE": ("tab:blue", ":"),
}


def demonstration_weight(name: str, p: torch.Tensor) -> torch.Tensor:
    """-dloss/dlog p (B,) of demonstration tokens of probability p (B,), A = 1."""
    logp = p.log()[:, None].requires_grad_()
    one, demo = torch.ones_like(logp), torch.ones(len(p), dtype=bool)
    loss, _ = DEMONSTRATIONS[name](logp, one, demo)
    loss.backward()
    return -logp.grad[:, 0]


def rollout_weight(name: str, p: torch.Tensor, advantage: float) -> torch.Tensor:
    """-dloss/dlog p (B,) of tokens that were sampled with probability OLD and now have probability p (B,)."""
    logp = p.log()[:, None].requires_grad_()
    one = torch.ones_like(logp)
    loss, _ = ROLLOUTS[name](logp, math.log(OLD) * one, advantage * one, one)
    loss.backward()
    return -logp.grad[:, 0]


def draw(path: Path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True)
    for name in DEMONSTRATIONS:
        colour, line = STYLES[name]
        left.plot(P, demonstration_weight(name, P), line, color=colour, label=name, linewidth=2)
    left.set(title="A token of a demonstration", ylabel="weight on d log p", ylim=(-0.05, 1.15),
             xlabel="p: its probability under the policy")
    left.legend(loc="center left", fontsize=9)
    for name in ROLLOUTS:
        colour, line = STYLES[name]
        for advantage in (1.0, -1.0):
            label = name if advantage > 0 else None
            right.plot(P, rollout_weight(name, P, advantage), line, color=colour, label=label, linewidth=2)
    right.plot([OLD, OLD], [1, -1], "o", color="black", markersize=5)
    right.annotate("on-policy: all the same", (OLD, 1), xytext=(0.004, 1.6), fontsize=9,
                   arrowprops={"arrowstyle": "-", "color": "grey"})
    right.axhline(0, color="lightgrey", linewidth=1, zorder=0)
    right.set(title=f"A token of a rollout, sampled when p was {OLD}", ylabel="weight on d log p",
              ylim=(-3.1, 2.2), xlabel="p: its probability under the policy, some updates later")
    right.text(1.2e-4, 1.08, "right answer, A = 1", fontsize=9, color="dimgrey")
    right.text(1.2e-4, -1.27, "wrong answer, A = -1", fontsize=9, color="dimgrey")
    right.legend(loc="lower left", fontsize=9)
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xlim(1e-4, 1)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    draw(ROOT / "bench" / "results" / "weights.png")
