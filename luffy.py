"""LUFFY: learning to reason under off-policy guidance. A demonstration joins the rollouts. See docs/luffy.md

    Learning to Reason under Off-Policy Guidance.
    Yan, Li, Hu, Wang, Cui, Qu, Cheng, Zhang. arXiv:2504.14945.

On-policy RL reinforces only what the model already samples: where all rollouts are wrong, all advantages are
0. LUFFY puts an expert's demonstration in the place of one rollout, so that each group has a right answer to
compare with. Policy shaping lifts the gradient of its unlikely tokens, which the model has yet to learn.

    J = 1/(B L) [ Σ_{i rollout} Σ_t m_it r_it A_i  +  Σ_{i demonstration} Σ_t m_it f(p_it) A_i ]
        + β/N Σ_i Σ_t m_it H_it

    r_it = π(y_it) / π_old(y_it)   p_it = π(y_it)   f(p) = p / (p + γ)   A_i = R_i - mean(R of its group)

  i, t      a row of the mini-batch, rollout or demonstration, and a token y_it of it; it has B rows
  R_i       its reward, a demonstration's too: 1 if the boxed answer after </think> is right, else 0
  group     the n rows of one prompt, the demonstration included
  π, π_old  the policy, and the policy before this step's updates (row.old_logp), both at --temperature
  m_it      batch.mask: 1 on the tokens of the response up to and including EOS, else 0; N = Σ_i Σ_t m_it
  γ         --gamma        L = --max_response        n = --n
  H_it      entropy of π at the token; β = --entropy_bonus

The two sums are eq. 6 of the paper; f is its policy shaping. The ratio of a demonstration would be π over the
probability under its author, which nobody knows. The author's is taken as 1, so that the ratio is p. The
price: a token of which the author was sure and one that he wrote by chance count alike.

The gradient of A f(p) is A w ∇ log p with w = γ p/(p+γ)²; without shaping w = p. At γ = 0.1 that is 10 p
for the rarest tokens, still 0 at p -> 0; it is largest, 1/4, at p = γ; at p = 0.22 both are the same; a
token that is certain has 0.08. Shaping favours what is rare, not what is impossible.

Compared with the others: fine-tuning (SFT) has w = 1 for every token of a demonstration, however unlikely,
and CHORD-φ p (1 - p), which vanishes at both ends; neither compares the demonstration with anything. Here
it counts as far as its group does worse (A > 0): once all n rows are right, it teaches nothing.

Deviations
  - The paper clips on-policy ratios, divides by the token count, and A by the standard deviation over all n
    rows; the authors' script removes the clip and the standard deviation and divides by a constant. Here as
    in the script; `--clip --token_mean --std_normalise` together restore the paper's.
  - The authors' script divides by L and never by B: on its 8 cards, which take 512 rows and average their
    gradients, its loss is 64 times ours. So its gradient clip of 1.0 acts more often there, and its entropy
    bonus of 0.001 counts less; both are the defaults here too.
  - The authors' code trains on demonstrations cut at L, without EOS and mostly without an answer. Here one
    that has more than L tokens with its EOS is left out and counted, and its prompt gets an n-th rollout.
  - The authors filter no demonstrations. Here one whose answer is not the reference is left out when the
    data are read, and counted. So the reward of those that remain, by the same verifier as a rollout's, is 1.

On the toy (six runs, README.md) the share of hard problems solved, which stays at 0 with GRPO, passes 0.5
at step 10 or 15 and ends at 0.95-0.98. Shaping helps most on bases that hardly ever begin a line of
working.

On a CPU, in a minute:  python luffy.py
On a GPU:               python luffy.py --model Qwen/Qwen2.5-Math-1.5B
"""
from dataclasses import dataclass

import common  # first: it reads the flags before torch is imported, which takes seconds
import torch
from common import Problem, Row, Run, flag
from grpo import group_advantages


