"""What the test files share: the authors' numbers, tiny models, and runs as scripts or users start them."""
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
HUB_CACHE = tempfile.TemporaryDirectory()
os.environ.update(HF_HOME=HUB_CACHE.name, HF_HUB_OFFLINE="1")  # before the imports; no test needs the net
if not os.environ.get("REQUIRE_VLLM"):  # what is tested is what a CPU does; vLLM's tests alone may use a card
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # here and in all that tests start; torch reads it once
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import common  # noqa: E402
from common import Run  # noqa: E402
from forked import run_forked  # noqa: E402
from runtime import toy  # noqa: E402
from runtime.verification import Verifier  # noqa: E402

torch.set_num_threads(1)  # tiny tensors lose by threads
transformers.utils.logging.disable_progress_bar()
SCRIPTS = [name for name in ("grpo", "luffy", "chord", "relift", "topr") if (ROOT / f"{name}.py").exists()]
MORE = sorted(f"more/{path.stem}" for path in (ROOT / "more").glob("*.py"))  # the methods around the five


# --------------------------------------------------------------------------------------- the authors' numbers
def golden(method: str, *names: str):
    """Parameters (case, variant) for a test: the named variants of the authors' numbers, or all."""
    cases = json.loads((TESTS / "golden" / f"{method}.json").read_text())["cases"]
    pairs = [(case, variant) for case in cases for variant in case["variants"]
             if not names or variant["name"] in names]
    return [pytest.param(case, variant, id=f"{case['id']}-{variant['name']}") for case, variant in pairs]


def tensors(case: dict, *names: str) -> list[torch.Tensor]:
    """Inputs of a case in its dtype; masks as the official code got them, int64; groups as numbers."""
    inputs, dtype = case["inputs"], getattr(torch, case["dtype"])
    groups = sorted(set(inputs["group"]))
    integer = {"mask": inputs["mask"], "prefix_mask": inputs.get("prefix_mask"),
               "is_expert": inputs.get("is_expert"),
               "group": [groups.index(name) for name in inputs["group"]]}
    return [torch.tensor(integer[name]) if name in integer else torch.tensor(inputs[name], dtype=dtype)
            for name in names]


def assert_golden(case: dict, actual: torch.Tensor, expected, rtol: float = 1e-9):
    """Equal to the authors' number: in float64 to rtol, in float32 to 2e-6 of the tensor's largest entry."""
    expected = torch.tensor(expected, dtype=torch.float64)
    largest = expected.abs().max().item()
    rtol, atol = (rtol, 1e-12 * largest + 1e-15) if case["dtype"] == "float64" else (0.0, 2e-6 * largest)
    torch.testing.assert_close(actual.detach().double(), expected, rtol=rtol, atol=atol)


