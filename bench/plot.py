"""Draws runs side by side from their metrics.jsonl: accuracy per slice, reward, entropy, length, sampler's gap.

    pip install matplotlib
    python bench/plot.py runs/grpo-toy-1 runs/luffy-toy-1                # writes runs.png
    python bench/plot.py runs/luffy-toy-1 --out luffy.png --smooth 15

Behind each smoothed curve stands the raw one, pale. Accuracy is drawn as it was measured, point by point. It
stands in bench/ and not beside the methods: the top level has what trains, and nothing else.
"""
import argparse
import json
import math
import statistics
import sys
from pathlib import Path

MEANS = {  # metric: title
    "reward": "reward of rollouts", "entropy": "entropy of rollouts, nats", "response/length": "length, tokens",
    "sampler_gap": "log-prob gap, sampler to trainer",
}


def fail(message: str):
    print(f"plot.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read(folder: Path) -> list[dict]:
    """The lines of a run's metrics."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        fail(f"{path}: no such file; name the folder of a run, such as runs/luffy-toy-1")
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            fail(f"{path}, line {number}: not JSON")
    if not lines:
        fail(f"{path} is empty: the run has not been evaluated yet")
    return lines


def smoothed(values: list[float], window: int) -> list[float]:
    """Centred moving means: of `window` values, and of fewer near the ends, as many before as after.

    >>> smoothed([1.0, 3.0, 8.0, 4.0], window=3)
    [1.0, 4.0, 5.0, 4.0]
    """
    result = []
    for place in range(len(values)):
        reach = min(window // 2, place, len(values) - 1 - place)
        result.append(statistics.fmean(values[place - reach:place + reach + 1]))
    return result


def draw(runs: dict[str, list[dict]], path: Path, smooth: int = 5):
    """One panel per metric that some run has; one colour per run. Returns the figure."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {name for lines in runs.values() for line in lines for name in line}
    accuracies = {name: name.replace("accuracy/", "accuracy, ") for name in sorted(names)
                  if name.startswith("accuracy/")}
    panels = accuracies | {name: title for name, title in MEANS.items() if name in names}
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows + 0.3 * len(runs) ** 0.5),
                                layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, (metric, title) in zip(axes.flat, panels.items()):
        for number, lines in enumerate(runs.values()):
            points = [(line["step"], line[metric]) for line in lines if metric in line]
            if not points:
                continue
            steps, values = zip(*points)
            if metric in accuracies:
                axis.plot(steps, values, ".-", color=f"C{number % 10}")
            else:
                axis.plot(steps, values, color=f"C{number % 10}", alpha=0.25, linewidth=1)
                axis.plot(steps, smoothed(values, smooth), color=f"C{number % 10}")
        axis.set_title(title, fontsize=11)
        if metric.startswith(("accuracy", "reward")):
            axis.set_ylim(-0.03, 1.03)
        if metric == "sampler_gap":
            gaps = [line[metric] for lines in runs.values() for line in lines if line.get(metric, 0) > 0]
            low, high = math.log10(min(gaps, default=1)), math.log10(max(gaps, default=1))
            axis.set(yscale="log", ylim=(10 ** math.floor(low), 10 ** (math.floor(high) + 1)))  # whole decades
        axis.set_xlim(0, max(line["step"] for lines in runs.values() for line in lines) * 1.03 + 0.1)
        axis.grid(alpha=0.2)
    for column in range(columns):
        last = [row for row in range(rows) if row * columns + column < len(panels)][-1]
        axes[last, column].set_xlabel("step")
    lines = [plt.Line2D([], [], color=f"C{number % 10}") for number in range(len(runs))]
    abreast = 1 + columns * 45 // (12 + max(map(len, runs)))  # entries of the legend in a line, by their length
    figure.legend(lines, list(runs), loc="outside lower center", ncols=min(abreast, len(runs)), fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path("runs.png"), help="the picture (default: runs.png)")
    parser.add_argument("--smooth", type=int, default=5, help="steps in a moving mean; 1: none (default: 5)")
    args = parser.parse_args()
    if args.smooth < 1:
        fail(f"--smooth is {args.smooth}: it must be at least 1")
    names = [folder.resolve().name for folder in args.runs]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, args.runs)]
    runs = {label: read(folder) for label, folder in zip(labels, args.runs)}
    draw(runs, args.out, args.smooth)
    print(f"{', '.join(runs)}: {args.out}")


if __name__ == "__main__":
    main()
