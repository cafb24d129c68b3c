"""Is a boxed answer right? math-verify says so, in processes that can be killed: some answers take it hours.

This file is also the program of these processes. It imports no torch, so that they are small and start fast.
"""
import hashlib
import json
import mmap
import os
import queue
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.normalise import comparable, normalise, prose, same

if TYPE_CHECKING:
    from sympy import Basic, MatrixBase, Number

    from runtime.rows import Codec, Row

ANSWER_SECONDS = 3.0        # of a processor, for one answer: a busy machine changes no verdict
ANSWER_MEGABYTES = 2048     # address space of the process that verifies it
ANSWER_CHARACTERS = 10_000  # a longer boxed answer is wrong unread
NEAR = 1e-4                 # relative difference of numbers that are the same
DIGITS = 1000               # in which numbers without a decimal point are the same
CHAIN_SIDES = 20            # of a longer chain of equations nothing is read
KNOWN_VERDICTS = 1_000_000  # kept in memory, the newest: about 100 bytes each, however long the answers
RIGHT, WRONG, UNPARSED, TIMEOUT, CRASH = 0, 1, 2, -signal.SIGPROF, -signal.SIGKILL
NAMES = {RIGHT: "right", WRONG: "wrong", UNPARSED: "unparsed", TIMEOUT: "timeout",
         None: "no answer"}  # any other verdict is a crash


def boxed_answer(response: str) -> str | None:
    r"""Content of the last box after the last </think> that has content; None without a box.

    \boxed{5}, \boxed {5}, \fbox{5} and \boxed 5 are boxes. A last box that is never closed hides the others.
    """
    _, think, answer = response.rpartition("</think>")
    contents = []
    for box in reversed(list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", answer)) if think else []):
        content = box_content(answer, box.end())
        if content is None or content.strip():
            return content
        contents.append(content)
    return contents[0] if contents else None


def box_content(text: str, start: int) -> str | None:
    r"""What stands in a box that begins at `start`: inside {...}, None without its end, or the next word."""
    if text[start:start + 1] != "{":
        return re.compile(r"(?!\\(?:boxed|fbox)\b)[^\s$]*|").match(text, start).group()
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):  # \{ and \} are no braces
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start + 1:brace.start()]
    return None


def read(text: str) -> "Basic | MatrixBase | None":
    """What math-verify makes of a normalised text, a sympy object; None if it holds it only as text.

    Only the whole text counts: not a number somewhere in a text that it cannot parse.
    """
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(boxed_match_priority=0)
    config = replace(config, normalization_config=replace(config.normalization_config, units=False))
    found = parse(f"\\boxed{{{text}}}", [config], "no_fallback", "first_match", parsing_timeout=None)
    return found[0] if found else None


def compare(gold: str, answer: str) -> int:
    r"""RIGHT, WRONG, or UNPARSED: math-verify makes nothing of the answer, or of the reference.

    The papers' reward is math-verify alone. Here both texts are normalised first (`12元`, `１２`, `12.` and
    `12 \text{ cm}` are 12 beside 12), texts that are then the same are right at once, and conditions are sets
    beside a set (`x > 1` beside `(1,\infty)`). Wrong, though math-verify finds them equal, are false chains
    (`11 = 12`), remainders and texts that contain the number (`12 \mod 7`, `11 \to 12`), units and bases
    other than the reference's, and numbers that are equal to six decimals but not by `near`.

    How often that changes a verdict, on the 1,036 references in 2,019 rows of five benchmarks
    (bench/verdicts.py): of references as answers, bare, in $...$, in display style or behind `x =`, 15 of
    4,144 become right and 2 wrong, both of rows that are left out when they are read; with a dot behind them
    739 of 1,036 become right. Of other references as answers 2 of 2,072 become wrong, and of boxes with two
    references (`a or b`, `b \to a`, `b = a`) 1,419 of 3,108 become wrong and 4 right.
    """
    from math_verify import verify
    from sympy import Interval, Union

    pair = normalise(gold), normalise(answer)
    if not same(*pair):
        pair = comparable(*pair)
    if pair is None:
        return WRONG
    if same(*pair):
        return RIGHT
    gold_read, answer_read = map(read, pair)
    if gold_read is None or answer_read is None:
        return UNPARSED
    if isinstance(gold_read, (Interval, Union)) or isinstance(answer_read, (Interval, Union)):
        gold_read, answer_read = as_set(gold_read), as_set(answer_read)
    equal = verify(gold_read, answer_read, timeout_seconds=None)
    return RIGHT if equal and near(gold_read, answer_read) and chain_holds(pair[1]) else WRONG


