"""The estimate of a GPU's memory: against what autograd keeps of a layer, and what --dry_run says."""
import json
import re

import pytest
import torch
import transformers
from conftest import ROOT, SMALL, save_model

import common
from runtime import memory, policy
from runtime.record import Record

QWEN_MATH = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960,
    "max_position_embeddings": 4096, "tie_word_embeddings": True}


def kept_bytes(hidden: int, inner: int, tokens: int = 200) -> int:
    """What autograd keeps of one Qwen2 layer in bfloat16 for backward, without its weights."""
    config = transformers.Qwen2Config(
        vocab_size=50, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1,
        num_attention_heads=hidden // 128, num_key_value_heads=1, max_position_embeddings=256)
    model, kept = transformers.Qwen2ForCausalLM(config).model.bfloat16().train(), {}

    def keep(tensor):
        if tokens in tensor.shape:  # and so no weight
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
        return tensor

    states = torch.randn(1, tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(tokens)[None]
    rotation = model.rotary_emb(states, positions)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.layers[0](states, attention_mask=None, position_ids=positions, position_embeddings=rotation)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / tokens


def test_a_layer_keeps_what_the_estimate_says():
    base = kept_bytes(512, 1024)
    assert (kept_bytes(512, 3072) - base) / 2048 == pytest.approx(8, rel=0.05)
    assert (kept_bytes(1536, 1024) - base) / 1024 == pytest.approx(20, rel=0.1)
    config = transformers.Qwen2Config(**QWEN_MATH)
    estimate = memory.parts(config, 0, 1)["inside one layer"]
    assert 20 * 1536 + 8 * 8960 < kept_bytes(1536, 8960) * 1.05 < estimate < 2 * kept_bytes(1536, 8960)


def test_the_largest_micro_batch_just_fits():
    config, parameters = transformers.Qwen2Config(**QWEN_MATH), 1_543_714_304
    for card in (48, 80):
        largest = memory.largest_micro_tokens(config, parameters, card * memory.GIB)
        size = sum(memory.parts(config, parameters, largest).values())
        assert 0 <= memory.usable(card * memory.GIB) - size < 10 * memory.GIB / largest * 100
    assert memory.largest_micro_tokens(config, parameters, 24 * memory.GIB) < 0  # 16 bytes a parameter


def test_what_is_divided_and_what_is_moved():
    config, parameters = transformers.Qwen2Config(**QWEN_MATH), 1_543_714_304
    alone, shared, moved = [memory.parts(config, parameters, 4096, 1, *rest) for rest in ((1,), (8,), (1, True))]
    kept = [name for name in alone if name in ("weights, float32", "their gradients", "moments of AdamW")]
    assert sum(alone[name] for name in kept) == 16 * parameters
    for name in alone:
        assert shared[name] == (alone[name] // 8 if name in kept else alone[name])
        assert moved[name] == (0 if name in kept else alone[name])
    assert memory.host_bytes(parameters, offload=True) == 18 * parameters  # and vLLM's weights, asleep
    assert memory.host_bytes(parameters, 1, 16, True, 8) == 32 * parameters  # eight loads at once are more


ROOM = {  # card in GiB, --offload, what is said
    "enough": (80, [], None),
    "too small alone": (24, [], "it takes more cards, or --offload"),
    "enough with offload": (24, ["--offload"], None),
    "too small even so": (4, ["--offload"], "it takes more or larger cards"),
    "no room for a micro-batch": (80, ["--micro_tokens", "300000"], "lower --micro_tokens to at most 190235"),
    "a share that fits": (80, ["--gpu_memory_utilization", "0.68"], None),
    "a share beside moments that come later": (80, ["--gpu_memory_utilization", "0.8"],
                                               "--gpu_memory_utilization at most 0.68"),
    "a share beside two moments": (48, ["--gpu_memory_utilization", "0.4"], "--gpu_memory_utilization at most 0.30"),
    "a share without a cache": (80, ["--gpu_memory_utilization", "0.05"], "raise --gpu_memory_utilization, up to 0.68"),
    "another engine": (80, ["--rollout", "transformers"], None),
}


@pytest.mark.parametrize("case", ROOM)
def test_a_card_that_is_too_small_is_one_line(case, command_line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * memory.GIB // 4096}.get)
    card, flags, said = ROOM[case]
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "config.json").write_text(json.dumps(QWEN_MATH))
    script = "relift" if "two" in case else "grpo"
    module = command_line(script, "--model", "math", *flags)
    args = common.parse(module.Args, module.__doc__)
    if said is None:
        memory.fit(args, script, card * memory.GIB)
        return
    with pytest.raises(SystemExit) as end:
        memory.fit(args, script, card * memory.GIB)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and said in error


def test_host_memory_that_is_too_small_is_one_line(command_line, tmp_path, capsys, monkeypatch):
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "config.json").write_text(json.dumps(QWEN_MATH))
    module = command_line("relift", "--model", "math", "--offload")
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 26 * memory.GIB // 4096}.get)
    with pytest.raises(SystemExit):
        memory.fit(common.parse(module.Args, module.__doc__), "relift", 24 * memory.GIB)
    assert "needs 37 GiB of host memory, and this machine has 26" in capsys.readouterr().err


@pytest.mark.parametrize("script, card, flags, expected", (
    ("grpo", 80, [], 0.68), ("grpo", 48, [], 0.54), ("relift", 80, [], 0.54), ("grpo", 24, ["--offload"], 0.87),
    ("grpo", 80, ["--gpu_memory_utilization", "0.5"], 0.5)))
def test_without_the_flag_vllm_gets_what_the_trainer_leaves(script, card, flags, expected, command_line, tmp_path,
                                                            monkeypatch):
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * memory.GIB // 4096}.get)
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "config.json").write_text(json.dumps(QWEN_MATH))
    module = command_line(script, "--model", "math", *flags)
    args = common.parse(module.Args, module.__doc__)
    assert args.gpu_memory_utilization == (expected if flags[1:] else 0)
    memory.fit(args, script, card * memory.GIB)
    assert args.gpu_memory_utilization == expected
    if not flags:  # weights and moments, 12 bytes a parameter or 20, and a tenth of the card
        held = (20 if script == "relift" else 12) * 1_543_714_304 / memory.GIB
        assert 0 <= 0.9 * card - held - expected * card < 0.01 * card


@pytest.mark.parametrize("script, moments", (("grpo", ["rl"]), ("relift", ["rl", "sft"])))
def test_the_disk_that_a_run_needs(script, moments, coin_model, command_line, tmp_path):
    """Measured on files: a checkpoint with the moments of each optimiser, and model/ in the dtype it came in."""
    config = transformers.AutoConfig.from_pretrained(coin_model)
    config.update({"hidden_size": 128, "intermediate_size": 512})
    wide = save_model(transformers.Qwen2ForCausalLM(config).bfloat16(), tmp_path / "wide")
    module = command_line(script, "--model", wide, "--data", "none.jsonl", *SMALL)
    args = common.parse(module.Args, module.__doc__)
    record, trained = Record(args), policy.Policy(args, torch.device("cpu"))
    for name in moments:
        trained.step(name, 1.0)
    record.open()
    record.save(1, {}, trained.state())
    trained.save(record.folder / "model")
    checkpoint, model = [sum(path.stat().st_size for path in (record.folder / part).rglob("*") if path.is_file())
                         for part in ("checkpoint", "model")]
    most, end = memory.disk_bytes(policy.load_config(args), trained.size(), len(moments))
    assert end < checkpoint + model < 1.1 * end
    assert most < 2 * checkpoint < 1.1 * most


def test_a_toy_gets_a_share_too(command_line):
    module = command_line("grpo")
    args = common.parse(module.Args, module.__doc__)
    memory.fit(args, "grpo", 24 * memory.GIB)
    assert args.gpu_memory_utilization == 0.87


@pytest.fixture
def dry_run(command_line, tmp_path, capsys):
    """What a script with --dry_run prints for Qwen2.5-Math-1.5B, of which there is only a config."""
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "config.json").write_text(json.dumps(QWEN_MATH))

    def run(script: str, *flags: str) -> str:
        with pytest.raises(SystemExit) as end:
            command_line(script, "--model", "math", "--dry_run", *flags).main()
        assert end.value.code == 0
        assert not (tmp_path / "runs").exists()
        return capsys.readouterr().out
    return run


