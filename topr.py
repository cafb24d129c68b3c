"""TOPR: tapered off-policy REINFORCE. Many updates on one set of right and wrong responses. See docs/topr.md

    Tapered Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs.
    Le Roux, Bellemare, Lebensold, Bergeron, Greaves, Fréchette, Pelletier, Thibodeau-Laufer, Toth, Work.
    arXiv:2503.14286.

Sampling is expensive, so one wants many updates from one set of responses. Plain REINFORCE on old responses
goes on pushing down what is impossible already: its loss has no lower bound, and the model collapses. PPO's
clip stops learning from most of the set instead. TOPR imitates right responses with full weight, however
unlikely they are, and tapers the push on wrong ones with their importance ratio: what the policy no longer
says, it need not unlearn.

    J = 1/(B L) Σ_i w_i A_i Σ_t m_it log π(y_it)  +  β/N Σ_i Σ_t m_it H_it

    A_i = R_i - c      R_i = +1 (right) or -1 (wrong)      N = Σ_i Σ_t m_it
    w_i = 1 if A_i >= 0, else min(1, π(y_i) / π_old(y_i)) of the whole response, without a gradient of its own

  i, t      a response of the mini-batch, and a token y_it of it; B = --minibatch
  c         --baseline, 0 by default
  π, π_old  the policy, and the behaviour policy: the one that sampled the set (row.old_logp); both at
            --temperature
  m_it      batch.mask: 1 on the tokens of the response up to and including EOS, else 0
  L         --max_response        H_it  entropy of π at the token; β = --entropy_bonus, 0 by default

The gradient of the first term, times L, is eq. 8 of the paper. An *iteration* samples and verifies a set,
--prompts x --n rollouts, once, and goes through it --epochs_per_iteration times, in a new order each time. A
step of this script is one mini-batch of the set and so one optimiser step; elsewhere a step samples anew.

A positive c makes right answers count less and wrong ones more: the effective share of positives in the
gradient, p (1-c) / (1 + (1-2p) c) for a share p of right responses, before w, falls as c rises. It is logged;
the paper finds 10 to 20% best.

Compared with the others: GRPO compares the responses to one prompt and drops them after --updates optimiser
steps; here a response stands alone, right or wrong, and is used again and again. No demonstrations are
needed.

Deviations
  - ROLL and Trinity-RFT weigh each token by its own ratio. The product over a long response and a single
    ratio differ by orders of magnitude; here, as in the paper, it is the product. Trinity also rewards wrong
    but well-formatted answers.
  - J is divided by L, a constant, so that gradient clip and entropy bonus weigh as in the other scripts;
    `--token_mean` divides by N in place of B L.
  - With `--offline` the probabilities under whoever wrote the responses are unknown; those under the starting
    policy are taken in their place.
  - `--weights` has the alternatives that the paper compares: reinforce (w = 1), tis (min(1, ratio) for both
    signs) and ppo (ratios clipped per token, no w).
  - The numbers of prompts, epochs and rows are this project's choice, not the paper's.

On the toy (six runs, README.md) five sets and 240 steps bring the share of easy problems solved to
0.95-0.99. Plain REINFORCE is at 0.00-0.01 after the first set and PPO's clip ends anywhere from 0.00 to
0.94; tis is as good as TOPR on this task.

On a CPU, in a minute:  python topr.py
On a GPU:               python topr.py --model Qwen/Qwen2.5-Math-1.5B
"""
import math
import random
from dataclasses import dataclass

import common  # first: it reads the flags before torch is imported, which takes seconds
import torch
from common import Problem, Row, Run, flag


