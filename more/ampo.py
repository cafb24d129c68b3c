"""AMPO: where all rollouts fail, the demonstrations that are easiest to follow. A diff of luffy.py.

    More Than One Teacher: Adaptive Multi-Guidance Policy Optimization for Diverse Exploration.
    Yuan, Ding, Bin, Shao, Cai, Song, Yang, Shen. arXiv:2510.02227.

A demonstration in every group takes room from rollouts that would have been right, and one teacher shows one
way of thinking. AMPO asks for guidance only where all n rollouts of a prompt are wrong. Then k of them make
way for k demonstrations, those of its teachers' that the policy understands best: after whose reasoning it
finds the reference answer likeliest.

    J = 1/(B L) [ Σ_{i rollout} Σ_t m_it min(r_it A_i, clip(r_it, 1-ε_low, 1+ε_high) A_i)
                  + Σ_{i demonstration} Σ_t m_it f(p_it) A_i ]  +  β/N Σ_i Σ_t m_it H_it

    r_it = π(y_it) / π_old(y_it)   p_it = π(y_it)   f(p) = p / (p + γ)   A_i = R_i - mean(R of its group)

    comprehension of a demonstration = exp(mean over the tokens a_j of log π_old(a_j | x, z, a_<j))

  i, t      a row of the mini-batch, rollout or demonstration, and a token y_it of it; it has B rows
  R_i       reward of a rollout: 1 if the boxed answer after </think> is right, else 0; of a demonstration 1
  group     the n rows of one prompt, its demonstrations included
  π, π_old  the policy, and the policy before this step's updates (row.old_logp), both at --temperature
  x, z, a   the prompt; the demonstration up to its own answer, in the last box; the reference's tokens
  k         --replace, as far as there are demonstrations; one rollout at least stays
  m_it      batch.mask: 1 on the tokens of the response up to and including EOS, else 0; N = Σ_i Σ_t m_it
  ε         --clip_low, --clip_high; where A < 0 there is a second clip: r counts as --dual_clip, c, at most
  γ, L, n   --gamma, --max_response, --n        H_it: entropy of π at the token; β = --entropy_bonus

The loss is LUFFY's with its clip, and a second one. New is who is in the batch.

Data with several demonstrations have a column `demonstrations`, a list, or, beside `target`, `target_lst`, as
in the authors' code. With one per problem nothing is chosen, and this is LUFFY where all rollouts fail.

Compared with the others: LUFFY has a demonstration in every group; ReLIFT asks for one where all rollouts
fail too, but imitates it in a step of its own; HPT throws the whole group away for it. All three take the
one that there is.

Deviations
  - The comprehension is the paper's. The authors' script takes the arithmetic mean of the tokens'
    probabilities, minus what it is without any reasoning, not below 0; 0.9 of it and 0.1 for the format.
    Of equal ones the shorter comes first, as in the paper.
  - The paper divides p by the teacher's probability, and a demonstration's sum by its length. The authors'
    code needs no teacher's probabilities and weighs all tokens alike, also with its setting `seq`: so here.
  - The code divides by L and never by B, and multiplies by a micro-batch's share of the rows, so that the
    scale depends on how rows are packed. Here all is divided by B L.
  - The code's reward is 0.9 for the answer and 0.1 for the format, less a penalty for repetitions.
  - The code replaces random wrong rollouts. Here the first ones make way, which is the same: they are drawn
    alike.
  - Which demonstrations are left out is as in luffy.py. Those that remain are right: R = 1.

On the toy (one base, two seeds) the share of hard problems solved is 0.44 and 0.53 at step 10, 0.94 and 0.91
at step 15, 0.98 and 1.00 at step 80. In step 1 0.44 and 0.81 of the prompts are guided, after step 10 hardly
one. The teachers are full working and working with a leap. The choice does not tell them apart as hoped: the
answer is a copy of the last line, and as likely behind either, 0.998 or more. On 300 hard problems the base
finds it likelier behind the leap in 70%. With both (`--replace 2`, one seed) it goes as well: 0.80, 0.95,
0.97.

On a CPU, in a minute:  python more/ampo.py
On a GPU:               python more/ampo.py --model Qwen/Qwen2.5-7B-Instruct --data teachers.jsonl
"""
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
    replace: int = flag("k: rollouts that make way where none is right", toy=1, real=2, least=1)
    std_normalise: bool = flag("divide A by the group's standard deviation (GRPO's paper)", False)
    token_mean: bool = flag("divide by N, the mini-batch's tokens, in place of B L", False)
    clip_low: float = flag("ε_low: the ratio is clipped below 1 - ε_low", 0.2, least=0, most=1)
    clip_high: float = flag("ε_high: the ratio is clipped above 1 + ε_high", 0.2, least=0)
    dual_clip: float = flag("c: where A < 0 the ratio counts as c at most", 10.0, least=1)
    gamma: float = flag("γ of the shaping", 0.1, least=1e-6)


