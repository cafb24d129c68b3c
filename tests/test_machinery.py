"""Flags and steps of the loop, seen from outside: lr in the update, noise that changes with the step."""
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from conftest import SMALL, load, read_jsonl, save_model, write_jsonl

import common
from common import Problem, Row
from runtime import toy
from runtime.policy import Policy
from runtime.record import Record
from runtime.rows import Codec
from runtime.stored import Demonstrations, KeptRows
from runtime.verification import RIGHT, TIMEOUT, UNPARSED, WRONG, Verifier

CPU = torch.device("cpu")


# -------------------------------------------------------------------------------------------- the optimiser
@pytest.fixture
def make_policy(command_line, tiny_model):
    def make(*flags: str) -> Policy:
        module = command_line("grpo", "--model", tiny_model, *SMALL, *flags)
        return Policy(common.parse(module.Args, module.__doc__), CPU)
    return make


def directions(model, seed: int) -> list[torch.Tensor]:
    """A random gradient of norm 1, as one tensor for each parameter."""
    torch.manual_seed(seed)
    tensors = [torch.randn_like(parameter) for parameter in model.parameters()]
    norm = torch.cat([tensor.flatten() for tensor in tensors]).norm()
    return [tensor / norm for tensor in tensors]


def add_gradient(model, seed: int, norm: float = 1.0):
    """By backward, as a loss adds it to what is there."""
    sum(norm * (parameter * direction).sum()
        for parameter, direction in zip(model.parameters(), directions(model, seed))).backward()