def check_gold(gold: str) -> int:
    """RIGHT if answers can be compared with this reference; WRONG if math-verify finds it unequal to itself.

    UNPARSED if math-verify holds it only as text: then an equal answer in another form would be wrong.
    Up to four words alone, such as names, have no other form.
    """
    from math_verify import verify

    gold = normalise(gold)
    value, _ = comparable(gold, gold)
    value_read = None if prose(value) else read(value)
    if value_read is None:
        return UNPARSED
    return RIGHT if verify(value_read, value_read, timeout_seconds=None) else WRONG


def chain_holds(text: str) -> bool:
    r"""Whether all numbers in a chain such as x = 12+5 = 17 are equal; beside \approx, nearly."""
    from math_verify import verify
    from sympy import Expr

    sides = re.split(r"=|\\equiv|\\approx", text)
    if len(sides) == 1 or len(sides) > CHAIN_SIDES:
        return len(sides) == 1
    numbers = [side for side in map(read, sides) if isinstance(side, Expr) and side.is_number]
    if r"\approx" in text:  # of a \approx b nothing is known
        return len(numbers) >= len(sides) - text.count("=") and all(
            near(number, numbers[-1], 0.05) for number in numbers)
    return all(verify(numbers[-1], number, timeout_seconds=None) and near(numbers[-1], number)
               for number in numbers)


def as_set(found: "Basic | MatrixBase") -> "Basic | MatrixBase":
    """A condition, or several of which one holds, as a set: x < 1, x > 2 as (-oo, 1) ∪ (2, oo)."""
    from sympy import And, FiniteSet, Ge, Gt, Le, Lt, Union

    parts = found.args if isinstance(found, FiniteSet) else [found]
    if all(isinstance(part, (And, Ge, Gt, Le, Lt)) for part in parts):
        return Union(*[part.as_set() for part in parts])
    return found


def near(gold: "Basic | MatrixBase", answer: "Basic | MatrixBase", tolerance: float = NEAR) -> bool:
    """Whether real numbers differ by at most this share of the larger, alone or as elements of two things.

    Two without a decimal point, if the share is NEAR, must be equal in DIGITS digits: 1 - 2^{-99} is not 1.
    """
    from sympy import Eq, Expr, Float, MatrixBase, Set, Tuple
    from sympy.core.evalf import PrecisionExhausted

    def numbers(found: "Basic | MatrixBase") -> "list[tuple[Number, Expr]]":
        parts = [found]
        if isinstance(found, (MatrixBase, Set, Tuple)):
            parts = found.flat() if isinstance(found, MatrixBase) else found.args
        parts = [part.rhs if isinstance(part, Eq) and part.lhs.is_Symbol else part for part in parts]
        values = [(part.evalf(), part) for part in parts if isinstance(part, Expr) and part.is_number]
        values = [pair for pair in values if pair[0].is_Number and pair[0].is_finite]  # real numbers
        return sorted(values, key=lambda pair: pair[0])

    def close(one: "tuple[Number, Expr]", other: "tuple[Number, Expr]") -> bool:
        (value, exact), (other_value, other_exact) = one, other
        if tolerance != NEAR or exact.has(Float) or other_exact.has(Float):
            return abs(value - other_value) <= tolerance * max(abs(value), abs(other_value))
        try:
            return (exact - other_exact).evalf(2, maxn=DIGITS, strict=True) == 0
        except PrecisionExhausted:  # no digit of the difference is known not to be 0
            return True

    golds, answers = numbers(gold), numbers(answer)
    return len(golds) != len(answers) or all(map(close, golds, answers))


