"""The first step in one line, and if nothing can be learnt from such a step, why that is and what to do."""

LARGE_GAP = {"cpu": 1e-4, "cuda": 0.05}  # mean nats a token that rounding does not explain: float32, bfloat16


def diagnose(metrics: dict[str, float], device: str, imitates: bool, own_reward: bool) -> list[str]:
    """Lines to print, of a run's first step.

    metrics: of the step, by their names in metrics.jsonl; without verified rollouts there is nothing to say.
    device: "cpu" or "cuda". imitates: demonstrations were asked for, so that wrong rollouts alone are no dead
        end. own_reward: --reward has a function that need not look for </think> and a box.

    >>> step = {"response/cut": 0.1, "response/thought": 0.8, "response/boxed": 0.75, "reward": 0.0,
    ...         "groups/all_wrong": 1.0, "groups/all_right": 0.0, "sampler_gap": 3e-7, "gradient_norm": 0.0}
    >>> for line in diagnose(step, "cpu", imitates=False, own_reward=False):
    ...     print(line[:100])
    first step: 0.90 of the responses end, 0.80 have a </think>, 0.75 a box behind it; mean reward 0.00;
    - No response is right: while that is so there is nothing to reinforce.
    - There are boxes, and none is right: compare them with the answers in samples.jsonl. If they look r
    """
    if not {"response/cut", "response/thought"} <= metrics.keys():
        return []
    ended, thought, boxed = (
        1 - metrics["response/cut"], metrics["response/thought"], metrics["response/boxed"])
    wrong, right = metrics["groups/all_wrong"], metrics["groups/all_right"]
    gap = metrics.get("sampler_gap", 0.0)
    flat = metrics.get("gradient_norm") == 0 and not imitates
    lines = [f"first step: {ended:.2f} of the responses end, {thought:.2f} have a </think>, {boxed:.2f} a "
             f"box behind it; mean reward {metrics['reward']:.2f}; groups all wrong {wrong:.2f}, all right "
             f"{right:.2f}; sampler gap {gap:.1g}"]
    if own_reward:
        if flat:
            lines.append("The function of --reward tells no response of a group from another: no gradient. "
                         "See samples.jsonl.")
    elif wrong == 1 and (ended == 0 or not imitates):
        if not imitates:
            lines.append("No response is right: while that is so there is nothing to reinforce.")
        if ended < 0.5:
            lines.append("Most are cut, and a response that is cut gets no reward: raise --max_response; if "
                         "they ramble on in samples.jsonl, the model does not know the chat template or EOS.")
        elif thought < 0.5 * ended:
            lines.append("Most have no </think>, behind which the answer is looked for: ask for it by "
                         "--system, or begin it by --prompt_end; the prompt is printed at the start.")
        elif boxed < 0.5 * thought:
            lines.append(r"Most have no \boxed{} behind </think>: ask for it by --system; the prompt is "
                         "printed at the start.")
        else:
            lines.append("There are boxes, and none is right: compare them with the answers in "
                         "samples.jsonl. If they look right, see --data's answer column; if not, take easier "
                         "problems, or luffy.py, relift.py or chord.py with demonstrations.")
    elif right == 1:
        lines.append("Every response is right: the reward has nothing left to raise; take harder problems.")
    elif wrong + right == 1 and flat:
        lines.append("Every group is all right or all wrong, so none has anything to compare: raise --n, or "
                     "take problems that are solved now and then.")
    if gap > LARGE_GAP[device]:
        lines.append(f"Sampler and trainer are {gap:.2g} nats a token apart, more than rounding makes: they "
                     "are not the same policy. --rollout transformers samples with the trainer's own model.")
    return lines[:1] + [f"- {line}" for line in lines[1:]]
