"""Nothing is lost: killed runs, full disks, gradients that are not finite, data with holes, taken folders."""
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, SMALL, load, read_jsonl, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime import policy, sampling
from runtime.flags import out_of_memory
from runtime.problems import load_problems, read_rows
from runtime.rows import Codec
from runtime.verification import RIGHT

# ------------------------------------------------------------------------------------------ kill and resume


@pytest.mark.slow
def test_a_run_killed_three_times_ends_as_one_left_alone(tmp_path):
    """ReLIFT has the most state: a buffer, two optimisers, a set of used demonstrations."""
    command = [sys.executable, str(ROOT / "bench" / "kill.py"), "--scripts", "relift", "--kills", "3"]
    process = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("the same") == 1


def test_a_half_written_checkpoint_does_not_hide_the_last_good_one(make_run, tiny_model, coin_data):
    run = make_run("grpo", "--model", tiny_model, "--data", coin_data, "--name", "x", *SMALL)
    run.record.write_metrics(run.step, {})
    run.step = 1
    run.save()
    (run.record.folder / "checkpoint" / "new").mkdir()
    (run.record.folder / "checkpoint" / "new" / "run.pt").write_bytes(b"half")
    assert run.record.load()["step"] == 1
    run.step = 2
    run.save()
    assert [path.name for path in (run.record.folder / "checkpoint").iterdir()] == ["step-2"]


def test_of_two_checkpoints_the_later_one_counts(make_run, tiny_model, coin_data):
    """A run that was killed when the new one was there and the old one not yet gone."""
    run = make_run("grpo", "--model", tiny_model, "--data", coin_data, "--name", "x", *SMALL)
    for run.step in (9, 10):
        run.save()
        shutil.copytree(run.record.folder / "checkpoint", run.record.folder / "kept", dirs_exist_ok=True)
    shutil.rmtree(run.record.folder / "checkpoint")
    (run.record.folder / "kept").rename(run.record.folder / "checkpoint")
    assert len(run.record.checkpoints()) == 2
    assert run.record.load()["step"] == 10


@pytest.mark.parametrize("name", ("run.pt", ".metadata", "__0_0.distcp"))
@pytest.mark.parametrize("spoiled", (b"", b"no checkpoint", b"PK and no more", None))
def test_a_checkpoint_that_cannot_be_read_is_one_line(make_run, tiny_model, coin_data, capsys, name, spoiled):
    run = make_run("grpo", "--model", tiny_model, "--data", coin_data, *SMALL, "--name", "x")
    run.step = 1
    run.save()
    path = run.record.folder / "checkpoint" / "step-1" / name
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2] if spoiled is None else spoiled)  # None: a half
    with pytest.raises(SystemExit) as error:
        make_run("grpo", "--model", tiny_model, "--data", coin_data, *SMALL, "--name", "x", "--resume")
    assert error.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert "cannot be read" in line and "step-1" in line


def test_what_was_logged_after_the_checkpoint_comes_only_once(make_run, tiny_model, coin_data):
    run = make_run("grpo", "--model", tiny_model, "--data", coin_data, "--name", "x", *SMALL)
    run.record.write_metrics(run.step, {"before": 1})
    run.save()
    run.record.write_metrics(run.step, {"after": 1})
    (run.record.folder / "samples.jsonl").write_text("a sample\n")
    run.record.load()
    assert [sorted(line) for line in read_jsonl(run.record.folder / "metrics.jsonl")] == [["before", "step"]]
    assert (run.record.folder / "samples.jsonl").read_text() == ""


