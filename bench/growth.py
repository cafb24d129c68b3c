"""How a step's time grows with the length of responses, against what the model alone needs for the same tokens.

    python bench/growth.py            # 4 rows of 64 to 4,096 tokens: ten minutes on one thread
    python bench/growth.py --steps 2000 --lengths           # host memory of a long run alone

The model alone: forwards and backwards over the same rows, and `model.generate`. Attention grows with the
square of the length for both, so that the ratio of the two says what this project adds, and the ratio's
change with the length what grows faster than attention. Both run in turn; processor time of one thread. Last,
the host memory of a run of GRPO on the toy is read off at its steps. Writes bench/results/growth.json.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import transformers

import common
from runtime import toy
from runtime.policy import Policy
from runtime.rows import Problem, Row, collate, micro_batches
from runtime.sampling import TransformersSampler

ROOT = Path(__file__).resolve().parent.parent
PROMPT, ROWS = 16, 4
WATCHED = """
import os, sys
sys.path.insert(0, {root!r})
sys.argv = ["grpo.py", *{flags!r}]
import common, grpo
end_step, pages = common.Run.end_step, os.sysconf("SC_PAGE_SIZE")
def look_and_end(run):  # the last step's end has an evaluation and a checkpoint
    with open("memory.txt", "a") as file:
        print(int(open("/proc/self/statm").read().split()[1]) * pages >> 10, file=file)
    end_step(run)
common.Run.end_step = look_and_end
grpo.main()
"""


def random_model(folder: Path, positions: int) -> str:
    """A model of the toy's kind and size that has so many positions, with random weights."""
    tokenizer = toy.make_tokenizer()
    torch.manual_seed(0)
    toy.Qwen2ForCausalLM(toy.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=384, max_position_embeddings=positions,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_rows(length: int, vocabulary: int) -> list[Row]:
    torch.manual_seed(length)
    rows = []
    for index in range(ROWS):
        tokens = torch.randint(vocabulary, (PROMPT + length,)).tolist()
        problem = Problem(index, "", tokens[:PROMPT], "1", "", "", {})
        rows.append(Row(problem, tokens[PROMPT:], advantage=1.0))
    return rows


def update(policy: Policy, rows: list[Row], micro_tokens: int):
    """What Run.score and the update do: log-probs without and with a gradient."""
    with torch.no_grad():
        for part in micro_batches(rows, micro_tokens):
            policy.logprobs(collate(part, policy.device), entropy=True)
    for part in micro_batches(rows, micro_tokens):
        logp, _ = policy.logprobs(collate(part, policy.device))
        policy.backward(-logp.mean())


def bare_update(model, rows: list[Row], micro_tokens: int):
    """The same by the model's own forward and the plain formula; rows of one length need no padding."""
    tokens = torch.tensor([row.problem.prompt + row.response for row in rows])
    parts = tokens.split(max(1, micro_tokens // tokens.shape[1]))

    def logp(part: torch.Tensor) -> torch.Tensor:
        logits = model(part, use_cache=False).logits[:, PROMPT - 1:-1]
        return logits.log_softmax(dim=-1).gather(2, part[:, PROMPT:, None])

    with torch.no_grad():
        for part in parts:
            logp(part)
    for part in parts:
        (-logp(part).mean()).backward()


def seconds(function, *arguments) -> float:
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def measure(lengths: list[int], repeats: int, micro_tokens: int) -> list[dict]:
    results = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder), PROMPT + max(lengths))
        sys.argv = ["grpo.py", "--model", model, "--device", "cpu", "--max_prompt", str(PROMPT),
                    "--max_response", str(max(lengths)), "--eval_response", "1"]
        policy = Policy(common.parse(common.Args, "bench"), torch.device("cpu"))
        bare = transformers.AutoModelForCausalLM.from_pretrained(model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        samplers = [TransformersSampler(bare, tokenizer), TransformersSampler(bare, tokenizer)]
        samplers[1].cache_name = None  # it samples by model.generate
        for sampler in samplers:
            sampler.eos = [-1]  # no response ends early
        bare.generation_config.eos_token_id = None
        updates = [partial(update, policy), partial(bare_update, bare)]
        for length in lengths:
            rows = make_rows(length, len(tokenizer))
            prompts, ratios = [row.problem.prompt for row in rows], {"update": [], "rollout": []}
            for repeat in range(-1, repeats):  # the first warms up
                pairs = {
                    "update": [seconds(function, rows, micro_tokens) for function in updates],
                    "rollout": [seconds(sampler.generate, prompts, length, 1.0, 0) for sampler in samplers]}
                for name, (ours, alone) in pairs.items():
                    ratios[name] += [ours / alone] * (repeat >= 0)
            for name, values in ratios.items():
                results.append({"part": name, "tokens": length, "ratio": round(statistics.median(values), 3),
                                "least": round(min(values), 3), "most": round(max(values), 3)})
                print(results[-1], flush=True)
    return results


def watch(steps: int) -> dict:
    """Megabytes of host memory in a run of so many steps: after a tenth of them, half of them, and all."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--steps", str(steps), "--prompts", "2", "--n", "4", "--eval_every", str(10 * steps),
                 "--eval_response", "1", "--device", "cpu", "--name", "long"]
        subprocess.run([sys.executable, "-c", WATCHED.format(root=str(ROOT), flags=flags)], cwd=folder, check=True,
                       env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        kilobytes = [int(line) for line in Path(folder, "memory.txt").read_text().split()]
    return {f"megabytes after step {step}": round(kilobytes[step - 1] / 1024)
            for step in (steps // 10, steps // 2, steps)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=[64, 256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--micro_tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=2000, help="of the run whose memory is watched; 0: none")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "growth.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    results = {"time": measure(args.lengths, args.repeats, args.micro_tokens) if args.lengths else []}
    if args.steps:
        results["memory"] = watch(args.steps)
        print(results["memory"])
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
