"""HPT: each prompt is learnt by RL or by imitation, as its rollouts decide. A diff of grpo.py.

    Towards a Unified View of Large Language Model Post-Training.
    Lv, Zuo, Sun, Liu, Wei, Chen, He, Zhu, Zhang, Wang, Ding, Zhou. arXiv:2509.04419.

RL needs rollouts that differ in their reward; fine-tuning harms what the model can do already. HPT (hybrid
post-training) asks the model's own success which of them a prompt needs. Where more than G of its n rollouts
are right it is trained by RL; else they are thrown away, and one row takes their place: the demonstration.

    J = 1/(B L) [ Σ_{i rollout} Σ_t m_it r_it A_i  +  c Σ_{i demonstration} Σ_t m_it log π(y_it) ]
        + β/N Σ_i Σ_t m_it H_it

    r_it = π(y_it) / π_old(y_it)      A_i = R_i - mean(R of the group)      N = Σ_i Σ_t m_it

  i, t      a row of the mini-batch, rollout or demonstration, and a token y_it of it; it has B rows, fewer
            where more groups gave way to their demonstrations
  R_i       reward of a rollout: 1 if the boxed answer after </think> is right, else 0; the group are the n
            rollouts to one prompt. A demonstration has neither R nor A
  π, π_old  the policy, and the policy before this step's updates (row.old_logp), both at --temperature
  m_it      batch.mask: 1 on the tokens of the response up to and including EOS, else 0
  G         --gate: right rollouts up to which the demonstration takes over        c = --sft_weight
  L         --max_response        n = --n        H_it: entropy of π at the token; β = --entropy_bonus

This is eq. 13 of the paper, which has the loss of RL where the share of right rollouts is above a threshold
γ = G/n and that of fine-tuning elsewhere, but with one normaliser for both.

Compared with the others: LUFFY compares the demonstration with the rollouts of its group; here it replaces
them and is imitated at every token alike. ReLIFT imitates on unsolved prompts too, but later, in steps of
their own. With G = -1 this is GRPO (with `--clip`), with G = n fine-tuning on demonstrations.

Deviations
  - The paper clips r, and divides A by the standard deviation (`--clip --std_normalise`), RL by n, and
    imitation by the demonstration's length: there a token of a demonstration weighs hundreds of times less
    than one of a rollout. The authors' code does none of this; it divides RL by the constant L = 8192, and
    imitation by the number of demonstration tokens in the micro-batch, 8000 to 16000: nearly the same weight,
    but one that depends on how rows were packed. Here both are divided by B L.
  - c is 1 in the authors' script for 7B models and 0.3 in that for 1.5B; G is 0, and for Llama 2, with n = 8.
  - In the authors' code a prompt without a demonstration loses its rollouts too, and a row of padding enters;
    a demonstration of L tokens or more is cut and loses its EOS; one with a wrong answer is imitated. Here
    all these are left out, and their prompts keep the rollouts and are counted.
  - The authors' script for Qwen skips updates whose gradient norm is above 80. Here they are scaled, as all.
  - In the authors' code fewer rows make fewer optimiser steps. Here there are --updates, whatever is in them.

On the toy (one base, two seeds) the share of hard problems solved, 0.02 at step 5, is 0.76 and 0.65 at step
10 and 0.97 and 0.98 at step 80. Of the prompts, 0.25 to 0.81 are imitated in steps 1 to 7, none from step 9.

On a CPU, in a minute:  python more/hpt.py
On a GPU:               python more/hpt.py --model Qwen/Qwen2.5-Math-7B
"""
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # where common.py and the five are

import common  # first: it reads the flags before torch is imported, which takes seconds
import torch
from common import Problem, Row, Run, flag
from grpo import group_advantages


