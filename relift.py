"""ReLIFT: reinforcement learning interleaved with fine-tuning on the hardest questions. See docs/relift.md

    Learning What Reinforcement Learning Can't: Interleaved Online Fine-Tuning for Hardest Questions.
    Ma, Liang, Qiang, Tang, Ma, Wong, Niu, Shen, He, Li, Cui, Zhang. arXiv:2506.07527.

RL improves what a model can already do now and then; fine-tuning on demonstrations brings in what it cannot
do at all, but harms what it can. ReLIFT does each where it helps: RL on all prompts, and fine-tuning only
on those that no rollout solved. These prompts wait in a buffer, and once M of them wait, a step of
fine-tuning on their demonstrations follows.

As in the authors' script, but for 1/B (the RL of the paper is GRPO with its clip):

    RL:   J = 1/(B L) Σ_i Σ_t m_it r_it A_i  +  β/N Σ_i Σ_t m_it H_it
    SFT:  J = 1/N Σ_i Σ_t m_it log π(y_it)   +  β/N Σ_i Σ_t m_it H_it    on M demonstrations y_i of the buffer

    r_it = π(y_it) / π_old(y_it)      A_i = R_i - mean(R of the group)      N = Σ_i Σ_t m_it

  i, t      a row of the mini-batch (SFT: of the M demonstrations), and a token y_it of it; B rows
  R_i       reward of a rollout: 1 if the boxed answer after </think> is right, else 0; the group are the
            rollouts to one prompt
  π, π_old  the policy, and the policy before this step's updates (row.old_logp), both at --temperature
  m_it      batch.mask: 1 on the tokens of a response up to and including EOS, else 0
  H_it      entropy of π at the token; β = --entropy_bonus
  L         --max_response        M = --sft_batch

Newest prompts first, as in the authors' script: those that today's policy fails. At most one step of
fine-tuning follows a step of RL; what is left waits for the next one, the oldest perhaps for ever. With
--updates 1, r is 1 and its gradient that of log π.

Compared with the others: LUFFY puts the demonstration of every prompt, solved or not, into its group and
weighs it by the group's rewards; CHORD imitates demonstrations of any prompt in every step. Here it is a
step of its own, with AdamW moments of its own, on unsolved prompts alone, and every token weighs the same.

Deviations
  - The paper describes clipped GRPO; the authors' script does not clip and divides by the constant L. So
    here, but by B L. On 8 cards, which take 512 rows and average their gradients, the script's loss is 64
    times ours: its gradient clip of 0.7 in RL acts more often there, and its entropy bonus counts less.
  - The authors' code crashes when no prompt has failed yet, trains on a bare EOS where a demonstration is
    missing, and cuts the last token of one that fills L. Here an empty buffer is fine, and a prompt without
    a demonstration, or with one of more than L tokens or a wrong answer, adds nothing and is counted.
  - On 8 cards the authors' gradient of fine-tuning is 1/8 of the intended one. Here it is the token mean.
  - A prompt that waits in the buffer and fails again moves to the front; it is not added twice.

On the toy (six runs, README.md) the share of hard problems solved passes 0.5 at step 10 or 15 and ends at
0.92-0.98. The paper used 13% of its demonstrations; here that share is logged as relift/used.

On a CPU, in a minute:  python relift.py
On a GPU:               python relift.py --model Qwen/Qwen2.5-Math-1.5B
"""
from collections import defaultdict
from dataclasses import dataclass

import common  # first: it reads the flags before torch is imported, which takes seconds
import torch
from common import Problem, Row, Run, flag
from grpo import group_advantages


@dataclass
class Args(common.Args):
    max_grad_norm: float = flag("a longer gradient is scaled to this norm, RL", toy=1.0, real=0.7, least=1e-6)
    entropy_bonus: float = flag("β: weight of the tokens' mean entropy, in RL and SFT", toy=0.0, real=0.001)
    sft_batch: int = flag("M: demonstrations of a step of fine-tuning", toy=16, real=128, least=1)
    sft_max_grad_norm: float = flag("the same for the step of fine-tuning", 1.0, least=1e-6)