def test_dry_run_says_what_fits_on_which_card(dry_run):
    output = dry_run("grpo")
    assert "1544M parameters" in output
    total = float(re.search(r"([\d.]+)  in all", output).group(1))
    assert total == pytest.approx(sum(map(float, re.findall(r"^ +([\d.]+)", output, re.M))) / 2, abs=0.4)
    assert "24 GiB: too small for this model" in output
    assert "80 GiB: enough" in output
    assert float(re.search(r"([\d.]+)  in all", dry_run("relift")).group(1)) > total + 11  # moments twice
    assert "lower --micro_tokens" in dry_run("grpo", "--micro_tokens", "100000")
    assert "8 cards of 24 GiB: enough" in output
    assert "a card of 24 GiB: enough" in dry_run("grpo", "--offload")
    assert "80 GiB: --gpu_memory_utilization at most 0.68" in dry_run("grpo", "--gpu_memory_utilization", "0.8")
    assert "24 GiB: raise --gpu_memory_utilization, up to 0.78" in dry_run("grpo", "--gpu_memory_utilization", "0.1")
    assert "lower --max_response" in dry_run("relift", "--rope_theta", "40000", "--max_positions", "131072",
                                             "--max_response", "100000")


def cards_rows() -> list[tuple]:
    """Of the table in docs/cards.md: name, config, its parameters, --offload, cells."""
    found = re.findall(r"^\| ([\d.]+B): H (\d+), (\d+) layers, I (\d+) \| (yes|no) \|(.*)\|$",
                       (ROOT / "docs" / "cards.md").read_text(), re.M)
    rows = []
    for name, hidden, layers, inner, offload, cells in found:
        large = int(hidden) > 3000
        config = transformers.Qwen2Config(
            vocab_size=152064 if large else 151936, hidden_size=int(hidden), num_hidden_layers=int(layers),
            num_attention_heads=int(hidden) // (64 if hidden == "896" else 128),
            num_key_value_heads=(8 if hidden == "5120" else 4) if large else 2, intermediate_size=int(inner),
            tie_word_embeddings=not large, dtype="bfloat16")
        rows.append((name, config, memory.count_parameters(config), offload == "yes", cells))
    return rows


