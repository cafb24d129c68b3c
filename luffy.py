"""LUFFY: learning to reason under off-policy guidance. A demonstration joins the rollouts of its prompt.

    Learning to Reason under Off-Policy Guidance.
    Yan, Li, Hu, Wang, Cui, Qu, Cheng, Zhang. arXiv:2504.14945.

On-policy RL reinforces only what the model already samples: where all rollouts are wrong, all advantages are
0. LUFFY puts an expert's demonstration in the place of one rollout, so that each group has a right answer to
compare with. Policy shaping lifts the gradient of its unlikely tokens, the ones that the model has yet to
learn.

    J = 1/(B L) [ Σ_{i on-policy} Σ_t m_it r_it A_i  +  Σ_{i demonstration} Σ_t m_it f(p_it) A_i ]    (eq. 6)
    r_it = π(y_it) / π_old(y_it)    p_it = π(y_it)    f(p) = p / (p + γ)    A_i = R_i - mean(R of all n rows)

for B responses of at most L tokens in an optimiser step; m_it = 1 up to and including EOS, else 0. The
probability of a demonstration under its author is taken as 1, which makes p the importance ratio. Shaping
multiplies the gradient by df/dp = γ / (p + γ)²: at γ = 0.1 by 10 for p = 0, by 1 at p = 0.22, by 0.08 at p =
1.

Deviations
  - The paper clips on-policy ratios and divides by the token count; the authors' script removes the clip and
    divides by a constant. Here as in the script; `--clip` and `--token_mean` restore the paper's.
  - The authors' script divides by L alone, so its loss is B times ours. Its entropy bonus of 0.001 is kept.
  - The authors' code trains on demonstrations cut at L, without EOS and mostly without an answer. Here one
    that does not fit is left out and counted, and its prompt gets an n-th rollout.
  - A demonstration's reward comes from the same verifier as a rollout's; it is not set to 1.

On a CPU, in minutes:   python luffy.py
On a GPU:               python luffy.py --model Qwen/Qwen2.5-Math-1.5B
"""
from dataclasses import dataclass

import torch

import common
from common import Row, flag
from grpo import group_advantages
from run import Run


@dataclass
class Args(common.Args):
    entropy_bonus: float = flag("weight of the tokens' mean entropy in the objective", toy=0.0, real=0.001)
    std_normalise: bool = flag("divide advantages by the group's standard deviation (GRPO's paper)", False)
    token_mean: bool = flag("divide by the step's response tokens instead of B * L (LUFFY's paper)", False)
    clip: bool = flag("clip the ratio of on-policy tokens (LUFFY's paper)", False)
    clip_low: float = flag("lower clip of the ratio, eps_low", 0.2, least=0, most=1)
    clip_high: float = flag("upper clip of the ratio, eps_high (DAPO: 0.28)", 0.2, least=0)
    shaping: str = flag("f of demonstration tokens; none is f(p) = p, the paper's ablation", "p/(p+gamma)",
                        choices=("p/(p+gamma)", "none"))
    gamma: float = flag("gamma of the shaping", 0.1, least=1e-6)


# ---------------------------------------------------------------------------------------------- the loss
def luffy_loss(logp, old_logp, advantages, mask, is_demo, normaliser=None, gamma=0.1,
               clip_low=None, clip_high=None):
    """-J of the formula at the top: arXiv:2504.14945, eq. 5 and 6.

    logp, old_logp (B, T): log-probs in nats of response tokens, under the policy and the policy that sampled
        (old_logp of demonstration tokens is not read).
    advantages (B,). mask (B, T): 1 on response tokens up to and including EOS.
    is_demo (B,) or (B, T): true on demonstrations, or on those tokens of mixed rows that come from one.
    normaliser: what the sum over tokens is divided by, B * L or the number of response tokens, of the *whole*
        optimiser step: then the losses of its micro-batches add up. By default B * T of these tensors.
    gamma: of the shaping p / (p + gamma); None for f(p) = p. clip_low, clip_high: None for no clip.
    Returns the loss and metrics {name: (sum, count)}, which are exact means over micro-batches too.
    """
    mask = mask.bool()
    normaliser = mask.numel() if normaliser is None else normaliser
    advantages = advantages[:, None]                                               # (B, 1)
    demo = mask & is_demo.bool().reshape(len(mask), -1)                            # (B, T)
    on_policy = mask & ~demo
    log_ratio = torch.where(on_policy, logp - old_logp, 0.0)
    ratio = log_ratio.exp()                                                        # (1) r
    unclipped = -advantages * ratio                                                # (2) -r A
    low = None if clip_low is None else 1 - clip_low
    high = float("inf") if clip_high is None else 1 + clip_high
    clipped = -advantages * ratio.clamp(low, high)                                 # (3) -clip(r) A
    p = torch.where(demo, logp, 0.0).exp()                                         # (4) p
    shaped = p if gamma is None else p / (p + gamma)                               # (5) f(p)
    token_loss = torch.where(demo, -advantages * shaped, torch.maximum(unclipped, clipped)) * mask
    metrics = {
        "loss/on_policy": ((token_loss * on_policy).sum(), on_policy.sum()),
        "loss/off_policy": ((token_loss * demo).sum(), demo.sum()),
        "clip_fraction": (((clipped > unclipped) & on_policy).sum(), on_policy.sum()),
        "kl/old_policy": (-log_ratio.sum(), on_policy.sum()),
    }
    return token_loss.sum() / normaliser, metrics                                  # (6) sum / (B L)


# --------------------------------------------------------------------------------------- what is in a batch
def make_batch(run, args, problems) -> list[Row]:
    """Mixed: for each prompt its demonstration and n-1 rollouts, or n rollouts where there is none."""
    demonstrations = {problem: run.demonstration(problem) for problem in problems}
    guided = {problem for problem in problems if demonstrations[problem]}
    rollouts = run.rollout([problem for problem in problems for _ in range(args.n - (problem in guided))])
    return rollouts + [demonstrations[problem] for problem in problems if problem in guided]


def main():
    args = common.parse(Args, __doc__)
    gamma = None if args.shaping == "none" else args.gamma
    clip = (args.clip_low, args.clip_high) if args.clip else (None, None)
    run = Run(args)
    optimizer = run.make_optimizer("rl")
    for step in run.steps():
        rows = make_batch(run, args, run.next_problems())
        rewards = run.verify(rows)
        groups = torch.tensor([row.problem.index for row in rows])
        advantages = group_advantages(rewards, groups, args.std_normalise)
        for row, advantage in zip(rows, advantages.tolist()):
            row.advantage = advantage
        run.score(rows)  # log-probs of the policy that sampled
        for minibatch in run.minibatches(rows):
            tokens = sum(len(row.response) for row in minibatch)
            normaliser = tokens if args.token_mean else len(minibatch) * args.max_response
            for batch in run.micro_batches(minibatch, args.entropy_bonus):
                logp, entropy = run.logprobs(batch, args.entropy_bonus)
                loss, metrics = luffy_loss(logp, batch.old_logp, batch.advantages, batch.mask, batch.is_demo,
                                           normaliser, gamma, *clip)
                run.backward(loss - args.entropy_bonus * entropy.sum() / tokens, metrics)
            run.optimizer_step(optimizer, minibatch)
        run.end_step()
    run.end()


if __name__ == "__main__":
    main()
