"""A reward of one's own in the place of math-verify: --reward FILE.py:function.

The function is called with a problem's row, as it was read (a dict), and the text of a response, and returns
a number. It is the user's own code and runs in this process, without limits of time or memory.
"""
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path

from runtime import processes
from runtime.flags import fail
from runtime.rows import Codec, Problem, Row
from runtime.verification import RIGHT, WRONG


def load_function(source: str) -> Callable[[dict, str], float]:
    """The function of --reward; what is wrong with it is one line."""
    path, _, name = source.rpartition(":")
    if not Path(path).is_file() or Path(path).suffix != ".py":
        fail(f"--reward {source}: no such file; it is given as FILE.py:function")
    spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.append(str(Path(path).resolve().parent))  # for what it imports from beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        fail(f"--reward {source}: {path} ends with {type(error).__name__}: {error}")
    function = getattr(module, name, None)
    if not callable(function):
        fail(f"--reward {source}: {path} has no function {name}")
    try:
        inspect.signature(function).bind({}, "")
    except TypeError as error:
        fail(f"--reward {source}: it is called with a problem's row and a response's text, but {error}")
    return function


class OwnReward:
    """Stands where a Verifier stands."""

    def __init__(self, source: str):
        self.source, self.function = source, load_function(source)

    def reward(self, problem: Problem, text: str) -> float:
        where = f"--reward {self.source}, row {problem.index} of {problem.part}"
        try:
            reward = self.function(problem.row, text)
        except Exception as error:  # whatever the user's code raises
            fail(f"{where}: {type(error).__name__}: {error}")
        try:
            number = float(reward)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            fail(f"{where}: it returns {reward!r}, not a finite number")
        return number

    def __call__(self, golds: list[str], responses: list[str]) -> list[int]:
        """Every demonstration can be imitated: math-verify is not asked."""
        return [RIGHT] * len(golds)

    def check_golds(self, golds: list[str]) -> list[int]:
        """Every reference can be used."""
        return [RIGHT] * len(golds)

    def judge(self, rows: list[Row], codec: Codec) -> tuple[list[str], list[int]]:
        """Sets row.reward, of responses that were cut too; returns texts, and RIGHT where the reward is 1."""
        texts = [codec.text(row) for row in rows]
        problems = [row.problem for row in rows]
        rewards = processes.spread(lambda *lists: list(map(self.reward, *lists)), problems, texts)
        for row, reward in zip(rows, rewards):
            row.reward = reward
        return texts, [RIGHT if row.reward == 1 else WRONG for row in rows]

    def close(self):
        """There are no processes to end."""
