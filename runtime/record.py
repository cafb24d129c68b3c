"""The run's folder runs/<name>: arguments, metrics, samples, checkpoint; how a run is resumed and ended."""
import contextlib
import json
import os
import pickle
import shlex
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from runtime.flags import Args, fail
from runtime.rows import Codec, Row

FREE = {"resume", "steps", "name"}  # flags that may change when a run is resumed


class Record:
    """A run's folder, and what is written there."""

    def __init__(self, args: Args):
        self.args, self.script = args, Path(sys.argv[0]).stem
        self.folder = self.choose_folder()
        self.sums = defaultdict(lambda: [0.0, 0])
        self.stop_signal = 0
        self.bar, self.rows = None, ""

    # ---- the folder
    def choose_folder(self) -> Path:
        """runs/<name>: a new one, or with --resume that of a run with the same arguments."""
        name, number = self.args.name, 0
        while not name or not self.args.name and Path("runs", name).exists():
            number += 1
            name = f"{self.script}-{Path(self.args.model).name}-{number}"
        folder = Path("runs", name)
        if self.args.resume and not (folder / "args.json").exists():
            fail(f"--resume: {folder} holds no run; --name says which one to go on with")
        if folder.exists() and not self.args.resume:
            fail(f"{folder} exists: go on with it by --resume, or choose another --name")
        place = next(place for place in (folder, *folder.parents) if place.exists())
        if not (place.is_dir() and os.access(place, os.W_OK)):
            fail(f"{folder} cannot be written: {place} is read-only, or not a folder")
        if self.args.resume:
            self.compare_arguments(folder)
        return folder

    def settings(self) -> dict:
        return {"script": self.script} | asdict(self.args)

    def compare_arguments(self, folder: Path):
        try:
            old = json.loads((folder / "args.json").read_text())
        except (OSError, ValueError) as error:
            fail(f"--resume: {folder}/args.json cannot be read: {error}")
        new = self.settings()
        changed = [key for key in sorted(new.keys() - FREE) if old.get(key) != new[key]]
        if changed:
            fail(f"{folder} was begun with other arguments: "
                 + ", ".join(f"{key} {old.get(key)}, not {new[key]}" for key in changed))

    def open(self, rows: str = ""):
        """Makes the folder. rows: fingerprint of the data; a run that goes on needs the same."""
        self.rows = rows
        if self.args.resume:
            before = json.loads((self.folder / "args.json").read_text()).get("rows", rows)
            if before != rows:
                fail(f"{self.folder} was begun with other data: --data or --eval_data has other rows now")
        try:
            self.folder.mkdir(parents=True, exist_ok=self.args.resume)
            self.write_arguments()
        except OSError as error:
            fail(f"{self.folder} cannot be written: {error.strerror}")

    def write_arguments(self):
        settings = self.settings() | {"name": self.folder.name, "resume": False, "rows": self.rows}
        (self.folder / "args.new").write_text(json.dumps(settings, indent=2))
        os.replace(self.folder / "args.new", self.folder / "args.json")  # whole or not at all

    # ---- metrics
    def log(self, name: str, total, count=1):
        """Adds `count` values, whose sum is `total`, to a mean over the step; with count 0 adds to a sum."""
        self.sums[name][0] += total.detach() if torch.is_tensor(total) else total
        self.sums[name][1] += count

    @contextlib.contextmanager
    def timer(self, name: str):
        start = time.perf_counter()
        yield
        self.log(f"seconds/{name}", time.perf_counter() - start, 0)

    def take_metrics(self) -> dict[str, float]:
        """The means and sums of the step that ends; the next one begins with none."""
        sums = sorted(self.sums.items())
        metrics = {name: float(total) / max(1, int(count)) for name, (total, count) in sums}
        self.sums.clear()
        shown = [name for name in ("reward", "response/length", "entropy") if name in metrics]
        self.bar.set_postfix({name: f"{metrics[name]:.2f}" for name in shown})
        self.bar.update()
        return metrics

    def write_metrics(self, step: int, metrics: dict):
        self.append("metrics.jsonl", {"step": step} | metrics)

    def append(self, name: str, line: dict):
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # ---- samples
    def describe(self, step: int, row: Row, codec: Codec) -> dict:
        return {"step": step, "prompt": row.problem.text, "response": codec.text(row),
                "answer": row.problem.answer, "is_demo": row.is_demo, "reward": row.reward,
                "advantage": row.advantage}

    def write_sample(self, step: int, row: Row, codec: Codec):
        sample = self.describe(step, row, codec)
        self.append("samples.jsonl", sample)
        if step % 10 == 1:
            tqdm.write(f"--- a sample of step {step}, reward {row.reward:g}\n"
                       f"{sample['prompt']}{sample['response'][:1000]}\n---")

    def write_skipped(self, step: int, update: int, rows: list[Row], codec: Codec) -> Path:
        """Keeps the rows whose gradient was not finite."""
        path = self.folder / f"skipped-{update}.json"
        path.write_text(json.dumps([self.describe(step, row, codec) for row in rows], indent=1))
        tqdm.write(f"step {step}: the gradient is not finite; no update from the rows in {path}")
        return path

    # ---- checkpoint
    def save(self, state: dict):
        """The whole state in one file, which appears whole or not at all; with it the sizes of the logs."""
        path = self.folder / "checkpoint" / "state.pt"
        path.parent.mkdir(exist_ok=True)
        sizes = {log.name: log.stat().st_size for log in self.folder.glob("*.jsonl")}
        with open(path.with_suffix(".new"), "wb") as file:
            torch.save(state | {"sizes": sizes}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".new"), path)

    def load(self) -> dict | None:
        """The last checkpoint, if there is one. What was logged after it is cut off and will come again."""
        path = self.folder / "checkpoint" / "state.pt"
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            fail(f"{path} cannot be read: {error}")
        for log in self.folder.glob("*.jsonl"):
            os.truncate(log, saved["sizes"].get(log.name, 0) if saved else 0)
        return saved

    # ---- from the first line to the last
    def announce(self, policy, train: list, held_out: list, plan: str):
        """Says what the run will do, and shows a rendered prompt and its demonstration."""
        args, example = self.args, (train or held_out)[0]
        demonstrated = sum(bool(problem.demonstration) for problem in train)
        print(f"{self.script} on {policy.device}: {args.model}, {policy.size() / 1e6:.1f}M parameters; {self.folder}/")
        if not args.eval_only:
            print(f"{len(train)} problems from {args.data}, {demonstrated} of them with a demonstration; "
                  f"{len(held_out)} held out")
            print(plan or f"{args.steps} steps of {args.prompts} prompts x {args.n} responses of at most "
                  f"{args.max_response} tokens, {args.updates} optimiser steps on each")
        print(f"--- a rendered prompt\n{example.text}")
        print(f"--- its demonstration\n{example.demonstration[:1000] or 'none'}\n---")

    def begin(self, step: int):
        """From here on a signal ends the run after its step, and a bar shows the steps."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        self.bar = tqdm(total=self.args.steps, initial=step, desc=self.script, unit="step")

    def on_signal(self, number, _frame):
        signal.signal(number, signal.SIG_DFL)
        self.stop_signal = number
        tqdm.write("ending after this step, with a checkpoint; a second signal ends at once")

    def end_early(self, step: int):
        """After a signal: says which command goes on."""
        self.bar.close()
        again = [part for part in sys.argv if part != "--resume"] + ["--resume"]
        again += [] if self.args.name else ["--name", self.folder.name]
        print(f"ended after step {step}; to go on: python {shlex.join(again)}")
        raise SystemExit(128 + self.stop_signal)

    def say_what_was_learnt(self):
        history = defaultdict(list)
        for line in open(self.folder / "metrics.jsonl", encoding="utf-8"):
            for name, value in json.loads(line).items():
                history[name].append(value)
        learnt = [f"{name.removeprefix('accuracy/')} {values[0]:.2f} -> {values[-1]:.2f}"
                  for name, values in history.items() if name.startswith("accuracy/")]
        print(f"accuracy: {', '.join(learnt) or 'no problems were held out'}; see {self.folder}/")
