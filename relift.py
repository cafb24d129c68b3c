"""ReLIFT: reinforcement learning interleaved with online fine-tuning on the hardest questions.

    Learning What Reinforcement Learning Can't: Interleaved Online Fine-Tuning for Hardest Questions.
    Ma, Liang, Qiang, Tang, Ma, Wong, Niu, Shen, He, Li, Cui, Zhang. arXiv:2506.07527.

RL improves what a model can already do now and then; fine-tuning on demonstrations brings in what it cannot
do at all, but harms what it can. ReLIFT does each where it helps: RL on all prompts, and fine-tuning only on
those that no rollout solved. Their demonstrations wait in a buffer, and a step of fine-tuning follows
whenever enough have come.

    RL:   J = 1/(B L) Σ_i Σ_t m_it r_it A_i      r_it = π(y_it) / π_old(y_it)   A_i = R_i - mean(R of group)
    SFT:  L = -1/N Σ_i Σ_t m_it log π(y*_it) - β H      on M buffered demonstrations y*, of N tokens in all

Deviations
  - The paper describes clipped GRPO; the authors' script does not clip and divides by the constant L. So
    here, but by B L.
  - The authors' code crashes when no prompt has failed yet, trains on a bare EOS where a demonstration is
    missing, and cuts the last token of one that fills L. Here an empty buffer is fine, and a prompt without a
    usable demonstration adds nothing.
  - On 8 GPUs the authors' gradient of fine-tuning is 1/8 of the intended one. Here it is the step's token
    mean.
  - A prompt that waits in the buffer already is not added again.

On a CPU, in minutes:   python relift.py
On a GPU:               python relift.py --model Qwen/Qwen2.5-Math-1.5B
"""
from collections import defaultdict
from dataclasses import dataclass

import torch

import common
from common import Row, flag
from grpo import group_advantages
from run import Run


@dataclass
class Args(common.Args):
    max_grad_norm: float = flag("a longer gradient is scaled to this norm", toy=1.0, real=0.7, least=1e-6)
    entropy_bonus: float = flag("weight of the tokens' mean entropy in fine-tuning", toy=0.0, real=0.001)
    sft_batch: int = flag("demonstrations of a step of fine-tuning, M", toy=16, real=128, least=1)


# -------------------------------------------------------------------------------------------- the losses
def rl_loss(logp, old_logp, advantages, mask, normaliser=None):
    """-J of the formula at the top: the policy gradient with an importance ratio and without clip.

    logp, old_logp (B, T): log-probs in nats of response tokens, under the policy and the policy that sampled.
    advantages (B,). mask (B, T): 1 on response tokens up to and including EOS.
    normaliser: what the sum over tokens is divided by, B * L of the *whole* optimiser step: then the losses
        of its micro-batches add up. By default B * T of these tensors.
    Returns the loss and metrics {name: (sum, count)}, which are exact means over micro-batches too.
    """
    mask = mask.bool()
    normaliser = mask.numel() if normaliser is None else normaliser
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    token_loss = -advantages[:, None] * log_ratio.exp() * mask                     # -r A
    metrics = {
        "loss/on_policy": (token_loss.sum(), mask.sum()),
        "kl/old_policy": (-log_ratio.sum(), mask.sum()),
    }
    return token_loss.sum() / normaliser, metrics                                  # sum / (B L)


def sft_loss(logp, mask, tokens=None):
    """Mean negative log-likelihood of demonstrations. logp, mask (B, T); tokens: N of the whole step."""
    mask = mask.bool()
    tokens = mask.sum() if tokens is None else tokens
    nll = -torch.where(mask, logp, 0.0).sum()
    return nll / tokens, {"loss/off_policy": (nll, mask.sum())}


# --------------------------------------------------------------------------------------- what is in a batch
def make_batch(run, args, problems) -> list[Row]:
    """On-policy: n rollouts of the policy for each prompt. Demonstrations have steps of their own."""
    return run.rollout([problem for problem in problems for _ in range(args.n)])


def hardest(rows: list[Row]) -> list:
    """The problems whose rollouts all have reward 0, in the order of the rows."""
    rewards = defaultdict(list)
    for row in rows:
        rewards[row.problem].append(row.reward)
    return [problem for problem, group in rewards.items() if max(group) == 0]


def take_from_buffer(buffer: list, new: list, size: int) -> tuple[list, list]:
    """(what to fine-tune on, what stays in the buffer): newest first; nothing until `size` wait."""
    buffer = new + [old for old in buffer if old not in new]
    return (buffer[:size], buffer[size:]) if len(buffer) >= size else ([], buffer)


def main():
    args = common.parse(Args, __doc__)
    run = Run(args)
    optimizer = run.make_optimizer("rl")
    sft_optimizer = run.make_optimizer("sft")  # with moments of its own, over the same parameters
    by_index = {problem.index: problem for problem in run.train if problem.demonstration}
    for step in run.steps():
        rows = make_batch(run, args, run.next_problems())
        rewards = run.verify(rows)
        groups = torch.tensor([row.problem.index for row in rows])
        advantages = group_advantages(rewards, groups)
        for row, advantage in zip(rows, advantages.tolist()):
            row.advantage = advantage
        run.score(rows)  # log-probs of the policy that sampled
        for minibatch in run.minibatches(rows):
            normaliser = len(minibatch) * args.max_response
            for batch in run.micro_batches(minibatch):
                logp, _ = run.logprobs(batch)
                run.backward(*rl_loss(logp, batch.old_logp, batch.advantages, batch.mask, normaliser))
            run.optimizer_step(optimizer, minibatch)

        unsolved = hardest(rows)
        new = [problem.index for problem in unsolved if run.demonstration(problem)]
        sft, run.state["buffer"] = take_from_buffer(run.state.get("buffer", []), new, args.sft_batch)
        demonstrations = [run.demonstration(by_index[index]) for index in sft]
        for row in demonstrations:
            row.advantage = 1.0  # imitated, not compared
        tokens = sum(len(row.response) for row in demonstrations)
        for batch in run.micro_batches(demonstrations):
            logp, entropy = run.logprobs(batch, args.entropy_bonus)
            loss, metrics = sft_loss(logp, batch.mask, tokens)
            run.backward(loss - args.entropy_bonus * entropy.sum() / tokens, metrics)
        if demonstrations:
            run.optimizer_step(sft_optimizer, demonstrations)
        run.state["used"] = sorted({*run.state.get("used", []), *sft})
        run.state["sft_steps"] = run.state.get("sft_steps", 0) + bool(demonstrations)
        run.log("relift/without_demonstration", len(unsolved) - len(new))
        run.log("relift/buffer", len(run.state["buffer"]))
        run.log("relift/sft_steps", run.state["sft_steps"])
        run.log("relift/used", len(run.state["used"]) / max(1, len(by_index)))
        run.end_step()
    run.end()


if __name__ == "__main__":
    main()
