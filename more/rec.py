"""REC: group REINFORCE on old responses, which needs no importance weights but a brake. A diff of grpo.py.

    Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm: Demystifying Some Myths About GRPO and Its
    Friends. Yao, Chen, Sun, Chen, Zhang, Pan, Li, Ding. arXiv:2509.24203.
    With OPMD, Kimi k1.5: Scaling Reinforcement Learning with LLMs. Kimi Team. arXiv:2501.12599;
    and AsymRE, Asymmetric REINFORCE for off-Policy Reinforcement Learning: Balancing positive and negative
    rewards. Arnal, Narozniak, Cabannes, Tang, Kempe, Munos. arXiv:2506.20520.

GRPO's ratio is thought to correct for responses that an older policy sampled. It need not: REINFORCE with the
group's mean as a baseline can be derived for a group that anybody sampled. What goes wrong on old responses
is that its loss has no lower bound: a wrong one is pushed down for ever. What helps is a brake. REC keeps
GRPO's clip as a brake and drops the ratio; OPMD and AsymRE are two more brakes on the same loss.

    J = 1/(B L) Σ_i Σ_t m_it k_it w_it A_i log π(y_it) - P  +  β/N Σ_i Σ_t m_it H_it

    r_it = π(y_it) / π_old(y_it)      A_i = R_i - mean(R of the group)      N = Σ_i Σ_t m_it
    k_it = 1, or with these brakes 1 where the condition holds, else 0
      one_side   r <= 1+ε_high if A > 0,  r >= 1-ε_low if A < 0
      two_side   1-ε_low <= r <= 1+ε_high
      ring       as two_side, or far where A pulls back: r <= 1-δ_low if A > 0, r >= 1+δ_high if A < 0
    P    = 0, or with these brakes
      opmd       1/(B L) τ/2 Σ_i (Σ_t m_it log r_it)²
      asymre     -1/(B L) τ Σ_i Σ_t m_it log π(y_it): A_i + τ in the place of A_i

  i, t      a response of the mini-batch, and a token y_it of it; the mini-batch has B responses (rows)
  R_i       its reward: 1 if the boxed answer after </think> is right, else 0; the group: n = --n responses
  π, π_old  the policy, and the policy before this step's updates (row.old_logp), both at --temperature
  w_it      1, or with --importance_weights r_it, without a gradient of its own
  m_it      batch.mask: 1 on the tokens of the response up to and including EOS, else 0
  ε, δ, τ   --clip_low, --clip_high; --ring_low, --ring_high; --tau        brake: --brake, also `none`
  L         --max_response        H_it: entropy of π at the token; β = --entropy_bonus

The derivation: ask that a_i = R_i - τ (log π - log π_old)(y_i) be the same for all responses of a group, by
1/n² Σ_{i<j} (a_i - a_j)². At π = π_old its gradient is -2τ times that of 1/n Σ_i A_i log π(y_i), for any n
responses. Further away it has a term that pulls back: OPMD's, less its mean over the group. With a reference
model for π_old it is, up to a factor, the loss of CoPG (arXiv:2406.19185).

A step samples a large set and takes --updates steps on parts of it, so that most of them are off-policy. With
--updates 1 every r is 1, and all brakes but asymre are REINFORCE.

Compared with the others: one_side with --importance_weights has the gradient of GRPO. TOPR brakes on wrong
responses alone, by the ratio of the whole response; BAPO moves the two bounds of the clip as it goes.

Deviations
  - The authors' code, Trinity-RFT, divides by the tokens of a micro-batch (`--token_mean`: by those of the
    mini-batch), has π_old from the sampler, and does not bound log-ratios: 0 times an infinite r is nan.
  - Its regulariser for OPMD squares single tokens. Its own `opmd` has no square, but divides by 1 + τ: plain
    REINFORCE at a smaller rate. Here it is that of a whole response, as in the paper, and divided by B L too.
  - AsymRE's paper has rewards of 1 and -1 and the same 0.1; for rewards of 1 and 0 that is twice as much.
  - A clip of 0.6 and 2.0 (`--clip_low 0.6 --clip_high 2`) is what REC's paper recommends where the responses
    are not too old. RED, which leaves out or re-weighs responses, is not here.

On the toy (one base, two seeds for one_side and none) the share of easy problems solved, 0.30 before the
first set, is 0.85 and 0.89 after it with one_side and 0.93 and 0.88 after the fifth; it dips to 0.67 between.
Without a brake it is 0.98 and 0.54, then anywhere from 0.29 to 0.80; at twice the learning rate (one seed)
0.10, and 0.01 to 0.02 from the third set on, where one_side stays at 0.67 to 0.81. One seed each, after sets
1 and 5: opmd 0.72, 0.90; asymre 0.96, 0.82; one_side with importance weights, GRPO's clip, 0.65, 0.80.

On a CPU, in a minute:  python more/rec.py
On a GPU:               python more/rec.py --model Qwen/Qwen2.5-Math-1.5B
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
    std_normalise: bool = flag("divide A by the group's standard deviation (GRPO's paper)", False)
    token_mean: bool = flag("divide by N, the mini-batch's tokens, in place of B L (DAPO)", False)
    data: str = flag("as in the other scripts; 'toy:easy' has only the toy's easy problems",
                     toy="toy:easy", real="Elliott/Openr1-Math-46k-8192")
    lr: float = flag("learning rate of AdamW", toy=3e-4, real=1e-6, least=0)
    steps: int = flag("sets to train on", toy=5, real=25, least=1)
    eval_every: int = flag("steps between evaluations on held-out problems", toy=1, real=5, least=1)
    prompts: int = flag("prompts in a set", toy=192, real=1920, least=1)
    updates: int = flag("optimiser steps on a set, each on a part of it", toy=48, real=20, least=1)
    brake: str = flag("what keeps the policy near the responses", "one_side",
                      choices=("none", "one_side", "two_side", "ring", "opmd", "asymre"))
    importance_weights: bool = flag("w = r in the place of 1", False)
    clip_low: float = flag("ε_low: where A < 0 tokens below 1 - ε_low are left out", 0.2, least=0, most=1,
                           only_with="brake=one_side|two_side|ring")
    clip_high: float = flag("ε_high: where A > 0 tokens above 1 + ε_high are left out", 0.2, least=0,
                            only_with="brake=one_side|two_side|ring")
    ring_low: float = flag("δ_low: where A > 0 tokens below 1 - δ_low are kept", 0.6, least=0, most=1,
                           only_with="brake=ring")
    ring_high: float = flag("δ_high: where A < 0 tokens above 1 + δ_high are kept", 2.0, least=0,
                            only_with="brake=ring")
    tau: float = flag("τ: strength of the brake", 0.1, least=0, only_with="brake=opmd|asymre")


# ---------------------------------------------------------------------------------------------- the loss
def rec_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    normaliser: float | None = None,
    brake: str = "one_side", importance_weights: bool = False,
    clip_low: float = 0.2, clip_high: float = 0.2, ring_low: float = 0.6, ring_high: float = 2.0,
    tau: float = 0.1,
) -> tuple[torch.Tensor, dict]:
    """-J without the entropy, for one micro-batch: REINFORCE with a brake (arXiv:2509.24203).

        loss = 1/normaliser Σ_i [ Σ_t m_it (-k_it w_it A_i log π(y_it)) (3) + p_i (4) ]
        r = π / π_old (1)    k: 0 where one_side, two_side or ring leave a token out (2)
        p_i = τ/2 (Σ_t m_it log r_it)² (opmd) or -τ Σ_t m_it log π(y_it) (asymre), else 0

    Tensors hold the rows of one micro-batch, padded to T tokens. logp, old_logp (rows, T): log-probs in nats,
        of π and π_old. advantages: A, (rows,), (rows, 1) or (rows, T).
        mask (rows, T), any dtype: m; what stands where it is 0 is not read. Half precision is computed in
        float32. In r a log-ratio above 60 counts as 60, so that nothing overflows.
    normaliser: what the sum is divided by, the same in all micro-batches of a mini-batch, so that they add
        up: B * L, with the B rows of the whole mini-batch, or its number of response tokens. Rows that
        micro-batches leave out count there too. Default: rows * T of these tensors.
    brake: 'none', 'one_side', 'two_side', 'ring', 'opmd' or 'asymre'. With the last two, rows of A = 0 have a
        gradient. importance_weights: w = r, else 1. clip_low, clip_high: ε; ring_low, ring_high: δ. tau: τ.
    Returns the loss and metrics {name: (sum, number of values)}, so that means over micro-batches are exact.
    clip_fraction: share of tokens that k leaves out, which have no gradient then.

    >>> logp, old_logp = torch.tensor([[0.5], [0.25]]).log(), torch.tensor([[0.25], [0.25]]).log()
    >>> for brake in ("none", "one_side", "opmd", "asymre"):     # r = 2, r = 1; log π = -0.6931, -1.3863
    ...     loss, _ = rec_loss(logp, old_logp, torch.tensor([1.0, -1.0]), torch.ones(2, 1), brake=brake)
    ...     print(round(loss.item(), 4))     # (0.69 - 1.39)/2; -1.39/2; + 0.1/2 * 0.69²/2; ...
    -0.3466
    -0.6931
    -0.3346
    -0.2426
    """
    mask = mask.bool()
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    count = mask.sum()
    normaliser = mask.numel() if normaliser is None else normaliser
    advantages = torch.where(mask, advantages.reshape(len(mask), -1), 0.0)         # (rows, T)
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    ratio = log_ratio.detach().clamp(max=60).exp()                                 # (1) r, without a gradient
    near = (ratio >= 1 - clip_low) & (ratio <= 1 + clip_high)
    far = torch.where(advantages > 0, ratio <= 1 - ring_low, ratio >= 1 + ring_high)
    one_side = torch.where(advantages > 0, ratio <= 1 + clip_high, ratio >= 1 - clip_low)
    keep = {"one_side": one_side, "two_side": near, "ring": near | far}.get(brake, mask)   # (2) k
    weight = ratio if importance_weights else 1.0
    logp = torch.where(mask, logp, 0.0)
    token_loss = -weight * advantages * torch.where(keep, logp, 0.0)               # (3) -k w A log π
    if brake == "opmd":
        row_ratio = log_ratio.sum(dim=1, keepdim=True)                             # (rows, 1)
        token_loss = token_loss + tau / 2 * log_ratio * row_ratio                  # (4) its square, in parts
    elif brake == "asymre":
        token_loss = token_loss - tau * logp                                       # (4) A + τ
    metrics = {
        "token_loss/rollouts": (token_loss.detach().sum(), count),
        "clip_fraction": ((mask & ~keep & (advantages != 0)).sum(), count),
        # The k1 estimate of KL(π_old || π): log π_old - log π of sampled tokens; single ones may be negative.
        "kl/old_policy": (-log_ratio.detach().sum(), count),
    }
    return token_loss.sum() / (normaliser or 1), metrics                           # 0 without tokens


# --------------------------------------------------------------------------------------- what is in a batch
def make_batch(run: Run, args: Args, problems: list[Problem]) -> list[Row]:
    """A set: n rollouts of the policy for each prompt. They grow old while the policy is updated on them."""
    return run.rollout([problem for problem in problems for _ in range(args.n)])


def main():
    args = common.parse(Args, __doc__)
    everywhere = args.brake in ("opmd", "asymre")  # the brake acts on rows of A = 0 too
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
            for batch in run.micro_batches(minibatch, args.entropy_bonus, everywhere):  # tensors
                logp, entropy = run.logprobs(batch, args.entropy_bonus)  # (rows, T); 0 outside the mask
                loss, metrics = rec_loss(logp, batch.old_logp, batch.advantages, batch.mask, normaliser,
                                         args.brake, args.importance_weights, args.clip_low, args.clip_high,
                                         args.ring_low, args.ring_high, args.tau)
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