@dataclass
class Args(common.Args):
    token_mean: bool = flag("divide by N, the mini-batch's tokens, in place of B L (DAPO)", False)
    data: str = flag("as in the other scripts; 'toy:easy' has only the toy's easy problems",
                     toy="toy:easy", real="Elliott/Openr1-Math-46k-8192", not_with="offline")
    lr: float = flag("learning rate of AdamW", toy=3e-4, real=1e-6, least=0)
    eval_every: int = flag("steps between evaluations on held-out problems", toy=48, real=64, least=1)
    prompts: int = flag("prompts in a set", toy=192, real=1024, least=1, not_with="offline")
    n: int = flag("responses to a prompt", 8, least=1, not_with="offline")
    iterations: int = flag("sets to sample", 5, least=1, not_with="offline")
    epochs_per_iteration: int = flag("times that a set is gone through", toy=4, real=2, least=1)
    minibatch: int = flag("B: rows of a step's mini-batch", toy=128, real=256, least=1)
    updates: int = flag("always 1: a step is one optimiser step", 1, least=1, most=1)
    steps: int = flag("optimiser steps (default: those of --iterations)", least=1)
    weights: str = flag("of the responses", "topr", choices=("topr", "tis", "reinforce", "ppo"))
    baseline: float = flag("c, which is subtracted from R = 1 or -1", 0.0, least=-0.99, most=0.99)
    clip_low: float = flag("ε_low of ppo", 0.2, least=0, most=1, only_with="weights=ppo")
    clip_high: float = flag("ε_high of ppo", 0.2, least=0, only_with="weights=ppo")
    offline: str = flag("file with columns problem, answer, response to train on instead of sampling", "")
    save_rollouts: bool = flag("keep sets in rollouts.jsonl, for --offline", False, not_with="offline")


# ---------------------------------------------------------------------------------------------- the loss
def topr_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    normaliser: float | None = None,
    weights: str = "topr",
    clip_low: float = 0.2, clip_high: float = 0.2,
) -> tuple[torch.Tensor, dict]:
    """-J without the entropy, for one micro-batch: arXiv:2503.14286, whose eq. 8 is the gradient of J L.

        loss = 1/normaliser Σ_i Σ_t m_it (-w_i A_i log π(y_it)) (7)
        w_i  = 1 if A_i >= 0, else min(1, Π_t π(y_it) / π_old(y_it)), without a gradient: (5), w (6)
        for weights = 'ppo' instead (1) to (4), as in grpo_loss

    Tensors hold the rows of one micro-batch, padded to T tokens. logp, old_logp (rows, T): log-probs in nats,
        of π and π_old. advantages: A = R - c, (rows,), (rows, 1) or
        (rows, T). mask (rows, T), any dtype: m; what stands where it is 0 is not read. Half precision is
        computed in float32. PPO's log-ratios above 60 count as 60, so that nothing overflows.
    normaliser: what the sum is divided by, the same in all micro-batches of a mini-batch, so that they add
        up: B * L, with the B rows of the whole mini-batch, or its number of response tokens. Default: the
        rows of these tensors, the paper's mean (for 'ppo' rows * T, as in grpo_loss).
    weights: 'topr'; or 'tis': min(1, ratio) for both signs; 'reinforce': w = 1; 'ppo': ratios of single
        tokens, clipped below 1 - clip_low and above 1 + clip_high.
    Returns the loss and metrics {name: (sum, number of values)}, so that means over micro-batches are exact.
    weight/negatives: min(1, ratio) of wrong responses, which is w with 'topr' and 'tis'.

    >>> logp, old_logp = torch.tensor([[0.25], [0.25]]).log(), torch.tensor([[0.5], [0.5]]).log()
    >>> loss, _ = topr_loss(logp, old_logp, torch.tensor([1.0, -1.0]), torch.ones(2, 1))
    >>> round(loss.item(), 4)     # w = 1 and w = 0.25/0.5: (1 * log 4 - 0.5 * log 4) / 2 rows
    0.3466
    """
    mask = mask.bool()
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    count = mask.sum()
    normaliser = normaliser if normaliser is not None else mask.numel() if weights == "ppo" else len(mask)
    advantages = torch.where(mask, advantages.reshape(len(mask), -1), 0.0)         # (rows, T)
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    tapered = log_ratio.detach().sum(dim=1, keepdim=True).clamp(max=0).exp()       # (5) of a row: (rows, 1)
    topr = torch.where(advantages >= 0, 1.0, tapered)
    weight = {"topr": topr, "tis": tapered, "reinforce": 1.0, "ppo": 0.0}[weights]     # (6) w
    tapered_loss = -weight * advantages * torch.where(mask, logp, 0.0)             # (7) -w A log π
    ratio = log_ratio.clamp(max=60).exp()                                          # (1) r, at most e⁶⁰
    unclipped = -advantages * ratio                                                # (2) -A r
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)               # (3) -A clip(r)
    token_loss = torch.maximum(unclipped, clipped)                                 # (4) the larger loss
    token_loss = token_loss if weights == "ppo" else tapered_loss
    negative = (advantages < 0).any(dim=1)                                         # (rows,)
    metrics = {
        "token_loss/rollouts": (token_loss.detach().sum(), count),
        "weight/negatives": (tapered[negative].sum(), negative.sum()),
        # The k1 estimate of KL(π_old || π): log π_old - log π of sampled tokens; single ones may be negative.
        "kl/old_policy": (-log_ratio.detach().sum(), count),
    }
    return token_loss.sum() / (normaliser or 1), metrics                           # 0 without tokens


