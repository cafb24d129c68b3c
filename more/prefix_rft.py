"""Prefix-RFT: one rollout of a group goes on from a demonstration's beginning. A diff of grpo.py.

    Blending Supervised and Reinforcement Fine-Tuning with Prefix Sampling.
    Huang, Cheng, Qiu, Wang, Xu, Ponti, Titov. arXiv:2507.01679.

On its own a policy hardly ever begins what leads to the answer of a hard problem; shown all of it, it
imitates all of it. Prefix-RFT gives it the beginning, a prefix, and lets it finish: the row, prefix
included, is one of the group and has the group's advantage. What was given is learnt as far as the policy
made something of it.

    J = 1/(B L) Σ_i Σ_t m_it k_it max(c A_i, min(r_it A_i, clip(r_it, 1-ε_low, 1+ε_high) A_i))
                                  (c A_i only where A_i < 0)
        + β/N Σ_i Σ_t m_it H_it

    r_it = π(y_it) / π_old(y_it)      A_i = R_i - mean(R of the group)      N = Σ_i Σ_t m_it

  i, t      a row of the mini-batch, and a token y_it of it, given or sampled; the mini-batch has B rows
  R_i       its reward, for prefix and continuation together: 1 if the boxed answer after </think> is right,
            else 0; the group are the n rows of one prompt, n-1 of them without a prefix
  π, π_old  the policy, and the policy before this step's updates (row.old_logp), both at --temperature; also
            at tokens of the prefix: nothing is divided by the probability that its author gave them
  m_it      batch.mask: 1 on the tokens of the response, prefix included, up to and including EOS, else 0
  k_it      batch.weights: 1 on sampled tokens; of the prefix tokens of the mini-batch 1 on the share
            --trained_share at which the policy's entropy is highest, before the update; 0 on the others
  ε         --clip_low, --clip_high        c = --dual_clip        L = --max_response        n = --n
  H_it      entropy of π at the token; β = --entropy_bonus

A prefix has floor(l |y*|) tokens of the demonstration's |y*| without EOS, at least --min_prefix and never
all; l is drawn for each prompt, evenly from ℓ_low to --high. ℓ_low falls along half a cosine from
--low_start to --low_end in --decay_steps: at first the policy is given nearly all, later anything.

Compared with the others: LUFFY's demonstration is whole, never wrong, and has a loss of its own (p/(p+γ)).
A prefix counts as right or wrong by what the policy makes of it, and has the loss of every other token. UFT
gives a hint to all rows of a group and imitates it, whatever comes of it.

Deviations
  - k is by the policy before the update, over all prefix tokens of an optimiser step. In the authors' code it
    is by the current policy, over those of a micro-batch: it depends on how rows were packed.
  - The authors' code divides by L and never by B. It also has a setting that sets k = 0 on sampled tokens of
    low entropy, and a clip for prefix tokens that it computes, logs and does not use. Neither is here.
  - It has other advantages too: one sets the prefix's against the mean of the rollouts without one. Which the
    paper's runs had could not be verified: their settings were not released, and the paper's text was not
    at hand. A, --trained_share, the schedule and n are by what others report of it.
  - The authors decode a prefix to text and tokenize it again, which may change ids at its end. Here ids are
    continued as they are. A prefix leaves room in L for what is sampled: demonstrations of more than L tokens
    with EOS are left out and counted.
  - A prompt without a demonstration, or with one of a single token, has n rollouts, and is counted.

On the toy (one base, two seeds) the share of hard problems solved, 0.02 at step 5, is 0.88 and 0.86 at step
10 and 0.97 at step 80; out of distribution it is 0.77 and 0.73 at step 20, 0.91 and 0.35 at step 80. Rows
with a prefix are all right at first. In steps 30 to 49 they are right in 0.84 and 0.88 of cases, the others
of their groups in 0.98: by then prefixes are pushed down more than up. With --trained_share 0 hard problems
stay at 0.02 or below; that less than all of a prefix is better is not seen: with 1 they end at 0.95 (both:
one seed).

On a CPU, in a minute:  python more/prefix_rft.py
On a GPU:               python more/prefix_rft.py --model Qwen/Qwen2.5-Math-7B
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
    clip_low: float = flag("ε_low: the ratio is clipped below 1 - ε_low", 0.2, least=0, most=1)
    clip_high: float = flag("ε_high: the ratio is clipped above 1 + ε_high (DAPO: 0.28)", 0.2, least=0)
    dual_clip: float = flag("c: where A < 0 a token's loss is at most -c A", 3.0, least=1)
    low_start: float = flag("ℓ_low before the first step", 0.95, least=0, most=1)
    low_end: float = flag("ℓ_low from step --decay_steps on", 0.05, least=0, most=1)
    decay_steps: int = flag("steps in which ℓ_low falls", toy=80, real=500, least=1)
    high: float = flag("largest share of a demonstration that is a prefix; ℓ_low: the least", 0.95, least=0,
                       most=1)
    min_prefix: int = flag("least tokens of a prefix", 1, least=1)
    trained_share: float = flag("share of the prefix tokens that are trained, those of the highest entropy",
                                0.2, least=0, most=1)


# ---------------------------------------------------------------------------------------------- the loss
def prefix_rft_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    is_demo: torch.Tensor,
    normaliser: float | None = None,
    clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float = 3.0,
) -> tuple[torch.Tensor, dict]:
    """-J without the entropy, for one micro-batch: a clipped policy gradient, of given tokens too.

        loss = 1/normaliser Σ_i Σ_t m_it l_it        r = π / π_old (1)
        l = max(-A r, -A clip(r, 1 - ε_low, 1 + ε_high)) (4), at most -c A where A < 0 (5)
                (2)   (3)

    Tensors hold the rows of one micro-batch, padded to T tokens. logp, old_logp (rows, T): log-probs in nats,
        of π and π_old. advantages: A, (rows,), (rows, 1) or (rows, T); 0 on tokens that are not trained.
        mask (rows, T), any dtype: m; what stands where it is 0 is not read. Half precision is computed in
        float32. A log-ratio above 60 counts as 60, so that nothing overflows.
    is_demo, any dtype: 1 on tokens of a prefix (rows, T), or on rows that are one (rows,); for metrics alone.
    normaliser: what the sum over tokens is divided by, the same in all micro-batches of a mini-batch, so that
        they add up: B * L, with the B rows of the whole mini-batch. Rows that micro-batches leave out, since
        A = 0, count there too. Default: rows * T of these tensors.
    clip_low, clip_high: ε_low and ε_high. dual_clip: c. All three infinite for no clip.
    Returns the loss and metrics {name: (sum, number of values)}, so that means over micro-batches are exact.
    clip_fraction: share of sampled tokens at which the first clip decides, which have no gradient then.

    >>> logp, old_logp = torch.tensor([[0.5, 0.8]]).log(), torch.tensor([[0.25, 0.2]]).log()
    >>> advantages, is_demo = torch.tensor([[0.5, -0.5]]), torch.tensor([[True, False]])
    >>> loss, _ = prefix_rft_loss(logp, old_logp, advantages, torch.ones(1, 2), is_demo)
    >>> round(loss.item(), 4)     # r = 2, clipped at 1.2, and r = 4, at most 3: (-0.5 * 1.2 + 0.5 * 3) / 2
    0.45
    """
    mask = mask.bool()
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    normaliser = mask.numel() if normaliser is None else normaliser
    advantages = torch.where(mask, advantages.reshape(len(mask), -1), 0.0)         # (rows, T)
    demo = mask & is_demo.bool().reshape(len(mask), -1)                            # (rows, T)
    on_policy = mask & ~demo
    count = on_policy.sum()
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    ratio = log_ratio.clamp(max=60).exp()                                          # (1) r, at most e⁶⁰
    unclipped = -advantages * ratio                                                # (2) -A r
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)               # (3) -A clip(r)
    token_loss = torch.maximum(unclipped, clipped)                                 # (4) the larger loss
    most = torch.where(advantages < 0, -advantages * dual_clip, torch.inf)
    token_loss = torch.minimum(token_loss, most)                                   # (5) at most -c A
    metrics = {
        "token_loss/rollouts": ((token_loss.detach() * on_policy).sum(), count),
        "token_loss/demonstrations": ((token_loss.detach() * demo).sum(), demo.sum()),
        "clip_fraction": (((clipped > unclipped) & on_policy).sum(), count),
        # The k1 estimate of KL(π_old || π): log π_old - log π of sampled tokens; single ones may be negative.
        "kl/old_policy": (-(log_ratio.detach() * on_policy).sum(), count),
    }
    return token_loss.sum() / (normaliser or 1), metrics                           # 0 without tokens


# --------------------------------------------------------------------------------------- what is in a batch
def lowest_share(step: int, steps: int, start: float, end: float) -> float:
    """ℓ_low of a step: a cosine from start, before the first of so many steps, to end, from the last on.

    >>> [round(lowest_share(step, 4, 0.9, 0.1), 3) for step in (0, 1, 2, 3, 4, 5)]
    [0.9, 0.783, 0.5, 0.217, 0.1, 0.1]
    """
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(1, step / steps)))


def prefix_length(share: float, size: int, least: int = 1) -> int:
    """Tokens of a prefix: the share of a demonstration's `size`, at least so many, and never all; 0 for none.

    >>> prefix_length(0.5, 7), prefix_length(0.05, 10), prefix_length(0.05, 8, least=16), prefix_length(1, 8)
    (3, 1, 7, 7)
    """
    return min(max(math.floor(share * size), least), size - 1) if size and share else 0


def make_batch(run: Run, args: Args, problems: list[Problem]) -> list[Row]:
    """Mixed: for each prompt n-1 rollouts, and one that goes on from a prefix of its demonstration.

    That one is a rollout like the others if there is no demonstration, if its answer is wrong, if it has more
    than L tokens with EOS, or but one without.
    """
    low = lowest_share(run.step, args.decay_steps, args.low_start, args.low_end)
    draws, prefixes = random.Random(f"{args.seed} prefixes {run.step}"), []
    for number, problem in enumerate(problems):
        share, demonstration = low + (args.high - low) * draws.random(), run.demonstrations.of(problem)
        tokens = demonstration.response[:-1] if demonstration else []  # without EOS
        group = [[]] * args.n
        group[number % args.n] = tokens[:prefix_length(share, len(tokens), args.min_prefix)]
        prefixes += group  # not always at the same place, so that --updates spread them
        run.log("prefix_rft/without_prefix", not any(group), 0)
    return run.rollout([problem for problem in problems for _ in range(args.n)], prefixes)


def train_uncertain(rows: list[Row], share: float):
    """Sets row.weights: of all rows' prefix tokens 1 on that share whose entropy is highest, 0 on the others.

    Of the N tokens int((1 - share) N) get 0; where entropies are the same, those that come first.

    >>> rows = [Row(None, [1, 2, 3], prefix=2, prefix_entropy=torch.tensor([0.1, 0.9])), Row(None, [4, 5])]
    >>> rows += [Row(None, [1, 7], prefix=1, prefix_entropy=torch.tensor([0.1]))]
    >>> train_uncertain(rows, 0.4)     # int(0.6 * 3) = 1 of 0.1, 0.9, 0.1
    >>> [row.weights if row.weights is None else row.weights.tolist() for row in rows]
    [[0.0, 1.0, 1.0], None, [1.0, 1.0]]
    """
    prefixed = [row for row in rows if row.prefix]
    entropy = torch.cat([torch.zeros(0), *(row.prefix_entropy for row in prefixed)])
    certain = entropy.argsort(stable=True)[:int((1 - share) * len(entropy))]
    kept = torch.ones(len(entropy)).index_fill(0, certain, 0.0).split([row.prefix for row in prefixed])
    for row, weights in zip(prefixed, kept):
        row.weights = torch.cat([weights, torch.ones(len(row.response) - row.prefix)])


def main():
    args = common.parse(Args, __doc__)
    run = Run(args)
    for step in run.steps():
        rows = make_batch(run, args, run.next_problems())
        rewards = run.verify(rows)  # sets row.reward: 1.0 if the box after </think> is right, else 0.0
        groups = torch.tensor([row.problem.index for row in rows])
        advantages = group_advantages(rewards, groups)
        for row, advantage in zip(rows, advantages.tolist()):
            row.advantage = advantage
        run.score(rows)  # sets row.old_logp: log π_old by the trainer, before this step's updates
        for minibatch in run.minibatches(rows):  # --updates of them, one optimiser step each
            train_uncertain(minibatch, args.trained_share)  # sets row.weights: 0 on other prefix tokens
            tokens = sum(len(row.response) for row in minibatch)
            normaliser = len(minibatch) * args.max_response
            for batch in run.micro_batches(minibatch, args.entropy_bonus):  # tensors, without rows of A = 0
                logp, entropy = run.logprobs(batch, args.entropy_bonus)  # (rows, T); 0 outside the mask
                advantages = batch.advantages[:, None] * batch.weights  # (rows, T)
                loss, metrics = prefix_rft_loss(logp, batch.old_logp, advantages, batch.mask, batch.is_demo,
                                                normaliser, args.clip_low, args.clip_high, args.dual_clip)
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
