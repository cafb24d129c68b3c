"""SRFT: imitation and RL at once, each row weighed by the policy's entropy on it. A diff of luffy.py.

    SRFT: A Single-Stage Method with Supervised and Reinforcement Fine-Tuning for Reasoning.
    Fu, Chen, Chai, Wang, Tu, Yin, Lin, Zhang, Zhu, Zhao. arXiv:2506.19767.

Fine-tuning changes the whole distribution coarsely, RL few tokens finely; in two stages the first cannot know
what the second will need. SRFT does both in every step, on LUFFY's groups, and weighs them by the policy's
entropy. A demonstration of which it is unsure is imitated less; a right rollout of which it is unsure, more.

    J = 1/(B L) [ Σ_{i demonstration} Σ_t m_it (w_i log p_it + A_i f(p_it))
                  + Σ_{i rollout} Σ_t m_it s_i log p_it ]  +  β/N Σ_i Σ_t m_it H_it

    w_i = c e^(-h_i)      s_i = d e^(h_i) if R_i = 1, else -1      h_i = sg(mean of H_it over the tokens of i)
    p_it = π(y_it)        f(p) = p / (p + γ)                       A_i = R_i - mean(R of its group)

  i, t      a row of the mini-batch, rollout or demonstration, and a token y_it of it; it has B rows
  R_i       its reward, a demonstration's too: 1 if the boxed answer after </think> is right, else 0
  group     the n rows of one prompt, the demonstration included; only the demonstration's A is used
  π, H_it   the policy at --temperature as it is in this update, and its entropy at the token
  sg        .detach(): e^h and e^-h are numbers, through which no gradient goes
  m_it      batch.mask: 1 on the tokens of the response up to and including EOS, else 0; N = Σ_i Σ_t m_it
  c         --sft_weight        d = --positive_weight        γ = --gamma        L = --max_response
  n         --n                 β = --entropy_bonus

These are the terms of eq. 13 of the paper: imitation of the demonstration, RL on it (with f(p) = p), and
RL on rollouts, whose reward is 1 or -1. In main() row.advantage of a rollout is this reward, 2 R - 1.

Look at the last term: it has no baseline, no ratio, no clip. Groups that are all right or all wrong teach as
well; and a wrong rollout is pushed down without a bound, at h = 0 with ten times the weight of a right one.
logp/negatives shows how far.

Compared with the others: LUFFY has the middle term alone on demonstrations and compares rollouts with their
group; CHORD imitates with one weight for all rows, which follows a schedule; HPT asks how many rollouts are
right, and does one or the other. Here the policy's own entropy decides, row by row.

Deviations
  - The paper has f(p) = p (`--shaping none`) and divides A by the standard deviation (`--std_normalise`).
    HPT's authors, who wrote an SRFT of their own, have LUFFY's f and no standard deviation. So it is here.
  - They divide imitation by the number of demonstration tokens in the micro-batch, and the rest by the
    constant L. Here all is divided by B L, whatever is packed where.
  - The paper has 8 rollouts beside the demonstration (`--n 9`), they have 7.
  - The code of SRFT's authors was not at hand. By a third party's report, which could not be verified, its w
    has e^(+h), against what the paper argues.
  - The paper sets rewards of 1 and 0, and derives the last term with 1 and -1. It speaks of four terms; the
    fourth is the wrong rollouts' part of the last one.
  - Without a demonstration of at most L tokens with the right answer a prompt has n rollouts, and the last
    term alone.

On the toy (one base, two seeds) the share of hard problems solved is 0.83 and 0.80 at step 10, 0.91 and 0.95
at step 80; out of distribution it is 0.53 and 0.60 at step 15, 0.24 and 0.42 at step 80. Entropy is low, so w
is 0.45 to 0.49 throughout and s, from step 10 on, 0.10: what the weights are for is not seen. Nothing
diverged: logp/negatives stayed between -0.06 and -0.46.

On a CPU, in a minute:  python more/srft.py
On a GPU:               python more/srft.py --model Qwen/Qwen2.5-Math-7B
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
    std_normalise: bool = flag("divide A by the group's standard deviation (SRFT's paper)", False)
    shaping: str = flag("f of demonstration tokens; none is f(p) = p, as in SRFT's paper", "p/(p+gamma)",
                        choices=("p/(p+gamma)", "none"))
    gamma: float = flag("γ of the shaping", 0.1, least=1e-6, not_with="shaping=none")
    sft_weight: float = flag("c: weight of imitation, times e^-h", 0.5, least=0)
    positive_weight: float = flag("d: weight of right rollouts, times e^h; of wrong ones 1", 0.1, least=0)
    constant_weights: bool = flag("take e^h and e^-h as 1 (the paper's ablation)", False)


# ---------------------------------------------------------------------------------------------- the loss
def srft_loss(
    logp: torch.Tensor, entropy: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    is_demo: torch.Tensor,
    normaliser: float | None = None, gamma: float | None = 0.1,
    sft_weight: float = 0.5, positive_weight: float = 0.1, constant_weights: bool = False,
) -> tuple[torch.Tensor, dict]:
    """-J without the entropy bonus, for one micro-batch: SRFT's imitation and RL, arXiv:2506.19767, eq. 13.

        loss = 1/normaliser Σ_i Σ_t m_it l_it        h_i = mean of H_it over the tokens of row i, a number (1)
        in a demonstration:  l = -w log p - A f(p)   w = c e^(-h) (2)   f(p) = p / (p + γ) (3)
        in a rollout:        l = -s log p            s = d e^h A if A > 0, else A (4)

    Tensors hold the rows of one micro-batch, padded to T tokens. logp, entropy (rows, T), in nats: log p of
        the tokens, and H of the policy there, which gets no gradient.
        advantages, (rows,), (rows, 1) or (rows, T): A of demonstrations; of rollouts 1 if right, -1 if wrong.
        mask (rows, T), any dtype: m; what stands where it is 0 is not read. Half precision is computed in
        float32.
    is_demo, any dtype: 1 on demonstrations (rows,), or on tokens that come from one (rows, T).
    normaliser: what the sum over tokens is divided by, the same in all micro-batches of a mini-batch, so that
        they add up: B * L, with the B rows of the whole mini-batch. Default: rows * T of these tensors.
    gamma: γ; None for f(p) = p. sft_weight: c. positive_weight: d.
    constant_weights: h counts as 0 in the weights.
    Returns the loss and metrics {name: (sum, number of values)}, so that means over micro-batches are exact.
    weight/demonstrations, weight/positives: w and, of right rollouts, s, per token.

    >>> logp, entropy = torch.tensor([[0.1], [0.5], [0.5]]).log(), torch.tensor([[2.0], [2.0], [9.0]]).log()
    >>> advantages, is_demo = torch.tensor([0.5, 1.0, -1.0]), torch.tensor([1, 0, 0])
    >>> loss, metrics = srft_loss(logp, entropy, advantages, torch.ones(3, 1), is_demo, normaliser=1)
    >>> metrics["weight/demonstrations"], metrics["weight/positives"]     # e^h = 2: 0.5 / 2 and 0.1 * 2
    ((tensor(0.2500), tensor(1)), (tensor(0.2000), tensor(1)))
    >>> round(loss.item(), 4)     # 0.25 * 2.3026 - 0.5 * 0.1/0.2 + 0.2 * 0.6931 - 0.6931
    -0.2289
    """
    mask = mask.bool()
    logp = torch.where(mask, logp.to(torch.promote_types(logp.dtype, torch.float32)), 0.0)
    normaliser = mask.numel() if normaliser is None else normaliser
    advantages = torch.where(mask, advantages.reshape(len(mask), -1), 0.0)         # (rows, T)
    demo = mask & is_demo.bool().reshape(len(mask), -1)                            # (rows, T)
    on_policy = mask & ~demo
    count = on_policy.sum()
    entropy = torch.where(mask, entropy.detach().to(logp.dtype), 0.0)
    h = entropy.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)   # (1) (rows, 1)
    h = torch.zeros_like(h) if constant_weights else h
    w = sft_weight * (-h).exp()                                                    # (2)
    p = logp.exp()
    shaped = p if gamma is None else p / (p + gamma)                               # (3) f(p)
    s = torch.where(advantages > 0, positive_weight * h.exp() * advantages, advantages)  # (4)
    token_loss = torch.where(demo, -w * logp - advantages * shaped, -s * logp)
    right, wrong = on_policy & (advantages > 0), on_policy & (advantages < 0)
    metrics = {
        "token_loss/rollouts": ((token_loss.detach() * on_policy).sum(), count),
        "token_loss/demonstrations": ((token_loss.detach() * demo).sum(), demo.sum()),
        "entropy/demonstrations": ((entropy * demo).sum(), demo.sum()),
        "weight/demonstrations": ((w * demo).sum(), demo.sum()),
        "weight/positives": ((s * right).sum(), right.sum()),
        "logp/negatives": ((logp.detach() * wrong).sum(), wrong.sum()),
    }
    return token_loss.sum() / (normaliser or 1), metrics                           # 0 without tokens


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
    gamma = None if args.shaping == "none" else args.gamma
    weights = args.sft_weight, args.positive_weight, args.constant_weights
    run = Run(args)
    for step in run.steps():
        rows = make_batch(run, args, run.next_problems())
        rewards = run.verify(rows)  # sets row.reward: 1.0 if the box after </think> is right, else 0.0
        groups = torch.tensor([row.problem.index for row in rows])
        advantages = group_advantages(rewards, groups, args.std_normalise)
        for row, advantage in zip(rows, advantages.tolist()):
            row.advantage = advantage if row.is_demo else 2 * row.reward - 1  # of a rollout 1 or -1
        run.score(rows)  # for entropy and sampler_gap in the metrics: this loss has no ratio to π_old
        for minibatch in run.minibatches(rows):  # --updates of them, one optimiser step each
            tokens = sum(len(row.response) for row in minibatch)
            normaliser = len(minibatch) * args.max_response
            for batch in run.micro_batches(minibatch, all_rows=True):  # tensors, also of rows of A = 0
                logp, entropy = run.logprobs(batch, entropy=True)  # (rows, T); 0 outside the mask
                loss, metrics = srft_loss(logp, entropy, batch.advantages, batch.mask, batch.is_demo,
                                          normaliser, gamma, *weights)
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
