"""TOPR: tapered off-policy REINFORCE. Many updates on one set of responses, of any age, right and wrong ones.

    Tapered Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs.
    Le Roux, Bellemare, Lebensold, Bergeron, Greaves, Fréchette, Pelletier, Thibodeau-Laufer, Toth, Work.
    arXiv:2503.14286.

Sampling is dear, so one wants many updates from one set of responses. Plain REINFORCE on old responses goes
on pushing down what is impossible already: its loss has no lower bound, and the model collapses. PPO's clip
stops learning from most of the set instead. TOPR imitates right responses with full weight, however unlikely
they are, and tapers the push on wrong ones with their importance ratio: what the policy no longer says, it
need not unlearn.

    J = 1/B Σ_i w_i R_i Σ_t m_it log π(y_it)    R = +1 (right) or -1 (wrong), minus c    (gradient: eq. 8)
    w = 1 if R >= 0, else sg(min(1, π(y) / π_old(y))) of the whole response y

for B responses of a mini-batch. An *iteration* samples and verifies a set once, and then takes epochs of
mini-batches.

Deviations
  - ROLL and Trinity-RFT weigh each token by its own ratio, and Trinity rewards wrong but well-formatted
    answers. Weights are off by orders of magnitude then; here, as in the paper, a response has one weight.
  - J is divided by L, a constant, so that learning rates mean the same as in the other scripts;
    `--token_mean` divides by the step's tokens instead, as there.
  - `--baseline` is c. It sets the effective share of positives, p (1-c) / (1 + (1-2p) c) for a share p of
    right responses; the paper finds 10 to 20% best, and it is logged.
  - `--weights` has the alternatives that the paper compares: reinforce (w = 1), tis (min(1, ratio) for both
    signs) and ppo (ratios clipped per token).

On a CPU, in minutes:   python topr.py
On a GPU:               python topr.py --model Qwen/Qwen2.5-Math-1.5B
"""
import random
from dataclasses import dataclass

import torch

import common
from common import Row, flag
from run import Run


@dataclass
class Args(common.Args):
    token_mean: bool = flag("divide by the step's response tokens instead of B * L (DAPO)", False)
    data: str = flag("as in the other scripts; 'toy:easy' has only the toy's problems of one step",
                     toy="toy:easy", real="Elliott/Openr1-Math-46k-8192")
    lr: float = flag("learning rate of AdamW", toy=3e-4, real=1e-6, least=0)
    eval_every: int = flag("steps between evaluations on held-out problems", toy=48, real=64, least=1)
    prompts: int = flag("prompts in a set", toy=192, real=1024, least=1)
    n: int = flag("responses to a prompt", 8, least=1)
    iterations: int = flag("sets to sample", 5, least=1)
    epochs_per_iteration: int = flag("times that a set is gone through", toy=4, real=2, least=1)
    minibatch: int = flag("rows of a step, which --updates optimiser steps share", toy=128, real=512, least=1)
    steps: int = flag("mini-batches to train on (default: those of --iterations)", least=1)
    weights: str = flag("of the responses", "topr", choices=("topr", "tis", "reinforce", "ppo"))
    baseline: float = flag("c, between -1 and 1", 0.0, least=-0.99, most=0.99)
    clip_low: float = flag("lower clip of the ratio, eps_low", 0.2, least=0, most=1)
    clip_high: float = flag("upper clip of the ratio, eps_high (DAPO: 0.28)", 0.2, least=0)
    offline: str = flag("file with columns problem, answer, response to train on instead of sampling", "")
    save_rollouts: bool = flag("keep the sets in runs/<name>/rollouts.jsonl, which --offline can read", False)