# --------------------------------------------------------------------------------------- what is in a batch
def make_batch(run: Run, args: Args, problems: list[Problem]) -> list[Row]:
    """An iteration's set: n rollouts of the policy for each prompt. It stays while the policy moves on."""
    return run.rollout([problem for problem in problems for _ in range(args.n)])


def pick(rows: list[Row], size: int, place: int, seed: str) -> list[Row]:
    """Off-policy: mini-batch number `place` of an iteration's set, which has a new order in every epoch.

    >>> [pick([1, 2, 3], 2, place, seed="0 1") for place in range(4)]     # places 2 and 3: the second epoch
    [[2, 1], [3], [3, 2], [1]]
    """
    epoch, number = divmod(place, math.ceil(len(rows) / size))
    order = random.Random(f"{seed} {epoch}").sample(rows, len(rows))
    return order[number * size:(number + 1) * size]


def main():
    args = common.parse(Args, __doc__)
    args.data = args.offline or args.data
    run = Run(args)
    offline = run.kept.read(args.offline, args.max_response) if args.offline else []
    size = len(offline) or args.prompts * args.n
    steps_per_iteration = math.ceil(size / args.minibatch) * args.epochs_per_iteration
    args.steps = args.steps or steps_per_iteration * (1 if offline else args.iterations)
    for step in run.steps(f"{args.steps} steps on mini-batches of {args.minibatch}, of sets of {size} rows"):
        iteration, place = divmod(step - 1, steps_per_iteration)
        if place == 0:
            rows = offline or make_batch(run, args, run.next_problems(iteration))
            rewards = run.verify(rows)  # sets row.reward: 1.0 if the box after </think> is right, else 0.0
            for row in rows:
                row.advantage = 2 * row.reward - 1 - args.baseline  # A = R - c, R = ±1
            run.score(rows)  # sets row.old_logp: log π_old; with --offline that of the starting policy
            p, c = rewards.mean().item(), args.baseline
            run.log("positives/effective", p * (1 - c) / (1 + (1 - 2 * p) * c))
            run.kept.keep(rows, args.save_rollouts)  # until the next set; with --save_rollouts in a file
        rows = pick(run.kept.rows(), args.minibatch, place, f"{args.seed} {iteration}")
        for minibatch in run.minibatches(rows):  # --updates of them, one optimiser step each
            tokens = sum(len(row.response) for row in minibatch)
            normaliser = tokens if args.token_mean else len(minibatch) * args.max_response
            for batch in run.micro_batches(minibatch, args.entropy_bonus):  # tensors, without rows of A = 0
                logp, entropy = run.logprobs(batch, args.entropy_bonus)  # (rows, T); 0 outside the mask
                loss, metrics = topr_loss(logp, batch.old_logp, batch.advantages, batch.mask,
                                          normaliser, args.weights, args.clip_low, args.clip_high)
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
