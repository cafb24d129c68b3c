"""Processor time of a rollout of the toy on one thread, against that by `model.generate`, as a ratio.

    python bench/rollout.py                            # the base model: about 20 tokens a response
    python bench/rollout.py runs/luffy-toy-1/model     # one that LUFFY has trained for 30 steps: about 40

Both run in turn on the same prompts, so that the machine's noise meets both. Their responses differ, and few
are long: a measurement is several batches of 16 x 8 responses, and its time is divided by its tokens.
"""
import argparse
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import transformers

from runtime import toy
from runtime.sampling import TransformersSampler


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="folder of a model with the toy's tokenizer")
    parser.add_argument("--pairs", type=int, default=7, help="measurements of each")
    parser.add_argument("--batches", type=int, default=4, help="of a measurement")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    folder = args.model or toy.EMBEDDED
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
             for row in toy.make_rows()[0]]
    prompts, rng, ratios = tokenizer(texts)["input_ids"], random.Random(0), []
    samplers = {name: TransformersSampler(model, tokenizer) for name in ("generate", "sampler")}
    samplers["generate"].cache_name = None  # as for a model whose cache it cannot use
    for sampler in samplers.values():
        sampler.generate(prompts[:8], 72, 1.0, seed=0)  # what is done only once
    for pair in range(args.pairs):
        seconds, tokens = dict.fromkeys(samplers, 0.0), dict.fromkeys(samplers, 0)
        for batch in range(args.batches):
            groups = [prompt for prompt in rng.sample(prompts, 16) for _ in range(8)]
            for name, sampler in samplers.items():
                start = time.process_time()  # on a busy machine the clock on the wall says little
                responses = sampler.generate(groups, 72, 1.0, seed=pair * args.batches + batch)
                seconds[name] += time.process_time() - start
                tokens[name] += sum(len(response) for response, _ in responses)
        microseconds = {name: 1e6 * seconds[name] / tokens[name] for name in samplers}
        ratios.append(microseconds["sampler"] / microseconds["generate"])
        print(f"a token: generate {microseconds['generate']:.0f} microseconds, sampler "
              f"{microseconds['sampler']:.0f}, ratio {ratios[-1]:.2f}; "
              f"{tokens['sampler'] / (args.batches * 128):.1f} tokens a response", flush=True)
    print(f"sampler / generate: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
