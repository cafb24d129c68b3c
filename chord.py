"""CHORD: supervised fine-tuning as a dynamically weighted objective beside on-policy RL. See docs/chord.md

    On-Policy RL Meets Off-Policy Experts: Harmonizing Supervised Fine-Tuning and Reinforcement Learning via
    Dynamic Weighting. Zhang, Xie, Sun, Chen, Wang, Li, Ding, Zhou. arXiv:2508.11408.

Fine-tuning on an expert's demonstrations first and RL afterwards lets the first damage what the model could
do already and overfit to the expert. CHORD does both in every step. In CHORD-μ their weight μ leads from
imitation to exploration; CHORD-φ holds μ at 0.1 and weighs each token instead, so that what is certain or
hopelessly unlikely counts little.

    loss = (1 - μ) L_GRPO(rollouts) + μ L_SFT(demonstrations) - β/N Σ_i Σ_t m_it H_it

    L_GRPO = -1/N_r Σ_i Σ_t m_it min(r_it A_i, clip(r_it, 1-ε_low, 1+ε_high) A_i)   over the rollouts
    L_SFT  = -1/N_d Σ_i Σ_t m_it φ_it log p_it                                      over the demonstrations

    r_it = π(y_it) / π_old(y_it)   A_i = (R_i - mean R) / (std R + 1e-6)   p_it = π(y_it)
    φ_it = 1 (CHORD-μ), or p_it (1 - p_it) taken as a constant, without a gradient of its own (CHORD-φ)

  i, t      a row of the mini-batch, and a token y_it of it
  R_i       reward of a rollout: 1 if the boxed answer after </think> is right, else 0; mean R and std R are
            those of its group, the rollouts to one prompt
  π, π_old  the policy, and the policy before this step's updates (row.old_logp), both at --temperature
  m_it      batch.mask: 1 on the tokens of a response up to and including EOS, else 0
  N_r, N_d  numbers of rollout and of demonstration tokens of the whole mini-batch; N = N_r + N_d
  μ         mu_schedule(): from --mu_peak to --mu_valley, or constant
  ε_low, ε_high  --clip_low, --clip_high
  H_it      entropy of π at the token; β = --entropy_bonus, 0 by default

The loss is eq. 3 of the paper and φ its eq. 6. With --updates 1, the default, r is 1, its gradient is that of
log π, and the clip does nothing. Demonstrations with a wrong answer, or of more than --max_response tokens
with EOS, are not used.

Compared with the others: LUFFY puts a prompt's demonstration into the group of its rollouts, where it has
an advantage; here demonstrations come from a stream of their own, not tied to the prompts, and are imitated
whatever the rollouts do. ReLIFT imitates only those of prompts that no rollout solved, in steps of their
own.

Deviations
  - Trinity-RFT, the authors' framework, today also bounds the loss of tokens with A < 0 and a large ratio
    and clamps log-ratios at 20. The release for the paper did neither; nor does this (at 60, where only
    overflow matters, it does).
  - The authors' framework averages micro-batches by their row counts, which is not the token mean of the
    step. Here it is, whatever the micro-batches.
  - The authors take r against the sampler's log-probs; here it is against the trainer's.
  - The authors' example combines both weights: `--preset phi --mu_peak 0.5 --mu_valley 0.02 --mu_warmup 200
    --mu_decay 400`.
  - A side of weight 0 is not paid for: at μ = 1 nothing is sampled, at μ = 0 no demonstration is drawn.
    `--mu_peak 1 --mu_valley 1` is supervised fine-tuning.
  - `--mu_peak 0.1 --mu_valley 0.1`, μ = 0.1 and φ = 1, mixes RL and SFT without CHORD's ideas. It is not the
    'RL with SFT loss' of LUFFY's paper, which has other normalisers and the prompts' own demonstrations.

On the toy (six runs, README.md) the share of hard problems solved ends at 0.92-0.97 with CHORD-μ and at
0.91-0.99 with CHORD-φ, which passes 0.5 only at steps 30 to 55 (with μ = 0.1 and φ = 1 it is 10 or 15): φ
is small for tokens that the model hardly samples. Fine-tuning alone ends at 0.29-0.38.

On a CPU, in a minute:  python chord.py
On a GPU:               python chord.py --model Qwen/Qwen2.5-Math-1.5B
"""
import math
from dataclasses import dataclass