def serve_verdicts(seconds: float, megabytes: int):
    """A JSON line [gold, answer], or [gold], in, a verdict line out, one at a time.

    A forked child does the work under limits that the kernel keeps: SIGPROF without a handler ends it after
    so many `seconds` of a processor on an answer, whatever it computes, and whether its parents still live or
    not. Then another child takes its place.
    """
    asked = mmap.mmap(-1, 1)  # shared: is the child at work on an answer?

    def serve():
        for _ in range(500):  # then a new child, so that no cache grows
            line = sys.stdin.readline()
            if not line:
                os._exit(0)
            asked[0] = 1
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                texts = json.loads(line)
                verdict = compare(*texts) if len(texts) == 2 else check_gold(*texts)
            except Exception:  # whatever math-verify stumbles over: the answer is counted as unparsed
                verdict = UNPARSED
            signal.setitimer(signal.ITIMER_PROF, 0)
            print(verdict, flush=True)
            asked[0] = 0
        os._exit(3)

    limit = megabytes << 20
    if resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY:
        limit = min(limit, resource.getrlimit(resource.RLIMIT_AS)[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":  # elsewhere address space is no measure of memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    compare(r"\frac{1}{2}", "0.5")  # imports all, and fills the parser's caches once, before the forks
    code = 3
    while code != 0:  # 0: end of input
        child = os.fork()
        if child == 0:
            serve()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if asked[0]:  # killed at work: by SIGPROF in time, or for its memory
            print(code if code < 0 else CRASH, flush=True)
            asked[0] = 0


class Verifier:
    """math-verify in processes that can be killed. No answer costs more than ANSWER_SECONDS, _MEGABYTES.

    known: the run's verdicts by a hash of what was asked, so that nothing is asked twice; the same in all
        processes of a run.
    """

    def __init__(
        self, workers: int = os.cpu_count(),
        spread: Callable[..., list] = lambda function, *lists: function(*lists),
        bar: Callable[..., Iterable] = lambda items, **options: items,
    ):
        """spread(function, *lists): by what the work is shared among the processes of a run.

        bar(items, total, desc, unit): the items, and a bar while one goes through them.
        """
        self.spread, self.bar = spread, bar
        self.known: dict[bytes, int] = {}
        self.idle = queue.SimpleQueue()
        for _ in range(workers):
            self.idle.put(self.start_worker())
        self.threads = ThreadPoolExecutor(workers)
        if self.ask("1", "1") != RIGHT:
            raise RuntimeError("math-verify does not find that 1 equals 1: is it installed?")

    def start_worker(self) -> subprocess.Popen:
        """In a session of its own: Ctrl-C is for the trainer."""
        command = [sys.executable, "-m", "runtime.verification", str(ANSWER_SECONDS), str(ANSWER_MEGABYTES)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, text=True, start_new_session=True,
                                cwd=Path(__file__).parent.parent)

    def ask(self, *texts: str) -> int:
        worker = self.idle.get()
        try:
            worker.stdin.write(json.dumps(texts) + "\n")
            worker.stdin.flush()
            verdict = worker.stdout.readline()
        except BrokenPipeError:
            verdict = ""
        if not verdict:  # somebody has killed the worker
            worker = self.start_worker()
        self.idle.put(worker)
        return int(verdict or CRASH)

    def ask_all(self, questions: list[tuple[str, ...]]) -> list[int]:
        verdicts = self.threads.map(lambda texts: self.ask(*texts), questions)
        return list(self.bar(verdicts, total=len(questions), desc="verifying", unit="answer"))

    def decide(self, questions: list[tuple[str, ...]]) -> list[int]:
        """The verdict on each (gold, answer) or (gold,); only what was never asked is asked, and once."""
        keys = [hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest() for texts in questions]
        new = {key: texts for key, texts in zip(keys, questions) if key not in self.known}
        self.known.update(zip(new, self.spread(self.ask_all, list(new.values()))))
        verdicts = [self.known[key] for key in keys]
        for key in list(islice(self.known, max(0, len(self.known) - KNOWN_VERDICTS))):
            del self.known[key]
        return verdicts

    def __call__(self, golds: list[str], responses: list[str]) -> list[int | None]:
        """RIGHT, WRONG, UNPARSED, TIMEOUT or another signal for each response, None for one without a box.

        An answer that is the reference to the letter is right, as it is for `compare`, without being asked.
        """
        pairs = list(zip(golds, map(boxed_answer, responses)))
        verdicts = {}
        for gold, answer in pairs:
            if answer is None:
                verdicts[gold, answer] = None
            elif len(answer) > ANSWER_CHARACTERS:
                verdicts[gold, answer] = UNPARSED
            elif answer == gold:
                verdicts[gold, answer] = RIGHT
        others = [pair for pair in dict.fromkeys(pairs) if pair not in verdicts]
        verdicts |= zip(others, self.decide(others))
        return [verdicts[pair] for pair in pairs]

    def check_golds(self, golds: list[str]) -> list[int]:
        """RIGHT for each reference that can be one; otherwise UNPARSED, WRONG or a signal."""
        boxable = [(gold,) for gold in golds
                   if box_content(f"{{{gold}}}", 0) == gold and len(gold) <= ANSWER_CHARACTERS]
        verdicts = dict(zip(boxable, self.decide(boxable)))
        return [verdicts.get((gold,), UNPARSED) for gold in golds]

    def judge(self, rows: "list[Row]", codec: "Codec") -> tuple[list[str], list[int | None]]:
        """Sets row.reward: 1.0 for a right answer in the box after </think>, else 0.0; 0.0 if it was cut.

        Returns the responses' texts and their verdicts.
        """
        texts = [codec.text(row) for row in rows]
        judged = [codec.judged(row, text) for row, text in zip(rows, texts)]
        verdicts = self([row.problem.answer for row in rows], judged)
        for row, verdict in zip(rows, verdicts):
            row.reward = float(verdict == RIGHT)
        return texts, verdicts

    def close(self):
        self.threads.shutdown()
        while not self.idle.empty():
            self.idle.get().communicate()  # the end of its input ends a worker


if __name__ == "__main__":
    serve_verdicts(float(sys.argv[1]), int(sys.argv[2]))