@dataclass
class Args(common.Args):
    lr: float = flag("learning rate of AdamW", toy=2e-4, real=5e-6, least=0)
    entropy_bonus: float = flag("β: weight of the tokens' mean entropy in the objective", toy=0.0, real=0.001)
    gate: int = flag("G: right rollouts up to which the demonstration takes their place", 0, least=-1)
    sft_weight: float = flag("c: weight of imitation", 1.0, least=0)
    std_normalise: bool = flag("divide A by the group's standard deviation (HPT's paper)", False)
    clip: bool = flag("clip the ratio (HPT's paper)", False)
    clip_low: float = flag("ε_low: the ratio is clipped below 1 - ε_low", 0.2, least=0, most=1,
                           only_with="clip")
    clip_high: float = flag("ε_high: the ratio is clipped above 1 + ε_high", 0.2, least=0, only_with="clip")


# ---------------------------------------------------------------------------------------------- the loss
def hpt_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    is_demo: torch.Tensor,
    normaliser: float | None = None, sft_normaliser: float | None = None,
    sft_weight: float = 1.0, clip_low: float = torch.inf, clip_high: float = torch.inf,
) -> tuple[torch.Tensor, dict]:
    """-J without the entropy, for one micro-batch: RL on rollouts, imitation of demonstrations (eq. 13).

        loss = 1/normaliser Σ_{i rollout} Σ_t m_it max(-A_i r_it, -A_i clip(r_it, 1 - ε_low, 1 + ε_high))
                                               (4)     (2)         (3)           r = π / π_old (1)
             + c/sft_normaliser Σ_{i demonstration} Σ_t m_it (-log π(y_it)) (5)

    Tensors hold the rows of one micro-batch, padded to T tokens. logp, old_logp (rows, T): log-probs in nats,
        of π and π_old. advantages: A, (rows,), (rows, 1) or (rows, T), not read in demonstrations.
        mask (rows, T), any dtype: m; what stands where it is 0 is not read, nor is old_logp of
        demonstrations. Half precision is computed in float32. A log-ratio above 60 counts as 60, so that
        nothing overflows.
    is_demo, any dtype: 1 on demonstrations (rows,), or on tokens that come from one (rows, T).
    normaliser, sft_normaliser: what the sums over tokens of rollouts and of demonstrations are divided by,
        the same in all micro-batches of a mini-batch, so that they add up: B * L, with the B rows of the
        whole mini-batch. Rows that micro-batches leave out, since A = 0, count there too. Default: rows * T
        of these tensors, and for demonstrations what it is for rollouts.
    sft_weight: c. clip_low, clip_high: ε_low and ε_high; both infinite for no clip.
    Returns the loss and metrics {name: (sum, number of values)}, so that means over micro-batches are exact.
    clip_fraction: share of rollout tokens at which the clip decides, which have no gradient then.

    >>> logp, old_logp = torch.tensor([[0.5], [0.25]]).log(), torch.tensor([[0.25], [0.0]]).log()
    >>> advantages, is_demo = torch.tensor([-0.5, 1.0]), torch.tensor([False, True])
    >>> loss, _ = hpt_loss(logp, old_logp, advantages, torch.ones(2, 1), is_demo, sft_weight=0.5)
    >>> round(loss.item(), 4)     # rollout: r = 2; demonstration: log 4; (0.5 * 2 + 0.5 * 1.3863) / 2
    0.8466
    """
    mask = mask.bool()
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    normaliser = mask.numel() if normaliser is None else normaliser
    sft_normaliser = normaliser if sft_normaliser is None else sft_normaliser
    demo = mask & is_demo.bool().reshape(len(mask), -1)                            # (rows, T)
    on_policy = mask & ~demo
    count = on_policy.sum()
    advantages = torch.where(on_policy, advantages.reshape(len(mask), -1), 0.0)    # (rows, T)
    log_ratio = torch.where(on_policy, logp - old_logp, 0.0)
    ratio = log_ratio.clamp(max=60).exp()                                          # (1) r, at most e⁶⁰
    unclipped = -advantages * ratio                                                # (2) -A r
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)               # (3) -A clip(r)
    token_loss = torch.maximum(unclipped, clipped)                                 # (4) the larger loss
    imitation = -torch.where(demo, logp, 0.0)                                      # (5) -log π: HPT
    metrics = {
        "token_loss/rollouts": (token_loss.detach().sum(), count),
        "token_loss/demonstrations": (imitation.detach().sum(), demo.sum()),
        "clip_fraction": ((clipped > unclipped).sum(), count),
        # The k1 estimate of KL(π_old || π): log π_old - log π of sampled tokens; single ones may be negative.
        "kl/old_policy": (-log_ratio.detach().sum(), count),
    }
    loss = token_loss.sum() / (normaliser or 1) + sft_weight * imitation.sum() / (sft_normaliser or 1)
    return loss, metrics                                                           # 0 without tokens


