"""Several processes, as torchrun starts them, do what one does: the same samples, gradients and weights, one voice."""
import json
import re
import shlex
import subprocess
import time
from collections import Counter

import pytest
import torch
from conftest import SCRIPTS, SMALL, load, read_jsonl, run_script, write_jsonl

from runtime import processes, sampling, toy
from runtime.rows import Problem, Row, collate, micro_batches

METHODS = [script for script in ("grpo", "luffy", "chord", "relift", "topr") if script in SCRIPTS]
EXTRA = {"chord": ["--expert_share", "0.2", "--mu_valley", "0.1"], "relift": ["--sft_batch", "1"],
         "topr": ["--minibatch", "4", "--epochs_per_iteration", "1"]}


@pytest.fixture
def demonstrated_data(tmp_path) -> str:
    """Problems for the coin model; two of three have a demonstration."""
    rows = [{"problem": f"a={i:02d};a?", "answer": str(i % 2),
             "demonstration": toy.answered("", 0).replace("00", str(i % 2)) if i % 3 else None} for i in range(20)]
    return write_jsonl(tmp_path / "demonstrated.jsonl", rows)


def last_lines(text: str) -> list[str]:
    """Lines of an output in which progress bars overwrite each other."""
    return [line for line in re.split(r"[\r\n]|\x1b\[A", text) if line.strip()]


def without_seconds(folder) -> list[dict]:
    return [{name: value for name, value in line.items() if not name.startswith("seconds/")}
            for line in read_jsonl(folder / "metrics.jsonl")]


# ------------------------------------------------------------------------------------- how the work is shared
def rows_of_many_lengths(number: int) -> list[Row]:
    return [Row(Problem(i, "", [5] * (3 + i * i % 17), "", "", "", {}), [7] * (1 + 7 * i % 30)) for i in range(number)]


@pytest.mark.parametrize("world", (1, 2, 3, 8))
@pytest.mark.parametrize("number", (0, 1, 5, 40))
def test_micro_batches_of_all_processes_hold_every_row_once_and_are_as_many(world, number):
    rows = rows_of_many_lengths(number)
    hands = [micro_batches(rows, 90, rank, world) for rank in range(world)]
    assert len({len(parts) for parts in hands}) == 1
    held = [row for parts in hands for part in parts for row in part if row.response]
    assert Counter(map(id, held)) == Counter(map(id, rows))
    for parts in hands:
        for part in parts:
            assert len(part) == 1 or collate(part, "cpu").tokens.numel() <= 90
    tokens = [sum(len(row.problem.prompt) + len(row.response) for part in parts for row in part if row.response)
              for parts in hands]
    if number == 40:
        assert max(tokens) < 1.6 * min(tokens)


def test_an_empty_micro_batch_touches_every_weight_with_a_gradient_of_zero(tiny_model):
    from luffy import luffy_loss
    from runtime import policy
    model, _ = load(tiny_model)
    empty, = micro_batches(rows_of_many_lengths(1), 90, rank=1, world=2)
    batch = collate(empty, "cpu")
    logp, entropy = policy.logprobs(model, batch, 1.0, entropy=True)
    loss, metrics = luffy_loss(logp, batch.old_logp, batch.advantages, batch.mask, batch.is_demo, normaliser=3)
    (loss + entropy.sum()).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
    assert not any(total or count for total, count in metrics.values())


@pytest.mark.parametrize("world", (1, 2, 3))
def test_spread_gives_results_in_the_order_of_the_items(world, monkeypatch):
    monkeypatch.setattr(processes, "world", lambda: world)
    parts = [[10 * item for item in range(7)[rank::world]] for rank in range(world)]
    for rank in range(world):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(processes, "gather", lambda part, own=parts[rank]: parts if part == own else None)
        assert processes.spread(lambda items: [10 * item for item in items], list(range(7))) == list(range(0, 70, 10))