def assert_parts_add_up(loss_of_part, inputs: list[torch.Tensor], parts: list[list[int]], loss_of_whole=None):
    """With the whole step's normaliser, losses, gradients and metrics of micro-batches sum to the whole's.

    The losses take the inputs, of which the first are the log-probs; parts are the rows of the micro-batches.
    """
    whole, pieces = inputs[0].clone().requires_grad_(), inputs[0].clone().requires_grad_()
    loss, metrics = (loss_of_whole or loss_of_part)(whole, *inputs[1:])
    loss.backward()
    total, sums = 0.0, dict.fromkeys(metrics, 0.0)
    for rows in parts:
        part, part_metrics = loss_of_part(pieces[rows], *[tensor[rows] for tensor in inputs[1:]])
        part.backward()
        total += part.detach()
        sums = {name: sums[name] + part_metrics[name][0].item() for name in sums}
    torch.testing.assert_close(total, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(pieces.grad, whole.grad, rtol=1e-12, atol=0)
    assert sums == pytest.approx({name: value.item() for name, (value, _) in metrics.items()}, rel=1e-12)


# ------------------------------------------------------------------------------------------------ tiny models
def save_model(model, folder: Path) -> str:
    model.save_pretrained(folder)
    toy.make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a random Qwen2 with the toy's tokenizer: its responses end or are cut, and none is right."""
    tokenizer = toy.make_tokenizer()
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=256, tie_word_embeddings=True,
        initializer_range=0.2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    return save_model(transformers.Qwen2ForCausalLM(config), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def coin_model(tiny_model, tmp_path_factory) -> str:
    r"""The tiny model, trained for a second to answer \boxed{0} or \boxed{1}, by chance: both rewards."""
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(tiny_model), toy.make_tokenizer()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "a=1;a?"}], tokenize=False,
                                           add_generation_prompt=True)
    texts = [f"{prompt}{toy.answered('', 0).replace('00', side)}<|im_end|>" for side in "01"]
    tokens = torch.tensor(tokenizer(texts)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return save_model(model, tmp_path_factory.mktemp("models") / "coin")


def load(folder: str, dtype=torch.float64):
    """A model and its tokenizer; in float64, which tells a wrong formula from a rounding error."""
    return (transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
            transformers.AutoTokenizer.from_pretrained(folder))


# ------------------------------------------------------------------------------------------------ runs
def optional(package: str):
    """The package, or the test is skipped; not where REQUIRE_OPTIONAL is set, as in CI."""
    if os.environ.get("REQUIRE_OPTIONAL"):
        return importlib.import_module(package)
    return pytest.importorskip(package, reason=f"{package}: pip install -r tests/requirements-optional.txt")


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def coin_data(tmp_path) -> str:
    """Problems for the coin model, without demonstrations."""
    rows = [{"problem": f"a={i:02d};a?", "answer": str(i % 2)} for i in range(20)]
    return write_jsonl(tmp_path / "coin.jsonl", rows)


# What a tiny run on data of one's own needs, in the place of the defaults for real models.
SMALL = ("--prompts 4 --n 4 --steps 2 --max_prompt 40 --max_response 40 --eval_response 20 "
         "--micro_tokens 512 --lr 0.01 --prompt_end").split() + [""]


# The same for a file of responses, from which nothing is sampled in training.
SMALL_OFFLINE = [part for part in SMALL if part not in ("--prompts", "--n", "4")]


@pytest.fixture
def command_line(tmp_path, monkeypatch):
    """Puts a script's command line in place, in an empty folder, and returns the script as a module."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def enter(script: str, *flags: str):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
        return importlib.import_module(script.replace("/", "."))

    yield enter
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def make_run(command_line):
    """Builds a Run from a command line, as the first lines of a script's main() do."""
    runs = []

    def make(script: str, *flags: str) -> Run:
        module = command_line(script, *flags)
        runs.append(Run(common.parse(module.Args, module.__doc__)))
        return runs[-1]

    yield make
    for run in runs:
        run.verifier.close()


@pytest.fixture(scope="session")
def verifier():
    """One for all tests, whose processes take seconds to start: it stays when a run closes it."""
    verifier = Verifier(workers=2)
    close, verifier.close = verifier.close, lambda: None
    yield verifier
    close()


@pytest.fixture(autouse=True)
def shared_verifier(request, monkeypatch):
    """The runs in the tests' own process ask it, too, and each knows nothing from the others."""
    def shared(workers, spread, bar):
        verifier = request.getfixturevalue("verifier")
        verifier.spread, verifier.bar, verifier.known = spread, bar, {}
        return verifier

    monkeypatch.setattr(common, "Verifier", shared)


def command(script: Path | str, *flags: str, processes: int = 1) -> list[str]:
    """`python script flags`, or `torchrun --nproc_per_node ... -- script flags`; one of the repository's, or a path."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--"]
    return [sys.executable, *(launcher if processes > 1 else ()), str(ROOT / script), *flags]


def environment() -> dict[str, str]:
    """On one thread: others may be busy."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_script(script: Path | str, *flags: str, cwd: Path, seconds: float = 600, processes: int = 1):
    """The command in the folder cwd, as a user runs it; the scripts of the repository do without their imports."""
    if processes == 1 and script in [f"{name}.py" for name in SCRIPTS + MORE]:
        with tempfile.TemporaryDirectory() as output:
            return run_forked(str(ROOT / script), flags, cwd, environment(), Path(output), seconds)
    return run_command(script, *flags, cwd=cwd, seconds=seconds, processes=processes)


def run_command(script: Path | str, *flags: str, cwd: Path, seconds: float = 600, processes: int = 1):
    """The same as the shell starts it, Python and all."""
    return subprocess.run(command(script, *flags, processes=processes), cwd=cwd, env=environment(), text=True,
                          capture_output=True, timeout=seconds)