@dataclass
class Args(common.Args):
    entropy_bonus: float = flag("β: weight of the tokens' mean entropy in the objective", toy=0.0, real=0.001)
    std_normalise: bool = flag("divide A by the group's standard deviation (LUFFY's paper)", False)
    token_mean: bool = flag("divide by N, the mini-batch's tokens, in place of B L (LUFFY's)", False)
    clip: bool = flag("clip the ratio of on-policy tokens (LUFFY's paper)", False)
    clip_low: float = flag("ε_low: the ratio is clipped below 1 - ε_low", 0.2, least=0, most=1,
                           only_with="clip")
    clip_high: float = flag("ε_high: the ratio is clipped above 1 + ε_high", 0.2, least=0, only_with="clip")
    shaping: str = flag("f of demonstration tokens; none is f(p) = p, the paper's ablation", "p/(p+gamma)",
                        choices=("p/(p+gamma)", "none"))
    gamma: float = flag("γ of the shaping", 0.1, least=1e-6, not_with="shaping=none")


# ---------------------------------------------------------------------------------------------- the loss
def luffy_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    is_demo: torch.Tensor,
    normaliser: float | None = None,
    gamma: float | None = 0.1, clip_low: float | None = None, clip_high: float | None = None,
) -> tuple[torch.Tensor, dict]:
    """-J without the entropy, for one micro-batch: LUFFY's mixed policy gradient, arXiv:2504.14945, eq. 5, 6.

        loss = 1/normaliser Σ_i Σ_t m_it l_it
        in a demonstration:  l = -A f(p)    p = π (5)    f(p) = p / (p + γ) (6)    -A f(p) (7)
        in a rollout:        l = max(-A r, -A clip(r, 1 - ε_low, 1 + ε_high)), (1) to (4) of grpo_loss

    Tensors hold the rows of one micro-batch, padded to T tokens. logp, old_logp (rows, T): log-probs in nats,
        of π and π_old. advantages: A, (rows,), (rows, 1) or (rows, T).
        mask (rows, T), any dtype: m; what stands where it is 0 is not read, nor is old_logp of
        demonstrations. Half precision is computed in float32. A log-ratio above 60 counts as 60, so that
        nothing overflows.
    is_demo, any dtype: 1 on demonstrations (rows,), or on tokens that come from one (rows, T).
    normaliser: what the sum over tokens is divided by, the same in all micro-batches of a mini-batch, so that
        they add up: B * L, with the B rows of the whole mini-batch, or its number of response tokens. Rows
        that micro-batches leave out, since A = 0, count there too. Default: rows * T of these tensors.
    gamma: γ; None for f(p) = p. clip_low, clip_high: ε_low and ε_high; None for no clip.
    Returns the loss and metrics {name: (sum, number of values)}, so that means over micro-batches are exact.

    >>> logp, old_logp = torch.tensor([[0.5], [0.1]]).log(), torch.tensor([[0.25], [0.0]]).log()
    >>> advantages, is_demo = torch.tensor([-0.5, 0.5]), torch.tensor([False, True])
    >>> loss, _ = luffy_loss(logp, old_logp, advantages, torch.ones(2, 1), is_demo)
    >>> round(loss.item(), 4)     # rollout: r = 2; demonstration: f = 0.1/0.2; (0.5 * 2 - 0.5 * 0.5) / 2
    0.375
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
    p = torch.where(demo, logp, 0.0).exp()                                         # (5)
    # The weight A df/dlog p = A γ p / (p + γ)² of a token is largest, A/4, at p = γ; it goes to 0 with p.
    shaped = p if gamma is None else p / (p + gamma)                               # (6) f(p)
    token_loss = torch.where(demo, -advantages * shaped, token_loss)               # (7) -A f(p): LUFFY
    metrics = {
        "token_loss/rollouts": ((token_loss.detach() * on_policy).sum(), count),
        "token_loss/demonstrations": ((token_loss.detach() * demo).sum(), demo.sum()),
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
    gamma = None if args.shaping == "none" else args.gamma
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
                loss, metrics = luffy_loss(logp, batch.old_logp, batch.advantages, batch.mask, batch.is_demo,
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
