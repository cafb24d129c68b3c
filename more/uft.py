"""UFT: a demonstration's beginning is given as a hint, imitated, and continued by RL. A diff of grpo.py.

    UFT: Unifying Supervised and Reinforcement Fine-Tuning.
    Liu, Farina, Ozdaglar. arXiv:2505.16984.

The longer a solution, the less often sampling finds one that earns a reward. UFT (unified fine-tuning) gives
the first lines of a demonstration, a hint, to all rollouts of a prompt: what is left is short enough to be
found, and RL learns it. Hints grow shorter until there are none, as in evaluation; a small term imitates
them.

    J = 1/(B L) Σ_i [ Σ_{t sampled} m_it min(r_it A_i, clip(r_it, 1-ε_low, 1+ε_high) A_i)
                      +  c Σ_{t hint} m_it log π(y_it) ]  +  β/N Σ_i Σ_{t sampled} m_it H_it

    r_it = π(y_it) / π_old(y_it)      A_i = (R_i - mean(R of the group)) / (std(R of the group) + 1e-6)

  i, t      a row of the mini-batch, and a token y_it of it, of the hint or sampled; the mini-batch has B rows
  R_i       its reward, for hint and continuation together: 1 if the boxed answer after </think> is right,
            else 0; the group are the n rows of one prompt, all behind the same hint, so that they compare
  π, π_old  the policy, and the policy before this step's updates (row.old_logp), both at --temperature
  m_it      batch.mask: 1 on the tokens of the response, hint included, up to and including EOS, else 0
  c         --sft_weight        ε: --clip_low, --clip_high        L = --max_response        n = --n
  H_it      entropy of π at the token; β = --entropy_bonus; N: tokens of the mini-batch that were sampled

A demonstration's lines are joined to at most five parts. For each of them a coin is thrown that shows heads
with chance q, and as many parts as there were heads are the hint of the prompt: at first often all but EOS. q
falls along half a cosine from --hint_high to --hint_low in T = --hint_steps; then there are no hints.

Compared with the others: Prefix-RFT gives a beginning to one row of the group and trains it with the row's
advantage. Here all rows have it, so that A says nothing about it, and it is imitated, however the row ends.
With --hint_low 0 --hint_high 0 this is GRPO with its standard deviation.

Deviations
  - The paper draws a number of sentences from the first five alone; the authors' code joins all of them to
    five parts. Here as in the code, with lines for sentences: a line ends with a token that has a line break.
  - The paper sums over a hint's tokens, with the weight of its KL term; the code takes the mean over them,
    with a weight of its own, c = 0.001, and for RL that over sampled tokens. Here both are divided by B L.
  - The authors have a KL term to the starting model, of weight 0.001, and a reward of 0.1 for the format
    alone. Here there is neither.
  - The authors tokenize hint and prompt apart and cut what is too long on the left. Here the ids are those of
    the whole demonstration, and a hint counts in L, together with what is sampled.
  - Their runs have n = 4 and 256 prompts, in 4 mini-batches: `--n 4 --prompts 256 --updates 4`.
  - Their code has two baselines. R3: any number of parts in every step, `--schedule uniform --sft_weight 0`.
    A curriculum: one part less every T // (parts + 1) steps, `--schedule stages`.
  - A prompt without a demonstration of at most L tokens with the right answer has no hint, and is counted.

On the toy (one base, two seeds) the share of hard problems solved, 0.02 at step 5, is 0.46 and 0.59 at step
10, 0.92 and 0.86 at step 15, 0.98 and 0.97 at step 80; out of distribution it ends at 0.92. At first nearly
all rows are right, so that there is little but imitation; its gradient is small, but AdamW's steps are not.
With --sft_weight 0 (one seed), hints alone, 0.05 is passed after step 25 only; it is 0.95 at step 40.

On a CPU, in a minute:  python more/uft.py
On a GPU:               python more/uft.py --model Qwen/Qwen2.5-Math-1.5B
"""
import math
import random
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
    entropy_bonus: float = flag("β: weight of the tokens' mean entropy in the objective", toy=0.0, real=0.001)
    sft_weight: float = flag("c: weight of imitation of hints", 0.001, least=0)
    schedule: str = flag("of the length of hints", "cosine", choices=("cosine", "uniform", "stages"))
    hint_steps: int = flag("T: steps with hints", toy=48, real=300, least=6, not_with="schedule=uniform")
    hint_low: float = flag("q at step T", 0.05, least=0, most=1, only_with="schedule=cosine")
    hint_high: float = flag("q before the first step", 0.95, least=0, most=1, only_with="schedule=cosine")
    clip_low: float = flag("ε_low: the ratio is clipped below 1 - ε_low", 0.2, least=0, most=1)
    clip_high: float = flag("ε_high: the ratio is clipped above 1 + ε_high (DAPO: 0.28)", 0.2, least=0)


