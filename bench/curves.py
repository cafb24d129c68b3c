"""Trains every method and the baselines on the toy over seeds, and draws bench/results/curves.png.

    pip install matplotlib
    python bench/curves.py                       # all: an hour and a half on two cores
    python bench/curves.py --only LUFFY GRPO     # some
    python bench/curves.py --q 0.01 --only LUFFY "LUFFY, no shaping"
    python bench/curves.py --draw                # the figure again, from bench/results/curves.jsonl
    python bench/curves.py --pages               # figures and tables of the methods' pages in docs/, from there too
    python bench/curves.py --field               # those of more/, with four of the five: bench/results/field.*
    python bench/curves.py --field --draw        # figure and table in more/README.md again, from field.jsonl

One line of curves.jsonl is one evaluation: method, q and seed of the base model, seed of the run, step,
seconds of training until then (evaluation not counted), accuracy per slice, entropy and response length.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "curves.jsonl"
FIELD_RESULTS = RESULTS.with_name("field.jsonl")
KEPT = ("accuracy/easy", "accuracy/hard", "accuracy/ood", "entropy", "response/length")
METHODS = {  # name: script, flags, colour
    "GRPO": ("grpo", [], "black"),
    "LUFFY": ("luffy", [], "tab:red"),
    "LUFFY, no shaping": ("luffy", ["--shaping", "none"], "lightcoral"),
    "CHORD-mu": ("chord", [], "tab:blue"),
    "CHORD-phi": ("chord", ["--preset", "phi"], "tab:cyan"),
    "RL with SFT loss": ("chord", ["--mu_peak", "0.1", "--mu_valley", "0.1"], "tab:purple"),
    "SFT": ("chord", ["--mu_peak", "1", "--mu_valley", "1", "--expert_share", "0.111"], "tab:grey"),
    "ReLIFT": ("relift", [], "tab:green"),
    "TOPR": ("topr", [], "tab:red"),
    "TOPR, tis": ("topr", ["--weights", "tis"], "tab:orange"),
    "TOPR, ppo": ("topr", ["--weights", "ppo"], "tab:blue"),
    "TOPR, reinforce": ("topr", ["--weights", "reinforce"], "black"),
    "HPT": ("more/hpt", [], "tab:brown"),
    "SRFT": ("more/srft", [], "tab:olive"),
    "RL-PLUS": ("more/rl_plus", [], "tab:green"),
    "AMPO": ("more/ampo", [], "tab:pink"),
    "Prefix-RFT": ("more/prefix_rft", [], "tab:brown"),
    "UFT": ("more/uft", [], "tab:olive"),
    "ExGRPO": ("more/exgrpo", [], "tab:orange"),
    "RL-SFT": ("more/rl_sft", [], "tab:purple"),
    "DAPO": ("more/dapo", [], "tab:grey"),
}
FIELD = ("GRPO", "LUFFY", "CHORD-mu", "ReLIFT", *[name for name in METHODS if METHODS[name][0].startswith("more/")])
PAGES = {  # page in docs/: methods on it, and the slice at which they are told apart
    "grpo": (("GRPO", "LUFFY", "CHORD-mu", "ReLIFT"), "hard"),
    "luffy": (("LUFFY", "LUFFY, no shaping", "GRPO", "SFT"), "hard"),
    "chord": (("CHORD-mu", "CHORD-phi", "RL with SFT loss", "SFT", "GRPO"), "hard"),
    "relift": (("ReLIFT", "LUFFY", "SFT", "GRPO"), "hard"),
    "topr": (("TOPR", "TOPR, tis", "TOPR, ppo", "TOPR, reinforce"), "easy"),
}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in open(path)]


def base_model(q: float, seed: int) -> Path:
    """Folder of a base model: the embedded one, others from the cache or made now, whole or not at all."""
    sys.path.insert(0, str(ROOT))
    import torch
    from safetensors import SafetensorError

    from runtime import toy
    from runtime.cache import cache_folder

    if (q, seed) == (toy.Q, toy.SEED):
        return toy.EMBEDDED
    folder = cache_folder() / f"toy-{toy.recipe()}-{torch.__version__}-{q}-{seed}"
    try:
        toy.Qwen2ForCausalLM.from_pretrained(folder), toy.Qwen2Tokenizer.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError):  # not there, or spoiled
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            toy.write_base(Path(temporary, "model"), q, seed)
            shutil.rmtree(folder, ignore_errors=True)
            Path(temporary, "model").rename(folder)
    return folder


def train(method: str, q: float, base_seed: int, seed: int, base: Path) -> list[dict]:
    """One run in a folder of its own, on one thread; its evaluations."""
    script, flags, _ = METHODS[method]
    every = "48" if script == "topr" else "5"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / f"{script}.py", "--model", base, "--data",
                   "toy:easy" if script == "topr" else "toy", "--eval_every", every, "--seed", str(seed),
                   "--name", "run", "--device", "cpu", *flags]
        done = subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"{method}, seed {seed}: {done.stdout[-2000:]}")
        steps = [json.loads(line) for line in open(Path(folder, "runs", "run", "metrics.jsonl"))]
    seconds, evaluations = 0.0, []
    for metrics in steps:
        seconds += sum(value for name, value in metrics.items() if name.startswith("seconds/"))
        if "accuracy/easy" in metrics:
            kept = {name: metrics[name] for name in KEPT if name in metrics}
            evaluations.append({"method": method, "q": q, "base_seed": base_seed, "seed": seed,
                                "step": metrics["step"], "seconds": round(seconds, 2)} | kept)
    print(f"{method}, base {base_seed}, seed {seed}: hard {evaluations[-1]['accuracy/hard']:.2f}, "
          f"easy {evaluations[-1]['accuracy/easy']:.2f} after {seconds:.0f} s", flush=True)
    return evaluations


def draw_method(axis, lines: list[dict], method: str, metric: str, against: str = "step", label: str = "",
                colour: str = "", style: str = ""):
    """The mean over the method's runs, and the range between the lowest and the highest."""
    points, colour = defaultdict(list), colour or METHODS[method][2]
    for line in lines:
        if line["method"] == method and metric in line:
            points[line["step"]].append(line)
    if not points:
        return
    x = [statistics.mean(line[against] for line in points[step]) for step in sorted(points)]
    values = [[line[metric] for line in points[step]] for step in sorted(points)]
    style = style or ("--" if method == "TOPR, tis" else "-")  # it lies on TOPR's line
    axis.plot(x, [statistics.mean(v) for v in values], style, color=colour, label=label or method)
    axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.12, linewidth=0)