def test_the_first_hours_figures_are_what_the_estimate_says():
    """docs/gpu.md: three cards, and the disk that 1.5B and 7B take."""
    page, gib = (ROOT / "docs" / "gpu.md").read_text(), memory.GIB
    rows = re.findall(r"^\| (24|48|80) \| `--model Qwen/Qwen2.5-(?:Math-)?([\d.]+B)( --offload)?` \|(.*)\|$", page,
                      re.M)
    sizes = {name: (config, parameters) for name, config, parameters, _, _ in cards_rows()}
    assert len(rows) == 6 and {card for card, *_ in rows} == {"24", "48", "80"}
    for card, name, offload, cells in rows:
        config, parameters = sizes[name]
        place, card = (1, 1, bool(offload)), int(card) * gib
        share = memory.largest_share(parameters, card, *place)
        update = sum(memory.parts(config, parameters, 16384, *place).values())
        assert [cell.strip() for cell in cells.split("|")] == [
            f"{update / gib:.1f}", f"{memory.largest_micro_tokens(config, parameters, card, *place):,}", f"{share:.2f}",
            f"{memory.cache_tokens(config, parameters, share, card) // 4096}",
            f"{memory.host_bytes(parameters, 1, 1, bool(offload)) / gib:.0f}"]
    disk = [round(size / gib) for name in ("1.5B", "7B") for optimizers in (1, 2)
            for size in memory.disk_bytes(*sizes[name], optimizers)]
    said = re.search(r"takes, of 1.5B, (\d+) GiB at most and (\d+) at the end \(ReLIFT (\d+) and (\d+)\), "
                     r"of 7B (\d+) and (\d+) \((\d+) and (\d+)\)", page)
    assert list(map(int, said.groups())) == disk


def test_the_readmes_table_is_what_the_estimate_says():
    rows = cards_rows()
    assert len(rows) >= 6
    for _, config, parameters, offload, cells in rows:
        expected = []
        for cards in (1, 8):
            for card in memory.CARDS:
                place = (parameters, card * memory.GIB, 1, cards, offload)
                largest = memory.largest_micro_tokens(config, *place)
                cache = memory.cache_tokens(config, parameters, memory.largest_share(*place), card * memory.GIB)
                expected.append(f"{largest // 1000}k" if min(largest, cache) >= 4096 else "-")
        hosts = [memory.host_bytes(parameters, 1, cards, offload, cards) / memory.GIB for cards in (1, 8)]
        expected.append(" / ".join(f"{host:.0f}" for host in hosts))
        assert [cell.strip() for cell in cells.split("|")] == expected


def test_rope_and_positions_are_those_of_the_flags(tiny_model, make_run, coin_data, tmp_path):
    run = make_run("grpo", "--model", tiny_model, "--data", coin_data, *SMALL, "--rope_theta", "40000",
                   "--max_positions", "512", "--max_response", "400")
    plain, _ = policy.load_model(make_run("grpo", "--model", tiny_model, "--data", coin_data, *SMALL,
                                          "--name", "plain").args, torch.device("cpu"))
    assert run.policy.model.config.max_position_embeddings == 512
    tokens = torch.tensor([[5, 6, 7, 8]])
    longer, shorter = (model.model.rotary_emb.inv_freq for model in (run.policy.model, plain))
    power = torch.arange(0, 8, 2) / 8
    torch.testing.assert_close(longer, 40000.0 ** -power)
    torch.testing.assert_close(shorter, 10000.0 ** -power)
    assert not torch.equal(run.policy.model(tokens).logits, plain(tokens).logits)
    run.policy.model.save_pretrained(tmp_path / "saved")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    assert config.rope_parameters["rope_theta"] == 40000
    assert config.max_position_embeddings == 512


def test_the_readmes_short_table_is_the_long_one():
    """yes where a model fits, --offload where it does only so."""
    cards = (ROOT / "docs" / "cards.md").read_text()
    long = re.findall(r"^\| ([\d.]+B): .*? \| (yes|no) \|(.*)\|[^|]*\|$", cards, re.M)
    fits = {(name, offload): [cell.strip() != "-" for cell in cells.split("|")] for name, offload, cells in long}
    expected = {name: ["yes" if alone else "`--offload`" if offloaded else "no"
                       for alone, offloaded in zip(fits[name, "no"], fits[name, "yes"], strict=True)]
                for name, _ in fits}
    short = re.findall(r"^\| ([\d.]+B) \|(.*)\|$", (ROOT / "README.md").read_text(), re.M)
    assert {name: [cell.strip() for cell in cells.split("|")] for name, cells in short} == expected