import common  # first: it reads the flags before torch is imported, which takes seconds
import torch
from common import Problem, Row, Run, flag
from grpo import group_advantages

PRESETS = {"mu": (0.9, 0.05), "phi": (0.1, 0.1)}  # --preset: --mu_peak and --mu_valley if they are not given


@dataclass
class Args(common.Args):
    prompts: int = flag("prompts in a rollout batch", toy=16, real=32, least=1)
    updates: int = flag("optimiser steps on the rows of a step", 1, least=1)
    clip_low: float = flag("ε_low: the ratio is clipped below 1 - ε_low", 0.2, least=0, most=1)
    clip_high: float = flag("ε_high: the ratio is clipped above 1 + ε_high (DAPO: 0.28)", 0.2, least=0)
    preset: str = flag("CHORD-mu, or CHORD-phi, whose weight is φ = p (1-p)", "mu", choices=tuple(PRESETS))
    mu_peak: float = flag("mu after warm-up (default: the preset's)", least=0, most=1)
    mu_valley: float = flag("mu after its decay (default: the preset's)", least=0, most=1)
    mu_warmup: int = flag("steps in which mu rises from 0 to --mu_peak", 0, least=0)
    mu_decay: int = flag("steps in which mu falls from --mu_peak to --mu_valley", toy=60, real=200, least=0)
    expert_share: float = flag("demonstrations' share of the rows", toy=0.06, real=0.2, least=0, most=0.99)


# ---------------------------------------------------------------------------------------------- the loss
def mu_schedule(step: int, peak: float, valley: float, warmup: int, decay: int) -> float:
    """μ of a step, counted from 0, by arXiv:2508.11408: up, down and constant.

    Linear from 0 to `peak` in `warmup` steps, half a cosine down to `valley` in `decay` steps, then `valley`.

    >>> [round(mu_schedule(step, 0.9, 0.1, warmup=2, decay=4), 4) for step in (0, 1, 2, 4, 6, 7)]
    [0.0, 0.45, 0.9, 0.5, 0.1, 0.1]
    """
    if step < warmup:
        return step / warmup * peak
    if step < warmup + decay:
        return (peak - valley) * (1 + math.cos(math.pi * (step - warmup) / decay)) / 2 + valley
    return valley


def chord_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    is_demo: torch.Tensor, mu: float, phi: bool = False,
    rollout_tokens: float | None = None, demo_tokens: float | None = None,
    clip_low: float = 0.2, clip_high: float = 0.2,
) -> tuple[torch.Tensor, dict]:
    """L without the entropy, for one micro-batch: GRPO on rollouts beside fine-tuning on demonstrations.

        loss = (1 - μ)/N_r Σ_i Σ_t max(-A r, -A clip(r, 1 - ε_low, 1 + ε_high))    over rollouts: (1) to (4)
             +      μ /N_d Σ_i Σ_t -φ log p     φ = 1 or p (1 - p) (5)    -φ log p (6)  over demonstrations

    arXiv:2508.11408, eq. 3 and 6; (1) to (4) are those of grpo_loss; p = π(y_it).

    Tensors hold the rows of one micro-batch, padded to T tokens. logp, old_logp (rows, T): log-probs in nats,
        of π and π_old. advantages: A, (rows,), (rows, 1) or (rows, T).
        mask (rows, T), any dtype; what stands where it is 0 is not read, nor are old_logp and advantages of
        demonstrations. Half precision is computed in float32. A log-ratio above 60 counts as 60.
    is_demo, any dtype: 1 on demonstrations (rows,), or on tokens that come from one (rows, T).
    mu: μ, the weight of imitation. phi: φ = p (1 - p), without a gradient of its own; else 1.
    rollout_tokens, demo_tokens: N_r and N_d, numbers of tokens of the whole mini-batch, the same for all its
        micro-batches, so that they add up. Default: those of these tensors.
    clip_low, clip_high: ε_low and ε_high.
    Returns the loss and metrics {name: (sum, number of values)}, so that means over micro-batches are exact.

    >>> logp = torch.tensor([[0.5], [0.5]]).log()
    >>> rows = logp, logp, torch.tensor([2.0, 0.0]), torch.ones(2, 1), torch.tensor([False, True])
    >>> loss, _ = chord_loss(*rows, mu=0.25)                # r = 1, log 0.5 = -0.6931
    >>> round(loss.item(), 4)                               # 0.75 * -2 + 0.25 * 0.6931
    -1.3267
    >>> round(chord_loss(*rows, mu=1, phi=True)[0].item(), 4)     # 0.5 * 0.5 * 0.6931
    0.1733
    """
    mask = mask.bool()
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    demo = mask & is_demo.bool().reshape(len(mask), -1)                            # (rows, T)
    on_policy = mask & ~demo
    count = on_policy.sum()
    rollout_tokens = count if rollout_tokens is None else rollout_tokens
    demo_tokens = demo.sum() if demo_tokens is None else demo_tokens
    advantages = torch.where(on_policy, advantages.reshape(len(mask), -1), 0.0)    # (rows, T)
    log_ratio = torch.where(on_policy, logp - old_logp, 0.0)
    ratio = log_ratio.clamp(max=60).exp()                                          # (1) r, at most e⁶⁰
    unclipped = -advantages * ratio                                                # (2) -A r
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)               # (3) -A clip(r)
    token_loss = torch.maximum(unclipped, clipped)                                 # (4) the larger loss
    log_p = torch.where(demo, logp, 0.0)
    p = log_p.detach().exp()
    weight = p * (1 - p) if phi else 1.0                                           # (5) φ
    sft_loss = -weight * log_p                                                     # (6) 0 outside demo
    metrics = {
        "token_loss/rollouts": (token_loss.detach().sum(), count),
        "token_loss/demonstrations": (sft_loss.detach().sum(), demo.sum()),
        "clip_fraction": ((clipped > unclipped).sum(), count),
        # The k1 estimate of KL(π_old || π): log π_old - log π of sampled tokens; single ones may be negative.
        "kl/old_policy": (-log_ratio.detach().sum(), count),
    }
    rl_loss = token_loss.sum() / (rollout_tokens or 1)                             # without tokens 0
    return (1 - mu) * rl_loss + mu * (sft_loss.sum() / (demo_tokens or 1)), metrics


