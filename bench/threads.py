"""Seconds of a training step against threads, on a quiet machine and beside a process that keeps a core busy.

    python bench/threads.py          # a quarter of an hour on two cores; writes bench/results/threads.json

Runs of grpo.py on random models of three sizes with OMP_NUM_THREADS = 1, 2 and all cores, in turn. A figure is
the median over steps of rollout and update; ratios are to one thread on the quiet machine.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIZES = {"0.4M": (128, 2), "3M": (256, 4), "27M": (512, 10)}  # name: hidden size, layers
STEPS = 6
SPIN = "import os; bench = os.getppid()\nwhile os.getppid() == bench: pass"  # it does not outlive the bench


def random_model(hidden: int, layers: int, folder: Path) -> Path:
    """A model of the toy's kind and vocabulary."""
    import torch
    from runtime import toy
    tokenizer = toy.make_tokenizer()
    torch.manual_seed(0)
    toy.Qwen2ForCausalLM(toy.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, intermediate_size=3 * hidden,
        max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def seconds_a_step(model: Path, threads: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "grpo.py", "--model", model, "--data", "toy", "--eval_data", "toy",
                   "--steps", str(STEPS), "--eval_every", "1000", "--eval_response", "1", "--device", "cpu",
                   "--max_response", "40", "--entropy_bonus", "0.001", "--name", "x"]
        done = subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                              text=True, capture_output=True)
        if done.returncode:
            sys.exit(done.stderr)
        lines = [json.loads(line) for line in open(Path(folder, "runs", "x", "metrics.jsonl"))]
    parts = [[value for name, value in line.items() if name.startswith("seconds/") and "verification" not in name]
             for line in lines[2:]]
    return statistics.median(map(sum, parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "threads.json")
    args = parser.parse_args()
    counts, results = sorted({1, 2, os.cpu_count()}), []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.sizes:
            model = random_model(*SIZES[name], Path(folder, name))
            figures = {}
            for _ in range(args.repeats):
                for busy in (False, True):
                    spinning = subprocess.Popen([sys.executable, "-c", SPIN]) if busy else None
                    for threads in counts:
                        figures.setdefault((busy, threads), []).append(seconds_a_step(model, threads))
                    if busy:
                        spinning.kill()
            one = statistics.median(figures[False, 1])
            for (busy, threads), seconds in sorted(figures.items()):
                ratios = [value / one for value in seconds]
                results.append({"parameters": name, "busy": busy, "threads": threads,
                                "ratio": round(statistics.median(ratios), 2),
                                "least": round(min(ratios), 2), "most": round(max(ratios), 2)})
                print(results[-1], flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