# -------------------------------------------------------------------------------------------- the losses
def rl_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    normaliser: float | None = None,
) -> tuple[torch.Tensor, dict]:
    """-J of RL without the entropy, for one micro-batch: the policy gradient with ratios, without a clip.

        loss = 1/normaliser Σ_i Σ_t m_it (-A_i r_it)        r = π / π_old (1)    -A r (2)

    Tensors hold the rows of one micro-batch, padded to T tokens. logp, old_logp (rows, T): log-probs in nats,
        of π and π_old. advantages: A, (rows,), (rows, 1) or (rows, T).
        mask (rows, T), any dtype: m; what stands where it is 0 is not read. Half precision is computed in
        float32. A log-ratio above 60 counts as 60, so that nothing overflows.
    normaliser: what the sum over tokens is divided by, the same in all micro-batches of a mini-batch, so that
        they add up: B * L, with the B rows of the whole mini-batch, or its number of response tokens. Rows
        that micro-batches leave out, since A = 0, count there too. Default: rows * T of these tensors.
    Returns the loss and metrics {name: (sum, number of values)}, so that means over micro-batches are exact.

    >>> logp, old_logp = torch.tensor([[0.5], [0.25]]).log(), torch.tensor([[0.25], [0.5]]).log()
    >>> loss, _ = rl_loss(logp, old_logp, torch.tensor([1.0, -1.0]), torch.ones(2, 1))
    >>> round(loss.item(), 4)     # r = 2 and r = 0.5: (-2 + 0.5) / (2 rows * 1 token)
    -0.75
    """
    mask = mask.bool()
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    count = mask.sum()
    normaliser = mask.numel() if normaliser is None else normaliser
    advantages = torch.where(mask, advantages.reshape(len(mask), -1), 0.0)         # (rows, T)
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    ratio = log_ratio.clamp(max=60).exp()                                          # (1) r, at most e⁶⁰
    token_loss = -advantages * ratio                                               # (2) -A r
    metrics = {
        "token_loss/rollouts": (token_loss.detach().sum(), count),
        # The k1 estimate of KL(π_old || π): log π_old - log π of sampled tokens; single ones may be negative.
        "kl/old_policy": (-log_ratio.detach().sum(), count),
    }
    return token_loss.sum() / (normaliser or 1), metrics                           # 0 without tokens


def sft_loss(
    logp: torch.Tensor, mask: torch.Tensor, tokens: float | None = None,
) -> tuple[torch.Tensor, dict]:
    """-J of SFT without the entropy, for one micro-batch: the token mean of -log π over demonstrations.

    logp (rows, T): log-probs in nats. mask (rows, T), any dtype: m; what stands where it is 0 is not read.
    tokens: N, the tokens of all M demonstrations, the same for all micro-batches, so that they add up.
        Default: those of these tensors; without any the loss is 0.
    Returns the loss and metrics {name: (sum, number of values)}, so that means over micro-batches are exact.

    >>> loss, _ = sft_loss(torch.tensor([[0.5, 0.25], [0.125, 1.0]]).log(), torch.tensor([[1, 1], [1, 0]]))
    >>> round(loss.item(), 4)     # (log 2 + log 4 + log 8) / 3 = 2 log 2
    1.3863
    """
    mask = mask.bool()
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    tokens = mask.sum() if tokens is None else tokens
    nll = -torch.where(mask, logp, 0.0).sum()
    return nll / (tokens or 1), {"token_loss/demonstrations": (nll.detach(), mask.sum())}


# --------------------------------------------------------------------------------------- what is in a batch
def make_batch(run: Run, args: Args, problems: list[Problem]) -> list[Row]:
    """On-policy: n rollouts of the policy for each prompt. Demonstrations have steps of their own."""
    return run.rollout([problem for problem in problems for _ in range(args.n)])


