"""RL-PLUS: demonstrations with an importance weight that cannot explode. A diff of luffy.py.

    RL-PLUS: Countering Capability Boundary Collapse of LLMs in Reinforcement Learning with Hybrid-policy
    Optimization. Dong, Jiang, Tao, Liu, Zhang, Mou, Cao, Ma, Chen, Li, Jin, Huang, Li, Li. arXiv:2508.00222.

RL sharpens what a model can do and hardly adds to it: problems that it never solves stay so. Demonstrations
add to it, but the importance weight that would correct for their author needs his probabilities, and nobody
has them. RL-PLUS divides by a mixture of what is known, so that the weight is bounded everywhere, and turns
the advantage towards the tokens that the policy finds unlikely, which it would not explore by itself.

    J = 1/(B L) [ Σ_{i rollout} Σ_t m_it r_it A_i  +  Σ_{i demonstration} Σ_t m_it w_it (1 - sg(p_it))^γ A_i ]
        + β/N Σ_i Σ_t m_it H_it

    r_it = π(y_it) / π_old(y_it)      p_it = π(y_it)      A_i = R_i - mean(R of its group)
    w_it = p_it / (½ π_ω(y_it) + ½ π_old(y_it))           π_ω(y_it) = ½ π_old(y_it) + ½ u

  i, t      a row of the mini-batch, rollout or demonstration, and a token y_it of it; it has B rows
  R_i       its reward, a demonstration's too: 1 if the boxed answer after </think> is right, else 0
  group     the n rows of one prompt, the demonstration included
  π, π_old  the policy, and the policy before this step's updates (row.old_logp), both at --temperature
  w_it      multiple importance sampling: the token could have been written by the demonstrator or by π_old.
            π_ω stands in for the demonstrator: half of it is π_old again, half the constant u = --uniform
  γ         --gamma: how far unlikely tokens are preferred (the exploration-based advantage); 0: not at all
  sg        .detach(): 1 - p is a number, through which no gradient goes
  m_it      batch.mask: 1 on the tokens of the response up to and including EOS, else 0; N = Σ_i Σ_t m_it
  L         --max_response        n = --n        H_it: entropy of π at the token; β = --entropy_bonus

Written out, w = 2p / (1.5 π_old + 0.5 u). The gradient of a demonstration's token is A w (1-p)^γ ∇ log p. At
a step's first update π_old is p and w = 4p / (3p + u); and u decides what the method is. With u = 1, which
the authors' code has, the weight is 4p for the rarest tokens, goes to 0 with p, and is largest, 0.57, at
p = 0.46: close to LUFFY without shaping. With u = 1/V, one over the size of the vocabulary, as in the paper,
w is 4/3 for every token that is much likelier than 1/V: nearly fine-tuning. At V = 150,000 a token of
p = 0.001 has w = 1.33 with the one and 0.004 with the other. Both are 0 at p = 1, if γ > 0.

Compared with the others: LUFFY takes the demonstrator's probability as 1, so that its weight is p, and lifts
it for rare tokens by shaping, to 10 p; it reads no π_old on demonstrations. Here it is read, so that the
weight of a token that became likelier since π_old can pass 1.

Deviations
  - u is 1/V in the paper and 1 in the authors' code, whatever V is. Here 1 (`--uniform`), the released one.
  - The paper divides A by the standard deviation over all n rows (`--std_normalise`); the authors' script
    does not. γ is a parameter in the paper and 0.5, written out, in the code.
  - The script removes the clip of rollouts and the mean over tokens that the code has (`--clip`,
    `--token_mean`), divides by the constant L, and never by B: its loss is B times ours.
  - Which demonstrations are left out is as in luffy.py.

On the toy (one base, two seeds) the share of hard problems solved is 0.46 and 0.55 at step 10, 0.92 and 0.92
at step 15, 0.98 and 0.97 at step 80. That does not tell it from LUFFY (one seed: 0.68, 0.92, 0.98), nor from
γ = 0 (one seed: 0.45, 0.91, 0.98). The paper's u, here 1/54, is ahead at step 10 (one seed): 0.91, then
0.95 and 0.97.

On a CPU, in a minute:  python more/rl_plus.py
On a GPU:               python more/rl_plus.py --model Qwen/Qwen2.5-Math-7B
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
    std_normalise: bool = flag("divide A by the group's standard deviation (RL-PLUS's paper)", False)
    token_mean: bool = flag("divide by N, the mini-batch's tokens, in place of B L", False)
    clip: bool = flag("clip the ratio of on-policy tokens", False)
    clip_low: float = flag("ε_low: the ratio is clipped below 1 - ε_low", 0.2, least=0, most=1,
                           only_with="clip")
    clip_high: float = flag("ε_high: the ratio is clipped above 1 + ε_high", 0.2, least=0, only_with="clip")
    gamma: float = flag("γ: demonstration tokens count (1 - p)^γ times; 0: the ablation", 0.5, least=0)
    uniform: float = flag("u: constant half of the demonstrator's stand-in; the paper's is 1/vocabulary", 1.0,
                          least=1e-9, most=1)


# ---------------------------------------------------------------------------------------------- the loss
def rl_plus_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    is_demo: torch.Tensor,
    normaliser: float | None = None,
    gamma: float = 0.5, uniform: float = 1.0, clip_low: float | None = None, clip_high: float | None = None,
) -> tuple[torch.Tensor, dict]:
    """-J without the entropy, for one micro-batch: RL-PLUS's mixed policy gradient, arXiv:2508.00222.

        loss = 1/normaliser Σ_i Σ_t m_it l_it
        in a demonstration:  l = -A w (1 - sg(p))^γ (8)    p = π (5)
                             w = 2p / (1.5 π_old + 0.5 u) (6)    (1 - sg(p))^γ (7)
        in a rollout:        l = max(-A r, -A clip(r, 1 - ε_low, 1 + ε_high)), (1) to (4) of grpo_loss

    Tensors hold the rows of one micro-batch, padded to T tokens. logp, old_logp (rows, T): log-probs in nats,
        of π and π_old, of demonstrations too. advantages: A, (rows,), (rows, 1) or (rows, T).
        mask (rows, T), any dtype: m; what stands where it is 0 is not read. Half precision is computed in
        float32. A log-ratio above 60 counts as 60, so that nothing overflows.
    is_demo, any dtype: 1 on demonstrations (rows,), or on tokens that come from one (rows, T).
    normaliser: what the sum over tokens is divided by, the same in all micro-batches of a mini-batch, so that
        they add up: B * L, with the B rows of the whole mini-batch, or its number of response tokens. Rows
        that micro-batches leave out, since A = 0, count there too. Default: rows * T of these tensors.
    gamma: γ. uniform: u, above 0. clip_low, clip_high: ε_low and ε_high; None for no clip.
    Returns the loss and metrics {name: (sum, number of values)}, so that means over micro-batches are exact.
    weight/demonstrations: w (1 - p)^γ, by which A ∇ log p of a demonstration's token is multiplied.

    >>> logp, old_logp = torch.tensor([[0.5], [0.75]]).log(), torch.tensor([[0.25], [1/3]]).log()
    >>> advantages, is_demo = torch.tensor([-0.5, 0.5]), torch.tensor([False, True])
    >>> loss, metrics = rl_plus_loss(logp, old_logp, advantages, torch.ones(2, 1), is_demo)
    >>> metrics["weight/demonstrations"]     # w = 2 * 0.75 / (0.5 + 0.5), and sqrt(1 - 0.75)
    (tensor(0.7500), tensor(1))
    >>> round(loss.item(), 4)     # rollout: r = 2; (0.5 * 2 - 0.5 * 0.75) / 2
    0.3125
    """
    mask = mask.bool()
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    old_logp = old_logp.to(logp.dtype)
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
    p = torch.where(demo, logp, 0.0).exp()                                         # (5)
    old_p = torch.where(demo, old_logp, 0.0).exp()
    # The weight's denominator is a number, at least u/2: where π_old is 0, w is 4p/u and no spike.
    weight = 2 * p / (1.5 * old_p + 0.5 * uniform)                                 # (6) w
    weight = weight * (1 - p.detach()).clamp(min=0) ** gamma                       # (7) p may round above 1
    token_loss = torch.where(demo, -advantages * weight, token_loss)               # (8) RL-PLUS
    metrics = {
        "token_loss/rollouts": ((token_loss.detach() * on_policy).sum(), count),
        "token_loss/demonstrations": ((token_loss.detach() * demo).sum(), demo.sum()),
        "weight/demonstrations": ((weight.detach() * demo).sum(), demo.sum()),
        "clip_fraction": ((clipped > unclipped).sum(), count),
        # The k1 estimate of KL(π_old || π): log π_old - log π of sampled tokens; single ones may be negative.
        "kl/old_policy": (-log_ratio.detach().sum(), count),
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
    clip = (args.clip_low, args.clip_high) if args.clip else (None, None)
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
            for batch in run.micro_batches(minibatch, args.entropy_bonus):  # tensors, without rows of A = 0
                logp, entropy = run.logprobs(batch, args.entropy_bonus)  # (rows, T); 0 outside the mask
                loss, metrics = rl_plus_loss(
                    logp, batch.old_logp, batch.advantages, batch.mask, batch.is_demo,
                    normaliser, args.gamma, args.uniform, *clip)
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