def test_a_rows_samples_do_not_depend_on_who_is_in_its_batch(coin_model):
    model, tokenizer = load(coin_model)
    sampler = sampling.TransformersSampler(model, tokenizer)
    prompts = [tokenizer(f"<|im_start|>user\na={i:02d};a?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
               for i in (3, 3, 14, 3, 5, 9)]
    together = sampler.generate(prompts, 20, 3.0, seed=4)
    for own in ([0, 2, 4], [1, 3, 5], [5]):
        apart = sampler.generate([prompts[number] for number in own], 20, 3.0, 4, own)
        assert [tokens for tokens, _ in apart] == [together[number][0] for number in own]
    assert len({tuple(together[number][0]) for number in (0, 1, 3)}) == 3  # one prompt, and noise of its own each


# ------------------------------------------------------------------------------ 1, 2 and 4: the same numbers
EXACT = """
import importlib, json, sys
import torch
from runtime import policy, processes

load_model, step, save = policy.load_model, policy.Policy.step, policy.Policy.save
numbers = []

def in_float64(args, device):
    model, tokenizer = load_model(args, device)
    return model.double(), tokenizer

def keep(self, *arguments):
    numbers.append([policy.whole(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).clone()
                    for parameter in self.model.parameters()])
    return step(self, *arguments)

def keep_last(self, folder):
    numbers.append([weight.clone() for _, weight in self.weights()])
    save(self, folder)
    if processes.first():
        torch.save(numbers, folder.parent / "numbers.pt")
    numbers.clear()

policy.load_model, policy.Policy.step, policy.Policy.save = in_float64, keep, keep_last
for line in json.loads(sys.argv[1]):
    sys.argv = line
    importlib.import_module(line[0].removesuffix(".py")).main()
"""
EXACT_FLAGS = [part for part in SMALL if part not in ("--steps", "2")]


@pytest.fixture(scope="module")
def exact(tmp_path_factory, coin_model):
    """Runs every method for three steps in float64 on a number of processes; returns where the runs are."""
    place, done = tmp_path_factory.mktemp("exact"), set()
    rows = [{"problem": f"a={i:02d};a?", "answer": str(i % 2),
             "demonstration": toy.answered("", 0).replace("00", str(i % 2)) if i % 3 else None} for i in range(20)]
    data = write_jsonl(place / "data.jsonl", rows)
    (place / "exact.py").write_text(EXACT)

    def runs(world: int):
        if world not in done:  # five prompts of three rows: they divide by neither 2 nor 4
            lines = [[f"{script}.py", "--model", coin_model, "--data", data, *SMALL, "--prompts", "5", "--n", "3",
                      "--steps", "3", "--lr", "0.003", "--micro_tokens", "60", "--name", f"{script}-{world}",
                      *(["--updates", "2"] if script != "topr" else []), *EXTRA.get(script, [])]
                     for script in METHODS]
            process = run_script(place / "exact.py", json.dumps(lines), cwd=place, processes=world)
            assert process.returncode == 0, process.stderr[-3000:]
            done.add(world)
        return place / "runs"

    return runs


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("script", METHODS)
@pytest.mark.slow
def test_several_processes_give_the_samples_gradients_and_weights_of_one(exact, script, world):
    alone, shared = exact(1) / f"{script}-1", exact(world) / f"{script}-{world}"
    for name in ("samples.jsonl", "answers.jsonl"):
        assert (alone / name).read_text() == (shared / name).read_text()
    for expected, actual in zip(without_seconds(alone), without_seconds(shared), strict=True):
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-7)  # the sampler's log-probs are float32
    expected, actual = [torch.load(folder / "numbers.pt") for folder in (alone, shared)]
    assert len(expected) == len(actual) > 3
    assert max(part.abs().max() for part in expected[0]) > 1e-3
    largest = [max((one - other).abs().max().item() for one, other in zip(*pair, strict=True))
               for pair in zip(expected, actual, strict=True)]
    print(f"{script} on {world}: gradients {max(largest[:-1]):.1e}, weights {largest[-1]:.1e}")
    assert max(largest) < 1e-10


# -------------------------------------------------------------------------------------------- as users start it
@pytest.mark.parametrize("script", METHODS)
@pytest.mark.slow
def test_two_processes_as_a_user_starts_them(script, coin_model, demonstrated_data, tmp_path):
    process = run_script(f"{script}.py", "--model", coin_model, "--data", demonstrated_data, *SMALL, "--name", "x",
                         *EXTRA.get(script, []), cwd=tmp_path, processes=2)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("a rendered prompt") == 1
    assert f"{script} on 2 x cpu" in process.stdout
    assert "Warning" not in process.stderr and "[rank" not in process.stderr
    folder = tmp_path / "runs" / "x"
    assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")] == [0, 1, 2]
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["step-2"]
    model, tokenizer = load(str(folder / "model"), "auto")
    assert model.dtype == torch.float32 and type(model).__name__ == "Qwen2ForCausalLM"
    assert not (folder / "model" / "model.safetensors.index.json").exists()
    assert model(torch.tensor([tokenizer("a=1")["input_ids"]])).logits.isfinite().all()


