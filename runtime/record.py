"""The run's folder runs/<name>: arguments, metrics, samples, checkpoint; how a run is resumed and ended."""
import contextlib
import importlib
import importlib.util
import json
import os
import pickle
import platform
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from runtime import processes
from runtime.flags import Args, fail
from runtime.policy import Policy
from runtime.progress import waiting
from runtime.rows import Codec, Problem, Row

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it should be in a run of one process
# Flags that may change when a run is resumed: no result depends on them (--eval_every: what is logged).
FREE = {"resume", "steps", "name", "tracker", "save_every", "keep", "device", "rollout", "offload",
        "micro_tokens", "gpu_memory_utilization"}


@contextlib.contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """One line for a file that was cut or spoiled."""
    try:
        yield
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError,
            CheckpointException) as error:
        fail(f"{path} cannot be read: {error}")


class Record:
    """A run's folder, and what the first process writes there; of a checkpoint each writes its part."""

    def __init__(self, args: Args):
        if args.tracker != "none" and not importlib.util.find_spec(args.tracker):
            fail(f"--tracker {args.tracker}: not installed; pip install {args.tracker}, or leave the flag "
                 "out")
        self.args, self.script, self.tracking = args, Path(sys.argv[0]).stem, False
        self.folder = processes.gather(self.choose_folder() if processes.first() else None)[0]
        self.sums = defaultdict(lambda: [0.0, 0])      # of values that every process has
        self.own_sums = defaultdict(lambda: [0.0, 0])  # of those of this process's rows
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
            if processes.first():
                self.folder.mkdir(parents=True, exist_ok=self.args.resume)
            self.write_arguments()
        except OSError as error:
            fail(f"{self.folder} cannot be written: {error.strerror}")
        processes.gather()
        if not self.folder.exists():
            fail(f"{self.folder.absolute()}, which the first process has made, is not on {platform.node()}: "
                 "start in a folder that all machines share")

    def write_arguments(self):
        if not processes.first():
            return
        settings = self.settings() | {"name": self.folder.name, "resume": False, "rows": self.rows}
        (self.folder / "args.new").write_text(json.dumps(settings, indent=2))
        os.replace(self.folder / "args.new", self.folder / "args.json")  # whole or not at all

    # ---- metrics
    def log(self, name: str, total: float | torch.Tensor, count: int = 1):
        """Adds `count` values, whose sum is `total`, to a mean over the step; with count 0 adds to a sum.

        For what every process knows; what it knows of its own rows alone is for log_own.
        """
        self.sums[name][0] += total
        self.sums[name][1] += count

    def log_own(self, name: str, total: float | torch.Tensor, count: int | torch.Tensor = 1):
        """The same for a process's own rows: sums and counts of all processes are added at the step's end."""
        self.own_sums[name][0] += total.detach() if torch.is_tensor(total) else total
        self.own_sums[name][1] += count

    @contextlib.contextmanager
    def timer(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.log(f"seconds/{name}", time.perf_counter() - start, 0)

    def take_metrics(self) -> dict[str, float]:
        """The means and sums of the step that ends; the next one begins with none."""
        own = {name: (float(total), int(count)) for name, (total, count) in self.own_sums.items()}
        for part in processes.gather(own):
            for name, (total, count) in part.items():
                self.log(name, total, count)
        sums = sorted(self.sums.items())
        metrics = {name: float(total) / max(1, int(count)) for name, (total, count) in sums}
        self.sums.clear()
        self.own_sums.clear()
        shown = [name for name in ("reward", "response/length", "entropy") if name in metrics]
        self.bar.set_postfix({name: f"{metrics[name]:.2f}" for name in shown})
        self.bar.update()
        return metrics

    def write_metrics(self, step: int, metrics: dict):
        self.append("metrics.jsonl", {"step": step} | metrics)

    def append(self, name: str, line: dict):
        if not processes.first():
            return
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.args.tracker != "none":
            self.track(name, line)

    def track(self, name: str, line: dict):
        """Sends a line of metrics.jsonl or samples.jsonl to --tracker, where a resumed run is another run."""
        tracker = importlib.import_module(self.args.tracker)
        if not self.tracking:
            tracker.init(project="minimal-luffy", name=self.folder.name, config=self.settings())
            self.tracking = True  # until the program ends, which both packages notice
        values = {key: value for key, value in line.items() if key != "step"}
        if name == "samples.jsonl":
            values = {"sample": tracker.Table(columns=list(values), data=[list(values.values())])}
        tracker.log(values, step=line["step"])

    # ---- samples
    def describe(self, step: int, row: Row, codec: Codec) -> dict:
        prefix = {"prefix": codec.tokenizer.decode(row.response[:row.prefix])} if row.prefix else {}
        return {"step": step, "prompt": row.problem.text, "response": codec.text(row),
                "answer": row.problem.answer, "is_demo": row.is_demo, "reward": row.reward,
                "advantage": row.advantage} | prefix

    def write_sample(self, step: int, row: Row, codec: Codec):
        sample = self.describe(step, row, codec)
        self.append("samples.jsonl", sample)
        if step % 10 == 1:
            tqdm.write(f"--- a sample of step {step}, reward {row.reward:g}\n"
                       f"{sample['prompt']}{sample['response'][:1000]}\n---")

    def write_skipped(self, step: int, update: int, rows: list[Row], codec: Codec) -> Path:
        """Keeps the rows whose gradient was not finite."""
        path = self.folder / f"skipped-{update}.json"
        if processes.first():
            path.write_text(json.dumps([self.describe(step, row, codec) for row in rows], indent=1))
        tqdm.write(f"step {step}: the gradient is not finite; no update from the rows in {path}")
        return path

    # ---- checkpoint
    @waiting("writing the checkpoint")
    def save(self, step: int, values: dict, tensors: dict):
        """checkpoint/step-N, which appears whole or not at all; then the one before it goes.

        values: plain values, tensors too, that all processes have: run.pt, with the sizes of the logs.
        tensors: of which each process has its part, for torch.distributed.checkpoint.
        """
        new, place = self.folder / "checkpoint" / "new", self.folder / "checkpoint" / f"step-{step}"
        if processes.first():
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            sizes = {log.name: log.stat().st_size for log in self.folder.glob("*.jsonl")}
            with open(new / "run.pt", "wb") as file:
                torch.save(values | {"sizes": sizes}, file)
                file.flush()
                os.fsync(file.fileno())
        processes.gather()
        try:
            dcp.save(tensors, checkpoint_id=new, no_dist=processes.world() == 1)
        except CheckpointException as error:  # what stopped one process is what there is to say
            raise next(iter(error.failures.values()))[0] from None
        processes.gather()
        if processes.first():
            shutil.rmtree(place, ignore_errors=True)  # only a step that is done twice has it
            os.replace(new, place)
            for old in self.checkpoints()[:-self.args.keep]:
                shutil.rmtree(old)
        processes.gather()

    def checkpoints(self) -> list[Path]:
        """Those that are whole, the last one last: --keep, or more if a kill came before the oldest went."""
        return sorted(self.folder.glob("checkpoint/step-*"),
                      key=lambda path: int(path.name.removeprefix("step-")))

    def load(self) -> dict | None:
        """The last checkpoint's values, if there is one. What was logged after it is cut off."""
        saved = None
        for path in self.checkpoints()[-1:]:
            with unreadable(path / "run.pt"):
                saved = torch.load(path / "run.pt", map_location="cpu", weights_only=True)
        processes.gather()
        for log in self.folder.glob("*.jsonl") if processes.first() else ():
            os.truncate(log, saved["sizes"].get(log.name, 0) if saved else 0)
        return saved

    def read_tensors(self, tensors: dict):
        """Those of the last checkpoint in the place of these: no second copy is made of them."""
        path = self.checkpoints()[-1]
        with unreadable(path):
            dcp.load(tensors, checkpoint_id=path, no_dist=processes.world() == 1)

    # ---- from the first line to the last
    def announce(self, policy: Policy, train: list[Problem], held_out: list[Problem], plan: str):
        """Says what the run will do, and shows a rendered prompt and its demonstration."""
        args, example = self.args, (train or held_out)[0]
        device = f"{processes.world()} x " * (processes.world() > 1) + policy.device.type
        demonstrated = sum(bool(problem.demonstration) for problem in train)
        size = f"{policy.size() / 1e6:.1f}M parameters"
        print(f"{self.script} on {device}: {args.model}, {size}; {self.folder}/")
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

    def on_signal(self, number: int, _frame: FrameType | None):
        signal.signal(number, signal.SIG_DFL)
        self.stop_signal = number
        tqdm.write("ending after this step, with a checkpoint; a second signal ends at once")

    def end_early(self, step: int, number: int):
        """After a signal: says which command goes on."""
        self.bar.close()
        again = [part for part in sys.argv if part != "--resume"] + ["--resume"]
        again += [] if self.args.name else ["--name", self.folder.name]
        python = "python"
        if processes.world() > 1:
            python = f"torchrun --nproc_per_node {processes.local_world()} --"  # for its own are --n...
        if processes.world() > processes.local_world():
            python += " and its other flags, as before,"
        print(f"ended after step {step}; to go on: {python} {shlex.join(again)}")
        processes.exit_code = 128 + number
        raise SystemExit(processes.exit_code)

    def say_what_was_learnt(self):
        history = defaultdict(list)
        for line in open(self.folder / "metrics.jsonl", encoding="utf-8"):
            for name, value in json.loads(line).items():
                history[name].append(value)
        learnt = [f"{name.removeprefix('accuracy/')} {values[0]:.2f} -> {values[-1]:.2f}"
                  for name, values in history.items() if name.startswith("accuracy/")]
        print(f"accuracy: {', '.join(learnt) or 'no problems were held out'}; see {self.folder}/")
