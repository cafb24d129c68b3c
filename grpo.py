"""GRPO: group relative policy optimisation, the on-policy baseline. Read it first: the others are diffs.

    DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models.
    Shao, Wang, Zhu, Xu, Song, Bi, Zhang, Zhang, Li, Wu, Guo. arXiv:2402.03300. With the corrections of
    Understanding R1-Zero-Like Training: A Critical Perspective (Dr. GRPO).
    Liu, Chen, Li, Qi, Pang, Du, Lee, Lin. arXiv:2503.20783.

A policy gradient needs to know which responses were better than expected, and a critic that predicts this is
as large as the model. GRPO samples n responses to the same prompt instead and expects their mean reward. A
response above the mean becomes more likely, one below it less, and a clip keeps the update near the policy
that sampled.

    J = 1/(B L) Σ_i Σ_t m_it min(r_it A_i, clip(r_it, 1-ε_low, 1+ε_high) A_i)        (arXiv:2402.03300, eq. 3)
    r_it = π(y_it) / π_old(y_it)        A_i = R_i - mean(R of the group)

for B responses of at most L tokens in an optimiser step; m_it = 1 up to and including EOS, else 0.

Deviations
  - The paper divides A by the group's standard deviation, which favours prompts that are nearly always or
    nearly never solved, and each response by its own length, which favours long wrong ones (Dr. GRPO). Here
    neither is done. `--std_normalise` does the first; `--token_mean` divides by the step's tokens, as DAPO
    does.
  - Scripts built on verl divide by L alone, so that their loss is B times ours and grows with the batch.
  - No KL term and no reference model, here and in the other four scripts.
  - A group of one has A = 0 (as in TRL; in verl A = R).

On a CPU, in minutes:   python grpo.py
On a GPU:               python grpo.py --model Qwen/Qwen2.5-Math-1.5B
"""
from dataclasses import dataclass

import torch

import common
from common import Row, flag
from run import Run


@dataclass
class Args(common.Args):
    std_normalise: bool = flag("divide advantages by the group's standard deviation (GRPO's paper)", False)
    token_mean: bool = flag("divide by the step's response tokens instead of B * L (DAPO)", False)
    clip_low: float = flag("lower clip of the ratio, eps_low", 0.2, least=0, most=1)
    clip_high: float = flag("upper clip of the ratio, eps_high (DAPO: 0.28)", 0.2, least=0)


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
    optimizer = run.make_optimizer("rl")
    for step in run.steps():
        rows = make_batch(run, args, run.next_problems())
        rewards = run.verify(rows)
        groups = torch.tensor([row.problem.index for row in rows])
        advantages = group_advantages(rewards, groups, args.std_normalise)
        for row, advantage in zip(rows, advantages.tolist()):
            row.advantage = advantage
        run.score(rows)  # log-probs of the policy that sampled
        for minibatch in run.minibatches(rows):
            tokens = sum(len(row.response) for row in minibatch)
            normaliser = tokens if args.token_mean else len(minibatch) * args.max_response
            for batch in run.micro_batches(minibatch, args.entropy_bonus):
                logp, entropy = run.logprobs(batch, args.entropy_bonus)
                loss, metrics = grpo_loss(logp, batch.old_logp, batch.advantages, batch.mask,
                                          normaliser, args.clip_low, args.clip_high)
                run.backward(loss - args.entropy_bonus * entropy.sum() / tokens, metrics)
            run.optimizer_step(optimizer, minibatch)
        run.end_step()
    run.end()


if __name__ == "__main__":
    main()
