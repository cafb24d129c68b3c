"""GRPO: group relative policy optimisation, the on-policy baseline. Read it first: the others are diffs.

    DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models.
    Shao, Wang, Zhu, Xu, Song, Bi, Zhang, Zhang, Li, Wu, Guo. arXiv:2402.03300. With the corrections of
    Understanding R1-Zero-Like Training: A Critical Perspective (Dr. GRPO).
    Liu, Chen, Li, Qi, Pang, Du, Lee, Lin. arXiv:2503.20783.

A policy gradient needs to know which responses were better than expected, and a critic that predicts this is
as large as the model. GRPO samples n responses to the same prompt instead, a group, and expects their mean
reward. A response above the mean becomes more likely, one below it less, and a clip keeps the update near
the policy that sampled.

    J = 1/(B L) Σ_i Σ_t m_it min(r_it A_i, clip(r_it, 1-ε_low, 1+ε_high) A_i)  +  β/N Σ_i Σ_t m_it H_it

    r_it = π(y_it) / π_old(y_it)      A_i = R_i - mean(R of the group)      N = Σ_i Σ_t m_it

  i, t      a response of the mini-batch, and a token y_it of it; the mini-batch has B responses (rows)
  R_i       its reward: 1 if the boxed answer after </think> is right, else 0 (run.verify)
  π, π_old  the policy, and the policy before this step's updates, whose log-probs are row.old_logp; both at
            the temperature of sampling: logits are divided by --temperature before the softmax
  m_it      batch.mask: 1 on the tokens of the response up to and including EOS, else 0
  ε         --clip_low, --clip_high        L = --max_response        n = --n
  H_it      entropy of π at the token; β = --entropy_bonus, 0 by default

The clip is eq. 3 of arXiv:2402.03300; the constant B L, and A without the standard deviation, are those of
arXiv:2503.20783. A step is one rollout batch. It is cut into --updates mini-batches, one optimiser step each;
a mini-batch is cut into micro-batches, which are in memory at once and change nothing: gradients add up.

Next to it: luffy.py puts a demonstration into the group, chord.py adds a second loss on demonstrations,
relift.py takes steps of its own on them, and topr.py learns from old responses.

Deviations
  - The paper divides A by the group's standard deviation, which favours prompts that are nearly always or
    nearly never solved (`--std_normalise`), and each response by its own length: a long wrong one is then
    pushed down less per token than a short one. Here neither is done. `--token_mean` divides by N in place
    of B L, as DAPO does.
  - The paper has a KL term to a reference model; here and in the other four scripts there is none.
  - Scripts built on verl with a constant normaliser divide by L and never by B: on one process their loss
    is B times ours, on 8 cards (512 rows, FSDP's mean) 64 times. So a gradient clip of 1.0 and an entropy
    bonus of 0.001 weigh otherwise there than the same numbers here.
  - A group of one has A = 0 (as in TRL; in verl A = R).

On the toy (six runs, README.md) easy problems rise from 0.10-0.23 to 0.95-0.99 and hard ones stay at 0.02 or
below: all rollouts of a hard prompt are wrong, all A are 0. That is what the other four are about.

On a CPU, in a minute:  python grpo.py
On a GPU:               python grpo.py --model Qwen/Qwen2.5-Math-1.5B
"""
from dataclasses import dataclass

import common  # first: it reads the flags before torch is imported, which takes seconds
import torch
from common import Row, Run, flag


@dataclass
class Args(common.Args):
    std_normalise: bool = flag("divide A by the group's standard deviation (GRPO's paper)", False)
    token_mean: bool = flag("divide by N, the mini-batch's tokens, in place of B L (DAPO)", False)
    clip_low: float = flag("ε_low: the ratio is clipped below 1 - ε_low", 0.2, least=0, most=1)
    clip_high: float = flag("ε_high: the ratio is clipped above 1 + ε_high (DAPO: 0.28)", 0.2, least=0)