def weights(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_the_update_is_adamw_with_the_flags_numbers(make_policy):
    """Six steps, through the end of the warmup, against the formula of arXiv:1711.05101, algorithm 2."""
    lr, beta2, decay, warmup = 0.02, 0.7, 0.3, 4
    policy = make_policy("--lr", str(lr), "--beta2", str(beta2), "--weight_decay", str(decay),
                         "--warmup", str(warmup))
    expected = [parameter.double() for parameter in weights(policy.model)]
    m, v = [[torch.zeros_like(parameter) for parameter in expected] for _ in range(2)]
    for step in range(1, 7):
        add_gradient(policy.model, step)
        assert policy.step("rl", 1e9).item() == pytest.approx(1, rel=1e-4)  # no older gradient is left in it
        lr_t = lr * min(1, step / warmup)
        for i, g in enumerate(directions(policy.model, step)):
            m[i] = 0.9 * m[i] + 0.1 * g.double()
            v[i] = beta2 * v[i] + (1 - beta2) * g.double() ** 2
            denominator = (v[i] / (1 - beta2 ** step)).sqrt() + 1e-8
            expected[i] = (1 - lr_t * decay) * expected[i] - lr_t * m[i] / (1 - 0.9 ** step) / denominator
    for actual, number in zip(weights(policy.model), expected):
        torch.testing.assert_close(actual.double(), number, rtol=0, atol=2e-5)
    assert policy.updates == 6


def test_without_warmup_the_first_update_has_the_whole_learning_rate(make_policy):
    """Adam's first step moves every weight by the learning rate, whatever the gradient."""
    policy = make_policy("--lr", "0.003", "--warmup", "0", "--weight_decay", "0")
    before = weights(policy.model)
    add_gradient(policy.model, 0, norm=1e4)
    policy.step("rl", 1e9)
    for old, new in zip(before, weights(policy.model)):
        assert (new - old).abs().median().item() == pytest.approx(0.003, rel=1e-3)


def test_a_step_without_any_gradient_is_one_with_a_gradient_of_0(make_policy):
    """No row has an advantage: the first moment moves the weights on, and what it weighs goes down."""
    policy = make_policy("--weight_decay", "0")
    add_gradient(policy.model, 0)
    policy.step("rl", 1.0)
    before = weights(policy.model)
    assert policy.step("rl", 1.0) == 0
    assert not any(torch.equal(old, new) for old, new in zip(before, weights(policy.model)))
    assert {state["step"].item() for state in policy.optimizers["rl"].state.values()} == {2}


def test_a_checkpoint_is_read_into_the_tensors_that_stay(make_policy):
    """No second copy of weights and moments is left in memory."""
    policy, seen = make_policy(), []
    policy.load(1, ["rl", "sft"], seen.append)
    [state] = seen
    moments = {name: state[name]["state"] for name in ("rl", "sft")}
    for name, parameter in policy.model.named_parameters():
        assert state["model"][name].data_ptr() == parameter.data_ptr()
        for optimizer in moments:
            for moment in ("exp_avg", "exp_avg_sq"):
                own = policy.optimizers[optimizer].state[parameter][moment]
                assert moments[optimizer][name][moment].data_ptr() == own.data_ptr()


def test_a_policy_that_was_saved_and_loaded_goes_on_to_the_bit(make_policy, tmp_path):
    """Also with moments that have rested since: `sft` makes no step between the two checkpoints."""
    policies = [make_policy("--warmup", "9") for _ in range(3)]

    def step(policy, seed, name):
        add_gradient(policy.model, seed)
        policy.step(name, 0.5)

    def hand_on(old, new):
        dcp.save(old.state(), checkpoint_id=tmp_path / "state")
        new.load(old.updates, list(old.optimizers), lambda state: dcp.load(state, checkpoint_id=tmp_path / "state"))
        shutil.rmtree(tmp_path / "state")

    alone, second, third = policies
    for seed, name in enumerate(("rl", "rl", "sft", "sft")):
        step(alone, seed, name)
    hand_on(alone, second)
    for policy in (alone, second):
        step(policy, 4, "rl")
    hand_on(second, third)
    for policy in (alone, third):
        for seed, name in enumerate(("sft", "rl"), 5):
            step(policy, seed, name)
    assert alone.updates == third.updates == 7
    for left, right in zip(weights(alone.model), weights(third.model)):
        assert torch.equal(left, right)


# ------------------------------------------------------------------------------------------------ the model
def test_a_longer_context_and_another_base_of_rope(make_policy, capsys):
    with pytest.raises(SystemExit):
        make_policy("--max_prompt", "300")
    assert "256 positions" in capsys.readouterr().err
    policy = make_policy("--max_prompt", "300", "--max_positions", "400", "--rope_theta", "40000")
    assert policy.model.config.max_position_embeddings == 400
    tokens = torch.arange(10)[None]
    logits = [model(input_ids=tokens).logits for model in (policy.model, make_policy().model)]
    frequency = 40000 ** (-2 / 8)  # of the second pair of a head's 8 dimensions
    assert policy.model.model.rotary_emb.inv_freq[1].item() == pytest.approx(frequency)
    assert not torch.allclose(logits[0], logits[1])


def test_a_model_with_dropout_is_trained_without(make_policy, tmp_path):
    """Sampler and trainer would not agree, nor the two passes of a checkpointed layer."""
    tokenizer = toy.make_tokenizer()
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0.5,
        embd_pdrop=0.5, attn_pdrop=0.5, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    folder = save_model(transformers.GPT2LMHeadModel(config), tmp_path / "gpt2")
    model = make_policy("--model", folder).model.train()
    tokens = torch.arange(10)[None]
    assert torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_a_saved_model_ends_its_responses_as_it_was_trained_to(make_policy, tiny_model, tmp_path):
    model, _ = load(tiny_model, torch.float32)
    model.generation_config.eos_token_id = 5
    policy = make_policy("--model", save_model(model, tmp_path / "other_eos"))
    policy.save(tmp_path / "model")
    saved = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
    assert saved.eos_token_id == policy.codec.ends == [policy.tokenizer.eos_token_id, 5]


# --------------------------------------------------------------------------------------- rollout and verify
def answer(run, problem: Problem, box: str) -> Row:
    return Row(problem, run.codec.encode(problem, f"<think>\n</think>\n{box}"))


def test_rollouts_change_with_the_step_the_seed_and_again_alone(make_run, coin_model, coin_data):
    run = make_run("grpo", "--model", coin_model, "--data", coin_data, *SMALL, "--temperature", "1.4")

    def responses(step: int, seed: int) -> list:
        run.step, run.args.seed = step, seed
        return [(row.response, row.sampler_logp) for row in run.rollout(run.train[:1] * 16)]

    first = responses(1, 0)
    assert responses(1, 0) == first
    others = [responses(step, seed) for step, seed in ((2, 0), (1, 1), (2, 1))]
    assert first not in others and others[0] not in others[1:] and others[1] != others[2]
    again = [(row.response, row.sampler_logp) for row in run.rollout(run.train[:1] * 16, again=1)]
    assert again not in [first, *others]

    run.record.sums.clear()
    run.args.temperature = 100.0  # of noise: every token is about as likely as every other
    rows = run.rollout(run.train[:1] * 3)
    logp = torch.tensor([number for row in rows for number in row.sampler_logp])
    assert logp.mean().item() == pytest.approx(-torch.tensor(len(run.policy.tokenizer)).log().item(), rel=0.05)
    assert run.record.sums["response/length"] == [sum(len(row.response) for row in rows), 3]


def test_problems_of_a_batch_that_is_asked_for(make_run, coin_model, coin_data):
    """TOPR's sets are numbered by themselves."""
    run = make_run("grpo", "--model", coin_model, "--data", coin_data, *SMALL)
    batches = []
    for run.step in (1, 2, 3):
        batches.append(run.next_problems())
    run.step = 9
    assert [run.next_problems(batch) for batch in (0, 1, 2)] == batches
    assert run.next_problems() == run.next_problems(8)

    run.args.updates = 2  # mini-batches: each has as many rows of every group
    rows = [Row(problem, [number]) for problem in batches[0] for number in range(4)]
    minibatches = run.minibatches(rows)
    assert [len(minibatch) for minibatch in minibatches] == [8, 8]
    assert sorted(map(id, sum(minibatches, []))) == sorted(map(id, rows))
    for minibatch in minibatches:
        indices = [row.problem.index for row in minibatch]
        assert all(indices.count(problem.index) == 2 for problem in batches[0])


def test_rewards_groups_and_verdicts_are_counted(make_run, coin_model, coin_data, verifier, monkeypatch):
    """Three groups; the demonstrations, all right, stand in a group that is all wrong and in one that is mixed."""
    run = make_run("grpo", "--model", coin_model, "--data", coin_data, *SMALL)
    boxes = {"1": RIGHT, "2": WRONG, "3": UNPARSED, "4": TIMEOUT, "5": -6}
    monkeypatch.setattr(verifier, "decide", lambda questions: [boxes[box] for _, box in questions])
    right, wrong, mixed = run.train[:3]
    rows = [answer(run, right, r"\boxed{1}"), answer(run, right, r"\boxed{1}")]
    rows += [answer(run, wrong, box) for box in ("no box", r"\boxed{2}", r"\boxed{2}", r"\boxed{2}", r"\boxed{3}",
                                                 r"\boxed{3}", *[r"\boxed{4}"] * 4, *[r"\boxed{5}"] * 5)]
    rows += [answer(run, mixed, r"\boxed{1}"), answer(run, mixed, r"\boxed{2}")]
    for problem in (wrong, mixed):
        rows.append(answer(run, problem, r"\boxed{1}"))
        rows[-1].is_demo = True
    run.step = 4
    assert run.verify(rows).tolist() == [1.0, 1.0, *[0.0] * 15, 1.0, 0.0, 1.0, 1.0]
    sums = dict(run.record.sums)
    assert sums.pop("seconds/verification")[1] == 0
    assert sums == {"reward": [3.0, 19], "reward/demonstrations": [2.0, 2],
                    "groups/all_right": [1, 3], "groups/all_wrong": [1, 3], "response/thought": [19, 19],
                    "response/boxed": [18, 19], "verifier/no_box": [1, 0],
                    "verifier/unparsed": [2, 0], "verifier/timeouts": [4, 0], "verifier/crashes": [5, 0]}

    for number, row in enumerate(rows):
        row.advantage = float(number)
    for run.step in range(5, 15):
        run.verify(rows)
    samples = read_jsonl(run.record.folder / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [4, *range(5, 15)]
    assert len({sample["advantage"] for sample in samples[1:]}) > 3  # any row, not always the same
    for sample in samples[1:]:
        row = rows[int(sample["advantage"])]
        assert sample == {"step": sample["step"], "prompt": row.problem.text, "response": run.codec.text(row),
                          "answer": row.problem.answer, "is_demo": row.is_demo, "reward": row.reward,
                          "advantage": row.advantage}


# --------------------------------------------------------------------------------------- score and the update
def plain(run, row: Row, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of a row alone, from all logits."""
    tokens = torch.tensor([row.problem.prompt + row.response])
    logits = run.policy.model(input_ids=tokens).logits[0, len(row.problem.prompt) - 1:-1].double()
    logp = (logits / temperature).log_softmax(dim=-1)
    return logp[range(len(row.response)), row.response].detach(), -(logp.exp() * logp).sum(dim=-1).detach()


@pytest.fixture
def watched(make_run, tiny_model, coin_data):
    """A run at a temperature of its own, rows of four lengths, and what the model is called with."""
    run = make_run("luffy", "--model", tiny_model, "--data", coin_data, *SMALL, "--temperature", "0.7",
                   "--micro_tokens", "80", "--max_grad_norm", "0.01", "--updates", "2")
    rows = [answer(run, problem, "a=1\n" * number) for number, problem in enumerate(run.train[:4])]
    for row in rows:
        row.advantage = 1.0
    rows[1].is_demo = True
    calls = []
    run.policy.model.base_model.register_forward_pre_hook(
        lambda module, _, inputs: calls.append((inputs["input_ids"].numel(), module.training)), with_kwargs=True)
    return run, rows, calls


def test_score_is_at_the_temperature_and_counts_tokens(watched):
    run, rows, calls = watched
    expected = [plain(run, row, 0.7) for row in rows]
    for row, (logp, _) in zip(rows, expected):
        if not row.is_demo:
            sign = torch.arange(len(logp)) % 2 * 2 - 1  # the sampler is above and below the trainer
            row.sampler_logp = (logp + sign * len(logp) / 100).tolist()
    calls.clear()
    run.policy.model.train()
    run.score(rows)
    assert len(calls) > 1 and all(tokens <= 80 and not training for tokens, training in calls)
    for row, (logp, _) in zip(rows, expected):
        assert not row.old_logp.requires_grad
        torch.testing.assert_close(row.old_logp.double(), logp, rtol=0, atol=1e-4)
    sampled = [number for number, row in enumerate(rows) if not row.is_demo]
    sizes = [len(row.response) for row in rows]
    for name, total, count in (
            ("entropy", sum(expected[i][1].sum() for i in sampled), sum(sizes[i] for i in sampled)),
            ("demonstrations/probability", expected[1][0].exp().sum(), sizes[1]),
            ("sampler_gap", sum(sizes[i] ** 2 / 100 for i in sampled), sum(sizes[i] for i in sampled))):
        assert run.record.own_sums[name][0].item() == pytest.approx(float(total), rel=1e-3), name
        assert run.record.own_sums[name][1] == count, name


def test_log_probs_of_an_update_are_at_the_temperature(watched):
    run, rows, calls = watched
    expected = {len(row.response): plain(run, row, 0.7) for row in rows}
    for bonus, asked in ((0.0, False), (0.1, False), (-0.1, False), (0.0, True)):
        run.policy.model.eval()
        calls.clear()
        batches = list(run.micro_batches(rows, bonus))
        for batch in batches:
            logp, entropy = run.logprobs(batch, bonus, asked)
            assert logp.requires_grad
            for i, size in enumerate(batch.mask.sum(dim=1).tolist()):
                row_logp, row_entropy = expected[size]
                row_entropy = row_entropy if bonus or asked else torch.zeros(size, dtype=torch.float64)
                torch.testing.assert_close(logp[i, :size].double(), row_logp, rtol=0, atol=1e-4)
                torch.testing.assert_close(entropy[i, :size].double(), row_entropy, rtol=0, atol=1e-4)
        assert len(calls) == len(batches) > 1
        assert all(tokens <= 80 and training for tokens, training in calls)


def first_moment(run, name: str) -> float:
    """Its norm: after the first step a tenth of the gradient's that the step was taken with."""
    return torch.cat([state["exp_avg"].flatten() for state in run.policy.optimizers[name].state.values()]).norm().item()


def test_two_updates_of_a_step_and_what_is_logged_of_them(watched):
    """The first from two micro-batches; its gradient is longer than --max_grad_norm 0.01. The second from none."""
    run, _, _ = watched
    model = run.policy.model
    for total, count in ((3.0, 2), (4.0, 8)):
        loss = sum((parameter * direction).sum() for parameter, direction in
                   zip(model.parameters(), directions(model, 0)))
        run.backward(loss - loss.detach() + 0.25, {"a metric": (torch.tensor(total), count)})
    run.optimizer_step([])
    assert first_moment(run, "rl") == pytest.approx(0.1 * 0.01, rel=1e-3)
    run.optimizer_step([])  # no row had an advantage
    sums = run.record.sums
    assert not run.record.own_sums["loss"][0].requires_grad
    assert sums["gradient_norm"][0].item() == pytest.approx(2.0, rel=1e-3) and sums["gradient_norm"][1] == 2
    run.record.begin(0)
    metrics = run.record.take_metrics()
    assert metrics["loss"] == pytest.approx(0.5)  # the whole step's, of which micro-batches are parts
    assert metrics["a metric"] == pytest.approx(0.7)
    assert metrics["gradient_norm"] == pytest.approx(1.0, rel=1e-3)

    run.optimizer_step([])
    assert run.record.take_metrics()["loss"] == 0.0  # a figure in every line, also where nothing was learnt


def test_the_gradient_is_scaled_to_the_norm_that_a_method_asks_for(watched):
    run, _, _ = watched
    for name, limit, expected in (("flag", None, 0.01), ("own", 0.5, 0.5), ("short", 3.0, 2.0)):
        add_gradient(run.policy.model, 0, norm=2.0)
        run.optimizer_step([], moments=name, max_grad_norm=limit)
        assert first_moment(run, name) == pytest.approx(0.1 * expected, rel=1e-3), name
    assert run.record.sums["gradient_norm"][0].item() == pytest.approx(6.0, rel=1e-3)  # before that
    for norm in (float("nan"), float("nan")):
        add_gradient(run.policy.model, 0, norm=norm)
        run.optimizer_step([])
    assert run.record.sums["updates/skipped"] == [2, 0]


# ---------------------------------------------------------------------------------------- the end of a step
class OtherEngine:
    """An engine with weights of its own, as vLLM has; notes whether they were the trainer's when it sampled."""

    def __init__(self, engine, policy, folder: str):
        self.engine, self.policy, self.current, self.deaf = engine, policy, [], False
        self.engine.model = load(folder, torch.float32)[0]

    def generate(self, *arguments):
        pairs = zip(self.engine.model.parameters(), self.policy.model.parameters())
        self.current.append(all(torch.equal(ours, theirs) for ours, theirs in pairs))
        return self.engine.generate(*arguments)

    def update(self, weights):
        if not self.deaf:
            self.engine.update(weights)

    def differing(self, weights):
        return self.engine.differing(weights)


def test_the_steps_of_a_run(make_run, coin_model, tmp_path, capsys):
    """Five steps, evaluated every second, saved every third; each a rollout and an update. A signal in the last one."""
    rows = [{"problem": f"a={i};a?", "answer": str(i % 2)} for i in range(6)]
    rows[1]["demonstration"] = "<think>\n</think>\n\\boxed{1}"
    data, held_out = write_jsonl(tmp_path / "rows.jsonl", rows), write_jsonl(tmp_path / "held.jsonl", rows[:2])
    run = make_run("grpo", "--model", coin_model, "--data", data, "--eval_data", held_out, *SMALL, "--steps", "5",
                   "--eval_every", "2", "--save_every", "3", "--name", "x")
    run.sampler.engine = engine = OtherEngine(run.sampler.engine, run.policy, coin_model)
    saved, logged = [], []
    for step in run.steps():
        run.rollout(run.train[:1])
        run.log("once", step, 0) if step == 2 else None
        run.log("reward", step, 2)
        add_gradient(run.policy.model, step)
        run.optimizer_step([])
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)  # all was done anyway: the run ends as it would
        run.end_step()
        state = {"step": 0, "sizes": {}}
        for checkpoint in run.record.checkpoints():  # one at most
            state = torch.load(checkpoint / "run.pt", weights_only=True)
        saved.append(state["step"])
        logged.append(state["sizes"].get("metrics.jsonl") == (run.record.folder / "metrics.jsonl").stat().st_size)
        assert run.record.bar.n == step
    assert saved == [0, 0, 3, 3, 5]
    assert logged == [False, False, True, False, True]  # what a checkpoint keeps has its step in it
    assert len(engine.current) > 10 and all(engine.current)

    run.verifier = Verifier(workers=1)
    run.end()
    assert run.verifier.idle.empty()  # its process has ended
    assert (run.record.folder / "model").exists()
    lines = read_jsonl(run.record.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(6))
    assert [line["step"] for line in lines if "accuracy/held" in line] == [0, 2, 4, 5]
    assert [line["once"] for line in lines if "once" in line] == [2]
    assert [line["reward"] for line in lines[1:]] == [step / 2 for step in range(1, 6)]
    answers = read_jsonl(run.record.folder / "answers.jsonl")
    assert [line["step"] for line in answers] == [step for step in (0, 2, 4, 5) for _ in range(2)]
    said = capsys.readouterr()
    assert "6 problems from" in said.out and "1 of them with a demonstration; 2 held out" in said.out
    assert "reward=2.50" in said.err.rpartition("5/5")[2]  # on the bar
    assert said.out.count("first step:") == 0  # nobody has verified anything

    engine.deaf = True  # a hand-over that does not arrive
    with torch.no_grad():
        next(run.policy.model.parameters()).mul_(2)
    with pytest.raises(SystemExit) as end:
        run.end_step()
    assert end.value.code == 2
    assert "the sampler is stale" in capsys.readouterr().err


def test_a_hand_over_that_does_not_arrive_is_seen_in_the_smallest_step_and_loses_none(make_run, coin_model, coin_data,
                                                                                      capsys):
    flags = ("grpo", "--model", coin_model, "--data", coin_data, *SMALL, "--steps", "5", "--name", "x",
             "--save_every", "0", "--eval_every", "2")
    run = make_run(*flags)
    run.sampler.engine = OtherEngine(run.sampler.engine, run.policy, coin_model)
    weight = run.policy.model.model.layers[1].mlp.down_proj.weight
    with pytest.raises(SystemExit) as end:
        for step in run.steps():
            run.sampler.engine.deaf = step == 2
            with torch.no_grad():
                weight[0, 0] += 1e-6  # no log-prob tells
            run.end_step()
    error = capsys.readouterr().err
    assert end.value.code == 2 and run.step == 2
    assert "the sampler is stale: after step 2's hand-over its model.layers.1.mlp.down_proj.weight is not" in error
    assert [list(line) == ["step"] for line in read_jsonl(run.record.folder / "metrics.jsonl")] == [False, True, True]
    resumed = make_run(*flags, "--resume")
    assert resumed.step == 2
    assert torch.equal(resumed.policy.model.model.layers[1].mlp.down_proj.weight, weight)


def test_without_save_every_the_only_checkpoint_is_the_last(make_run, coin_model, coin_data):
    run = make_run("grpo", "--model", coin_model, "--data", coin_data, *SMALL, "--steps", "3", "--save_every", "0")
    saved = []
    for _ in run.steps():
        run.end_step()
        saved.append(bool(run.record.checkpoints()))
    assert saved == [False, False, True]


def test_an_evaluation_has_flags_of_its_own(make_run, coin_model, tmp_path):
    held_out = write_jsonl(tmp_path / "held.jsonl", [{"problem": "a=1;a?", "answer": "1"}])
    run = make_run("grpo", "--model", coin_model, "--data", held_out, "--eval_data", f"{held_out}@16", *SMALL,
                   "--eval_temperature", "1", "--eval_response", "6")
    run.args.temperature = 1e-4
    path = run.record.folder / "answers.jsonl"

    def answers(step: int) -> list[dict]:
        run.step, lines = step, len(path.read_text().splitlines()) if path.exists() else 0
        metrics = run.evaluate()
        assert metrics.keys() == {"accuracy/held", *(f"pass@{k}/held" for k in (2, 4, 8, 16))}
        new = read_jsonl(path)[lines:]
        assert [line.pop("step") for line in new] == [step] * 16
        return new

    first = answers(0)
    assert max(line["tokens"] for line in first) == 6  # of 8, and L is 40
    run.args.eval_response = 8
    first = answers(1)
    assert {line["boxed"] for line in first} >= {"0", "1"}
    assert [line["tokens"] for line in first if line["boxed"]] == [8] * sum(bool(line["boxed"]) for line in first)
    assert answers(2) == first  # accuracies of two steps differ by the weights alone
    run.args.seed = 1
    assert answers(3) != first
    run.args.eval_temperature = 1e-4  # the coin always falls on one side
    assert len({line["response"] for line in answers(4)}) == 1


# ----------------------------------------------------------------------------------------------- resuming
def test_a_resumed_run_has_all_of_its_state(make_run, tiny_model, tmp_path):
    texts = [f"<think>\na={i}\n</think>\n\\boxed{{{i}}}" for i in range(7)]
    rows = [{"problem": f"a={i};a?", "answer": str(i), "demonstration": text} for i, text in enumerate(texts)]
    flags = ("chord", "--model", tiny_model, "--data", write_jsonl(tmp_path / "rows.jsonl", rows), *SMALL,
             "--name", "x")
    run = make_run(*flags)
    assert len(run.demonstrations.next(3)) == 3
    add_gradient(run.policy.model, 0)
    run.optimizer_step([])
    run.step, run.skipped = 2, 2
    run.save()
    again = make_run(*flags, "--resume")
    assert (again.step, again.skipped, again.policy.updates) == (2, 2, 1)
    for one in (run, again):
        add_gradient(one.policy.model, 1)
        one.optimizer_step([])
    for left, right in zip(weights(run.policy.model), weights(again.policy.model)):
        assert torch.equal(left, right)
    rest = [[row.problem.index for row in one.demonstrations.next(4)] for one in (run, again)]
    assert rest[0] == rest[1]


# --------------------------------------------------------------------------------------------- the folder
@pytest.fixture
def make_record(command_line):
    def make(*flags: str) -> Record:
        module = command_line("grpo", "--model", "somewhere/tiny", *SMALL, *flags)
        record = Record(common.parse(module.Args, module.__doc__))
        record.open()
        return record
    return make


def test_runs_without_a_name_are_numbered(make_record):
    records = [make_record() for _ in range(3)]
    assert [record.folder.name for record in records] == ["grpo-tiny-1", "grpo-tiny-2", "grpo-tiny-3"]
    assert [json.loads((record.folder / "args.json").read_text())["name"] for record in records] \
        == ["grpo-tiny-1", "grpo-tiny-2", "grpo-tiny-3"]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(make_record):
    make_record("--name", "x").write_metrics(0, {"accuracy/held": 0.5})
    record = make_record("--name", "x", "--resume")
    assert record.load() is None
    assert read_jsonl(record.folder / "metrics.jsonl") == []
    assert json.loads((record.folder / "args.json").read_text())["resume"] is False  # no setting of the run


def test_a_run_of_an_older_script_without_a_flag_is_not_resumed(make_record, capsys):
    """Its value then is not known to be today's default."""
    record = make_record("--name", "x")
    arguments = json.loads((record.folder / "args.json").read_text())
    del arguments["beta2"]
    (record.folder / "args.json").write_text(json.dumps(arguments))
    with pytest.raises(SystemExit) as end:
        make_record("--name", "x", "--resume")
    assert end.value.code == 2
    assert "beta2" in capsys.readouterr().err


def test_the_last_line_says_what_was_learnt(make_record, capsys):
    record = make_record()
    for step, accuracy in enumerate((0.25, 0.5, 0.75)):
        record.write_metrics(step, {"accuracy/held": accuracy, "reward": 1.0})
    record.say_what_was_learnt()
    assert capsys.readouterr().out == f"accuracy: held 0.25 -> 0.75; see {record.folder}/\n"


def test_means_and_sums_of_a_step(make_record):
    record = make_record()
    record.begin(0)
    for total, count in ((1.0, 3), (torch.tensor(2.0, requires_grad=True), 1)):
        record.log_own("mean", total, count)
        record.log_own("sum", total, 0)
    with record.timer("update"), record.timer("update"):
        pass
    assert not record.own_sums["sum"][0].requires_grad  # a graph would stay in memory for the step
    assert record.sums["seconds/update"][1] == 0    # a sum
    metrics = record.take_metrics()
    assert (metrics["mean"], metrics["sum"]) == (0.75, 3.0)
    assert record.take_metrics() == {}


# ------------------------------------------------------------------------------------------ rows that are kept
@pytest.fixture
def codec(tiny_model) -> Codec:
    return Codec(load(tiny_model)[1])


def problems_of(*demonstrations: str) -> list[Problem]:
    """Their index is not their place in the list, as when others were held out."""
    return [Problem(10 + i, f"a={i};a?", [5], "1", text, "", {"id": i}) for i, text in enumerate(demonstrations)]


def test_the_stream_of_demonstrations(codec, capsys):
    """In an order of the seed, other than the prompts'; those that do not fit are passed over and counted."""
    problems, log = problems_of(*["a=1"] * 9, "", "a=1" * 20), []

    def stream(seed: int = 0, state=None) -> Demonstrations:
        return Demonstrations(SimpleNamespace(seed=seed, max_response=12, data="rows.jsonl"), problems, codec,
                              {} if state is None else state, lambda *entry: log.append(entry))

    state = {}
    demonstrations = stream(state=state)
    rows = demonstrations.next(4) + demonstrations.next(5)
    assert all(row.is_demo and row.advantage == 1 for row in rows)
    indices = [row.problem.index for row in rows]
    assert sorted(indices) == list(range(10, 19))
    assert 9 <= state["drawn"] <= 11
    assert all(entry[0] == "demonstrations/left_out" and entry[2] == 0 for entry in log)
    assert sum(entry[1] for entry in log) <= 1
    assert [row.problem.index for row in stream(seed=1).next(9)] != indices
    prompts = common.draw(problems, "0 prompts", 0, 11)
    assert [problem.index for problem in prompts if problem.index < 19] != indices

    problems[:] = problems_of("", "a=1" * 20)
    log.clear()
    with pytest.raises(SystemExit) as end:
        stream().next(1)
    assert end.value.code == 2
    assert "rows.jsonl: no demonstration fits in --max_response 12" in capsys.readouterr().err
    assert 1 < len(log) < 4  # it gives up after two epochs


def test_the_demonstrations_of_a_problem(codec, capsys):
    """All that fit, in their order; the others are counted. The first stands for them where one is asked for."""
    problem, log = problems_of("a=1" * 20)[0], []
    problem.others = ["a=1" * 2, "a=1"]
    args = SimpleNamespace(seed=0, max_response=12, data="rows.jsonl")
    demonstrations = Demonstrations(args, [problem], codec, {}, lambda *entry: log.append(entry))
    assert "rows.jsonl: 1 of 3 demonstrations have more than --max_response 12 tokens" in capsys.readouterr().out
    rows = demonstrations.all(problem)
    assert [codec.text(row) for row in rows] == problem.others and all(row.is_demo for row in rows)
    assert demonstrations.of(problem).response == rows[0].response
    assert log == [("demonstrations/left_out", 1, 0)] * 2 and demonstrations.given == 4
    assert demonstrations.all(problems_of("")[0]) == [] and demonstrations.of(problems_of("")[0]) is None


@pytest.mark.parametrize("said, before", (
    ("</think>\\boxed{7}", "</think>\\boxed{"), ("\\boxed{3}</think>\\boxed{7};", "\\boxed{3}</think>\\boxed{"),
    ("</think>7", "</think>7\n\\boxed{")))
def test_the_reference_in_the_place_of_a_demonstrations_answer(said, before, codec):
    problem = problems_of("")[0]
    problem.answer = "42"
    row, size = Demonstrations(SimpleNamespace(max_response=99, data=""), [], codec, {}, None).with_reference(
        Row(problem, codec.encode(problem, said), is_demo=True))
    assert codec.tokenizer.decode(row.response) == before + "42"
    assert row.response[-size:] == codec.tokens("42") and row.is_demo and row.problem is problem


def test_rows_that_are_kept_and_saved(codec, tmp_path, capsys):
    problems = problems_of("", "")
    rows = [Row(problem, codec.encode(problem, text)) for problem in problems for text in ("a=1", "a=2")]
    rows[1].response.pop()  # it was cut
    kept = KeptRows(problems, codec, {}, tmp_path / "rollouts.jsonl")
    kept.keep(rows, in_file=False)
    kept.keep(rows[2:], in_file=False)  # in place of the others
    assert [(row.problem.index, row.response) for row in kept.rows()] \
        == [(row.problem.index, row.response) for row in rows[2:]]
    kept.keep(rows[:2], in_file=True)
    kept.keep(rows[2:], in_file=True)
    assert read_jsonl(kept.path) == [
        {"problem": f"a={i};a?", "id": i, "answer": "1", "response": text}
        for i, text in ((0, "a=1"), (1, "a=1"), (1, "a=2"))]

    for problem in problems:
        problem.row["response"] = "a=1" * 20
    problems[0].row["response"] = None
    with pytest.raises(SystemExit) as end:
        kept.read("old.jsonl", 12)
    said = capsys.readouterr()
    assert end.value.code == 2 and "--offline old.jsonl: no response can be used" in said.err
    assert "left out 1 rows without a response and 1 responses of more than 12 tokens" in said.out
    problems[1].row["response"] = "a=3"
    row, = kept.read("old.jsonl", 12)
    assert (row.problem, codec.text(row), codec.ended(row)) == (problems[1], "a=3", True)