# ------------------------------------------------------------------------------------------------ signals
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_ends_a_run_after_the_step_and_it_goes_on(command_line, coin_model, coin_data, tmp_path,
                                                           monkeypatch, capsys, number):
    """Without --name and --save_every: the signal saves the run, and the printed command names it."""
    script = command_line("grpo", "--model", coin_model, "--data", coin_data, *SMALL, "--steps", "9",
                          "--save_every", "0")
    make_batch = script.make_batch

    def interrupted(run, args, problems):
        if run.step == 2:
            os.kill(os.getpid(), number)
        return make_batch(run, args, problems)

    monkeypatch.setattr(script, "make_batch", interrupted)
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    folder, = (tmp_path / "runs").iterdir()
    assert torch.load(folder / "checkpoint" / "step-2" / "run.pt", weights_only=True)["step"] == 2
    command = capsys.readouterr().out.splitlines()[-1].partition("to go on: ")[2]
    python, name, *flags = shlex.split(command)
    assert (python, name) == ("python", "grpo.py")
    command_line("grpo", *flags, "--steps", "3").main()
    assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")] == [0, 1, 2, 3]
    assert list((tmp_path / "runs").iterdir()) == [folder]


LONG_STEP = """
import time
import grpo

def make_batch(*arguments):
    print("in the step")
    time.sleep(60)

grpo.make_batch = make_batch
grpo.main()
"""


def test_a_second_ctrl_c_ends_it_at_once(tiny_model, coin_data, tmp_path):
    command = [sys.executable, "-u", "-c", LONG_STEP, "--model", tiny_model, "--data", coin_data, *SMALL]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as process:
        for sign in ("in the step", "ending after this step"):
            assert any(sign in line for line in process.stdout)
            process.send_signal(signal.SIGINT)
    assert process.returncode == -signal.SIGINT


# ------------------------------------------------------------------------------------- gradients not finite
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(make_run, tiny_model, coin_data, capsys):
    run = make_run("grpo", "--model", tiny_model, "--data", coin_data, *SMALL)
    rows = run.rollout(run.train[:2])
    before = {name: parameter.clone() for name, parameter in run.policy.model.named_parameters()}
    first = next(run.policy.model.parameters())
    for number, bad in enumerate((float("nan"), float("inf"), float("nan")), 1):
        first.grad = torch.full_like(first, bad)
        if number < 3:
            run.optimizer_step(rows)
            kept = json.loads((run.record.folder / f"skipped-{number}.json").read_text())
            assert [row["response"] for row in kept] == [run.codec.text(row) for row in rows]
            assert run.record.sums["updates/skipped"][0] == number
        else:  # three in a row
            with pytest.raises(SystemExit) as error:
                run.optimizer_step(rows)
            assert error.value.code == 2
            assert "--lr" in capsys.readouterr().err
    for name, parameter in run.policy.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_good_update_between_two_bad_ones_counts_anew(make_run, tiny_model, coin_data):
    run = make_run("grpo", "--model", tiny_model, "--data", coin_data, *SMALL)
    first = next(run.policy.model.parameters())
    for bad in (float("nan"), float("nan"), 1.0, float("nan"), float("nan")):
        first.grad = torch.full_like(first, bad)
        run.optimizer_step([])
    assert run.skipped == 2


# --------------------------------------------------------------------------------- no room: disk and memory
def last_words(error, capsys) -> str:
    """What python says of the exception that ends it: one line, that no progress bar stands before."""
    sys.excepthook(error.type, error.value, error.tb)
    said = re.split(r"[\r\n]|\x1b\[A", capsys.readouterr().err)  # bars end in "]" and without a line break
    line, = [line for line in said if line.strip() and not line.endswith("]")]
    assert "step/s" not in line
    return line