# ---------------------------------------------------------------------------------------------- the loss
def group_advantages(rewards, groups, std_normalise=False):
    """A_i = R_i - mean(R of the group): arXiv:2503.20783. Divided by std + 1e-6: arXiv:2402.03300, 4.1.2.

    rewards (B,) float; groups (B,) int, the same number for responses to the same prompt. Returns (B,).
    """
    same_group = (groups[:, None] == groups[None, :]).to(rewards.dtype)            # (B, B)
    group_size = same_group.sum(dim=1)
    advantages = rewards - same_group @ rewards / group_size
    if std_normalise:
        variance = same_group @ advantages.square() / (group_size - 1).clamp(min=1)    # unbiased
        advantages = advantages / (variance.sqrt() + 1e-6)
    return advantages


def grpo_loss(logp, old_logp, advantages, mask, normaliser=None, clip_low=0.2, clip_high=0.2):
    """-J of the formula at the top: arXiv:2402.03300, eq. 3, without its KL term.

    logp, old_logp (B, T): log-probs in nats of response tokens, under the policy and the policy that sampled.
    advantages (B,). mask (B, T): 1 on response tokens up to and including EOS.
    normaliser: what the sum over tokens is divided by, B * L or the number of response tokens, of the *whole*
        optimiser step: then the losses of its micro-batches add up. By default B * T of these tensors.
    Returns the loss and metrics {name: (sum, count)}, which are exact means over micro-batches too.
    """
    mask = mask.bool()
    normaliser = mask.numel() if normaliser is None else normaliser
    advantages = advantages[:, None]                                               # (B, 1)
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    ratio = log_ratio.exp()                                                        # (1) r
    unclipped = -advantages * ratio                                                # (2) -r A
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)               # (3) -clip(r) A
    token_loss = torch.maximum(unclipped, clipped) * mask                          # (4) -min(r A, clip(r) A)
    metrics = {
        "loss/on_policy": (token_loss.sum(), mask.sum()),
        "clip_fraction": (((clipped > unclipped) & mask).sum(), mask.sum()),
        "kl/old_policy": (-log_ratio.sum(), mask.sum()),
    }
    return token_loss.sum() / normaliser, metrics                                  # (5) sum / (B L)


# --------------------------------------------------------------------------------------- what is in a batch
def make_batch(run, args, problems) -> list[Row]:
    """On-policy: n rollouts of the policy for each prompt, and nothing else."""
    return run.rollout([problem for problem in problems for _ in range(args.n)])


def main():
    args = common.parse(Args, __doc__)
    run = Run(args)
    for step in run.steps():
        rows = make_batch(run, args, run.next_problems())
        rewards = run.verify(rows)  # (rows,) 1.0: right answer in the box after </think>, else 0.0
        groups = torch.tensor([row.problem.index for row in rows])
        advantages = group_advantages(rewards, groups, args.std_normalise)
        for row, advantage in zip(rows, advantages.tolist()):
            row.advantage = advantage
        run.score(rows)  # sets row.old_logp: the trainer's log-probs before any update of this step
        for minibatch in run.minibatches(rows):  # --updates parts, not shuffled: an optimiser step each
            tokens = sum(len(row.response) for row in minibatch)
            normaliser = tokens if args.token_mean else len(minibatch) * args.max_response
            for batch in run.micro_batches(minibatch, args.entropy_bonus):  # tensors; rows of A = 0 left out
                logp, entropy = run.logprobs(batch, args.entropy_bonus)  # (rows, T), at --temperature
                loss, metrics = grpo_loss(logp, batch.old_logp, batch.advantages, batch.mask,
                                          normaliser, args.clip_low, args.clip_high)
                run.backward(loss - args.entropy_bonus * entropy.sum() / tokens, metrics)
            run.optimizer_step(minibatch)  # scales a long gradient down; AdamW
        run.end_step()  # weights to the sampler; evaluation, metrics, checkpoint
    run.end()


if __name__ == "__main__":
    main()