def draw(evaluations: list[dict], path: Path):
    """Mean over seeds, and the range between the lowest and the highest as a band."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    topr = [line for line in evaluations if line["method"].startswith("TOPR")]
    hard_base = [line for line in evaluations if line["q"] == 0.01]
    others = [line for line in evaluations if line["q"] == 0.02 and line not in topr]
    panels = [
        (others, "accuracy/hard", "step", "hard problems: 4 or 5 steps"),
        (others, "accuracy/easy", "step", "easy problems: 1 step"),
        (others, "accuracy/ood", "step", "out of distribution: 6 or 7 steps"),
        (others, "accuracy/hard", "seconds", "hard problems against time"),
        (others, "entropy", "step", "entropy of the rollouts"),
        (others, "response/length", "step", "length of the rollouts"),
        (hard_base, "accuracy/hard", "step", "hard problems, doors of 0.01 instead of 0.02"),
        (topr, "accuracy/easy", "step", "TOPR, easy problems: 5 sets x 48 updates"),
    ]
    figure, axes = plt.subplots(2, 4, figsize=(17, 7.5), constrained_layout=True)
    for axis, (lines, metric, against, title) in zip(axes.flat, panels):
        for method in METHODS:
            draw_method(axis, lines, method, metric, against)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("optimiser steps" if against == "step" else "seconds of training, one CPU thread")
        if metric.startswith("accuracy"):
            axis.set_ylim(-0.03, 1.03)
    for axis in (axes[0, 1], axes[1, 2], axes[1, 3]):
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def draw_page(evaluations: list[dict], page: str, path: Path):
    """Accuracy per slice of a page's methods, on bases of q = 0.02."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for line in evaluations if line["q"] == 0.02]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained", sharey=True)
    for axis, part in zip(axes, ("easy", "hard", "ood")):
        for method in PAGES[page][0]:
            draw_method(axis, lines, method, f"accuracy/{part}")
        axis.set(title=f"{part} problems", xlabel="step", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("accuracy on 128 held-out problems")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def make_table(evaluations: list[dict], methods: tuple[str, ...], part: str, time: bool = True) -> str:
    """Markdown: where the methods' runs end, when they get half of a slice right, and the time of a step.

    time: without it the last column is left out, where the machine was not the same for all.
    """
    runs = defaultdict(lambda: defaultdict(list))  # method: {(base_seed, seed): evaluations}
    for line in evaluations:
        if line["q"] == 0.02:
            runs[line["method"]][line["base_seed"], line["seed"]].append(line)

    def span(values: list[float]) -> str:
        return f"{min(values):.2f}-{max(values):.2f}"

    def seconds(method: str, key) -> float:
        return runs[method][key][-1]["seconds"] / runs[method][key][-1]["step"]

    columns = ["", "easy", "hard", "ood", f"steps until {part} > 0.5", "time of a step, GRPO's = 1"]
    rows = [columns]
    for method in filter(runs.__contains__, methods):
        ends = [lines[-1] for lines in runs[method].values()]
        above = [next((line["step"] for line in lines if line[f"accuracy/{part}"] > 0.5), None)
                 for lines in runs[method].values()]
        reached = sorted(step for step in above if step is not None)
        first = ", ".join(map(str, reached)) + (f"; {above.count(None)} never" if None in above else "")
        ratio = span([seconds(method, key) / seconds("GRPO", key) for key in runs[method]])
        cells = [span([line[f"accuracy/{name}"] for line in ends]) for name in ("easy", "hard", "ood")]
        cells = [method, *cells, first.removeprefix("; "), "1" if method == "GRPO" else ratio]
        rows.append(cells)
    shown = [cells if time else cells[:-1] for cells in rows]
    table = [f"| {' | '.join(cells)} |" for cells in shown]
    return "\n".join([table[0], "|---" * len(shown[0]) + "|", *table[1:]])


def insert_table(path: Path, table: str):
    """Puts it between the lines <!-- table --> and <!-- end -->."""
    before, _, rest = path.read_text(encoding="utf-8").partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- end -->\n")
    path.write_text(f"{before}<!-- table -->\n{table}\n<!-- end -->\n{after}", encoding="utf-8")


def write_pages(evaluations: list[dict]):
    """Draws the figures of the methods' pages, and writes their tables."""
    for page, (methods, part) in PAGES.items():
        draw_page(evaluations, page, RESULTS.parent / f"{page}.png")
        insert_table(ROOT / "docs" / f"{page}.md", make_table(evaluations, methods, part))


def draw_field(evaluations: list[dict], path: Path):
    """A panel for each method of more/, with hard problems under GRPO and LUFFY behind it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [method for method in FIELD if METHODS[method][0].startswith("more/")]
    rows = -(-len(shown) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(11, 2.6 * rows), layout="constrained", sharex=True, sharey=True,
                                squeeze=False)
    for axis in axes.flat[len(shown):]:
        axis.set_visible(False)
    for axis, method in zip(axes.flat, shown):
        for other, style in (("GRPO", ":"), ("LUFFY", "--")):
            draw_method(axis, evaluations, other, "accuracy/hard", label=f"hard, {other}", colour="grey", style=style)
        for part, colour in (("easy", "tab:blue"), ("hard", "tab:red"), ("ood", "tab:orange")):
            draw_method(axis, evaluations, method, f"accuracy/{part}", label=part, colour=colour)
        axis.set_title(method, fontsize=11)
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.2)
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy")
    figure.supxlabel("step", fontsize=10)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=100)


def write_field(evaluations: list[dict]):
    draw_field(evaluations, FIELD_RESULTS.with_suffix(".png"))
    insert_table(ROOT / "more" / "README.md", make_table(evaluations, FIELD, "hard", time=False))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(METHODS), help="default: all, or all of the field")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the runs on each base")
    parser.add_argument("--base_seeds", nargs="+", type=int, help="seeds of the base model; default: 0 1 2, "
                                                                  "with --field 0 1")
    parser.add_argument("--q", type=float, default=0.02, help="probability of a door, see toy.py")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    parser.add_argument("--draw", action="store_true", help="only draw")
    parser.add_argument("--pages", action="store_true", help="only the methods' pages in docs/")
    parser.add_argument("--field", action="store_true", help="the methods of more/")
    args = parser.parse_args()
    results = FIELD_RESULTS if args.field else RESULTS
    methods = args.only or (FIELD if args.field else [name for name in METHODS if "/" not in METHODS[name][0]])
    if args.pages:
        return write_pages(read(RESULTS))
    if not args.draw:
        base_seeds = args.base_seeds or ([0, 1] if args.field else [0, 1, 2])
        jobs = [(method, args.q, base_seed, seed, base_model(args.q, base_seed))
                for method in methods for base_seed in base_seeds for seed in args.seeds]
        with ThreadPoolExecutor(args.jobs) as pool:
            for evaluations in pool.map(lambda job: train(*job), jobs):
                with open(results, "a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in evaluations)
    if args.field:
        write_field(read(results))
    else:
        draw(read(results), RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