# --------------------------------------------------------------------------------------- what is in a batch
def make_batch(run: Run, args: Args, problems: list[Problem]) -> list[Row]:
    """On-policy: n rollouts of the policy for each prompt. Demonstrations come in by `switch`."""
    return run.rollout([problem for problem in problems for _ in range(args.n)])


def switch(
    rows: list[Row], gate: int, demonstration_of: Callable[[Problem], Row | None],
) -> tuple[list[Row], int]:
    """The rows to train on: a group with at most `gate` right rollouts gives way to its demonstration.

    demonstration_of(problem): a row, or None where there is none; that group stays. Returns the rollouts that
    stay, then the demonstrations; and the number of groups that stay for want of one.

    >>> rollouts = ("A", 0.0), ("A", 1.0), ("B", 0.0), ("B", 0.0), ("C", 0.0), ("C", 0.0)   # and reward
    >>> rows = [Row(problem, response=[], reward=reward) for problem, reward in rollouts]
    >>> rows, missing = switch(rows, 0, {"B": Row("B", response=[], is_demo=True)}.get)
    >>> [(row.problem, row.is_demo) for row in rows], missing
    ([('A', False), ('A', False), ('C', False), ('C', False), ('B', True)], 1)
    """
    right = Counter()
    for row in rows:
        right[row.problem] += row.reward == 1
    instead = {problem: demonstration_of(problem) for problem in right if right[problem] <= gate}
    demonstrations = [row for row in instead.values() if row]
    for row in demonstrations:
        row.advantage = 1.0  # imitated, not compared; rows of A = 0 are left out
    rows = [row for row in rows if not instead.get(row.problem)]
    return rows + demonstrations, len(instead) - len(demonstrations)


def main():
    args = common.parse(Args, __doc__)
    clip = (args.clip_low, args.clip_high) if args.clip else (torch.inf, torch.inf)
    run = Run(args)
    for step in run.steps():
        rows = make_batch(run, args, run.next_problems())
        rewards = run.verify(rows)  # sets row.reward: 1.0 if the box after </think> is right, else 0.0
        groups = torch.tensor([row.problem.index for row in rows])
        advantages = group_advantages(rewards, groups, args.std_normalise)
        for row, advantage in zip(rows, advantages.tolist()):
            row.advantage = advantage
        run.score(rows)  # sets row.old_logp: log π_old by the trainer, before this step's updates
        rows, missing = switch(rows, args.gate, run.demonstrations.of)
        run.log("hpt/imitated", sum(row.is_demo for row in rows), len(groups.unique()))
        run.log("hpt/without_demonstration", missing, 0)
        run.log("hpt/rows", len(rows))
        for minibatch in run.minibatches(rows):  # --updates of them, one optimiser step each
            tokens = sum(len(row.response) for row in minibatch)
            normaliser = len(minibatch) * args.max_response
            for batch in run.micro_batches(minibatch, args.entropy_bonus):  # tensors, without rows of A = 0
                logp, entropy = run.logprobs(batch, args.entropy_bonus)  # (rows, T); 0 outside the mask
                loss, metrics = hpt_loss(logp, batch.old_logp, batch.advantages, batch.mask, batch.is_demo,
                                         normaliser, normaliser, args.sft_weight, *clip)
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