# ---------------------------------------------------------------------------------------------- the loss
def ampo_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    is_demo: torch.Tensor,
    normaliser: float | None = None,
    gamma: float = 0.1, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float = 10.0,
) -> tuple[torch.Tensor, dict]:
    """-J without the entropy, for one micro-batch: LUFFY's loss with both clips, as in AMPO's code.

        loss = 1/normaliser Σ_i Σ_t m_it l_it
        in a demonstration:  l = -A f(p)    p = π (5)    f(p) = p / (p + γ) (6)    -A f(p) (7)
        in a rollout:        l = max(-A r, -A clip(r, 1 - ε_low, 1 + ε_high)), (1) to (4) of grpo_loss,
                             and where A < 0 at most -c A (4)

    Tensors hold the rows of one micro-batch, padded to T tokens. logp, old_logp (rows, T): log-probs in nats,
        of π and π_old. advantages: A, (rows,), (rows, 1) or (rows, T).
        mask (rows, T), any dtype: m; what stands where it is 0 is not read, nor is old_logp of
        demonstrations. Half precision is computed in float32. A log-ratio above 60 counts as 60, so that
        nothing overflows.
    is_demo, any dtype: 1 on demonstrations (rows,), or on tokens that come from one (rows, T).
    normaliser: what the sum over tokens is divided by, the same in all micro-batches of a mini-batch, so that
        they add up: B * L, with the B rows of the whole mini-batch, or its number of response tokens. Rows
        that micro-batches leave out, since A = 0, count there too. Default: rows * T of these tensors.
    gamma: γ. clip_low, clip_high: ε_low and ε_high. dual_clip: c; infinite for none.
    Returns the loss and metrics {name: (sum, number of values)}, so that means over micro-batches are exact.
    clip_fraction: share of rollout tokens at which a clip decides, which have no gradient then.

    >>> logp, old_logp = torch.tensor([[0.5], [0.1]]).log(), torch.tensor([[0.025], [0.0]]).log()
    >>> advantages, is_demo = torch.tensor([-0.5, 0.5]), torch.tensor([False, True])
    >>> loss, _ = ampo_loss(logp, old_logp, advantages, torch.ones(2, 1), is_demo)
    >>> round(loss.item(), 4)     # rollout: r = 20 counts as 10; demonstration: f = 0.1/0.2
    2.375
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
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)               # (3) -A clip(r)
    token_loss = torch.maximum(unclipped, clipped)                                 # (4) the larger loss
    # The clip does not bound a wrong token that became likelier: A < 0 and r > 1, and its gradient grows.
    ceiling = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
    decided = (clipped > unclipped) | (token_loss > ceiling)
    token_loss = torch.minimum(token_loss, ceiling)                                # (4) and the dual clip
    p = torch.where(demo, logp, 0.0).exp()                                         # (5)
    # The weight A df/dlog p = A γ p / (p + γ)² of a token is largest, A/4, at p = γ; it goes to 0 with p.
    shaped = p / (p + gamma)                                                       # (6) f(p)
    token_loss = torch.where(demo, -advantages * shaped, token_loss)               # (7) -A f(p): LUFFY
    metrics = {
        "token_loss/rollouts": ((token_loss.detach() * on_policy).sum(), count),
        "token_loss/demonstrations": ((token_loss.detach() * demo).sum(), demo.sum()),
        "clip_fraction": (decided.sum(), count),
        # The k1 estimate of KL(π_old || π): log π_old - log π of sampled tokens; single ones may be negative.
        "kl/old_policy": (-log_ratio.detach().sum(), count),
    }
    return token_loss.sum() / (normaliser or 1), metrics                           # 0 without tokens


# --------------------------------------------------------------------------------------- what is in a batch
def answer_likelihood(logp: torch.Tensor) -> float:
    """The geometric mean of probabilities, from 0 to 1: of the reference answer's tokens after a reasoning.

    logp (tokens,): their log-probs, in nats.

    >>> answer_likelihood(torch.tensor([0.5, 0.125]).log())
    0.25
    """
    return logp.mean().exp().clamp(max=1).item()


def likeliest(demonstrations: list[Row], likelihood: dict[Row, float], count: int) -> list[Row]:
    """The `count` of largest likelihood; of equal ones the shorter first.

    >>> a, b, c = [Row("prompt", response) for response in ([5, 6, 9], [5, 9], [9])]
    >>> likeliest([a, b, c], {a: 0.5, b: 0.5, c: 0.1}, 2) == [b, a]
    True
    """
    return sorted(demonstrations, key=lambda row: (-likelihood.get(row, 0.0), len(row.response)))[:count]


def replace(rows: list[Row], chosen: dict[Problem, list[Row]]) -> list[Row]:
    """The rows, where the first of a prompt's rollouts make way for as many demonstrations, which stand last.

    >>> rows = [Row(prompt, [number]) for prompt in "AB" for number in (1, 2, 3)]
    >>> rows = replace(rows, {"B": [Row("B", [7]), Row("B", [8])]})
    >>> [row.problem + str(row.response[0]) for row in rows]
    ['A1', 'A2', 'A3', 'B3', 'B7', 'B8']
    """
    surplus, kept = {problem: len(several) for problem, several in chosen.items()}, []
    for row in rows:
        if surplus.get(row.problem):
            surplus[row.problem] -= 1
        else:
            kept.append(row)
    return kept + [row for several in chosen.values() for row in several]


def make_batch(run: Run, args: Args, problems: list[Problem]) -> list[Row]:
    """On demand: n rollouts for each prompt, of which k make way for demonstrations where none is right.

    Sets row.reward, also of demonstrations: 1, since they were verified when they were read. Where there are
    no more of them than places nothing is chosen, and so nothing is scored.
    """
    rows = run.rollout([problem for problem in problems for _ in range(args.n)])
    run.verify(rows)  # sets row.reward: 1.0 if the box after </think> is right, else 0.0
    solved, places = {row.problem for row in rows if row.reward == 1}, min(args.replace, args.n - 1)
    found = {problem: run.demonstrations.all(problem) for problem in problems if problem not in solved}
    compared = [row for several in found.values() if len(several) > places for row in several]
    answered = [run.demonstrations.with_reference(row) for row in compared]  # and the size of the reference
    run.score([row for row, _ in answered])  # sets row.old_logp
    likelihood = {row: answer_likelihood(probe.old_logp[-size:])
                  for row, (probe, size) in zip(compared, answered)}
    chosen = {problem: likeliest(several, likelihood, places) for problem, several in found.items()}
    taken = {row for several in chosen.values() for row in several}
    for row in taken:
        row.reward = 1.0
    for row in compared:
        run.log("likelihood/taken" if row in taken else "likelihood/left", likelihood[row])
    run.log("ampo/guided", sum(map(bool, chosen.values())), len(set(problems)))
    run.log("ampo/replaced", len(taken), 0)  # rollouts that were sampled in vain
    run.log("ampo/without_demonstration", sum(not several for several in found.values()), 0)
    return replace(rows, chosen)


def main():
    args = common.parse(Args, __doc__)
    clip = args.clip_low, args.clip_high, args.dual_clip
    run = Run(args)
    for step in run.steps():
        rows = make_batch(run, args, run.next_problems())
        rewards = torch.tensor([row.reward for row in rows])
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
                loss, metrics = ampo_loss(logp, batch.old_logp, batch.advantages, batch.mask, batch.is_demo,
                                          normaliser, args.gamma, *clip)
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
