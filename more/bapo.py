"""BAPO: the clip's two bounds are searched anew at each update, for balance. A diff of grpo.py.

    BAPO: Stabilizing Off-Policy Reinforcement Learning for LLMs via Balanced Policy Optimization with
    Adaptive Clipping. Xi, Guo, Nan, Zhou, Shen, Chen, Liu, Huang, Zhang, Guo, Deng, Lei, Zheng, Wang, Zhang,
    Sun, Zheng, Yan, Gui, Zhang, Huang. arXiv:2510.18927. (Another BAPO is about replay buffers.)

Several updates on one set of responses reuse what sampling has cost, but the later ones are off-policy: wrong
tokens outweigh right ones, whose ratios the clip cuts off, and entropy falls. BAPO widens the clip upwards at
each update until right tokens make up a given share of the loss; where the whole range is not enough, it
narrows the clip from below.

    J = 1/(B L) Σ_i Σ_t m_it min(r_it A_i, clip(r_it, c_low, c_high) A_i)  +  β/N Σ_i Σ_t m_it H_it

    ρ = P / (P + N⁻)     P = Σ_{A_i > 0} Σ_t m_it min(r_it, c_high) A_i
                         N⁻ = Σ_{A_i < 0} Σ_t m_it max(r_it, c_low) |A_i|     over the whole mini-batch
    c_low, c_high = 0.6, 1.2; while ρ < ρ_0: c_high += 0.05 up to 3.0, then c_low += 0.02 up to 0.9

    r_it = π(y_it) / π_old(y_it)      A_i = R_i - mean(R of the group)      N = Σ_i Σ_t m_it

  i, t      a response of the mini-batch, and a token y_it of it; the mini-batch has B responses (rows)
  R_i       its reward: 1 if the boxed answer after </think> is right, else 0; the group: n = --n responses
  π, π_old  the policy, and the policy before this step's updates (row.old_logp), both at --temperature
  m_it      batch.mask: 1 on the tokens of the response up to and including EOS, else 0
  c         from --low_start to --low_end, from --high_start to --high_end; --fixed_bounds: not searched
  ρ_0       --target        L = --max_response        H_it: entropy of π at the token; β = --entropy_bonus

This is the paper's Algorithm 1. ρ needs the ratios of the whole mini-batch before its first gradient: one
more pass over its rows with A ≠ 0, without gradients. A step samples a large set and takes --updates steps on
parts of it; with --updates 1 every r is 1 and no bound acts.

What the search can do: raising c_high lets P grow. Raising c_low never raises ρ: max(r, c_low), and with it
N⁻, can only grow. What it does is take the gradient from wrong tokens with r < c_low, which ρ, made of
losses, does not see. So once the range of c_high is not enough, c_low runs to its end. It is a search over
c_high, and a switch.

Compared with the others: GRPO has fixed bounds of 0.8 and 1.2. REC clips without the ratio in the loss, TOPR
tapers wrong responses by it. None of them looks at the batch's balance.

Deviations
  - The authors' code raises c_low first and then c_high (`--lower_first`): its c_low is at its end whenever
    the start does not suffice. It searches in each micro-batch of a few rows, and compares P / N⁻.
  - Eq. 8 literally weighs tokens by π_old and has signed sums; the text and the figures mean the share.
  - The code has other ranges (0.6 to 0.8 and 1.2 to 2.0, or 0.8 to 0.95 and 1.2 to 2.0), a second clip at 3
    where A < 0, and bounds log-ratios by 20. The paper has neither.
  - In the code A is divided by the standard deviation (`--std_normalise`).
  - With `--mask_cut` rows that were cut count in ρ all the same.

On the toy (one base, two seeds) the share of easy problems solved, 0.30 before the first set, is 0.95 and
0.84 after it and 0.82 and 0.95 after the fifth; with --fixed_bounds 0.93 and 0.88, then 0.88 and 0.96. Of 240
updates the search moved the bounds in 65 and 66, to both ends in 64 and 64: a switch that is mostly off. What
there is over GRPO's bounds (one seed: 0.65, 0.80; the dip between is to 0.48) the wider start has without it.
With --lower_first (one seed) it is 0.95, a dip to 0.68, and 0.86.

On a CPU, in a minute:  python more/bapo.py
On a GPU:               python more/bapo.py --model Qwen/Qwen2.5-Math-7B
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # where common.py and the five are

import common  # first: it reads the flags before torch is imported, which takes seconds
import torch
from common import Problem, Row, Run, flag
from grpo import group_advantages


@dataclass
class Args(common.Args):
    std_normalise: bool = flag("divide A by the group's standard deviation (GRPO's paper)", False)
    token_mean: bool = flag("divide by N, the mini-batch's tokens, in place of B L (DAPO)", False)
    data: str = flag("as in the other scripts; 'toy:easy' has only the toy's easy problems",
                     toy="toy:easy", real="Elliott/Openr1-Math-46k-8192")
    lr: float = flag("learning rate of AdamW", toy=3e-4, real=1e-6, least=0)
    steps: int = flag("sets to train on", toy=5, real=100, least=1)
    eval_every: int = flag("steps between evaluations on held-out problems", toy=1, real=10, least=1)
    prompts: int = flag("prompts in a set", toy=192, real=256, least=1)
    updates: int = flag("optimiser steps on a set, each on a part of it", toy=48, real=8, least=1)
    fixed_bounds: bool = flag("no search: c_low and c_high stay at their start (ablation)", False)
    target: float = flag("ρ_0: share of right tokens up to which the search goes", 0.4, least=0, most=1,
                         not_with="fixed_bounds")
    lower_first: bool = flag("raise c_low before c_high (the authors' code)", False, not_with="fixed_bounds")
    low_start: float = flag("c_low at the start of the search", 0.6, least=0, most=1)
    low_end: float = flag("c_low at most", 0.9, least=0, most=1, not_with="fixed_bounds")
    high_start: float = flag("c_high at the start of the search", 1.2, least=1)
    high_end: float = flag("c_high at most", 3.0, least=1, not_with="fixed_bounds")


# ---------------------------------------------------------------------------------------------- the loss
def bapo_bounds(
    ratio: torch.Tensor, advantages: torch.Tensor, target: float = 0.4,
    low: tuple[float, float, float] = (0.6, 0.9, 0.02), high: tuple[float, float, float] = (1.2, 3.0, 0.05),
    lower_first: bool = False,
) -> tuple[float, float, float]:
    """c_low, c_high and ρ at them: arXiv:2510.18927, Algorithm 1, or the order of the authors' code.

    ratio (tokens,): r of all response tokens of the mini-batch; advantages (tokens,): A of their rows.
    target: ρ_0. low, high: start, end and step of the bounds. lower_first: c_low to its end, then c_high.
    Without wrong tokens ρ is 1 and the start stays; without right ones it is 0 and both run to their ends;
    without either it is nan and the start stays.

    >>> ratio, advantages = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([0.5, -0.5, -0.5])
    >>> c_low, c_high, share = bapo_bounds(ratio, advantages)     # at 0.6 and 1.2: 0.6 / (0.6 + 0.5 + 0.3)
    >>> round(c_low, 2), round(c_high, 2), round(share, 4)        # 1.2 / 2.8 is enough, 1.05 / 2.65 was not
    (0.6, 1.2, 0.4286)
    """
    steps_low, steps_high = [max(0, int((end - start) / step + 1e-6)) for start, end, step in (low, high)]
    for number in range(steps_low + steps_high + 1):  # whole numbers: 0.6 + 0.02 + 0.02 ... misses 0.9
        ups = max(0, number - steps_low) if lower_first else min(number, steps_high)
        c_low, c_high = low[0] + (number - ups) * low[2], high[0] + ups * high[2]
        right = torch.where(advantages > 0, ratio.clamp(max=c_high) * advantages, 0.0).sum()       # P
        wrong = torch.where(advantages < 0, ratio.clamp(min=c_low) * -advantages, 0.0).sum()       # N⁻
        share = (right / (right + wrong)).item()                                                   # ρ
        if not share < target:
            break
    return c_low, c_high, share


def bapo_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    normaliser: float | None = None,
    c_low: float = 0.6, c_high: float = 1.2,
) -> tuple[torch.Tensor, dict]:
    """-J without the entropy, for one micro-batch: GRPO's loss, between two bounds that bapo_bounds finds.

        loss = 1/normaliser Σ_i Σ_t m_it max(-A_i r_it, -A_i clip(r_it, c_low, c_high))
                                         (4)     (2)         (3)           r = π / π_old (1)

    Tensors hold the rows of one micro-batch, padded to T tokens. logp, old_logp (rows, T): log-probs in nats,
        of π and π_old. advantages: A, (rows,), (rows, 1) or (rows, T).
        mask (rows, T), any dtype: m; what stands where it is 0 is not read. Half precision is computed in
        float32. A log-ratio above 60 counts as 60, so that nothing overflows.
    normaliser: what the sum over tokens is divided by, the same in all micro-batches of a mini-batch, so that
        they add up: B * L, with the B rows of the whole mini-batch, or its number of response tokens. Rows
        that micro-batches leave out, since A = 0, count there too. Default: rows * T of these tensors.
    c_low, c_high: the bounds of r, the same in all micro-batches.
    Returns the loss and metrics {name: (sum, number of values)}, so that means over micro-batches are exact.
    clip_fraction: share of tokens at which the clip decides, which have no gradient then.

    >>> logp, old_logp = torch.tensor([[0.5], [0.5]]).log(), torch.tensor([[0.25], [0.5]]).log()
    >>> loss, _ = bapo_loss(logp, old_logp, torch.tensor([1.0, -1.0]), torch.ones(2, 1), c_high=1.5)
    >>> round(loss.item(), 4)     # r = 2, clipped at 1.5, and r = 1: (-1.5 + 1) / (2 rows * 1 token)
    -0.25
    """
    mask = mask.bool()
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    count = mask.sum()
    normaliser = mask.numel() if normaliser is None else normaliser
    advantages = torch.where(mask, advantages.reshape(len(mask), -1), 0.0)         # (rows, T)
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    ratio = log_ratio.clamp(max=60).exp()                                          # (1) r, at most e⁶⁰
    unclipped = -advantages * ratio                                                # (2) -A r
    clipped = -advantages * ratio.clamp(c_low, c_high)               # (3) -A clip(r)
    token_loss = torch.maximum(unclipped, clipped)                                 # (4) the larger loss
    metrics = {
        "token_loss/rollouts": (token_loss.detach().sum(), count),
        "clip_fraction": ((clipped > unclipped).sum(), count),
        # The k1 estimate of KL(π_old || π): log π_old - log π of sampled tokens; single ones may be negative.
        "kl/old_policy": (-log_ratio.detach().sum(), count),
    }
    return token_loss.sum() / (normaliser or 1), metrics                           # 0 without tokens


# --------------------------------------------------------------------------------------- what is in a batch
def make_batch(run: Run, args: Args, problems: list[Problem]) -> list[Row]:
    """A set: n rollouts of the policy for each prompt. They grow old while the policy is updated on them."""
    return run.rollout([problem for problem in problems for _ in range(args.n)])


def main():
    args = common.parse(Args, __doc__)
    run = Run(args)
    for step in run.steps():
        rows = make_batch(run, args, run.next_problems())
        rewards = run.verify(rows)  # sets row.reward: 1.0 if the box after </think> is right, else 0.0
        groups = torch.tensor([row.problem.index for row in rows])
        advantages = group_advantages(rewards, groups, args.std_normalise)
        for row, advantage in zip(rows, advantages.tolist()):
            row.advantage = advantage
        run.score(rows)  # sets row.old_logp: log π_old by the trainer, before this step's updates
        for minibatch in run.minibatches(rows):  # --updates of them, one optimiser step each
            tokens = sum(len(row.response) for row in minibatch)
            normaliser = tokens if args.token_mean else len(minibatch) * args.max_response
            c_low, c_high = args.low_start, args.high_start
            compared = [row for row in minibatch if row.advantage]
            if compared and not args.fixed_bounds:
                now = [Row(row.problem, row.response) for row in compared]
                run.score(now, entropy=False)  # sets their old_logp: log π by the trainer, before this update
                drift = torch.cat([new.old_logp - old.old_logp for new, old in zip(now, compared)])
                token_advantages = [torch.full((len(row.response),), row.advantage) for row in compared]
                c_low, c_high, share = bapo_bounds(
                    drift.clamp(max=60).exp(), torch.cat(token_advantages), args.target,
                    (args.low_start, args.low_end, 0.02), (args.high_start, args.high_end, 0.05),
                    args.lower_first)
                run.log("bapo/share", share)
                run.log("bapo/moved", (c_low, c_high) != (args.low_start, args.high_start))
                run.log("bapo/at_ends", share < args.target)
            run.log("bapo/c_low", c_low)
            run.log("bapo/c_high", c_high)
            for batch in run.micro_batches(minibatch, args.entropy_bonus):  # tensors, without rows of A = 0
                logp, entropy = run.logprobs(batch, args.entropy_bonus)  # (rows, T); 0 outside the mask
                loss, metrics = bapo_loss(logp, batch.old_logp, batch.advantages, batch.mask,
                                          normaliser, c_low, c_high)
                run.backward(loss - args.entropy_bonus * entropy.sum() / tokens, metrics)
            run.optimizer_step(minibatch)  # clips the gradient's norm; AdamW
        run.end_step()  # weights to the sampler; evaluation, metrics, checkpoint
    run.end()


# What `uv run` installs: as in requirements.txt.
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "transformers>=5.16.1,<6", "datasets>=5.2,<6", "math-verify>=0.9,<0.10", "tqdm>=4.67",
# ]
# ///


if __name__ == "__main__":
    main()
