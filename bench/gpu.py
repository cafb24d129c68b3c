"""What one CUDA card does with this repository: matrix rate, the update, a run's phases, the toy, vLLM's tests.

    python bench/gpu.py                          # needs 30 GB for temporary files: TMPDIR says where
    python bench/gpu.py --small                  # the same parts at sizes that suit a CPU too
    python bench/gpu.py --parts matmul update    # some of them

Prints each figure as it comes and writes all of them after each part: one object with one object per part.
A part that fails has its error there, the others go on, and the exit code is 1. A GB is 10^9 bytes.
"""
import argparse
import gc
import importlib.metadata
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from datetime import UTC, datetime
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import grpo  # noqa: E402
from runtime import policy, processes, toy  # noqa: E402
from runtime.flags import fail  # noqa: E402
from runtime.rows import Row, collate, micro_batches  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_CARD = DEVICE.type == "cuda"
SECONDS = 3600  # after which a command is killed
FULL = SimpleNamespace(
    matrix=8192, config=dict(  # Qwen2.5-Math-1.5B's
        hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        intermediate_size=8960, vocab_size=151_936, max_position_embeddings=4096),
    rows=16, prompt=1024, response=3072, updates=5,  # an update's rows, their tokens, how often it is timed
    run=(16, 8, 512), toy=[],                        # a run's --prompts, --n, --max_response; flags
    tests=["-n", "0", "-m", "", "tests/test_vllm.py"])
SMALL = SimpleNamespace(
    matrix=256, config=dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=128, vocab_size=256, max_position_embeddings=256),
    rows=4, prompt=64, response=128, updates=3, run=(2, 2, 32),
    toy="--data toy --steps 2 --prompts 2 --n 2".split(), tests=["tests/test_grpo.py"])


