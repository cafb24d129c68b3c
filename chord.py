"""CHORD: supervised fine-tuning as a dynamically weighted objective beside on-policy RL.

    On-Policy RL Meets Off-Policy Experts: Harmonizing Supervised Fine-Tuning and Reinforcement Learning via
    Dynamic Weighting. Zhang, Xie, Sun, Chen, Wang, Li, Ding, Zhou. arXiv:2508.11408.

Fine-tuning on an expert's demonstrations first and RL afterwards lets the first damage what the model could
do already and overfit to the expert. CHORD does both in every step. A weight mu leads from imitation to
exploration (CHORD-mu), or a weight per token keeps both what is already certain and what is hopelessly
unlikely from being imitated (CHORD-phi).

    L = (1 - μ) L_GRPO(rollouts) + μ L_SFT(demonstrations)                                         (eq. 3)
    L_GRPO = -1/N_r Σ_i Σ_t m_it min(r_it A_i, clip(r_it, 1-ε, 1+ε) A_i)   A_i = (R_i - mean R)/(std R + 1e-6)
    L_SFT  = -1/N_d Σ_i Σ_t m_it φ_it log p_it    p_it = π(y_it)    φ = 1 (CHORD-μ) or sg(p (1 - p)) (CHORD-φ)

N_r and N_d are the numbers of rollout and of demonstration tokens of the whole optimiser step.

Deviations
  - Demonstrations come from a stream of their own, not tied to the prompts, and never enter a group: as in
    the authors' code, unlike LUFFY.
  - Trinity-RFT, the authors' framework, now adds a dual clip and a clamp of the log-ratio that it had not
    when the paper appeared; the golden numbers of the tests are of that time.
  - The authors' framework averages micro-batches by their row counts, which is not the token mean of the
    step. Here it is, whatever the micro-batches.
  - A side of weight 0 is not sampled or computed: `--mu_peak 1 --mu_valley 1` is supervised fine-tuning.

On a CPU, in minutes:   python chord.py
On a GPU:               python chord.py --model Qwen/Qwen2.5-Math-1.5B
"""
import math
from dataclasses import dataclass

import torch

import common
from common import Row, flag
from grpo import group_advantages
from run import Run

PRESETS = {  # --preset: values of flags that are not given themselves
    "mu": {"mu_peak": 0.9, "mu_valley": 0.05, "phi": False},
    "phi": {"mu_peak": 0.1, "mu_valley": 0.1, "phi": True},
    "rl+sft": {"mu_peak": 0.1, "mu_valley": 0.1, "phi": False},
}


@dataclass
class Args(common.Args):
    prompts: int = flag("prompts in a rollout batch", toy=16, real=32, least=1)
    updates: int = flag("optimiser steps on the rows of a step", 1, least=1)
    clip_low: float = flag("lower clip of the ratio, eps_low", 0.2, least=0, most=1)
    clip_high: float = flag("upper clip of the ratio, eps_high (DAPO: 0.28)", 0.2, least=0)
    preset: str = flag("CHORD-mu, CHORD-phi, or 'RL with SFT loss' (constant mu, weight 1)", "mu",
                       choices=tuple(PRESETS))
    mu_peak: float = flag("mu after warm-up (default: the preset's)", least=0, most=1)
    mu_valley: float = flag("mu after its decay (default: the preset's)", least=0, most=1)
    mu_warmup: int = flag("steps in which mu rises from 0 to --mu_peak", 0, least=0)
    mu_decay: int = flag("steps in which mu falls from --mu_peak to --mu_valley", toy=60, real=200, least=0)
    phi: bool = flag("weigh demonstration tokens by p(1-p)", False)
    expert_share: float = flag("demonstrations' share of the rows", toy=0.06, real=0.2, least=0, most=0.99)


# ---------------------------------------------------------------------------------------------- the loss
def mu_schedule(step: int, peak: float, valley: float, warmup: int, decay: int) -> float:
    """mu of a step, counted from 0: linear warm-up, half a cosine from peak to valley, then valley."""
    if step < warmup:
        return step / warmup * peak
    if step < warmup + decay:
        return (peak - valley) * (1 + math.cos(math.pi * (step - warmup) / decay)) / 2 + valley
    return valley


