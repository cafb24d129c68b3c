"""GRPO: group relative policy optimisation, the on-policy baseline. Read it first. See docs/grpo.md

    DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models.
    Shao, Wang, Zhu, Xu, Song, Bi, Zhang, Zhang, Li, Wu, Guo. arXiv:2402.03300. With the corrections of
    Understanding R1-Zero-Like Training: A Critical Perspective (Dr. GRPO).
    Liu, Chen, Li, Qi, Pang, Du, Lee, Lin. arXiv:2503.20783.

A policy gradient needs to know which responses were better than expected, and a critic that predicts this is
as large as the model. GRPO needs none: it samples n responses to the same prompt, a group, and compares each
with their mean reward. A response above the mean becomes more likely, one below it less, and a clip keeps
the update near the policy that sampled.

    J = 1/(B L) Σ_i Σ_t m_it min(r_it A_i, clip(r_it, 1-ε_low, 1+ε_high) A_i)  +  β/N Σ_i Σ_t m_it H_it

    r_it = π(y_it) / π_old(y_it)      A_i = R_i - mean(R of the group)      N = Σ_i Σ_t m_it

  i, t      a response of the mini-batch, and a token y_it of it; the mini-batch has B responses (rows)
  R_i       its reward: 1 if the boxed answer after </think> is right, else 0 (run.verify)
  π, π_old  the policy, and the policy before this step's updates, whose log-probs are row.old_logp; both at
            the temperature of sampling: logits are divided by --temperature before the softmax
  m_it      batch.mask: 1 on the tokens of the response up to and including EOS, else 0
  ε         --clip_low, --clip_high        L = --max_response        n = --n
  H_it      entropy of π at the token; β = --entropy_bonus, 0 by default
            In main(): B = len(minibatch), N = tokens.

J is maximised: the code minimises -J. The clip is eq. 3 of arXiv:2402.03300, which has one ε for both sides;
the constant B L, and A without the standard deviation, are those of arXiv:2503.20783. A step samples one
rollout batch. It is cut into --updates mini-batches (every --updates-th row), one optimiser step each. In the
first, π is still π_old: r is 1, its gradient is that of log π, and nothing is clipped; with --updates 1 the
clip never acts. A mini-batch is cut into micro-batches, worked on one by one to save memory; their gradients
add up to the mini-batch's. Rows of A = 0 are left out of them, unless β makes them count; B and N count all.

Compared with the others: luffy.py puts a demonstration into the group, chord.py adds a second loss on
demonstrations, relift.py takes steps of its own on them, and topr.py learns from old responses.

Deviations
  - The paper divides A by the group's standard deviation, which favours prompts that are nearly always or
    nearly never solved (`--std_normalise`), and each response by its own length: a long wrong one is then
    pushed down less per token than a short one. Here neither is done. `--token_mean` divides by N in place
    of B L, as DAPO does.
  - The paper has a KL term to a reference model; here and in the other four scripts there is none.
  - Scripts built on verl with a constant normaliser divide by L and never by B. Their loss is B times ours;
    with 512 rows on 8 cards, whose gradients are averaged, 64 times. So a gradient clip of 1.0 and an
    entropy bonus of 0.001 have another effect there.
  - A group of one has A = 0 (as in TRL; in verl A = R).

On the toy (six runs, README.md) the share of easy problems solved rises from 0.10-0.23 to 0.95-0.99; of
hard ones it stays at 0.02 or below: all rollouts of a hard prompt are wrong, so that all A are 0. LUFFY,
CHORD and ReLIFT use demonstrations for that; TOPR is about using old responses again.

On a CPU, in a minute:  python grpo.py
On a GPU:               python grpo.py --model Qwen/Qwen2.5-Math-1.5B
"""
from dataclasses import dataclass

import common  # first: it reads the flags before torch is imported, which takes seconds
import torch
from common import Problem, Row, Run, flag


@dataclass
class Args(common.Args):
    std_normalise: bool = flag("divide A by the group's standard deviation (GRPO's paper)", False)
    token_mean: bool = flag("divide by N, the mini-batch's tokens, in place of B L (DAPO)", False)
    clip_low: float = flag("ε_low: the ratio is clipped below 1 - ε_low", 0.2, least=0, most=1)
    clip_high: float = flag("ε_high: the ratio is clipped above 1 + ε_high (DAPO: 0.28)", 0.2, least=0)


