"""Kills runs with SIGKILL, resumes them, and compares them with runs that were left alone.

    python bench/kill.py                                # all five scripts, 20 kills
    python bench/kill.py --scripts relift --kills 3

On the CPU everything but timings must be the same to the bit: metrics.jsonl, samples.jsonl, final weights.
A checkpoint is written after every step; every other kill waits for the writing of one to begin, the others
come at random moments. A checkpoint/new that a kill leaves behind shows that it fell into the writing.
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FLAGS = ["--data", "toy", "--steps", "8", "--prompts", "8", "--n", "4", "--eval_every", "3",
         "--save_every", "1", "--device", "cpu", "--name", "run"]
EXTRA = {"relift": ["--sft_batch", "4"],
         "topr": ["--minibatch", "8", "--epochs_per_iteration", "1", "--save_rollouts"]}


def tiny_model(folder: Path) -> Path:
    """A random model of the toy's kind: what is learnt does not matter here, only that it is the same."""
    import torch
    from runtime import toy
    tokenizer = toy.make_tokenizer()
    torch.manual_seed(0)
    toy.Qwen2ForCausalLM(toy.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=128, max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def start(script: str, model: Path, folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, ROOT / f"{script}.py", "--model", model, *FLAGS,
               *EXTRA.get(script, []), *flags]
    return subprocess.Popen(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def changed(path: Path) -> int:
    """When a file was written to, or one came into a folder; 0 if there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def kill(process: subprocess.Popen, run: Path, in_writing: bool, rng: random.Random) -> bool:
    """Kills it some time after it has logged a step. Has it left a checkpoint half written?"""
    log, new = run / "metrics.jsonl", run / "checkpoint" / "new"
    while process.poll() is None and not log.exists():
        time.sleep(0.01)
    size, old = log.stat().st_size if log.exists() else 0, changed(new)
    while process.poll() is None and log.stat().st_size <= size:
        time.sleep(0.005)
    if in_writing:
        while process.poll() is None and changed(new) in (0, old):
            time.sleep(0.0005)
    else:
        time.sleep(rng.random() * 0.5)
    process.kill()
    process.wait()
    return changed(new) not in (0, old)


def outputs(folder: Path) -> dict:
    """All that must be the same: logs without timings, weights."""
    run = folder / "runs" / "run"
    metrics = [json.loads(line) for line in open(run / "metrics.jsonl")]
    kept = [{name: value for name, value in line.items() if "seconds" not in name} for line in metrics]
    logs = {path.name: path.read_text() for path in run.glob("*.jsonl") if path.name != "metrics.jsonl"}
    return {"metrics": kept, "weights": (run / "model" / "model.safetensors").read_bytes()} | logs


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scripts", nargs="+", default=["grpo", "luffy", "chord", "relift", "topr"])
    parser.add_argument("--kills", type=int, default=4, help="of each script's run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, failed = random.Random(args.seed), False
    with tempfile.TemporaryDirectory() as temporary:
        model = tiny_model(Path(temporary, "model"))
        for script in args.scripts:
            alone, killed = Path(temporary, script), Path(temporary, f"{script}-killed")
            alone.mkdir()
            killed.mkdir()
            process = start(script, model, alone)
            said, _ = process.communicate()
            if process.returncode:
                sys.exit(f"{script}: {said}")
            places, halves, flags = [], 0, []
            for number in range(args.kills):
                process, run = start(script, model, killed, *flags), killed / "runs" / "run"
                half = kill(process, run, number % 2 == 0, rng)
                if process.returncode != -signal.SIGKILL:  # it came to its end before
                    break
                halves += half
                places.append(sum(1 for _ in open(run / "metrics.jsonl")) - 1)
                flags = ["--resume"]
            process = start(script, model, killed, "--resume")
            said, _ = process.communicate()
            if process.returncode:
                sys.exit(f"{script}, resumed: {said}")
            expected, found = outputs(alone), outputs(killed)
            differing = [name for name in expected if expected[name] != found.get(name)]
            failed = failed or bool(differing)
            print(f"{script}: killed {len(places)} times, after steps {places}, {halves} times while a "
                  f"checkpoint was written; "
                  f"{'different: ' + ', '.join(differing) if differing else 'the same'}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
