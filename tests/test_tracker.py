"""--tracker with the real packages, on this machine alone: what they stored is what the run's folder holds."""
import json
import sqlite3
import sys
from collections import ChainMap

import pytest
from conftest import SMALL, optional, read_jsonl, run_command


@pytest.fixture
def train(tiny_model, coin_data, tmp_path, monkeypatch):
    """Two steps of GRPO with a tracker; the run's metrics and samples, without their steps."""
    def run(tracker: str, *flags: str):
        optional(tracker)
        process = run_command("grpo.py", "--model", tiny_model, "--data", coin_data, *SMALL, "--name", "x",
                             "--tracker", tracker, *flags, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        folder = tmp_path / "runs" / "x"
        return read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / "samples.jsonl")

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    return run


def test_trackio_has_the_metrics_and_samples_of_the_run(train, tmp_path):
    metrics, samples = train("trackio")
    with sqlite3.connect(tmp_path / "trackio" / "minimal-luffy.db") as database:
        stored = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        (config,), = database.execute("SELECT config FROM configs").fetchall()
    assert {"script": "grpo", "steps": 2, "tracker": "trackio"}.items() <= json.loads(config).items()
    assert {name for name, _, _ in stored} == {"x"}
    lines = [(step, json.loads(values)) for _, step, values in stored]
    tables = [(step, values["sample"]["_value"]) for step, values in lines if "sample" in values]
    assert [{"step": step} | values for step, values in lines if "sample" not in values] == metrics
    assert [{"step": step} | row for step, (row,) in tables] == samples
    assert len(metrics) == 3 and len(samples) == 2


def records_of(data: bytes) -> list[bytes]:
    """wandb's file: a header of 7 bytes, then blocks of 32 KiB, as LevelDB's logs are built.

    A record stands in one piece (type 1) or in several (2, 3 ..., 4); each has a checksum, a length and its type.
    """
    records, begun, place = [], b"", 7
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # too short for a piece: filled with zeros
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4:place + 6], "little"), data[place + 6]
        begun += data[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(begun)
            begun = b""
    return records


def test_wandb_has_the_metrics_and_samples_of_the_run(train, tmp_path):
    metrics, samples = train("wandb")
    from wandb.proto.wandb_internal_pb2 import Record
    path, = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    lines = []
    for data in records_of(path.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("history"):
            items = record.history.item
            lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    for step, line in enumerate(metrics):
        stored = ChainMap(*[stored for stored in lines if stored["_step"] == step])
        assert {name: stored[name] for name in line.keys() - {"step"}} | {"step": step} == line
    tables = {json.loads(file.read_text())["data"][0][1]: json.loads(file.read_text())
              for file in (path.parent / "files" / "media" / "table").glob("*.table.json")}
    assert {sample["response"] for sample in samples} == tables.keys()
    for sample in samples:
        table = tables[sample["response"]]
        assert dict(zip(table["columns"], *table["data"]), step=sample["step"]) == sample


@pytest.mark.parametrize("tracker", ("trackio", "wandb"))
def test_a_tracker_that_is_not_installed_is_one_line(tracker, command_line, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, tracker, None)  # so Python takes it for absent
    module = command_line("grpo", "--tracker", tracker)
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == (f"grpo.py: error: --tracker {tracker}: not installed; pip install {tracker}, "
                                       "or leave the flag out\n")
    assert not list(tmp_path.iterdir())
