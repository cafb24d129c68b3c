"""Seconds per generated token of grpo.py against TRL's GRPOTrainer, on a CPU: the ratio ours / TRL.

    pip install -r bench/requirements-speed.txt
    python bench/speed.py                        # 5 pairs of runs for 2 models at 1 and 2 threads

Both train the same model on the same prompts in the same order: 16 prompts x 8 responses a step and one
optimiser step on them, in float32, with Dr. GRPO's loss, no KL term, and the same AdamW, clip, temperature,
limit of tokens and verifier. Responses are sampled and differ, so time is divided by tokens. TRL does nothing
else meanwhile: no evaluation, checkpoint, report or gradient checkpointing. Of its settings it has those that
were fastest here: generation as transformers does it, as continuous batching took 17 times as long, and
micro-batches of 32 rows, about as large as ours. Two differences are no settings: ours leaves rows without an
advantage out of the update, and TRL does not score responses before it, for want of a second update.

A run is a process of its own, and the sides take turns, so that the machine's noise meets both. With two
threads the machine must do nothing else, as they wait for each other. The models: the toy's base model, which
answers in one line, and what `luffy.py --steps 30` makes of it, which shows its work. A step lasts from its
beginning to that of the next; the first two are not counted.

bench/results/speed.json has the ratios' spread over the pairs, of the whole and of parts, and the medians of
each side: microseconds per token, and its peak memory without the verifier's processes.
"""
import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
WARMUP = 2  # steps that are not counted
TRL_MICRO_BATCH = 32
SIDES = ("ours", "trl")
PARTS = ("whole", "rollout", "verification", "scoring", "update", "scoring and update")
COMPARED = ("whole", "rollout", "verification", "scoring and update", "peak megabytes")


