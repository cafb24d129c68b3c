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
  - J is divided by L, a constant, so that learning rates mean the same as in the other scripts.
  - `--baseline` is c. It sets the effective share of positives, p (1-c) / (1 + (1-2p) c) for a share p of
    right responses; the paper finds 10 to 20% best, and it is logged.
  - `--weights` has the alternatives that the paper compares: reinforce (w = 1), tis (min(1, ratio) for both
    signs) and ppo (ratios clipped per token).

On a CPU, in minutes:   python topr.py
On a GPU:               python topr.py --model Qwen/Qwen2.5-Math-1.5B
"""
import json
import random
from dataclasses import dataclass

import torch

import common
from common import Row, flag


@dataclass
class Args(common.Args):
    data: str = flag("as in the other scripts; 'toy:easy' is the part of the toy's problems with one step",
                     toy="toy:easy", real="Elliott/Openr1-Math-46k-8192")
    steps: int = flag("optimiser steps (default: those of --iterations)")
    iterations: int = flag("sets of responses to sample", 5)
    prompts: int = flag("prompts in a set", toy=192, real=1024)
    epochs_per_iteration: int = flag("times that a set is gone through", toy=4, real=2)
    minibatch: int = flag("rows of an optimiser step", toy=128, real=256)
    updates: int = flag("optimiser steps on a mini-batch", 1)
    lr: float = flag("learning rate of AdamW", toy=3e-4, real=1e-6)
    eval_every: int = flag("steps between evaluations on held-out problems", toy=48, real=64)
    weights: str = flag("of the responses", "topr", choices=("topr", "tis", "reinforce", "ppo"))
    baseline: float = flag("c, between -1 and 1", 0.0)
    clip: float = flag("of --weights ppo, eps", 0.2)
    offline: str = flag("file with columns problem, answer, response to train on instead of sampling", "")
    save_rollouts: bool = flag("keep the sets in runs/<name>/rollouts.jsonl, which --offline can read", False)


# ---------------------------------------------------------------------------------------------- the loss
def topr_loss(logp, old_logp, rewards, mask, normaliser=None, weights="topr", clip=0.2):
    """-J of the formula at the top: arXiv:2503.14286, whose eq. 8 is its gradient.

    logp, old_logp (B, T): log-probs in nats of response tokens, under the policy and the policy that sampled.
    rewards (B,): R minus the baseline. mask (B, T): 1 on response tokens up to and including EOS.
    normaliser: what the sum over responses is divided by, B (or B * L) of the *whole* optimiser step: then
        the losses of its micro-batches add up. By default B of these tensors.
    weights: 'topr', 'tis', 'reinforce' or 'ppo', which clips ratios at 1 - clip and 1 + clip.
    Returns the loss and metrics {name: (sum, count)}, which are exact means over micro-batches too.
    """
    mask = mask.bool()
    normaliser = len(mask) if normaliser is None else normaliser
    log_ratio = torch.where(mask, logp - old_logp, 0.0)                            # (B, T)
    response_logp = torch.where(mask, logp, 0.0).sum(dim=1)                        # (1) Σ_t m log π
    tapered = log_ratio.detach().sum(dim=1).clamp(max=0).exp()                     # (2) min(1, π/π_old)
    if weights == "ppo":
        ratio = log_ratio.exp()
        advantages = rewards[:, None]
        token_loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)) * mask
        loss = token_loss.sum(dim=1)
    else:
        full = torch.ones_like(tapered)
        topr = torch.where(rewards >= 0, full, tapered)
        weight = {"topr": topr, "tis": tapered, "reinforce": full}[weights]
        loss = -weight * rewards * response_logp                                   # (3) -w R Σ_t m log π
    negative = rewards < 0
    metrics = {
        "weight/negatives": (tapered[negative].sum(), negative.sum()),
        "kl/old_policy": (-log_ratio.sum(), mask.sum()),
    }
    return loss.sum() / normaliser, metrics


# --------------------------------------------------------------------------------------- what is in a batch
def read_offline(run, args) -> list[Row]:
    """The responses of --offline that end within --max_response tokens."""
    if "response" not in run.train[0].row:
        common.fail(f"--offline {args.offline}: it has no column `response`")
    rows = [Row(problem, run.encode(problem, problem.row["response"] or "")) for problem in run.train]
    fitting = [row for row in rows if len(row.response) <= args.max_response]
    print(f"{args.offline}: left out {len(rows) - len(fitting)} responses of more than --max_response tokens")
    return fitting


def save_rollouts(run, rows: list[Row]):
    """Appends the finished responses to rollouts.jsonl, which --offline can read."""
    with open(run.folder / "rollouts.jsonl", "a") as file:
        for row in filter(run.ended, rows):
            kept = {"answer": row.problem.answer, "response": run.text(row)}
            file.write(json.dumps({"problem": row.problem.text} | row.problem.row | kept) + "\n")


def prepare(run, args, rows: list[Row]) -> list[Row]:
    """Verifies an iteration's set and stores the log-probs of the policy at its start."""
    rewards = run.verify(rows)
    for row, reward in zip(rows, rewards.tolist()):
        row.advantage = 2 * reward - 1 - args.baseline                             # R = ±1, minus c
    run.score(rows)
    p, c = rewards.mean().item(), args.baseline
    run.log("positives", p)
    run.log("positives/effective", p * (1 - c) / (1 + (1 - 2 * p) * c))
    return rows