@pytest.fixture
def limit_files():
    """A limit on the size of files is to a run what a full disk is: a write fails when half of it is done."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=before[0]: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", ("a log", "a checkpoint"))
def test_a_full_disk_ends_in_one_line_and_the_last_checkpoint_stays(
        command_line, coin_model, coin_data, tmp_path, limit_files, capsys, what):
    flags = ["--model", coin_model, "--data", coin_data, *SMALL, "--save_every", "0", "--name", "x"]
    command_line("grpo", *flags, "--steps", "3").main()
    folder = tmp_path / "runs" / "x"
    logged = max(path.stat().st_size for path in folder.glob("*.jsonl"))
    saved = (folder / "checkpoint" / "step-3" / "__0_0.distcp").stat().st_size
    limit_files(logged if what == "a log" else saved // 2)
    with pytest.raises((OSError, RuntimeError)) as error:
        command_line("grpo", *flags, "--steps", "5", "--resume").main()
    words = last_words(error, capsys)
    assert words.endswith("File too large; --resume goes on from the last checkpoint, if there is one")
    assert (folder / "checkpoint" / "new").exists() == (what == "a checkpoint")
    limit_files()
    command_line("grpo", *flags, "--steps", "5", "--resume").main()
    assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("error", (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
                                   None), ids=("GPU", "CPU"))
def test_out_of_memory_is_one_line_that_names_the_flags(command_line, tiny_model, coin_data, monkeypatch,
                                                        capsys, error):
    script = command_line("grpo", "--model", tiny_model, "--data", coin_data, *SMALL)

    def make_batch(*arguments):
        if error:
            raise error
        torch.empty(1 << 50)  # a million gigabytes, which no CPU has

    monkeypatch.setattr(script, "make_batch", make_batch)
    with pytest.raises(RuntimeError) as raised:
        script.main()
    words = last_words(raised, capsys)
    assert words.startswith("out of memory: lower --micro_tokens; ")
    assert "--resume goes on from the last checkpoint" in words and "allocate" in words


def raiser(error):
    def function(*arguments, **options):
        raise error.with_traceback(None)  # without the frames of an earlier test
    return function


NO_BLOCKS = ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when ...")
SHORT_CACHE = ValueError("To serve at least one request with the model's max seq len (16384), (2.0 GiB KV cache is "
                         "needed, which is larger than the available KV cache memory (1.5 GiB). Based on ...")
NOT_FREE = ValueError("Free memory on device cuda:0 (20.1/23.5 GiB) on startup is less than desired GPU memory "
                      "utilization (0.9, 21.2 GiB). Decrease GPU memory utilization or reduce ...")
TORCH = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
CUDA = torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported ...")
WAKE = RuntimeError("CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:62")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
WARM_UP = RuntimeError("CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try ...")
PLACES = {  # what is at work -> a call of its real method, in which something raises an error
    "vLLM": lambda error: sampling.VLLMSampler.generate(
        SimpleNamespace(settings=raiser(error), eos=[0]), [[1]], 1, 1.0, 0),
    "a hand-over": lambda error: sampling.VLLMSampler.update(
        SimpleNamespace(engine=SimpleNamespace(wake_up=raiser(error))), iter(())),
    "transformers": lambda error: sampling.TransformersSampler.generate(
        SimpleNamespace(model=SimpleNamespace(eval=raiser(error))), [[1]], 1, 1.0, 0),
    "the update": lambda error: policy.Policy.logprobs(
        SimpleNamespace(model=SimpleNamespace(logprobs=raiser(error))), None, False, 1.0),
    "the optimiser": lambda error: policy.Policy.step(
        SimpleNamespace(model=SimpleNamespace(parameters=raiser(error))), "rl", 1.0),
}


@pytest.mark.parametrize("place, error, flag", (
    ("vLLM", NO_BLOCKS, "raise --gpu_memory_utilization"),
    ("vLLM", SHORT_CACHE, "raise --gpu_memory_utilization, or lower --max_response"),
    ("vLLM", NOT_FREE, "lower --gpu_memory_utilization"),
    ("vLLM", WARM_UP, "lower --gpu_memory_utilization"), ("vLLM", TORCH, "lower --gpu_memory_utilization"),
    ("a hand-over", WAKE, "lower --gpu_memory_utilization"),
    ("transformers", TORCH, "lower --prompts, --n or --max_response"),
    ("the update", TORCH, "lower --micro_tokens"), ("the update", CUDA, "lower --micro_tokens"),
    ("the update", CUBLAS, "lower --micro_tokens"), ("the update", MemoryError(), "lower --micro_tokens"),
    ("the optimiser", TORCH, "use --offload or more cards"),
    ("the update", RuntimeError("CUDA error: an illegal memory access was encountered"), None),
    ("vLLM", ValueError("temperature must be non-negative"), None)))
def test_memory_that_runs_out_names_the_flag_of_what_was_at_work(place, error, flag):
    with pytest.raises(type(error)) as raised:
        PLACES[place](error)
    advice = out_of_memory(raised.value)
    assert advice == "" if flag is None else flag in advice
    try:  # also where another error was raised on top of it
        try:
            PLACES[place](error)
        except type(error) as cause:
            raise RuntimeError("the engine has ended") from cause
    except RuntimeError as outer:
        assert out_of_memory(outer) == advice


# --------------------------------------------------------------------------------------------- bad rows
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4)
ROLE = ANYTHING | st.sampled_from(("system", "user", "assistant"))
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLE, "content": ANYTHING}), max_size=2)
GOLD = st.fixed_dictionaries({"ground_truth": ANYTHING})
PLAIN = st.fixed_dictionaries({"problem": ANYTHING, "answer": ANYTHING}, optional={"demonstration": ANYTHING})
CHAT = st.fixed_dictionaries({"prompt": ANYTHING | MESSAGES, "reward_model": ANYTHING | GOLD},
                             optional={"target": ANYTHING | MESSAGES, "data_source": ANYTHING})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(PLAIN | CHAT, max_size=4))
def test_rows_of_anything_end_in_problems_or_in_one_line(rows, verifier, tiny_tokenizer, capsys):
    good = {"problem": "a=1;a?", "answer": "1"}
    try:
        problems = load_problems("rows", [*rows, good], Codec(tiny_tokenizer), verifier, 60)
    except SystemExit as error:
        assert error.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        return
    assert all(isinstance(problem.text, str) and problem.prompt for problem in problems)
    answers = [problem.answer for problem in problems]
    assert verifier(answers, [f"</think>\\boxed{{{answer}}}" for answer in answers]) == [RIGHT] * len(answers)


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny_model):
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


def test_ten_megabytes_in_a_field_cost_nothing(verifier, tiny_tokenizer, capsys):
    rows = [{"problem": "a" * 10_000_000, "answer": "1"}, {"problem": "a=1;a?", "answer": "1" * 10_000_000},
            {"problem": "b=1;b?", "answer": "1"}]
    assert [problem.index for problem in load_problems("rows", rows, Codec(tiny_tokenizer), verifier, 60)] == [2]
    assert capsys.readouterr().out.count("left out 1 of 3 rows") == 2


def test_the_broken_line_of_a_jsonl_file_is_named(tmp_path, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "a=1;a?", "answer": "1"}] * 3)
    with open(data, "a") as file:
        file.write('{"problem": "cut off')
    with pytest.raises(SystemExit) as error:
        read_rows(data)
    assert error.value.code == 2
    assert "rows.jsonl, line 4" in capsys.readouterr().err


def test_windows_files_and_rows_of_both_schemas_are_read(tmp_path, verifier, tiny_tokenizer):
    chat = {"prompt": [{"role": "user", "content": "b=2;b?"}], "reward_model": {"ground_truth": "2"}}
    rows = [{"problem": "a=1;a?", "answer": "1"}, chat, {"problem": "c=3;c?", "answer": "x"}]
    text = "\ufeff" + "\r\n".join(map(json.dumps, rows)) + "\r\n\r\n"
    (tmp_path / "rows.jsonl").write_bytes(text.encode())
    problems = load_problems("rows", read_rows(str(tmp_path / "rows.jsonl")), Codec(tiny_tokenizer), verifier, 60)
    assert [problem.answer for problem in problems] == ["1", "2", "x"]
    assert not any("\r" in problem.text for problem in problems)


def test_a_file_in_another_encoding_is_one_line(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_bytes('{"problem": "é?", "answer": "1"}\n'.encode("latin-1"))
    with pytest.raises(SystemExit) as error:
        read_rows(str(tmp_path / "rows.jsonl"))
    assert error.value.code == 2
    assert "utf-8" in capsys.readouterr().err


def test_a_truncated_parquet_file_is_one_line(tmp_path, capsys):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(SystemExit) as error:
        read_rows(str(tmp_path / "rows.parquet"))
    assert error.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# ----------------------------------------------------------------------------------------------- folders
@pytest.mark.parametrize("flags, named", [
    (["--name", "x"], "--resume"),
    (["--name", "x", "--resume", "--seed", "5"], "seed 0, not 5"),
    (["--name", "y", "--resume"], "holds no run")])
def test_a_folder_of_another_run_is_left_alone(make_run, tiny_model, coin_data, capsys, flags, named):
    flags = ["--model", tiny_model, "--data", coin_data, *SMALL, *flags]
    run = make_run("grpo", "--model", tiny_model, "--data", coin_data, *SMALL, "--name", "x")
    run.record.write_metrics(run.step, {"precious": 1})
    with pytest.raises(SystemExit) as error:
        make_run("grpo", *flags)
    assert error.value.code == 2
    assert named in capsys.readouterr().err
    assert read_jsonl(run.record.folder / "metrics.jsonl") == [{"step": 0, "precious": 1}]


@pytest.mark.parametrize("place", ("runs", "runs/x"))
def test_a_file_in_the_place_of_a_folder_is_one_line(command_line, tiny_model, coin_data, tmp_path, capsys,
                                                     place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("precious")
    script = command_line("grpo", "--model", tiny_model, "--data", coin_data, *SMALL, "--name", "x")
    with pytest.raises(SystemExit) as end:
        script.main()
    said = capsys.readouterr()
    assert end.value.code == 2
    assert said.err.count("\n") == 1
    assert "runs/x" in said.err
    assert "step" not in said.out  # nothing was trained
    assert (tmp_path / place).read_text() == "precious"


def test_a_run_of_another_method_is_not_resumed(make_run, tiny_model, coin_data, capsys):
    flags = ["--model", tiny_model, "--data", coin_data, *SMALL, "--name", "x"]
    make_run("grpo", *flags)
    with pytest.raises(SystemExit) as error:
        make_run("luffy", *flags, "--resume")
    assert error.value.code == 2
    assert "script grpo, not luffy" in capsys.readouterr().err


def test_the_saved_model_is_the_trained_one(make_run, tiny_model, coin_data):
    run = make_run("grpo", "--model", tiny_model, "--data", coin_data, *SMALL)
    with torch.no_grad():
        next(run.policy.model.parameters()).add_(0.5)
    run.record.write_metrics(run.step, {})
    run.end()
    saved, _ = load(str(run.record.folder / "model"), torch.float32)
    for trained, loaded in zip(run.policy.model.parameters(), saved.parameters()):
        assert torch.equal(trained, loaded)


def test_the_newest_checkpoints_are_kept(command_line, coin_model, coin_data, tmp_path):
    flags = ["--model", coin_model, "--data", coin_data, *SMALL, "--save_every", "1", "--name", "x"]
    command_line("grpo", *flags, "--steps", "3", "--keep", "2").main()
    checkpoints = tmp_path / "runs" / "x" / "checkpoint"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-2", "step-3"]
    command_line("grpo", *flags, "--steps", "4", "--resume").main()
    assert [path.name for path in checkpoints.iterdir()] == ["step-4"]


# ------------------------------------------------------------------------------------------- hardware
def test_a_large_model_without_a_card_is_one_line_unless_a_cpu_is_asked_for(
        make_run, tiny_model, coin_data, monkeypatch, capsys):
    monkeypatch.setattr(policy, "LARGE", 1000)
    flags = ["grpo", "--model", tiny_model, "--data", coin_data, *SMALL]
    with pytest.raises(SystemExit) as end:
        make_run(*flags)
    assert end.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert "torch sees no CUDA device" in line and "--device cpu" in line
    make_run(*flags, "--device", "cpu")


def test_a_card_without_vllm_is_one_line_for_all_but_small_models(monkeypatch, capsys):
    monkeypatch.setattr(sampling, "find_spec", lambda name: None)
    card = SimpleNamespace(device=torch.device("cuda"), size=lambda: 10**9)
    with pytest.raises(SystemExit) as end:
        sampling.Sampler(SimpleNamespace(rollout="auto"), card)
    assert end.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert "pip install" in line and "--rollout transformers" in line
