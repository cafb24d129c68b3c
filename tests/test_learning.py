"""That it learns: the main job itself, cut short, on the real toy, whose base model is made on first use."""
import random

import torch

from conftest import load, read_jsonl, run_script
from runtime import toy


def test_the_base_model_can_but_does_not(base_model):
    """Asked with `!` it works out 4 or 5 steps; asked with `?` it enters each line about 1 time in 50."""
    model, tokenizer = load(toy.base_model())
    rng = random.Random(1)
    for n in (4, 5):
        probability, doors = [], []
        for chain in (toy.Chain(n, rng) for _ in range(20)):
            working = f"<think>\n{''.join(chain.working())}</think>"
            response = tokenizer(working)["input_ids"]
            newlines = [at for at, token in enumerate(tokenizer.tokenize(working)) if token == "Ċ"]
            for mark in "!?":
                prompt = tokenizer.apply_chat_template([{"role": "user", "content": chain.question(mark)}],
                                                       tokenize=False, add_generation_prompt=True)
                tokens = torch.tensor([tokenizer(prompt)["input_ids"] + response])
                with torch.no_grad():
                    logp = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
                if mark == "!":
                    probability.append(logp[-len(response):].sum().exp())
                else:
                    doors.append(logp[-len(response):][1:][newlines[:-1]])  # the first letters of the lines
        assert torch.stack(probability).mean() > 0.8
        typical = torch.stack(doors).mean(0).exp()  # (n + 1,), a line each
        # Six bases had them within a factor of nine; from samples a door of 0.01 came out as 0.00006.
        assert typical.min() > toy.Q / 15 and typical.max() < toy.Q * 5, typical


def test_luffy_learns_what_the_base_model_almost_never_does(base_model, tmp_path):
    """40 steps: on six bases 20 were enough, but other hardware rounds to yet another base."""
    process = run_script("luffy.py", "--steps", "40", "--eval_every", "40", "--name", "short", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    first, *_, last = read_jsonl(tmp_path / "runs" / "short" / "metrics.jsonl")
    assert first["accuracy/hard"] < 0.1
    assert last["accuracy/hard"] >= first["accuracy/hard"] + 0.3  # luck moves it by 0.05
