"""RL with SFT loss: rollouts learn by RL, the prompt's demonstration is imitated. A diff of luffy.py.

    The multi-task baseline of Learning to Reason under Off-Policy Guidance (there: RL w/ SFT Loss).
    Yan, Li, Hu, Wang, Cui, Qu, Cheng, Zhang. arXiv:2504.14945.

The simplest way to use demonstrations in RL is to add the two losses. The rollouts are compared with each
other, as if there were no demonstration; the demonstration is imitated, as if there were no rollouts. One
weight, the same for all prompts, all tokens and the whole run, says how much the second counts.

    J = 1/(B L) [ Σ_{i rollout} Σ_t m_it r_it A_i  +  c Σ_{i demonstration} Σ_t m_it log π(y_it) ]
        + β/N Σ_i Σ_t m_it H_it

    r_it = π(y_it) / π_old(y_it)      A_i = R_i - mean(R of the group)      N = Σ_i Σ_t m_it

  i, t      a row of the mini-batch, rollout or demonstration, and a token y_it of it; it has B rows
  R_i       reward of a rollout: 1 if the boxed answer after </think> is right, else 0
  group     the n-1 rollouts to one prompt (n where it has no demonstration): demonstrations are not in it
  π, π_old  the policy, and the policy before this step's updates (row.old_logp), both at --temperature
  m_it      batch.mask: 1 on the tokens of the response up to and including EOS, else 0
  c         --sft_weight        L = --max_response        n = --n
  H_it      entropy of π at the token; β = --entropy_bonus

Compared with the others: same rows as in LUFFY, but there the demonstration is in the group, and teaches no
more once all of it is right; here it pulls to the end, at every token alike. CHORD-μ adds the same two losses
and lowers the weight of the second by a schedule; HPT takes, prompt by prompt, one of them; SRFT weighs the
second by the policy's entropy. ReLIFT imitates what was not solved, in steps of its own.

Deviations
  - The authors' code divides RL by the constant L and imitation by the number of demonstration tokens in the
    micro-batch, so that their balance depends on how rows are packed: its c of 1 is here L over this number.
    Here both are divided by B L. `--token_mean` divides each by its tokens in the whole mini-batch, which is
    the code's other setting, with the clip (`--clip`).
  - The paper says of this baseline no more than its name; the setting is that of the authors' script.
  - Which demonstrations are left out is as in luffy.py.

On the toy (one base, two seeds) the share of hard problems solved is 0.73 and 0.74 at step 10, 0.89 and 0.86
at step 15, and does not rest: from there on it is anywhere between 0.70 and 0.92, 0.92 and 0.81 at step 80.
LUFFY, which lets a solved problem's demonstration go, ends at 0.95-0.98. Half the demonstrations here make a
leap that the model cannot follow; what is imitated at every step includes it. With `--sft_weight 0.1` (one
seed) it is 0.93 at step 15 and between 0.91 and 0.98 after that.

On a CPU, in a minute:  python more/rl_sft.py
On a GPU:               python more/rl_sft.py --model Qwen/Qwen2.5-Math-7B
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
    sft_weight: float = flag("c: weight of imitation", 1.0, least=0)
    std_normalise: bool = flag("divide A by the group's standard deviation", False)
    token_mean: bool = flag("divide both sums by their tokens in the mini-batch, in place of B L", False)
    clip: bool = flag("clip the ratio of rollouts", False)
    clip_low: float = flag("ε_low: the ratio is clipped below 1 - ε_low", 0.2, least=0, most=1,
                           only_with="clip")
    clip_high: float = flag("ε_high: the ratio is clipped above 1 + ε_high", 0.2, least=0, only_with="clip")


# ---------------------------------------------------------------------------------------------- the loss
def rl_sft_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    is_demo: torch.Tensor,
    normaliser: float | None = None, sft_normaliser: float | None = None,
    sft_weight: float = 1.0, clip_low: float = torch.inf, clip_high: float = torch.inf,
) -> tuple[torch.Tensor, dict]:
    """-J without the entropy, for one micro-batch: RL on rollouts and, beside it, imitation.

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
        whole mini-batch, or the numbers of these tokens in it. Rows that micro-batches leave out, since
        A = 0, count there too. Default: rows * T of these tensors, and for demonstrations what it is for
        rollouts.
    sft_weight: c. clip_low, clip_high: ε_low and ε_high; both infinite for no clip.
    Returns the loss and metrics {name: (sum, number of values)}, so that means over micro-batches are exact.
    clip_fraction: share of rollout tokens at which the clip decides, which have no gradient then.

    >>> logp, old_logp = torch.tensor([[0.5], [0.25]]).log(), torch.tensor([[0.25], [0.0]]).log()
    >>> advantages, is_demo = torch.tensor([-0.5, 1.0]), torch.tensor([False, True])
    >>> loss, _ = rl_sft_loss(logp, old_logp, advantages, torch.ones(2, 1), is_demo, sft_weight=0.5)
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
    imitation = -torch.where(demo, logp, 0.0)                                      # (5) -log π
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
    """Mixed: for each prompt its demonstration and n-1 rollouts, or n rollouts where there is none.

    There is none if the data have none, if its answer is wrong, or if it has more than L tokens with EOS.
    """
    demonstrations = [run.demonstrations.of(problem) for problem in problems]  # a row or None each
    prompts = []
    for problem, demonstration in zip(problems, demonstrations):
        prompts += [problem] * (args.n - 1 if demonstration else args.n)
    return run.rollout(prompts) + [row for row in demonstrations if row]


def main():
    args = common.parse(Args, __doc__)
    clip = (args.clip_low, args.clip_high) if args.clip else (torch.inf, torch.inf)
    run = Run(args)
    for step in run.steps():
        rows = make_batch(run, args, run.next_problems())
        rewards = run.verify(rows)  # sets row.reward: 1.0 if the box after </think> is right, else 0.0
        groups = torch.tensor([-1 if row.is_demo else row.problem.index for row in rows])
        advantages = group_advantages(rewards, groups, args.std_normalise)
        for row, advantage in zip(rows, advantages.tolist()):
            row.advantage = 1.0 if row.is_demo else advantage  # imitated, not compared: in no group
        run.score(rows)  # sets row.old_logp: log π_old by the trainer, before this step's updates
        for minibatch in run.minibatches(rows):  # --updates of them, one optimiser step each
            tokens = sum(len(row.response) for row in minibatch)
            demo_tokens = sum(len(row.response) for row in minibatch if row.is_demo)
            normalisers = [len(minibatch) * args.max_response] * 2  # of rollouts and of demonstrations
            if args.token_mean:
                normalisers = [tokens - demo_tokens, demo_tokens]
            for batch in run.micro_batches(minibatch, args.entropy_bonus):  # tensors, without rows of A = 0
                logp, entropy = run.logprobs(batch, args.entropy_bonus)  # (rows, T); 0 outside the mask
                loss, metrics = rl_sft_loss(logp, batch.old_logp, batch.advantages, batch.mask, batch.is_demo,
                                            *normalisers, args.sft_weight, *clip)
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
