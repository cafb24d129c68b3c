"""Evaluation: pass@k against its definition, the table, every answer in a file, --eval_only as it is run."""
import itertools
import json
import math
import statistics

import pytest
from conftest import SMALL, TESTS, load, read_jsonl, run_script, write_jsonl

from common import Row
from runtime import evaluation
from runtime.problems import SYSTEM as OURS
from runtime.rows import Problem


@pytest.mark.parametrize("samples, right", [(4, 0), (4, 1), (5, 3), (6, 6), (1, 1), (1, 0), (7, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(samples, right):
    outcomes = [1] * right + [0] * (samples - right)
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(outcomes, k))
        share = sum(map(max, subsets)) / len(subsets)
        assert evaluation.pass_at_k(samples, right, k) == pytest.approx(share, abs=1e-12)


def rows_of(*groups: tuple[str, list[float]]) -> list[Row]:
    rows = []
    for index, (part, rewards) in enumerate(groups):
        problem = Problem(index, "", [], "1", "", part, {}, len(rewards))
        rows += [Row(problem, [0], reward=reward) for reward in rewards]
    return rows


def test_a_summary_has_the_mean_over_problems_its_error_and_pass_at_k():
    rows = rows_of(("a", [1, 0, 0, 0]), ("a", [1, 1, 1, 1]), ("b", [0]), ("b", [1]), ("b", [1]))
    summary = evaluation.summarise(rows)
    a, b = summary["a"], summary["b"]
    assert (a["problems"], a["samples"], b["problems"], b["samples"]) == (2, 4, 3, 1)
    assert a["accuracy"] == pytest.approx((0.25 + 1) / 2)
    assert a["error"] == pytest.approx(statistics.stdev([0.25, 1]) / math.sqrt(2))
    assert a["pass@2"] == pytest.approx((0.5 + 1) / 2)  # 3 of the 6 pairs have the right one
    assert a["pass@4"] == 1
    assert b["accuracy"] == pytest.approx(2 / 3)
    assert not any("@" in name for name in b)
    lines = [line.split() for line in evaluation.table(summary).splitlines()]
    assert lines[0] == ["slice", "problems", "samples", "accuracy", "pass@2", "pass@4"]
    assert lines[1][:4] == ["a", "2", "4", "0.625"] and lines[1][-2:] == ["0.750", "1.000"]
    assert lines[2][:4] == ["b", "3", "1", "0.667"]
    assert lines[3] == ["mean", "of", "slices", "0.646"]


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory) -> list[str]:
    """Two benchmarks for the coin model; one has the column names and lists of some on the Hub."""
    folder = tmp_path_factory.mktemp("benchmarks")
    first = [{"question": f"a={i:02d};a?", "final_answer": [str(i % 2)]} for i in range(6)]
    second = [{"problem": f"b={i:02d};b?", "answer": i % 2, "data_source": "mine"} for i in range(4)]
    return [write_jsonl(folder / "first.jsonl", first), write_jsonl(folder / "second.jsonl", second)]


def test_eval_only_as_a_user_runs_it(coin_model, benchmarks, tmp_path):
    process = run_script("grpo.py", "--model", coin_model, "--eval_only", *SMALL, "--eval_temperature", "1",
                         "--eval_data", f"{benchmarks[0]}@8,{benchmarks[1]}", "--name", "test", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "runs" / "test"
    assert sorted(path.name for path in folder.iterdir()) == ["answers.jsonl", "args.json", "metrics.jsonl"]
    answers = read_jsonl(folder / "answers.jsonl")
    assert len(answers) == 6 * 8 + 4
    right = {}
    for answer in answers:
        assert (answer["verdict"] == "right") == (answer["boxed"] == answer["reference"])  # of a coin: 0 or 1
        assert f"\\boxed{{{answer['boxed']}}}" in answer["response"] or answer["verdict"] == "no answer"
        right.setdefault((answer["slice"], answer["index"]), []).append(answer["verdict"] == "right")
    metrics, = read_jsonl(folder / "metrics.jsonl")
    first = [hits for (name, _), hits in right.items() if name == "first"]
    second = [hits for (name, _), hits in right.items() if name == "mine"]
    assert metrics["accuracy/first"] == pytest.approx(sum(map(sum, first)) / 48)
    assert metrics["accuracy/mine"] == pytest.approx(sum(map(sum, second)) / 4)
    assert 0 < metrics["accuracy/first"] < 1
    for k in (2, 4, 8):
        passed = [1 - math.comb(8 - sum(hits), k) / math.comb(8, k) for hits in first]
        assert metrics[f"pass@{k}/first"] == pytest.approx(statistics.mean(passed))
    table = process.stdout[process.stdout.index("slice"):].splitlines()
    assert table[1].split()[:4] == ["first", "6", "8", f"{metrics['accuracy/first']:.3f}"]
    assert table[3].startswith("mean of slices")


@pytest.mark.parametrize("flags, named", [
    (["--eval_data", ""], "--eval_data"),
    (["--eval_data", "missing.jsonl@4"], "missing.jsonl: no such file"),
    (["--eval_data", "rows.jsonl@0"], "rows.jsonl@0"),
])
def test_what_cannot_be_evaluated_is_one_line(flags, named, coin_model, command_line, tmp_path, capfd):
    write_jsonl(tmp_path / "rows.jsonl", [{"problem": "a=1;a?", "answer": 1}])
    with pytest.raises(SystemExit) as end:
        command_line("luffy", "--model", coin_model, "--eval_only", *SMALL, *flags).main()
    error = capfd.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and named in error
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------ what the papers render
SYSTEM = "Think first."
QUESTION = "What is 1 + 1?"


@pytest.fixture
def qwen_math(tiny_model, tmp_path) -> str:
    """The tiny model with Qwen2.5-Math's chat template: a system prompt of its own and no <think>."""
    model, tokenizer = load(tiny_model)
    tokenizer.chat_template = (TESTS / "golden" / "qwen2.5-math.jinja").read_text()
    model.save_pretrained(tmp_path / "math")
    tokenizer.save_pretrained(tmp_path / "math")
    return str(tmp_path / "math")


def rendered(system: str) -> str:
    return (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n")


def test_the_papers_prompt_in_training_and_in_evaluation(qwen_math, make_run, tmp_path, capsys):
    """The data's system message instead of the template's, and <think>; benchmarks are asked alike."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    thought = "<think>\n1+1\n</think>\n\\boxed{2}"
    row = {"prompt": messages, "reward_model": {"ground_truth": "2"},
           "target": [{"role": "assistant", "content": thought}]}
    train = write_jsonl(tmp_path / "train.jsonl", [row])
    benchmark = write_jsonl(tmp_path / "benchmark.jsonl", [{"problem": QUESTION, "answer": "2"}])
    flags = ("--model", qwen_math, "--data", train, "--eval_data", benchmark, "--max_prompt", "150",
             "--max_response", "100", "--eval_response", "100")
    run = make_run("luffy", *flags)
    assert run.train[0].text == run.held_out[0].text == rendered(SYSTEM)
    response = run.codec.encode(run.train[0], run.train[0].demonstration)
    assert run.policy.tokenizer.decode(response[:-1]) == thought.removeprefix("<think>\n")  # it is in the prompt
    run.record.announce(run.policy, run.train, run.held_out, "")
    assert rendered(SYSTEM) in capsys.readouterr().out
    other = make_run("luffy", *flags, "--system", "Be brief.", "--prompt_end", "", "--name", "other")
    assert other.held_out[0].text == rendered("Be brief.").removesuffix("<think>\n")
    assert other.train[0].text == rendered(SYSTEM).removesuffix("<think>\n")


def test_benchmarks_without_training_data_are_asked_in_our_words(qwen_math, make_run, tmp_path):
    benchmark = write_jsonl(tmp_path / "benchmark.jsonl", [{"problem": QUESTION, "answer": "2"}])
    run = make_run("luffy", "--model", qwen_math, "--eval_only", "--eval_data", benchmark,
                   "--max_prompt", "250", "--max_response", "5", "--eval_response", "5")
    assert run.train == [] and run.held_out[0].text == rendered(OURS)
    assert json.loads((run.record.folder / "args.json").read_text())["prompt_end"] == "<think>\n"


def test_log_probs_are_asked_for_in_training_alone(coin_model, coin_data, make_run, shared_verifier, monkeypatch):
    run = make_run("grpo", "--model", coin_model, "--data", coin_data, *SMALL)
    batches, generate = [], run.sampler.engine.generate
    monkeypatch.setattr(run.sampler.engine, "generate", lambda *args: batches.append(generate(*args)) or batches[-1])
    run.rollout(run.train[:2])
    run.evaluate()
    assert [{type(logp) for _, logp in batch} for batch in batches] == [{list}, {type(None)}]
