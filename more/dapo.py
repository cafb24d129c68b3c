"""DAPO: sampling goes on until every group has right and wrong responses. A diff of grpo.py.

    DAPO: An Open-Source LLM Reinforcement Learning System at Scale.
    Yu, Zhang, Zhu, Yuan, Zuo, Yue et al. arXiv:2503.14476.

A group whose rollouts are all right or all wrong has A = 0 and teaches nothing. The better the model gets,
the more groups are all right: what is left of GRPO's batches shrinks, and its gradients get noisy. DAPO drops
such groups and samples further prompts until the batch is full. It also clips tokens that become likelier
later than others, weighs all tokens alike, and lowers the reward of responses that nearly reach the limit.

    J = 1/N Σ_i Σ_t m_it min(r_it A_i, clip(r_it, 1-ε_low, 1+ε_high) A_i)  +  β/N Σ_i Σ_t m_it H_it
        over groups in which the number of right responses is neither 0 nor n

    r_it = π(y_it) / π_old(y_it)      A_i = (R_i - mean(R)) / std(R)      N = Σ_i Σ_t m_it
    R_i  = C_i + min(0, (L - L_cache - |y_i|) / L_cache)

  i, t      a response of the mini-batch, and a token y_it of it; |y_i| = Σ_t m_it tokens
  C_i       1 if the boxed answer after </think> is right, else -1; run.verify sets row.reward to 1 or 0
  mean, std over the n = --n responses to the same prompt, the group; std with n - 1, plus 1e-6
  L_cache   --cache: in the last tokens below L = --max_response the reward falls by up to 1; 0: it does not
  π, π_old  the policy, and the policy before this step's updates (row.old_logp), both at --temperature
  m_it      batch.mask: 1 on the tokens of the response up to and including EOS, else 0
  ε         --clip_low, --clip_high        H_it: entropy of π at the token; β = --entropy_bonus

The first line is eq. 8 of the paper, the condition eq. 11, and the second term of R eq. 13. A step samples in
rounds, of --prompts new prompts each, until --prompts groups are mixed; what is mixed beyond that is dropped.
After --rounds rounds the step takes those that there are. If there is none, its updates have a gradient of 0,
as in grpo.py, and AdamW follows the earlier ones. `dapo/in_vain` is the share of rollouts that were dropped:
the price, which a step's number does not show.

Compared with the others: LUFFY, HPT and AMPO help with groups that are all wrong by a demonstration; DAPO
passes over them until one of their rollouts is right by chance. That needs none, but many rollouts.

Deviations
  - The authors' script samples three times as many prompts a round as it needs, and raises an error where ten
    rounds do not suffice.
  - N is that of one group in the paper's formula, of a micro-batch in the code; here of the mini-batch.
  - The paper also tries to leave cut responses out of the loss: `--mask_cut`. The script does not.
  - The script takes 16 updates a step: `--updates 16`. With one the ratio is 1 and no clip acts.

On the toy (one base, two seeds) the share of easy problems solved is 0.70 and 0.74 at step 5, 0.97 and 0.95
at step 10, 0.99 and 1.00 at step 80. GRPO has (one seed) 0.66 and 0.96 at steps 5 and 10: a step is hardly
better, and costs up to four times the rollouts. In the first ten steps 0.64 of them are in vain, after step
20 0.94: then 4 groups of 16 are found in four rounds, and in three steps none. Hard problems stay at 0.02,
with ten rounds too (one seed, 30 steps): what is never right is not found by sampling more. No response came
so near the limit that its reward was lowered.

On a CPU, in a minute:  python more/dapo.py
On a GPU:               python more/dapo.py --model Qwen/Qwen2.5-Math-7B
"""
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # where common.py and the five are

import common  # first: it reads the flags before torch is imported, which takes seconds
import torch
from common import Row, Run, flag
from grpo import group_advantages


@dataclass
class Args(common.Args):
    rounds: int = flag("rounds of sampling in a step, if groups are still missing", toy=4, real=10, least=1)
    cache: int = flag("L_cache: tokens below --max_response in which the reward falls; 0: none",
                      toy=8, real=512, least=0)
    clip_low: float = flag("ε_low: the ratio is clipped below 1 - ε_low", 0.2, least=0, most=1)
    clip_high: float = flag("ε_high: the ratio is clipped above 1 + ε_high", 0.28, least=0)