def random_model(config: dict, folder: Path) -> str:
    """Folder of a Qwen2 with random weights and the toy's tokenizer, whose ids are the vocabulary's first."""
    if not folder.exists():
        tokenizer = toy.make_tokenizer()
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
            **config, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
        tokenizer.save_pretrained(folder)
        model.to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def run_command(command: list, folder: Path) -> tuple[int, str, float, float]:
    """Exit code, output, seconds, and the most GB of the card that all processes had in use at once."""
    peak, start = 0, time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(list(map(str, command)), cwd=folder, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None:
                if time.perf_counter() - start > SECONDS:
                    raise TimeoutError(f"not ended after {SECONDS} seconds: {command}")
                free, total = torch.cuda.mem_get_info() if ON_CARD else (0, 0)
                peak = max(peak, total - free)
                time.sleep(0.02)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return process.returncode, output.read(), time.perf_counter() - start, peak / 1e9


def run_luffy(*flags) -> tuple[list[dict], float, float]:
    """Lines of metrics, seconds from start to end, and the card's peak in GB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "luffy.py", "--device", DEVICE.type, "--name", "run", *flags]
        code, output, seconds, peak = run_command(command, folder)
        if code:
            raise RuntimeError(f"exit code {code}: {output[-2000:]}")
        lines = Path(folder, "runs", "run", "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], seconds, peak


def timed(function, repeats: int) -> list[float]:
    """Seconds of each call, after one that warms up."""
    seconds = []
    for _ in range(1 + repeats):
        torch.get_device_module(DEVICE).synchronize()
        start = time.perf_counter()
        function()
        torch.get_device_module(DEVICE).synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


# -------------------------------------------------------------------- the parts, which yield figures by name
def environment(size, folder):
    yield "date", datetime.now(UTC).isoformat(timespec="seconds")
    yield "device", torch.cuda.get_device_name() if ON_CARD else f"CPU, {platform.machine()}"
    if ON_CARD:
        yield "memory_gb", torch.cuda.get_device_properties(DEVICE).total_memory / 1e9
    yield "cuda", torch.version.cuda or "none"
    distributions = importlib.metadata.packages_distributions()
    for name in ("torch", "transformers", "vllm"):
        yield name, importlib.metadata.version(distributions[name][0]) if find_spec(name) else "not installed"


@lru_cache
def dense_rate(n: int) -> float:
    """FLOP/s of products of n x n matrices, of 2 n^3 FLOPs each; in bfloat16, on a CPU in float32."""
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=torch.bfloat16 if ON_CARD else torch.float32)

    def multiply():
        for _ in range(20):
            torch.matmul(a, b)

    return 20 * 2 * n ** 3 / statistics.median(timed(multiply, 5))


def matmul(size, folder):
    yield "tflops", dense_rate(size.matrix) / 1e12


def flops_per_token(model, prompt: int, response: int) -> float:
    """FLOPs that the model needs for a token, forward and backward: 6 N + 12 L H T / 2, a mean over T tokens.

    N are the weights of matrices: 2 FLOPs forward, 4 backward. The head's count at response tokens alone, for
    which it is computed; it is the embedding too, whose look-up is free. Attention multiplies with the keys
    and with the values of t tokens, 2 H t FLOPs each in each of L layers, twice that backward, and t is T / 2
    on average. Not counted: what is computed again (checkpoints, the head), biases, norms, softmax, AdamW.
    """
    config, head, length = model.config, model.get_output_embeddings().weight, prompt + response
    body = sum(p.numel() for p in model.parameters() if p.ndim == 2 and p is not head)
    n = body + head.numel() * response / length
    return 6 * n + 12 * config.num_hidden_layers * config.hidden_size * length / 2


def random_rows(vocabulary: int, prompt: int, responses: list[int]) -> list[Row]:
    """Rows of random tokens: a prompt and, for each row, so many of a response."""
    rows = []
    for number, length in enumerate(responses):
        tokens = torch.randint(vocabulary, (prompt + length,)).tolist()
        old_logp = torch.full((length,), -math.log(vocabulary))  # nearly what random weights give: no clip
        rows.append(Row(SimpleNamespace(prompt=tokens[:prompt]), tokens[prompt:], old_logp=old_logp,
                               advantage=(-1.0) ** number))
    return rows


def take_step(trained: policy.Policy, rows: list[Row], args):
    """An optimiser step, as a run of grpo.py takes it."""
    trained.model.train()
    for part in micro_batches(rows, args.micro_tokens):
        batch = collate(part, DEVICE)
        logp, _ = trained.logprobs(batch)
        normaliser = len(rows) * args.max_response
        loss, _ = grpo.grpo_loss(logp, batch.old_logp, batch.advantages, batch.mask, normaliser)
        trained.backward(loss)
    norm = trained.step("rl", args.max_grad_norm)
    if not 0 < norm < math.inf:
        raise ArithmeticError(f"a gradient of norm {norm} is none")


def update(size, folder):
    defaults = {f.name: f.metadata["real"] if f.default is None else f.default for f in fields(grpo.Args)}
    args = grpo.Args(**defaults | {"model": random_model(size.config, folder), "max_prompt": size.prompt,
                                   "max_response": size.response, "eval_response": size.response})
    processes.start()
    trained = policy.Policy(args, DEVICE)
    model = trained.model
    rows = random_rows(model.config.vocab_size, size.prompt, [size.response] * size.rows)
    seconds = timed(lambda: take_step(trained, rows, args), size.updates)
    rate = size.rows * (size.prompt + size.response) / statistics.median(seconds)
    flops = flops_per_token(model, size.prompt, size.response)
    yield "rows", size.rows
    yield "tokens_per_row", size.prompt + size.response
    yield "seconds_per_step", seconds
    yield "tokens_per_second", rate
    yield "flops_per_token", flops
    yield "tflops", rate * flops / 1e12
    yield "mfu", rate * flops / dense_rate(size.matrix)  # of what was measured, not of what the maker says
    yield "mfu_goal", 0.4
    if ON_CARD:
        yield "memory_allocated_gb", torch.cuda.max_memory_allocated() / 1e9
        yield "memory_reserved_gb", torch.cuda.max_memory_reserved() / 1e9
    # Rows of one length need no padding, those of a run do. Padding does not count among the tokens.
    lengths = [size.response * (number + 1) // size.rows for number in range(size.rows)]
    rows = random_rows(model.config.vocab_size, size.prompt, lengths)
    seconds = timed(lambda: take_step(trained, rows, args), size.updates)
    yield "tokens_per_second_uneven", (size.rows * size.prompt + sum(lengths)) / statistics.median(seconds)


def phases(size, folder):
    prompts, n, max_response = size.run
    engine = "vllm" if ON_CARD and find_spec("vllm") else "transformers"
    data = folder.with_name("data.jsonl")
    data.write_text("".join(json.dumps({
        "problem": f"a={i:02d};a?", "answer": f"{i:02d}",
        "demonstration": toy.answered(f"a={i:02d}\n", i)}) + "\n" for i in range(40)))
    metrics, seconds, peak = run_luffy(
        "--model", random_model(size.config, folder), "--data", data, "--rollout", engine, "--steps", 3,
        "--prompts", prompts, "--n", n, "--max_prompt", 64, "--max_response", max_response,
        "--eval_response", max_response, "--save_every", 0)
    steps = metrics[1:]  # the first line is an evaluation
    rollouts = prompts * (n - 1)  # the n-th row of a group is its demonstration
    yield "engine", engine
    for name in ("seconds/rollout", "seconds/verification", "seconds/update", "response/length",
                 "sampler_gap"):
        yield name, [step[name] for step in steps]
    yield "rollout_tokens_per_second", [rollouts * step["response/length"] / step["seconds/rollout"]
                                        for step in steps]
    yield "seconds", seconds
    if ON_CARD:
        yield "memory_gb", peak


def toy_run(size, folder):
    flags = ["--model", random_model(size.config, folder), *size.toy] if size.toy else []
    metrics, seconds, _ = run_luffy(*flags)
    for part in toy.SLICES:
        yield f"accuracy/{part}", [metrics[0][f"accuracy/{part}"], metrics[-1][f"accuracy/{part}"]]
    yield "seconds", seconds


def tests(size, folder):
    command = ["env", "REQUIRE_VLLM=1", sys.executable, "-m", "pytest", "-q", *size.tests]  # else a card is hidden
    code, output, seconds, _ = run_command(command, ROOT)
    yield "exit_code", code
    yield "last_line", output.strip().split("\n")[-1]
    yield "seconds", seconds
    if code:
        raise RuntimeError(f"pytest ended with exit code {code}: {output[-2000:]}")


PARTS = {"environment": environment, "matmul": matmul, "update": update, "phases": phases, "toy": toy_run,
         "tests": tests}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="sizes that suit a CPU: the figures mean little")
    parser.add_argument("--out", type=Path, help="default: bench/results/gpu.json, or gpu-small.json")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = parser.parse_args()
    if not ON_CARD and not args.small:
        fail("torch sees no CUDA device; --small has sizes that suit a CPU")
    out = args.out or ROOT / "bench" / "results" / ("gpu-small.json" if args.small else "gpu.json")
    size, results = SMALL if args.small else FULL, {}
    out.parent.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            results[part] = {}
            try:
                for name, value in PARTS[part](size, Path(folder, "model")):
                    results[part][name] = value
                    print(f"{part}: {name} = {value}", flush=True)
            except (Exception, SystemExit) as error:  # whatever it is, the other parts can be measured
                results[part]["error"] = f"{type(error).__name__}: {error}"
                print(f"{part}: {results[part]['error']}", file=sys.stderr, flush=True)
            out.write_text(json.dumps(results, indent=1) + "\n")
            gc.collect()
            torch.cuda.empty_cache()  # the next part's processes need what this one's tensors had
    raise SystemExit(1 if any("error" in figures for figures in results.values()) else 0)


if __name__ == "__main__":
    main()
