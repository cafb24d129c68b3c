"""ExGRPO: the policy's own right answers of earlier steps come back into the groups. A diff of luffy.py.

    ExGRPO: Learning to Reason from Experience.
    Zhan, Li, Wang, Qu, Liu, Shao, Wong, Cheng. arXiv:2510.02245.

GRPO drops each response after one step, also a right one to a problem that is rarely solved. ExGRPO keeps
them. Some prompts of a step are problems that were solved in part before: about half of the times rather than
hardly ever or nearly always. The stored response of which the policy is surest today joins their group.

    J = 1/(B L) [ Σ_{i rollout} Σ_t m_it r_it A_i  +  Σ_{i replayed} Σ_t m_it f(w_it) A_i ]
        + β/N Σ_i Σ_t m_it H_it

    r_it = π(y_it) / π_old(y_it)   w_it = π(y_it) / π_past(y_it)   f(w) = w / (w + γ)   A_i = R_i - mean(R)

  i, t      a row of the mini-batch, rollout or replayed, and a token y_it of it; it has B rows
  R_i       its reward: 1 if the boxed answer after </think> is right, else 0; mean(R): of its group, the n
            rows of one prompt, the replayed one included
  π, π_old  the policy, and the policy before this step's updates (row.old_logp), both at --temperature
  π_past    the policy of the step in which the replayed response was sampled, whose log-probs are stored with
            it and stand in its row.old_logp
  m_it      batch.mask: 1 on the tokens of the response up to and including EOS, else 0; N = Σ_i Σ_t m_it
  γ         --gamma        L = --max_response        n = --n
  H_it      entropy of π at the token; β = --entropy_bonus

What is stored: after the first step whose mean reward is above --start, all right responses to a problem that
k of its n rows solve, 0 < k < n, each once. A problem that all rows solve is retired: it is neither replayed
nor asked again. A step replays int(--prompts ρ) problems, ρ = --replay, or as many as there are; for each a k
is drawn with a probability ∝ exp(-(k - n/2)²/2) among those that problems had last, then one of its problems.
The response of the lowest mean entropy under π_old is replayed, beside n-1 new rollouts.

Look at f: where the policy is what it was, w = 1, the gradient of a replayed token is A γ/(1 + γ)², 0.083 A:
it pulls a twelfth as much as one of a rollout. It is largest, A/4, at w = γ, where the token has become
unlikely, and goes to 0 with w.

Compared with the others: no expert is needed. In LUFFY the probabilities of a demonstration's author are not
known, and f is taken of p itself; here they are stored, and f is taken of the true ratio. TOPR uses a whole
set again, right and wrong; here it is one right response per group.

Deviations
  - The paper has a normal density of the *share* k/n, mean 0.5 and deviation 1, which is almost flat; the
    authors' code has one of the *number* k, mean n/2 and deviation 1: with n = 8 the bucket of 4 right is 90
    times as likely as that of 1. So here.
  - The paper clips r. The code does so until the start alone, as here; `--clip` clips after it too.
  - In the paper the two sums have weights ρ and 1 - ρ; in the code, and here, ρ is the make-up of the batch.
  - For the entropy of a response the paper has the mean of -log p of its tokens, the code that of the whole
    distribution, as here. But the code averages over padding in the place of the response.
  - The code keeps texts, cuts the characters of the EOS off their ends and tokenizes them again, so that ids
    and log-probs may be shifted against each other. Here ids are kept.
  - The code divides by L and never by B, and skips updates whose gradient norm is above 500.
  - The problems in whose place others are replayed are not asked in this pass over the data, as in the code.
    A problem that is asked anew is not replayed in the same step.
  - Everything that is stored stays in memory and in every checkpoint: 8 bytes per token.

On the toy (one base, two seeds) it does what grpo.py does: of easy problems 0.96 and 0.92 are solved at step
10, 0.95 and 0.99 at step 80, with GRPO 0.96 and 0.93, then 0.99 and 0.95; of hard ones 0.02 with either. On a
base that samples lines of working more often (q = 0.3 in runtime/toy.py in the place of 0.02) both learn the
hard ones: the share reaches 0.5 at step 65 and 30, with GRPO at step 65 and 40, and ends at 0.90 and 1.00,
with GRPO at 0.97 and 0.96. A problem has rarely more than one stored response, so that the choice among them
is hardly seen.

On a CPU, in a minute:  python more/exgrpo.py
On a GPU:               python more/exgrpo.py --model Qwen/Qwen2.5-Math-7B
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
    std_normalise: bool = flag("divide A by the group's standard deviation", False)
    token_mean: bool = flag("divide by N, the mini-batch's tokens, in place of B L", False)
    replay: float = flag("ρ: largest share of a step's prompts that are replayed", 0.5, least=0, most=1)
    start: float = flag("nothing is stored until a mean reward is above this", toy=0.1, real=0.35, least=-1)
    clip: bool = flag("clip the ratio of rollouts after the start too (ExGRPO's paper)", False)
    clip_low: float = flag("ε_low: the ratio is clipped below 1 - ε_low", 0.2, least=0, most=1)
    clip_high: float = flag("ε_high: the ratio is clipped above 1 + ε_high", 0.2, least=0)
    shaping: str = flag("f of replayed tokens, or f(w) = w", "w/(w+gamma)", choices=("w/(w+gamma)", "none"))
    gamma: float = flag("γ of the shaping", 0.1, least=1e-6, not_with="shaping=none")


# ---------------------------------------------------------------------------------------------- the loss
def exgrpo_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    is_demo: torch.Tensor,
    normaliser: float | None = None,
    gamma: float | None = 0.1, clip_low: float | None = None, clip_high: float | None = None,
) -> tuple[torch.Tensor, dict]:
    """-J without the entropy, for one micro-batch: ExGRPO's mixed policy gradient, arXiv:2510.02245.

        loss = 1/normaliser Σ_i Σ_t m_it l_it
        in a replayed row:  l = -A f(w)    w = π / π_past (5)    f(w) = w / (w + γ) (6)    -A f(w) (7)
        in a rollout:       l = max(-A r, -A clip(r, 1 - ε_low, 1 + ε_high)), (1) to (4) of grpo_loss

    Tensors hold the rows of one micro-batch, padded to T tokens. logp, old_logp (rows, T): log-probs in nats,
        of π, and of π_old or, in replayed rows, π_past. advantages: A, (rows,), (rows, 1) or (rows, T).
        mask (rows, T), any dtype: m; what stands where it is 0 is not read. Half precision is computed in
        float32. A log-ratio above 60 counts as 60, so that nothing overflows.
    is_demo, any dtype: 1 on replayed rows (rows,), or on their tokens (rows, T).
    normaliser: what the sum over tokens is divided by, the same in all micro-batches of a mini-batch, so that
        they add up: B * L, with the B rows of the whole mini-batch, or its number of response tokens. Rows
        that micro-batches leave out, since A = 0, count there too. Default: rows * T of these tensors.
    gamma: γ; None for f(w) = w. clip_low, clip_high: ε_low and ε_high; None for no clip.
    Returns the loss and metrics {name: (sum, number of values)}, so that means over micro-batches are exact.
    ratio/demonstrations: w of replayed tokens.

    >>> logp, old_logp = torch.tensor([[0.5], [0.1]]).log(), torch.tensor([[0.25], [0.25]]).log()
    >>> advantages, is_demo = torch.tensor([-0.5, 0.5]), torch.tensor([False, True])
    >>> loss, _ = exgrpo_loss(logp, old_logp, advantages, torch.ones(2, 1), is_demo)
    >>> round(loss.item(), 4)     # rollout: r = 2; replayed: w = 0.4, f = 0.4/0.5; (0.5 * 2 - 0.5 * 0.8) / 2
    0.3
    """
    mask = mask.bool()
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    normaliser = mask.numel() if normaliser is None else normaliser
    advantages = torch.where(mask, advantages.reshape(len(mask), -1), 0.0)         # (rows, T)
    demo = mask & is_demo.bool().reshape(len(mask), -1)                            # (rows, T)
    on_policy = mask & ~demo
    count = on_policy.sum()
    log_ratio = torch.where(on_policy, logp - old_logp, 0.0)
    ratio = log_ratio.clamp(max=60).exp()                                          # (1) r, at most e⁶⁰
    unclipped = -advantages * ratio                                                # (2) -A r
    clip_low = float("inf") if clip_low is None else clip_low
    clip_high = float("inf") if clip_high is None else clip_high
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)               # (3) -A clip(r)
    token_loss = torch.maximum(unclipped, clipped)                                 # (4) the larger loss
    w = torch.where(demo, logp - old_logp, 0.0).clamp(max=60).exp()                # (5)
    # The weight A df/dlog w = A γ w / (w + γ)² of a token is largest, A/4, at w = γ; at w = 1 it is A/12.
    shaped = w if gamma is None else w / (w + gamma)                               # (6) f(w)
    token_loss = torch.where(demo, -advantages * shaped, token_loss)               # (7) -A f(w): ExGRPO
    metrics = {
        "token_loss/rollouts": ((token_loss.detach() * on_policy).sum(), count),
        "token_loss/demonstrations": ((token_loss.detach() * demo).sum(), demo.sum()),
        "ratio/demonstrations": ((w.detach() * demo).sum(), demo.sum()),
        "clip_fraction": ((clipped > unclipped).sum(), count),
        # The k1 estimate of KL(π_old || π): log π_old - log π of sampled tokens; single ones may be negative.
        "kl/old_policy": (-log_ratio.detach().sum(), count),
    }
    return token_loss.sum() / (normaliser or 1), metrics                           # 0 without tokens


# --------------------------------------------------------------------------------------- what is in a batch
def bucket_weights(counts: list[int], n: int) -> list[float]:
    """Probability of each bucket: a normal density at its number of right rows, mean n/2, deviation 1.

    >>> [round(weight, 3) for weight in bucket_weights([1, 3, 4, 5], 8)]     # as 0.011 : 0.607 : 1 : 0.607
    [0.005, 0.273, 0.45, 0.273]
    """
    distance = [(count - n / 2) ** 2 / 2 for count in counts]
    density = [math.exp(min(distance) - far) for far in distance]  # that of the nearest is 1: not all are 0
    return [value / sum(density) for value in density]


def choose(right: dict[Problem, int], count: int, n: int, seed: str) -> list[Problem]:
    """`count` problems, none twice: each time a bucket is drawn of those that are left, then one in it.

    right: {problem: how many of its n rows were right}; the problems of the same number are a bucket.

    >>> choose({"A": 4, "B": 4, "C": 7}, 2, 8, "seed"), choose({"A": 4, "B": 7}, 2, 8, "seed")
    (['A', 'B'], ['A', 'B'])
    """
    draws, left = random.Random(seed), dict(right)
    while len(left) > len(right) - count:
        buckets = sorted(set(left.values()))
        bucket, = draws.choices(buckets, bucket_weights(buckets, n))
        del left[draws.choice([problem for problem in left if left[problem] == bucket])]
    return [problem for problem in right if problem not in left]


def surest(rows: list[Row]) -> int:
    """Place of the response whose mean entropy over its tokens is lowest; of equal ones the first.

    >>> surest([Row("", [7, 9], prefix_entropy=torch.tensor(entropy)) for entropy in ([.4, .2], [.1], [.1])])
    1
    """
    return min(range(len(rows)), key=lambda place: rows[place].prefix_entropy.mean().item())


def make_batch(run: Run, args: Args, problems: list[Problem]) -> list[Row]:
    """Mixed: n-1 rollouts and a stored response for each problem that is replayed, n rollouts for the others.

    Replayed ones take the place of the last of `problems`, which are not asked in this pass over the data.
    """
    right = {problem: count for problem, count in run.experience.right.items() if problem not in problems}
    number = min(len(right), int(args.prompts * args.replay))
    chosen = choose(right, number, args.n, f"{args.seed} replay {run.step}")
    stored = [run.experience.rows(problem) for problem in chosen]
    run.score(sum(stored, []))  # sets row.prefix_entropy under π_old; these rows are not trained on
    replayed = [run.experience.rows(problem)[surest(rows)] for problem, rows in zip(chosen, stored)]
    prompts = [problem for problem in problems[:args.prompts - number] for _ in range(args.n)]
    prompts += [problem for problem in chosen for _ in range(args.n - 1)]
    return run.rollout(prompts) + replayed


def sort_groups(rows: list[Row]) -> tuple[list[Problem], dict[Problem, list[Row]]]:
    """Problems whose rows are all right, and the right rows of those that have right and wrong ones.

    >>> rewards = ("A", 1.0), ("A", 0.0), ("A", 1.0), ("B", 1.0), ("B", 1.0), ("C", 0.0)
    >>> solved, right = sort_groups([Row(problem, response=[], reward=reward) for problem, reward in rewards])
    >>> solved, {problem: len(rows) for problem, rows in right.items()}
    (['B'], {'A': 2})
    """
    failed = dict.fromkeys(row.problem for row in rows if row.reward != 1)
    solved = dict.fromkeys(row.problem for row in rows if row.problem not in failed)
    right = {one: [row for row in rows if row.problem == one and row.reward == 1] for one in failed}
    return list(solved), {problem: some for problem, some in right.items() if some}


def main():
    args = common.parse(Args, __doc__)
    gamma = None if args.shaping == "none" else args.gamma
    run = Run(args)
    for step in run.steps():
        started = run.state.get("started", False)
        clip = (None, None) if started and not args.clip else (args.clip_low, args.clip_high)
        rows = make_batch(run, args, run.next_problems(without=run.experience.retired))
        rewards = run.verify(rows)  # sets row.reward: 1.0 if the box after </think> is right, else 0.0
        groups = torch.tensor([row.problem.index for row in rows])
        advantages = group_advantages(rewards, groups, args.std_normalise)
        for row, advantage in zip(rows, advantages.tolist()):
            row.advantage = advantage
        run.score([row for row in rows if not row.is_demo])  # sets row.old_logp; replayed rows keep π_past's
        solved, right = sort_groups(rows)
        run.experience.retire(solved)
        run.experience.add(right if started else {})
        run.state["started"] = started or rewards.mean().item() > args.start
        run.log("exgrpo/replayed", sum(row.is_demo for row in rows), len(groups.unique()))
        for minibatch in run.minibatches(rows):  # --updates of them, one optimiser step each
            tokens = sum(len(row.response) for row in minibatch)
            normaliser = tokens if args.token_mean else len(minibatch) * args.max_response
            for batch in run.micro_batches(minibatch, args.entropy_bonus):  # tensors, without rows of A = 0
                logp, entropy = run.logprobs(batch, args.entropy_bonus)  # (rows, T); 0 outside the mask
                loss, metrics = exgrpo_loss(logp, batch.old_logp, batch.advantages, batch.mask, batch.is_demo,
                                            normaliser, gamma, *clip)
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