def chord_loss(logp, old_logp, advantages, mask, is_demo, mu, phi=False, rollout_tokens=None,
               demo_tokens=None, clip_low=0.2, clip_high=0.2):
    """L of the formula at the top: arXiv:2508.11408, eq. 3; with phi eq. 6 in it.

    logp, old_logp (B, T): log-probs in nats of response tokens, under the policy and the policy that sampled
        (old_logp of demonstration tokens is not read).
    advantages (B,), of demonstrations not read. mask (B, T): 1 on response tokens up to and including EOS.
    is_demo (B,): true on demonstrations. mu: weight of imitation. phi: weigh its tokens by p (1 - p).
    rollout_tokens, demo_tokens: N_r and N_d of the *whole* optimiser step: then the losses of its
        micro-batches add up. By default those of these tensors.
    Returns the loss and metrics {name: (sum, count)}, which are exact means over micro-batches too.
    """
    demo = mask.bool() & is_demo.bool()[:, None]                                   # (B, T)
    mask = mask.bool() & ~demo
    rollout_tokens = mask.sum().clamp(min=1) if rollout_tokens is None else max(1, rollout_tokens)
    demo_tokens = demo.sum().clamp(min=1) if demo_tokens is None else max(1, demo_tokens)
    advantages = torch.where(is_demo.bool(), 0.0, advantages)[:, None]             # (B, 1)
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    ratio = log_ratio.exp()                                                        # (1) r
    unclipped = -advantages * ratio                                                # (2) -r A
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)               # (3) -clip(r) A
    token_loss = torch.maximum(unclipped, clipped) * mask                          # (4) -min(r A, clip(r) A)
    log_p = torch.where(demo, logp, 0.0)
    p = log_p.detach().exp()
    sft_loss = -log_p * demo * (p * (1 - p) if phi else 1)                         # (5) -phi log p
    metrics = {
        "loss/on_policy": (token_loss.sum(), mask.sum()),
        "loss/off_policy": (sft_loss.sum(), demo.sum()),
        "clip_fraction": (((clipped > unclipped) & mask).sum(), mask.sum()),
        "kl/old_policy": (-log_ratio.sum(), mask.sum()),
    }
    return (1 - mu) * (token_loss.sum() / rollout_tokens) + mu * (sft_loss.sum() / demo_tokens), metrics


# --------------------------------------------------------------------------------------- what is in a batch
def make_batch(run, args, problems, mu) -> tuple[list[Row], list[Row]]:
    """Side by side: n rollouts for each prompt, and demonstrations of a stream of their own."""
    rollouts = run.rollout([problem for problem in problems for _ in range(args.n)] if mu < 1 else [])
    wanted = round(args.expert_share / (1 - args.expert_share) * args.prompts * args.n) if mu > 0 else 0
    return rollouts, run.next_demonstrations(wanted)


def main():
    args = common.parse(Args, __doc__)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None or getattr(args, name) is False:
            setattr(args, name, value)
    run = Run(args)
    optimizer = run.make_optimizer("rl")
    for step in run.steps():
        mu = mu_schedule(step - 1, args.mu_peak, args.mu_valley, args.mu_warmup, args.mu_decay)
        rows, demonstrations = make_batch(run, args, run.next_problems(), mu)
        rewards = run.verify(rows)
        groups = torch.tensor([row.problem.index for row in rows])
        advantages = group_advantages(rewards, groups, std_normalise=True)
        for row, advantage in zip(rows, advantages.tolist()):
            row.advantage = advantage
        rows += demonstrations
        run.score(rows)  # log-probs of the policy that sampled
        run.log("mu", mu)
        for minibatch in run.minibatches(rows):
            tokens = sum(len(row.response) for row in minibatch)
            demo_tokens = sum(len(row.response) for row in minibatch if row.is_demo)
            for batch in run.micro_batches(minibatch, args.entropy_bonus):
                logp, entropy = run.logprobs(batch, args.entropy_bonus)
                loss, metrics = chord_loss(logp, batch.old_logp, batch.advantages, batch.mask, batch.is_demo,
                                           mu, args.phi, tokens - demo_tokens, demo_tokens,
                                           args.clip_low, args.clip_high)
                run.backward(loss - args.entropy_bonus * entropy.sum() / tokens, metrics)
            run.optimizer_step(optimizer, minibatch)
        run.end_step()
    run.end()


if __name__ == "__main__":
    main()