# ------------------------------------------------------------------ the sides, each in a process of its own
def write_figures(side: str, begins: list[float], steps: list[dict[str, float]]):
    """Microseconds per token, and what else is compared, over the counted steps: in <side>.json.

    begins: when each step began, in seconds. steps: each one's numbers of tokens, responses and right ones,
    and its seconds of rollout, verification and scoring; what remains of the whole is called the update.
    The last step is not counted: it ends where no other begins.
    """
    counted = steps[WARMUP:-1]
    sums = {name: sum(step[name] for step in counted) for name in counted[0]}
    sums["whole"] = begins[-1] - begins[WARMUP]
    sums["scoring and update"] = sums["whole"] - sums["rollout"] - sums["verification"]
    sums["update"] = sums["scoring and update"] - sums["scoring"]
    figures = {part: sums[part] / sums["tokens"] * 1e6 for part in PARTS}
    figures |= {"tokens per response": sums["tokens"] / sums["responses"],
                "reward": sums["right"] / sums["responses"],
                "peak megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    Path(f"{side}.json").write_text(json.dumps(figures))


def run_ours(model: str, steps: int):
    """grpo.py, with a clock where a step begins. Leaves its arguments and prompts to TRL, in given.json."""
    import grpo

    begins, rows, next_problems = [], [], grpo.Run.next_problems

    def timed(run):
        begins.append(time.perf_counter())
        problems = next_problems(run)
        rows.extend({"prompt": problem.text, "answer": problem.answer} for problem in problems)
        return problems

    grpo.Run.next_problems = timed
    sys.argv = ["grpo.py", "--model", model, "--data", "toy", "--eval_data", "toy:easy", "--name", "ours",
                "--steps", str(steps), "--eval_every", str(steps), "--save_every", "0", "--device", "cpu"]
    grpo.main()
    args = json.loads(Path("runs/ours/args.json").read_text())
    Path("given.json").write_text(json.dumps({"args": args, "rows": rows}))
    metrics = [json.loads(line) for line in open("runs/ours/metrics.jsonl")]
    responses = args["prompts"] * args["n"]
    write_figures("ours", begins, [
        {"tokens": step["response/length"] * responses, "responses": responses,
         "right": step["reward"] * responses, "scoring": step["seconds/scoring"],
         "rollout": step["seconds/rollout"], "verification": step["seconds/verification"]}
        for step in metrics if step["step"] > 0])


def run_trl(model: str, steps: int):
    """TRL on the prompts and with the arguments of ours, which ran before in this folder."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    from runtime.verification import RIGHT, Verifier

    given = json.loads(Path("given.json").read_text())
    args, rows, verifier = SimpleNamespace(**given["args"]), given["rows"], Verifier()
    answers = sorted({row["answer"] for row in rows})
    verifier(answers, [f"</think>\\boxed{{{answer}}}" for answer in answers])  # as ours does before it trains
    begins, measured = [], []

    class TimedTrainer(GRPOTrainer):
        def _generate(self, prompts):
            begins.append(time.perf_counter())
            output = super()._generate(prompts)
            measured.append({"tokens": sum(map(len, output[1])), "responses": len(prompts), "scoring": 0.0,
                             "rollout": time.perf_counter() - begins[-1]})
            return output

    def reward(completions, completion_ids, answer, **_):
        start, eos = time.perf_counter(), trainer.processing_class.eos_token_id
        ended = [text if ids[-1] == eos else "" for text, ids in zip(completions, completion_ids)]
        rewards = [float(verdict == RIGHT) for verdict in verifier(answer, ended)]
        measured[-1] |= {"verification": time.perf_counter() - start, "right": sum(rewards)}
        return rewards

    config = GRPOConfig(
        output_dir="trl", use_cpu=True, bf16=False, model_init_kwargs={"dtype": "float32"}, seed=args.seed,
        max_steps=steps, shuffle_dataset=False, per_device_train_batch_size=TRL_MICRO_BATCH,
        gradient_accumulation_steps=args.prompts * args.n // TRL_MICRO_BATCH, num_generations=args.n,
        max_completion_length=args.max_response, temperature=args.temperature,
        loss_type="dr_grpo", scale_rewards="none", beta=0.0,
        epsilon=args.clip_low, epsilon_high=args.clip_high, max_grad_norm=args.max_grad_norm,
        learning_rate=args.lr, lr_scheduler_type="constant_with_warmup", warmup_steps=args.warmup,
        adam_beta2=args.beta2, weight_decay=args.weight_decay,
        gradient_checkpointing=False, save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False)
    trainer = TimedTrainer(model, reward, config, datasets.Dataset.from_list(rows))
    trainer.train()
    verifier.close()
    write_figures("trl", begins, measured)


# ------------------------------------------------------------------------------------------------- the bench
def python(*arguments, folder: str, threads: int = 1) -> str:
    """What a Python process prints, which runs in the folder and must end well."""
    path = f"{ROOT}{os.pathsep}{ROOT / 'bench'}"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stdout[-2000:]}")
    return done.stdout


def run_pair(model: str, steps: int, threads: int) -> dict[str, dict[str, float]]:
    """The figures of ours, then of TRL."""
    with tempfile.TemporaryDirectory() as folder:
        figures = {}
        for side in SIDES:
            code = f"import speed; speed.run_{side}({model!r}, {steps + 1})"  # one more, which is not counted
            python("-c", code, folder=folder, threads=threads)
            figures[side] = json.loads(Path(folder, f"{side}.json").read_text())
    return figures


def summarise(pairs: list[dict[str, dict[str, float]]]) -> dict:
    """The spread over pairs of the ratios ours / TRL, and the medians of each side's figures."""
    ratios = {}
    for name in COMPARED:
        numbers = [pair["ours"][name] / pair["trl"][name] for pair in pairs]
        ratios[name] = {"min": min(numbers), "median": statistics.median(numbers), "max": max(numbers)}
    medians = {side: {name: statistics.median([pair[side][name] for pair in pairs])
                      for name in pairs[0][side]} for side in SIDES}
    return {"pairs": len(pairs), "ours / trl": ratios} | medians


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="runs of each side in each setting")
    parser.add_argument("--steps", type=int, default=12, help="steps of a run, the two of warm-up included")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "speed.json")
    args = parser.parse_args()
    if args.pairs < 1 or args.steps <= WARMUP:
        parser.error(f"--pairs must be at least 1 and --steps at least {WARMUP + 1}")
    try:
        versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    except PackageNotFoundError as error:
        parser.error(f"{error}; pip install -r bench/requirements-speed.txt")
    start, pairs = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        base = python("-c", "from runtime.toy import EMBEDDED; print(EMBEDDED)", folder=folder)
        python(ROOT / "luffy.py", "--steps", "30", "--name", "learnt", "--device", "cpu", folder=folder)
        models = {"base": base.splitlines()[-1], "learnt": f"{folder}/runs/learnt/model"}
        for _, threads, name in itertools.product(range(args.pairs), args.threads, models):
            setting, pair = f"{name} model, threads: {threads}", run_pair(models[name], args.steps, threads)
            pairs.setdefault(setting, []).append(pair)
            print(f"{setting}: ours / trl {pair['ours']['whole'] / pair['trl']['whole']:.2f}", flush=True)
    results = {"versions": versions, "cores": os.cpu_count(), "minutes": (time.perf_counter() - start) / 60}
    results |= {setting: summarise(measured) for setting, measured in pairs.items()}
    results = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.3g}"))
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