def test_model_is_written_in_the_dtype_in_which_it_came(make_run, coin_model, coin_data, tmp_path):
    """And its generation_config may hold what transformers refuses to write."""
    for part in load(coin_model, torch.bfloat16):
        part.save_pretrained(tmp_path / "half")
    settings = json.loads((tmp_path / "half" / "generation_config.json").read_text())
    (tmp_path / "half" / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.7}))
    run = make_run("grpo", "--model", str(tmp_path / "half"), "--data", coin_data, *SMALL)
    run.record.write_metrics(0, {})
    assert next(run.policy.model.parameters()).dtype == torch.float32
    run.end()
    saved, _ = load(str(run.record.folder / "model"), "auto")
    assert saved.dtype == torch.bfloat16
    for trained, written in zip(run.policy.model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(trained.bfloat16(), written)


# --------------------------------------------------------------------------- killed, resumed, ended by signals
BROKEN = """
import importlib, os, signal, sys, time
from runtime import processes
from runtime.flags import fail

what, sys.argv = sys.argv[1], sys.argv[2:]
script = importlib.import_module(sys.argv[0].removesuffix(".py"))
make_batch = script.make_batch

def broken(run, *arguments):
    if run.step == 3 and processes.rank() == 1:
        print(time.time(), file=open("when", "w"))
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "fail":
            fail("only on this process")
        if what == "raise":
            raise OSError(28, "No space left on device")
    if run.step == 2 and what == "ctrl-c torchrun" and processes.first():
        os.kill(os.getppid(), signal.SIGINT)
    if run.step == 2 and what == "tell one" and processes.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return make_batch(run, *arguments)

script.make_batch = broken
script.main()
"""


@pytest.fixture
def broken(tmp_path, coin_model, demonstrated_data):
    """Runs ReLIFT, which has the most state, on two processes, one of which breaks at step 3."""
    (tmp_path / "broken.py").write_text(BROKEN)
    flags = ["relift.py", "--model", coin_model, "--data", demonstrated_data, *SMALL, "--steps", "4", "--name", "x",
             "--save_every", "2", "--sft_batch", "2"]

    def run(what: str, *more: str):
        process = run_script(tmp_path / "broken.py", what, *flags, *more, cwd=tmp_path, processes=2)
        seconds = time.time() - float((tmp_path / "when").read_text()) if (tmp_path / "when").exists() else None
        return process, seconds
    return run, flags


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_run_goes_on_on_two_or_on_one(broken, tmp_path):
    run, (script, *flags) = broken
    process, seconds = run("kill")
    assert process.returncode != 0 and seconds < 20
    assert process.stderr.count("another process of this run was killed") == 1
    assert "[rank" not in process.stderr
    folder = tmp_path / "runs" / "x"
    assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")] == [0, 1, 2]
    (tmp_path / "copy" / "runs").mkdir(parents=True)
    subprocess.run(["cp", "-r", folder, tmp_path / "copy" / "runs"], check=True)
    alone = run_script(script, *[flag if flag != "x" else "alone" for flag in flags], cwd=tmp_path, processes=2)
    assert alone.returncode == 0, alone.stderr
    for place, world in ((tmp_path, 2), (tmp_path / "copy", 1)):
        resumed = run_script(script, *flags, "--resume", cwd=place, processes=world)
        assert resumed.returncode == 0, resumed.stderr
        expected, found = tmp_path / "runs" / "alone", place / "runs" / "x"
        assert (found / "samples.jsonl").read_text() == (expected / "samples.jsonl").read_text()
        metrics = without_seconds(expected), without_seconds(found)
        weights = [load(str(path / "model"), torch.float32)[0].state_dict() for path in (expected, found)]
        if world == 2:
            assert metrics[0] == metrics[1]
            assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        else:  # other sums of the same numbers
            for one, other in zip(*metrics, strict=True):
                assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
            for name in weights[0]:
                torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("what, said", (
    ("fail", "relift.py: error: only on this process"),
    ("raise", "ended by the system: [Errno 28] No space left on device; --resume goes on")))
@pytest.mark.slow
def test_an_error_on_one_process_ends_all_with_its_message(broken, what, said):
    process, seconds = broken[0](what)
    assert process.returncode != 0 and seconds < 20
    assert process.stderr.count(said) == 1, process.stderr
    assert "[rank" not in process.stderr
    assert process.stderr.count("Traceback") == 1  # torchrun's own: that a child has failed
    assert "another process" not in process.stderr


@pytest.mark.parametrize("what", ("ctrl-c torchrun", "tell one"))
@pytest.mark.slow
def test_a_signal_ends_all_after_the_step_with_one_checkpoint(broken, what, tmp_path):
    run, _ = broken
    process, _ = run(what, "--save_every", "0")
    assert process.returncode != 0
    folder = tmp_path / "runs" / "x"
    assert [path.name for path in (folder / "checkpoint").iterdir()] == ["step-2"]
    said = [line for line in last_lines(process.stdout) if line.startswith("ended after step 2; to go on: ")]
    assert len(said) == 1, process.stdout + process.stderr
    torchrun, *flags = shlex.split(said[0].partition("to go on: ")[2])
    assert [torchrun, *flags[:3]] == ["torchrun", "--nproc_per_node", "2", "--"] and "--resume" in flags
    if what == "tell one":
        resumed = run_script("relift.py", *flags[4:], cwd=tmp_path, processes=2)
        assert resumed.returncode == 0, resumed.stderr
        assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("flags, said", (
    (["--steps", "0"], "--steps is 0"), (["--prompts", "1"], "--prompts 1"), (["--model", "missing"], "missing")))
@pytest.mark.slow
def test_a_mistake_on_all_processes_is_said_once(flags, said, coin_model, coin_data, tmp_path):
    process = run_script("grpo.py", "--model", coin_model, "--data", coin_data, *SMALL, *flags, cwd=tmp_path,
                         processes=2)
    lines = [line for line in process.stderr.splitlines() if "error: " in line and line.startswith("grpo.py")]
    assert process.returncode != 0 and len(lines) == 1 and said in lines[0], process.stderr
    assert not (tmp_path / "runs").exists()


def test_offload_without_a_card_is_one_line(make_run, coin_model, coin_data, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        make_run("grpo", "--model", coin_model, "--data", coin_data, *SMALL, "--offload")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("grpo.py: error: --offload: ")
    assert not (tmp_path / "runs").exists()