# ---------------------------------------------------------------------------------------------- the loss
def dapo_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    normaliser: float | None = None,
    clip_low: float = 0.2, clip_high: float = 0.28,
) -> tuple[torch.Tensor, dict]:
    """-J without the entropy, for one micro-batch: GRPO's, clipped higher, as a mean over tokens (eq. 8).

        loss = 1/normaliser Σ_i Σ_t m_it max(-A_i r_it, -A_i clip(r_it, 1 - ε_low, 1 + ε_high))
                                         (4)     (2)         (3)           r = π / π_old (1)

    Tensors hold the rows of one micro-batch, padded to T tokens. logp, old_logp (rows, T): log-probs in nats,
        of π and π_old. advantages: A, (rows,), (rows, 1) or (rows, T).
        mask (rows, T), any dtype: m; what stands where it is 0 is not read. Half precision is computed in
        float32. A log-ratio above 60 counts as 60, so that nothing overflows.
    normaliser: N, what the sum over tokens is divided by: the response tokens of the whole mini-batch, so
        that its micro-batches add up. Default: those of these tensors.
    clip_low, clip_high: ε_low and ε_high; both infinite for no clip.
    Returns the loss and metrics {name: (sum, number of values)}, so that means over micro-batches are exact.
    clip_fraction: share of tokens at which the clip decides, which have no gradient then.

    >>> logp, old_logp = torch.tensor([[0.5], [0.5]]).log(), torch.tensor([[0.25], [0.5]]).log()
    >>> loss, _ = dapo_loss(logp, old_logp, torch.tensor([1.0, -1.0]), torch.ones(2, 1))
    >>> round(loss.item(), 4)     # r = 2, clipped at 1.28, and r = 1: (-1.28 + 1) / 2 tokens
    -0.14
    """
    mask = mask.bool()
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    count = mask.sum()
    normaliser = count if normaliser is None else normaliser
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
def mixed(rows: list[Row]) -> list[Row]:
    """The rows of the groups whose rewards differ: the others have A = 0.

    >>> rollouts = ("A", 0.0), ("A", 1.0), ("B", 0.0), ("B", 0.0), ("C", 1.0), ("C", 1.0)   # and reward
    >>> [row.problem for row in mixed([Row(problem, [], reward=reward) for problem, reward in rollouts])]
    ['A', 'A']
    """
    rewards = defaultdict(set)
    for row in rows:
        rewards[row.problem].add(row.reward)
    return [row for row in rows if len(rewards[row.problem]) > 1]


def length_penalty(lengths: torch.Tensor, longest: int, cache: int) -> torch.Tensor:
    """min(0, (L - L_cache - |y|) / L_cache), not below -1, for lengths |y| (rows,) in tokens (eq. 13).

    >>> length_penalty(torch.tensor([60, 64, 68, 72]), longest=72, cache=8).tolist()
    [0.0, 0.0, -0.5, -1.0]
    """
    return ((longest - cache - lengths) / max(1, cache)).clamp(-1, 0)


def make_batch(run: Run, args: Args) -> list[Row]:
    """Dynamic sampling: n rollouts for each of further prompts until --prompts groups are mixed; those rows.

    Sets row.reward. There are fewer groups, or none, if --rounds rounds do not suffice.
    """
    rows, sampled, wanted = [], 0, args.prompts * args.n
    for number in range(args.rounds):
        problems = run.next_problems(run.state.get("rounds", 0))
        run.state["rounds"] = run.state.get("rounds", 0) + 1
        fresh = run.rollout([problem for problem in problems for _ in range(args.n)], again=number)
        run.verify(fresh)  # sets row.reward: 1.0 if the box after </think> is right, else 0.0
        rows += mixed(fresh)
        sampled += len(fresh)
        run.log("dapo/rounds", 1, 0)
        if len(rows) >= wanted:
            break
    run.log("dapo/surplus", max(0, len(rows) - wanted), 0)
    rows = rows[:wanted]
    run.log("dapo/in_vain", sampled - len(rows), sampled)
    run.log("dapo/groups", len(rows) / args.n)
    return rows


def main():
    args = common.parse(Args, __doc__)
    run = Run(args)
    for step in run.steps():
        rows = make_batch(run, args)
        lengths = torch.tensor([len(row.response) for row in rows])
        penalties = length_penalty(lengths, args.max_response, args.cache)
        rewards = 2 * torch.tensor([row.reward for row in rows]) - 1 + penalties
        run.log("dapo/length_penalty", penalties.sum().item(), len(rows))
        groups = torch.tensor([row.problem.index for row in rows])
        advantages = group_advantages(rewards, groups, std_normalise=True)
        for row, advantage in zip(rows, advantages.tolist()):
            row.advantage = advantage
        run.score(rows)  # sets row.old_logp: log π_old by the trainer, before this step's updates
        for minibatch in run.minibatches(rows):  # --updates of them, one optimiser step each
            tokens = sum(len(row.response) for row in minibatch)
            for batch in run.micro_batches(minibatch, args.entropy_bonus):  # tensors, without rows of A = 0
                logp, entropy = run.logprobs(batch, args.entropy_bonus)  # (rows, T); 0 outside the mask
                loss, metrics = dapo_loss(logp, batch.old_logp, batch.advantages, batch.mask,
                                          tokens, args.clip_low, args.clip_high)
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