# --------------------------------------------------------------------------------------- what is in a batch
def make_batch(run: Run, args: Args, problems: list[Problem], mu: float) -> tuple[list[Row], list[Row]]:
    """Side by side: n rollouts for each prompt, and demonstrations of a stream of their own.

    No rollouts at mu = 1 and no demonstrations at mu = 0, where they would weigh nothing.
    """
    rollouts = run.rollout([problem for problem in problems for _ in range(args.n)] if mu < 1 else [])
    wanted = round(args.expert_share / (1 - args.expert_share) * args.prompts * args.n) if mu > 0 else 0
    return rollouts, run.demonstrations.next(wanted)


def main():
    args = common.parse(Args, __doc__)
    peak, valley = PRESETS[args.preset]
    args.mu_peak = peak if args.mu_peak is None else args.mu_peak
    args.mu_valley = valley if args.mu_valley is None else args.mu_valley
    run = Run(args)
    run.demonstrations.require(args.expert_share, args.prompts * args.n, max(args.mu_peak, args.mu_valley))
    for step in run.steps():
        mu = mu_schedule(step - 1, args.mu_peak, args.mu_valley, args.mu_warmup, args.mu_decay)
        rows, demonstrations = make_batch(run, args, run.next_problems(), mu)
        rewards = run.verify(rows)  # sets row.reward: 1.0 if the box after </think> is right, else 0.0
        groups = torch.tensor([row.problem.index for row in rows])
        advantages = group_advantages(rewards, groups, std_normalise=True)
        for row, advantage in zip(rows, advantages.tolist()):
            row.advantage = advantage
        rows += demonstrations
        run.score(rows)  # sets row.old_logp: log π_old by the trainer, before this step's updates
        run.log("mu", mu)
        for minibatch in run.minibatches(rows):  # --updates of them, one optimiser step each
            tokens = sum(len(row.response) for row in minibatch)
            demo_tokens = sum(len(row.response) for row in minibatch if row.is_demo)
            for batch in run.micro_batches(minibatch, args.entropy_bonus):  # tensors, without rows of A = 0
                logp, entropy = run.logprobs(batch, args.entropy_bonus)  # (rows, T); 0 outside the mask
                loss, metrics = chord_loss(logp, batch.old_logp, batch.advantages, batch.mask, batch.is_demo,
                                           mu, args.preset == "phi", tokens - demo_tokens, demo_tokens,
                                           args.clip_low, args.clip_high)
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
