"""The estimate of a GPU's memory: against what autograd keeps of a layer, and what --dry_run says."""
import json
import re

import pytest
import torch
import transformers
from conftest import ROOT, SMALL

from runtime import memory, policy

QWEN_MATH = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960,
    "max_position_embeddings": 4096, "tie_word_embeddings": True}


def kept_bytes(hidden: int, inner: int, tokens: int = 200) -> int:
    """What autograd keeps of one Qwen2 layer under autocast for backward, without its weights."""
    config = transformers.Qwen2Config(
        vocab_size=50, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1,
        num_attention_heads=hidden // 128, num_key_value_heads=1, max_position_embeddings=256)
    model, kept = transformers.Qwen2ForCausalLM(config).model.train(), {}

    def keep(tensor):
        if tokens in tensor.shape:  # and so no weight
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
        return tensor

    states = torch.randn(1, tokens, hidden, requires_grad=True)
    positions = torch.arange(tokens)[None]
    with torch.autocast("cpu", torch.bfloat16):
        rotation = model.rotary_emb(states, positions)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.layers[0](states, attention_mask=None, position_ids=positions, position_embeddings=rotation)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / tokens


def test_a_layer_keeps_what_the_estimate_says():
    base = kept_bytes(512, 1024)
    assert (kept_bytes(512, 3072) - base) / 2048 == pytest.approx(8, rel=0.05)
    assert (kept_bytes(1536, 1024) - base) / 1024 == pytest.approx(31, rel=0.1)
    config = transformers.Qwen2Config(**QWEN_MATH)
    estimate = memory.parts(config, 0, 1)["inside one layer"]
    assert 31 * 1536 + 8 * 8960 < kept_bytes(1536, 8960) * 1.05 < estimate < 2 * kept_bytes(1536, 8960)


def test_the_largest_micro_batch_just_fits():
    config, parameters = transformers.Qwen2Config(**QWEN_MATH), 1_543_714_304
    for card in (48, 80):
        largest = memory.largest_micro_tokens(config, parameters, card * memory.GIB)
        size = sum(memory.parts(config, parameters, largest).values())
        assert 0 <= memory.USABLE * card * memory.GIB - size < 10 * memory.GIB / largest * 100
    assert memory.largest_micro_tokens(config, parameters, 24 * memory.GIB) < 0  # 16 bytes a parameter


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it speaks of the card that is there")
def test_dry_run_says_what_fits_on_which_card(dry_run):
    output = dry_run("grpo")
    assert "1544M parameters" in output
    total = float(re.search(r"([\d.]+)  in all", output).group(1))
    assert total == pytest.approx(sum(map(float, re.findall(r"^ +([\d.]+)", output, re.M))) / 2, abs=0.4)
    assert "24 GiB: too small for this model" in output
    assert "80 GiB: enough" in output
    assert float(re.search(r"([\d.]+)  in all", dry_run("relift")).group(1)) > total + 11  # moments twice
    assert "lower --micro_tokens" in dry_run("grpo", "--micro_tokens", "100000")
    assert "lower --max_response" in dry_run("relift", "--rope_theta", "40000", "--max_positions", "131072",
                                             "--max_response", "100000")


def test_the_readmes_table_is_what_the_estimate_says():
    rows = re.findall(r"^\| ([\d.]+B): H (\d+), (\d+) layers, I (\d+) \|(.*)\|$",
                      (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 3
    for _, hidden, layers, inner, cells in rows:
        large = int(hidden) > 3000
        config = transformers.Qwen2Config(
            vocab_size=152064 if large else 151936, hidden_size=int(hidden), num_hidden_layers=int(layers),
            num_attention_heads=int(hidden) // (64 if hidden == "896" else 128),
            num_key_value_heads=4 if large else 2, intermediate_size=int(inner),
            tie_word_embeddings=not large)
        parameters = memory.count_parameters(config)
        expected = []
        for card in memory.CARDS:
            largest = memory.largest_micro_tokens(config, parameters, card * memory.GIB)
            expected.append(f"{largest // 1000}k" if largest >= 2000 else "-")
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
