"""Accuracy on held-out problems: mean over samples, pass@k, a table, and every answer with its verdict."""
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

from tqdm import tqdm

from runtime import processes
from runtime.flags import Args
from runtime.reward import OwnReward
from runtime.rows import Codec, Problem, Row
from runtime.sampling import Sampler
from runtime.verification import NAMES, Verifier, boxed_answer


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that one of k responses is right, if `right` of `samples` are: 1 - C(n-c, k) / C(n, k).

    The unbiased estimate of arXiv:2107.03374, eq. 1 (k <= samples); 1 - (1 - c/n)^k would be too low.
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def summarise(rows: list[Row]) -> dict[str, dict[str, float]]:
    """{slice: figures} of verified rows of held-out problems.

    accuracy: mean over the samples of a problem, then over problems, with its standard error over problems.
    pass@k for k = 2, 4, 8, ... up to the samples of a problem.
    """
    slices = defaultdict(lambda: defaultdict(list))
    for row in rows:
        slices[row.problem.part][row.problem].append(row.reward)
    summary = {}
    for name, problems in slices.items():
        means = [statistics.mean(rewards) for rewards in problems.values()]
        samples = min(map(len, problems.values()))
        error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else math.nan
        summary[name] = {"problems": len(problems), "samples": samples, "accuracy": statistics.mean(means),
                         "error": error}
        for k in [2 ** power for power in range(1, samples.bit_length())]:
            passed = [pass_at_k(len(rewards), rewards.count(1), k) for rewards in problems.values()]
            summary[name][f"pass@{k}"] = statistics.mean(passed)
    return summary


def table(summary: dict[str, dict[str, float]]) -> str:
    """The figures as lines of text, with the mean over slices last, as the papers report it."""
    ks = sorted({name for figures in summary.values() for name in figures if "@" in name},
                key=lambda name: int(name.partition("@")[2]))
    lines = [["slice", "problems", "samples", "accuracy", *ks]]
    for name, figures in summary.items():
        accuracy = f"{figures['accuracy']:.3f} ± {figures['error']:.3f}"
        passed = [f"{figures[k]:.3f}" if k in figures else "" for k in ks]
        lines.append([name, str(figures["problems"]), str(figures["samples"]), accuracy, *passed])
    mean = statistics.mean(figures["accuracy"] for figures in summary.values())
    lines.append(["mean of slices", "", "", f"{mean:.3f}", *[""] * len(ks)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def write_answers(path: Path, step: int, rows: list[Row], texts: list[str], verdicts: list[int | None]):
    """Appends every answer with its verdict: slice, the problem's row in its source, reference, response."""
    with open(path, "a") as file:
        for row, text, verdict in zip(rows, texts, verdicts):
            answer = {"step": step, "slice": row.problem.part, "index": row.problem.index,
                      "reference": row.problem.answer, "boxed": boxed_answer(text), "reward": row.reward,
                      "verdict": NAMES.get(verdict, "crash"), "tokens": len(row.response), "response": text}
            file.write(json.dumps(answer) + "\n")


def evaluate(
    args: Args, step: int, held_out: list[Problem], sampler: Sampler, verifier: Verifier | OwnReward,
    codec: Codec, path: Path,
) -> dict[str, float]:
    """Samples and verifies responses to the held-out problems; every answer is appended to `path`.

    Returns accuracy/<slice> and, where a problem has several samples, pass@k/<slice>.
    """
    problems = [problem for problem in held_out for _ in range(problem.samples)]
    rows = sampler.rows(problems, args.eval_response, args.eval_temperature, args.seed, logprobs=False)
    texts, verdicts = verifier.judge(rows, codec)
    if processes.first():
        write_answers(path, step, rows, texts, verdicts)
    summary = summarise(rows)
    shown = ", ".join(f"{name} {figures['accuracy']:.3f}" for name, figures in summary.items())
    tqdm.write(table(summary) if args.eval_only else f"step {step}: {shown or 'no problems are held out'}")
    return {f"{kind}/{name}": value for name, figures in summary.items()
            for kind, value in figures.items() if kind == "accuracy" or "@" in kind}