def make_batch(rows: list[Row], size: int, place: int, seed: str) -> list[Row]:
    """Off-policy: mini-batch number `place` of an iteration's set, which has a new order in every epoch."""
    epoch, number = divmod(place, -(-len(rows) // size))
    order = random.Random(f"{seed} {epoch}").sample(rows, len(rows))
    return order[number * size:(number + 1) * size]


def pack(row: Row) -> dict:
    """A row as plain values, for a checkpoint."""
    return {"index": row.problem.index, "response": row.response, "sampler_logp": row.sampler_logp,
            "advantage": row.advantage, "old_logp": row.old_logp}


def unpack(packed: dict, problems: dict) -> Row:
    return Row(problems[packed["index"]], **{name: packed[name] for name in packed.keys() - {"index"}})


def main():
    args = common.parse(Args, __doc__, smallest_n=1)
    if args.offline:
        args.data, args.iterations = args.offline, 1
    run = common.Run(args)
    optimizer = run.make_optimizer("rl")
    offline = read_offline(run, args) if args.offline else []
    steps_per_epoch = -(-(len(offline) or args.prompts * args.n) // args.minibatch)
    steps_per_iteration = steps_per_epoch * args.epochs_per_iteration
    args.steps = args.steps or args.iterations * steps_per_iteration
    by_index = {problem.index: problem for problem in run.train}
    rows = [unpack(packed, by_index) for packed in run.state.get("set", [])]
    for step in run.steps():
        iteration, place = divmod(step - 1, steps_per_iteration)
        if place == 0:
            problems = run.draw("prompts", iteration * args.prompts, args.prompts)
            rows = offline or run.rollout([problem for problem in problems for _ in range(args.n)])
            rows = prepare(run, args, rows)
            run.state["set"] = [pack(row) for row in rows]
            if args.save_rollouts:
                save_rollouts(run, rows)
        batch_rows = make_batch(rows, args.minibatch, place, f"{args.seed} {iteration}")
        for minibatch in run.minibatches(batch_rows):
            normaliser = len(minibatch) * args.max_response
            for batch in run.micro_batches(minibatch):
                logp, _ = run.logprobs(batch)
                loss, metrics = topr_loss(logp, batch.old_logp, batch.advantages, batch.mask,
                                          normaliser, args.weights, args.clip)
                run.backward(loss, metrics)
            run.optimizer_step(optimizer, minibatch)
        run.end_step()
    run.end()


if __name__ == "__main__":
    main()