# ---------------------------------------------------------------------------------------------- the loss
def uft_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    is_demo: torch.Tensor,
    normaliser: float | None = None, sft_normaliser: float | None = None, sft_weight: float = 0.001,
    clip_low: float = 0.2, clip_high: float = 0.2,
) -> tuple[torch.Tensor, dict]:
    """-J without the entropy, for one micro-batch: RL on what was sampled, imitation of hints.

        loss = 1/normaliser Σ_i Σ_{t sampled} m_it max(-A_i r_it, -A_i clip(r_it, 1 - ε_low, 1 + ε_high))
                                               (4)     (2)         (3)           r = π / π_old (1)
             + c/sft_normaliser Σ_i Σ_{t hint} m_it (-log π(y_it)) (5)

    Tensors hold the rows of one micro-batch, padded to T tokens. logp, old_logp (rows, T): log-probs in nats,
        of π and π_old. advantages: A, (rows,), (rows, 1) or (rows, T), not read on hints.
        mask (rows, T), any dtype: m; what stands where it is 0 is not read, nor is old_logp of hints. Half
        precision is computed in float32. A log-ratio above 60 counts as 60, so that nothing overflows.
    is_demo, any dtype: 1 on tokens of hints (rows, T), or on rows that are one (rows,).
    normaliser, sft_normaliser: what the sums over sampled tokens and over hints are divided by, the same in
        all micro-batches of a mini-batch, so that they add up: B * L, with the B rows of the whole
        mini-batch. Rows that micro-batches leave out count there too. Default: rows * T of these tensors, and
        for hints what it is for sampled tokens.
    sft_weight: c. clip_low, clip_high: ε_low and ε_high; both infinite for no clip.
    Returns the loss and metrics {name: (sum, number of values)}, so that means over micro-batches are exact.
    clip_fraction: share of sampled tokens at which the clip decides, which have no gradient then.

    >>> logp, old_logp = torch.tensor([[0.25, 0.5]]).log(), torch.tensor([[0.0, 0.25]]).log()
    >>> is_demo = torch.tensor([[True, False]])
    >>> loss, _ = uft_loss(logp, old_logp, torch.tensor([1.0]), torch.ones(1, 2), is_demo, sft_weight=0.5)
    >>> round(loss.item(), 4)     # hint: log 4; then r = 2, clipped at 1.2: (-1.2 + 0.5 * 1.3863) / 2
    -0.2534
    """
    mask = mask.bool()
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    normaliser = mask.numel() if normaliser is None else normaliser
    sft_normaliser = normaliser if sft_normaliser is None else sft_normaliser
    hint = mask & is_demo.bool().reshape(len(mask), -1)                            # (rows, T)
    sampled = mask & ~hint
    count = sampled.sum()
    advantages = torch.where(sampled, advantages.reshape(len(mask), -1), 0.0)      # (rows, T)
    log_ratio = torch.where(sampled, logp - old_logp, 0.0)
    ratio = log_ratio.clamp(max=60).exp()                                          # (1) r, at most e⁶⁰
    unclipped = -advantages * ratio                                                # (2) -A r
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)               # (3) -A clip(r)
    token_loss = torch.maximum(unclipped, clipped)                                 # (4) the larger loss
    imitation = -torch.where(hint, logp, 0.0)                                      # (5) -log π: UFT
    metrics = {
        "token_loss/rollouts": (token_loss.detach().sum(), count),
        "token_loss/demonstrations": (imitation.detach().sum(), hint.sum()),
        "clip_fraction": ((clipped > unclipped).sum(), count),
        # The k1 estimate of KL(π_old || π): log π_old - log π of sampled tokens; single ones may be negative.
        "kl/old_policy": (-log_ratio.detach().sum(), count),
    }
    loss = token_loss.sum() / (normaliser or 1) + sft_weight * imitation.sum() / (sft_normaliser or 1)
    return loss, metrics                                                           # 0 without tokens