# ---------------------------------------------------------------------------------------------- the loss
def topr_loss(logp, old_logp, advantages, mask, normaliser=None, weights="topr", clip_low=0.2, clip_high=0.2):
    """-J of the formula at the top: arXiv:2503.14286, whose eq. 8 is its gradient.

    logp, old_logp (B, T): log-probs in nats of response tokens, under the policy and the policy that sampled.
    advantages (B,): R, the baseline subtracted. mask (B, T): 1 on response tokens up to and including EOS.
    normaliser: what the sum over responses is divided by, B (or B * L) of the *whole* optimiser step: then
        the losses of its micro-batches add up. By default B of these tensors.
    weights: 'topr', 'tis', 'reinforce' or 'ppo', for which alone there are clip_low and clip_high.
    Returns the loss and metrics {name: (sum, count)}, which are exact means over micro-batches too.
    Lines (1) to (4) are PPO's, as in grpo.py; TOPR puts (5) to (7) in their place.
    """
    mask = mask.bool()
    normaliser = len(mask) if normaliser is None else normaliser
    advantages = advantages[:, None]                                               # (B, 1)
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    ratio = log_ratio.clamp(max=60).exp()                                          # (1) r, finite
    unclipped = -advantages * ratio                                                # (2) -r A
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)               # (3) -clip(r) A
    token_loss = torch.maximum(unclipped, clipped) * mask                          # (4) -min(r A, clip(r) A)
    tapered = log_ratio.detach().sum(dim=1, keepdim=True).clamp(max=0).exp()       # (5) min(1, π/π_old)
    if weights != "ppo":
        topr = torch.where(advantages >= 0, 1.0, tapered)
        weight = {"topr": topr, "tis": tapered, "reinforce": 1.0}[weights]         # (6) w
        token_loss = -weight * advantages * torch.where(mask, logp, 0.0)           # (7) -w R m log π
    negative = advantages < 0
    metrics = {
        "weight/negatives": (tapered[negative].sum(), negative.sum()),
        "kl/old_policy": (-log_ratio.sum(), mask.sum()),
    }
    return token_loss.sum() / normaliser, metrics                                  # (8) sum / B


# --------------------------------------------------------------------------------------- what is in a batch
def make_batch(run, args, problems) -> list[Row]:
    """An iteration's set: n rollouts of the policy for each prompt. It stays while the policy moves on."""
    return run.rollout([problem for problem in problems for _ in range(args.n)])


def make_set(run, args, rows):
    """Gives the responses of an iteration R - c and the log-probs of the policy at its start."""
    rewards = run.verify(rows)
    for row, reward in zip(rows, rewards.tolist()):
        row.advantage = 2 * reward - 1 - args.baseline                             # R = ±1, minus c
    run.score(rows)  # log-probs of the policy that sampled
    p, c = rewards.mean().item(), args.baseline
    run.log("positives", p)
    run.log("positives/effective", p * (1 - c) / (1 + (1 - 2 * p) * c))


def pick(rows: list[Row], size: int, place: int, seed: str) -> list[Row]:
    """Off-policy: mini-batch number `place` of an iteration's set, which has a new order in every epoch."""
    epoch, number = divmod(place, -(-len(rows) // size))
    order = random.Random(f"{seed} {epoch}").sample(rows, len(rows))
    return order[number * size:(number + 1) * size]


def main():
    args = common.parse(Args, __doc__)
    if args.offline:
        args.data, args.iterations = args.offline, 1
    run = Run(args)
    optimizer = run.make_optimizer("rl")
    offline = run.read_offline() if args.offline else []
    steps_per_epoch = -(-(len(offline) or args.prompts * args.n) // args.minibatch)
    steps_per_iteration = steps_per_epoch * args.epochs_per_iteration
    args.steps = args.steps or args.iterations * steps_per_iteration
    collected = run.unpack(run.state.get("set", []))
    for step in run.steps():
        iteration, place = divmod(step - 1, steps_per_iteration)
        if place == 0:
            problems = run.draw("prompts", iteration * args.prompts, args.prompts)
            collected = offline or make_batch(run, args, problems)
            make_set(run, args, collected)
            run.keep_set(collected)
        rows = pick(collected, args.minibatch, place, f"{args.seed} {iteration}")
        for minibatch in run.minibatches(rows):
            tokens = sum(len(row.response) for row in minibatch)
            normaliser = tokens if args.token_mean else len(minibatch) * args.max_response
            for batch in run.micro_batches(minibatch, args.entropy_bonus):
                logp, entropy = run.logprobs(batch, args.entropy_bonus)
                loss, metrics = topr_loss(logp, batch.old_logp, batch.advantages, batch.mask,
                                          normaliser, args.weights, args.clip_low, args.clip_high)
                run.backward(loss - args.entropy_bonus * entropy.sum() / tokens, metrics)
            run.optimizer_step(optimizer, minibatch)
        run.end_step()
    run.end()


if __name__ == "__main__":
    main()