def hardest(rows: list[Row]) -> list[Problem]:
    """The problems whose rollouts all have reward 0, in the order of the rows.

    >>> rollouts = ("A", 0.0), ("B", 0.0), ("A", 1.0), ("B", 0.0), ("C", 0.0)     # problem and reward
    >>> hardest([Row(problem, response=[], reward=reward) for problem, reward in rollouts])
    ['B', 'C']
    """
    rewards = defaultdict(list)
    for row in rows:
        rewards[row.problem].append(row.reward)
    return [problem for problem, group in rewards.items() if max(group) == 0]


def take_from_buffer(buffer: list, new: list, size: int) -> tuple[list, list]:
    """(what to fine-tune on, what stays in the buffer), from the unsolved prompts that wait and the new ones.

    Nothing until `size` wait. Newest first: today's policy fails these, and may have learnt to solve the old
    ones. So a prompt that waits and fails again moves to the front; it is not added twice. Only one step of
    `size` demonstrations after a step of RL, so that imitation does not take over; what is left waits.

    >>> take_from_buffer(buffer=[5, 6, 7], new=[8, 6], size=3)      # in order: 8, 6, 5, 7
    ([8, 6, 5], [7])
    >>> take_from_buffer(buffer=[5], new=[5], size=2)
    ([], [5])
    """
    buffer = new + [old for old in buffer if old not in new]
    return (buffer[:size], buffer[size:]) if len(buffer) >= size else ([], buffer)


def main():
    args = common.parse(Args, __doc__)
    run = Run(args)
    by_index = {problem.index: problem for problem in run.train if problem.demonstration}
    for step in run.steps():
        rows = make_batch(run, args, run.next_problems())
        rewards = run.verify(rows)  # sets row.reward: 1.0 if the box after </think> is right, else 0.0
        groups = torch.tensor([row.problem.index for row in rows])
        advantages = group_advantages(rewards, groups)
        for row, advantage in zip(rows, advantages.tolist()):
            row.advantage = advantage
        run.score(rows)  # sets row.old_logp: log π_old by the trainer, before this step's updates
        for minibatch in run.minibatches(rows):  # --updates of them, one optimiser step each
            tokens = sum(len(row.response) for row in minibatch)
            normaliser = len(minibatch) * args.max_response
            for batch in run.micro_batches(minibatch, args.entropy_bonus):  # tensors, without rows of A = 0
                logp, entropy = run.logprobs(batch, args.entropy_bonus)  # (rows, T); 0 outside the mask
                loss, metrics = rl_loss(logp, batch.old_logp, batch.advantages, batch.mask, normaliser)
                run.backward(loss - args.entropy_bonus * entropy.sum() / tokens, metrics)
            run.optimizer_step(minibatch)  # clips the gradient's norm; AdamW

        unsolved = hardest(rows)
        new = [problem.index for problem in unsolved if run.demonstrations.of(problem)]
        sft, run.state["buffer"] = take_from_buffer(run.state.get("buffer", []), new, args.sft_batch)
        demonstrations = [run.demonstrations.of(by_index[index]) for index in sft]
        for row in demonstrations:
            row.advantage = 1.0  # imitated, not compared; rows of A = 0 are left out
        tokens = sum(len(row.response) for row in demonstrations)
        for batch in run.micro_batches(demonstrations):
            logp, entropy = run.logprobs(batch, args.entropy_bonus)
            loss, metrics = sft_loss(logp, batch.mask, tokens)
            run.backward(loss - args.entropy_bonus * entropy.sum() / tokens, metrics)
        if demonstrations:
            run.optimizer_step(demonstrations, moments="sft", max_grad_norm=args.sft_max_grad_norm)
        run.state["used"] = sorted({*run.state.get("used", []), *sft})
        run.state["sft_steps"] = run.state.get("sft_steps", 0) + bool(demonstrations)
        run.log("relift/without_demonstration", len(unsolved) - len(new))
        run.log("relift/buffer", len(run.state["buffer"]))
        run.log("relift/sft_steps", run.state["sft_steps"])
        run.log("relift/used", len(run.state["used"]) / max(1, len(by_index)))
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