# ---------------------------------------------------------------------------------------------- the loss
def group_advantages(
    rewards: torch.Tensor, groups: torch.Tensor, std_normalise: bool = False,
) -> torch.Tensor:
    """A_i = R_i - mean(R of the group), as in arXiv:2503.20783, with the rewards of a whole step.

    rewards (rows,) of any dtype; groups (rows,) int, the same number for responses to the same prompt.
    std_normalise: divide by the group's standard deviation too (arXiv:2402.03300, 4.1.2; here the one with
        n - 1, plus 1e-6, as in verl).
    Returns (rows,). A group of one has A = 0. A reward that is nan spoils its own group and no other.

    >>> rewards, groups = torch.tensor([1, 0, 0, 0, 1, 1]), torch.tensor([7, 7, 7, 7, 8, 8])
    >>> group_advantages(rewards, groups).tolist()           # the means are 1/4 and 1
    [0.75, -0.25, -0.25, -0.25, 0.0, 0.0]
    >>> advantages = group_advantages(rewards, groups, std_normalise=True)
    >>> round(advantages[0].item(), 4)                       # 0.75 / sqrt((0.75² + 3 * 0.25²) / 3)
    1.5
    """
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    same_group = groups[:, None] == groups[None, :]                                # (rows, rows)
    size = same_group.sum(dim=1)                                                   # (rows,)
    advantages = rewards - torch.where(same_group, rewards, 0.0).sum(dim=1) / size
    if std_normalise:
        variance = torch.where(same_group, advantages.square(), 0.0).sum(dim=1) / (size - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + 1e-6)
    return advantages


def grpo_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    normaliser: float | None = None,
    clip_low: float = 0.2, clip_high: float = 0.2,
) -> tuple[torch.Tensor, dict]:
    """-J without the entropy, for one micro-batch: GRPO's clipped policy gradient, arXiv:2402.03300, eq. 3.

        loss = 1/normaliser Σ_i Σ_t m_it max(-A_i r_it, -A_i clip(r_it, 1 - ε_low, 1 + ε_high))
                                         (4)     (2)         (3)           r = π / π_old (1)

    The numbers stand at the lines below. max(-x, -y) is -min(x, y).

    Tensors hold the rows of one micro-batch, padded to T tokens. logp, old_logp (rows, T): log-probs in nats,
        of π and π_old. advantages: A, (rows,), (rows, 1) or (rows, T).
        mask (rows, T), any dtype: m; what stands where it is 0 is not read. Half precision is computed in
        float32. A log-ratio above 60 counts as 60, so that nothing overflows.
    normaliser: what the sum over tokens is divided by, the same in all micro-batches of a mini-batch, so that
        they add up: B * L, with the B rows of the whole mini-batch, or its number of response tokens. Rows
        that micro-batches leave out, since A = 0, count there too. Default: rows * T of these tensors.
    clip_low, clip_high: ε_low and ε_high; both infinite for no clip.
    Returns the loss and metrics {name: (sum, number of values)}, so that means over micro-batches are exact.
    clip_fraction: share of tokens at which the clip decides, which have no gradient then.

    >>> logp, old_logp = torch.tensor([[0.5], [0.5]]).log(), torch.tensor([[0.25], [0.5]]).log()
    >>> loss, metrics = grpo_loss(logp, old_logp, torch.tensor([1.0, -1.0]), torch.ones(2, 1))
    >>> round(loss.item(), 4)     # r = 2, clipped at 1.2, and r = 1: (-1.2 + 1) / (2 rows * 1 token)
    -0.1
    >>> metrics["clip_fraction"]
    (tensor(1), tensor(2))
    """
    mask = mask.bool()
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    count = mask.sum()
    normaliser = mask.numel() if normaliser is None else normaliser
    advantages = torch.where(mask, advantages.reshape(len(mask), -1), 0.0)         # (rows, T)
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    ratio = log_ratio.clamp(max=60).exp()                                          # (1) r, at most e⁶⁰
    unclipped = -advantages * ratio                                                # (2) -A r
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)               # (3) -A clip(r)
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
    """On-policy: n rollouts of the policy for each prompt, and nothing else."""
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
            for batch in run.micro_batches(minibatch, args.entropy_bonus):  # tensors, without rows of A = 0
                logp, entropy = run.logprobs(batch, args.entropy_bonus)  # (rows, T); 0 outside the mask
                loss, metrics = grpo_loss(logp, batch.old_logp, batch.advantages, batch.mask,
                                          normaliser, args.clip_low, args.clip_high)
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