# --------------------------------------------------------------------------------------- what is in a batch
def hint_share(step: int, steps: int, low: float, high: float) -> float:
    """q: what share of a demonstration a hint has on average; half a cosine, and none after so many steps.

    >>> [round(hint_share(step, 4, 0.1, 0.9), 3) for step in (1, 2, 3, 4, 5)]
    [0.783, 0.5, 0.217, 0.1, 0.0]
    """
    return low + (high - low) / 2 * (1 + math.cos(math.pi * step / steps)) if step <= steps else 0.0


def separation(ends: list[int]) -> list[int]:
    """Joins a demonstration's lines to at most five parts: tokens of the first 0, 1, ... parts.

    ends: tokens of the first 1, 2, ... lines.

    >>> separation([10, 20, 30, 40, 50, 60, 70]), separation([10, 20]), separation([])
    ([0, 10, 30, 40, 60, 70], [0, 10, 20], [0])
    """
    parts = min(5, len(ends))
    return [0] + [ends[round(part / parts * len(ends)) - 1] for part in range(1, parts + 1)]


def hint_parts(parts: int, step: int, args: Args, draws: random.Random) -> int:
    """How many parts of a demonstration are the hint: by a coin of chance q for each, or by another schedule.

    >>> args = Args(schedule="stages", hint_steps=12)
    >>> [hint_parts(3, step, args, None) for step in (1, 3, 6, 8, 9, 20)]     # one less every 12 // (3 + 1)
    [3, 2, 1, 1, 0, 0]
    """
    if args.schedule == "uniform":
        return draws.randint(0, parts)
    if args.schedule == "stages":
        return max(0, parts - step // (args.hint_steps // (parts + 1)))
    q = hint_share(step, args.hint_steps, args.hint_low, args.hint_high)
    return sum(draws.random() < q for _ in range(parts))


def make_batch(run: Run, args: Args, problems: list[Problem]) -> list[Row]:
    """On-policy behind a hint: n rollouts for each prompt, all from the same lines of its demonstration.

    There is no hint without one, if its answer is wrong, or if it has more than L tokens with EOS.
    """
    draws, prefixes = random.Random(f"{args.seed} hints {run.step}"), []
    for problem in problems:
        demonstration = run.demonstrations.of(problem)
        run.log("uft/without_demonstration", not demonstration, 0)
        tokens = demonstration.response[:-1] if demonstration else []  # without EOS
        ends = separation(run.codec.line_ends(tokens))
        prefixes += [tokens[:ends[hint_parts(len(ends) - 1, run.step, args, draws)]]] * args.n
    return run.rollout([problem for problem in problems for _ in range(args.n)], prefixes)


def main():
    args = common.parse(Args, __doc__)
    run = Run(args)
    for step in run.steps():
        rows = make_batch(run, args, run.next_problems())
        rewards = run.verify(rows)  # sets row.reward: 1.0 if the box after </think> is right, else 0.0
        groups = torch.tensor([row.problem.index for row in rows])
        advantages = group_advantages(rewards, groups, std_normalise=True)
        for row, advantage in zip(rows, advantages.tolist()):
            row.advantage = advantage
        run.score(rows)  # sets row.old_logp: log π_old by the trainer, before this step's updates
        for minibatch in run.minibatches(rows):  # --updates of them, one optimiser step each
            tokens = sum(len(row.response) - row.prefix for row in minibatch)  # that were sampled
            normaliser = len(minibatch) * args.max_response
            hints = args.sft_weight > 0 and any(row.prefix for row in minibatch)
            for batch in run.micro_batches(minibatch, args.entropy_bonus, hints):  # all, if hints are learnt
                logp, entropy = run.logprobs(batch, args.entropy_bonus)  # (rows, T); 0 outside the mask
                loss, metrics = uft_loss(logp, batch.old_logp, batch.advantages, batch.mask, batch.is_demo,
                                         normaliser, normaliser, args.sft_weight,
                                         args.clip_low, args.clip_high)
                entropy = entropy[~batch.is_demo]
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
