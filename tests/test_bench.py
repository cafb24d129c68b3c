"""bench/gpu.py at its small size: each figure is there and right, and what fails is recorded."""
import json
import math
import signal
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, run_script

sys.path.append(str(ROOT / "bench"))
import gpu  # noqa: E402

FIGURES = {
    "environment": {"date", "device", "cuda", "torch", "transformers", "vllm"},
    "matmul": {"tflops"},
    "update": {"rows", "tokens_per_row", "seconds_per_step", "tokens_per_second", "tokens_per_second_uneven",
               "flops_per_token", "tflops", "mfu", "mfu_goal"},
    "phases": {"engine", "seconds/rollout", "seconds/verification", "seconds/update", "response/length",
               "sampler_gap", "rollout_tokens_per_second", "seconds"},
    "toy": {"accuracy/easy", "accuracy/hard", "accuracy/ood", "seconds"},
}
ON_A_CARD = {"environment": {"memory_gb"}, "update": {"memory_allocated_gb", "memory_reserved_gb"},
             "phases": {"memory_gb"}}


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict:
    """All parts but the tests, of which this is one."""
    folder = tmp_path_factory.mktemp("gpu")
    result = run_script("bench/gpu.py", "--small", "--out", "new/gpu.json", "--parts", *FIGURES, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((folder / "new" / "gpu.json").read_text())
    for part, values in figures.items():
        for name, value in values.items():
            assert f"{part}: {name} = {value}\n" in result.stdout
    return figures


@pytest.mark.slow
@pytest.mark.parametrize("part", FIGURES)
def test_every_figure_is_there_finite_and_positive(figures, part):
    assert list(figures) == list(FIGURES)
    assert set(figures[part]) == FIGURES[part] | (ON_A_CARD.get(part, set()) if gpu.ON_CARD else set())
    for name, value in figures[part].items():
        for number in value if isinstance(value, list) else [value]:
            if name.startswith("accuracy/"):
                assert 0 <= number <= 1
            elif isinstance(number, str):
                assert number
            else:
                assert 0 < number < math.inf, name


@pytest.mark.slow
def test_mfu_is_the_models_flops_over_the_measured_rate(figures):
    update = figures["update"]
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128  # queries and outputs, keys and values of one head, MLP
    head = 256 * 64 * 128 / 192                       # 128 of the 192 tokens are a response's
    attention = 2 * 3 * 2 * 2 * 64 * 192 / 2          # layers, passes, products, FLOPs each, H, T / 2
    flops = 6 * (2 * layer + head) + attention
    rate = 4 * 192 / statistics.median(update["seconds_per_step"])
    assert update["flops_per_token"] == flops
    assert update["tokens_per_second"] == pytest.approx(rate)
    assert update["tflops"] == pytest.approx(flops * rate / 1e12)
    assert update["mfu"] == pytest.approx(update["tflops"] / figures["matmul"]["tflops"])


def test_a_matrix_product_has_a_product_and_a_sum_for_each_pair_of_a_row_and_a_column(monkeypatch):
    products, multiply = [], torch.matmul

    def matmul(a, b):
        products.append(multiply(a, b))

    def timed(function, repeats):
        function()
        return [4.0] * repeats

    monkeypatch.setattr(torch, "matmul", matmul)
    monkeypatch.setattr(gpu, "timed", timed)
    assert gpu.dense_rate(8) == 2 * 8 ** 3 * len(products) / 4
    assert all(product.shape == (8, 8) for product in products)


def test_what_warms_up_is_not_timed(monkeypatch):
    seconds, clock = iter((7.0, 2.0, 3.0)), [0.0]

    def work():
        clock[0] += next(seconds)

    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert gpu.timed(work, 2) == [2.0, 3.0]


@pytest.mark.slow
def test_rollout_tokens_are_those_of_rollouts(figures):
    """Of two rows of a prompt one is a demonstration, so that two prompts have two rollouts."""
    phases = figures["phases"]
    steps = zip(phases["response/length"], phases["seconds/rollout"], strict=True)
    assert phases["rollout_tokens_per_second"] == pytest.approx([2 * length / s for length, s in steps])
    assert len(phases["seconds/update"]) == 3 and max(phases["response/length"]) <= 32


def test_the_full_size_is_that_of_qwen_math():
    with torch.device("meta"):
        config = transformers.Qwen2Config(**gpu.FULL.config, tie_word_embeddings=True)
        model = transformers.Qwen2ForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_543_714_304  # as published
    body = 28 * (2 * 1536 ** 2 + 2 * 1536 * 256 + 3 * 1536 * 8960)
    expected = 6 * (body + 0.75 * 151_936 * 1536) + 6 * 28 * 1536 * 4096
    assert gpu.flops_per_token(model, gpu.FULL.prompt, gpu.FULL.response) == expected


# --------------------------------------------------------------------------------------------- what fails
@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Runs parts in this process; exit code and what was written."""
    def run(*parts: str):
        out = tmp_path / "gpu.json"
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--out", str(out), "--parts", *parts])
        with pytest.raises(SystemExit) as stop:
            gpu.main()
        return stop.value.code, json.loads(out.read_text())
    return run


@pytest.mark.parametrize("error", (ValueError("why"), SystemExit("why")))
def test_a_part_that_fails_is_recorded_and_the_next_ones_go_on(measure, error, tmp_path, monkeypatch, capsys):
    def broken(size, folder):
        yield "before", 1
        raise error

    def after(size, folder):
        yield "file", json.loads((tmp_path / "gpu.json").read_text())

    monkeypatch.setattr(gpu, "PARTS", {"broken": broken, "after": after})
    code, results = measure("broken", "after")
    failed = {"before": 1, "error": f"{type(error).__name__}: why"}
    assert code == 1
    assert results == {"broken": failed, "after": {"file": {"broken": failed}}}
    assert failed["error"] in capsys.readouterr().err


def test_a_command_that_fails_is_recorded_with_what_it_said(measure, tmp_path, monkeypatch):
    (tmp_path / "luffy.py").write_text("print('too little of everything')\nraise SystemExit(2)\n")
    (tmp_path / "test_broken.py").write_text("def test_broken():\n    assert 1 == 2\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "SMALL", SimpleNamespace(**vars(gpu.SMALL) | {"tests": ["test_broken.py"]}))
    code, results = measure("toy", "tests")
    assert code == 1
    assert results["toy"] == {"error": "RuntimeError: exit code 2: too little of everything\n"}
    assert results["tests"]["exit_code"] == 1 and "1 failed" in results["tests"]["last_line"]
    assert "assert 1 == 2" in results["tests"]["error"]


def test_a_command_without_an_end_is_killed(tmp_path, monkeypatch):
    started = []

    class Kept(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Kept)
    monkeypatch.setattr(gpu, "SECONDS", 0.5)
    with pytest.raises(TimeoutError, match="not ended after 0.5 seconds"):
        gpu.run_command(["sleep", "60"], tmp_path)
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_without_a_card_the_full_size_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "ON_CARD", False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 2 and "--small" in capsys.readouterr().err
