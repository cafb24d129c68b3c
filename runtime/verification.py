"""Is a boxed answer right? math-verify says so, in processes that can be killed: some answers take it hours.

This file is also the program of these processes. It imports no torch, so that they are small and start fast.
"""
import json
import mmap
import os
import queue
import re
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

ANSWER_SECONDS = 3.0        # wall clock for one answer
ANSWER_MEGABYTES = 2048     # address space of the process that verifies it
ANSWER_CHARACTERS = 10_000  # a longer boxed answer is wrong unread
RIGHT, WRONG, UNPARSED, TIMEOUT, CRASH = 0, 1, 2, -signal.SIGALRM, -signal.SIGKILL
NAMES = {RIGHT: "right", WRONG: "wrong", UNPARSED: "unparsed", TIMEOUT: "timeout",
         None: "no answer"}  # any other verdict is a crash


def boxed_answer(response: str) -> str | None:
    r"""Content of the last \boxed{} after the last </think>, by matching braces; None if there is none."""
    _, think, answer = response.rpartition("</think>")
    start, depth = answer.rfind(r"\boxed{") + len(r"\boxed{"), 1
    if not think or start < len(r"\boxed{"):
        return None
    for brace in re.finditer(r"\\.|[{}]", answer[start:], re.DOTALL):  # \{ and \} are no braces
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return answer[start:start + brace.start()]
    return None


def serve_verdicts(seconds: float, megabytes: int):
    """A JSON line [gold, answer] in, a verdict line out, one at a time.

    A forked child does the work under limits that the kernel keeps: SIGALRM without a handler ends it
    `seconds` after an answer came in, whatever it computes, and whether its parents still live or not. Then
    another child takes its place.
    """
    from math_verify import parse, verify

    asked = mmap.mmap(-1, 1)  # shared: is the child at work on an answer?

    def serve():
        for _ in range(500):  # then a new child, so that no cache grows
            line = sys.stdin.readline()
            if not line:
                os._exit(0)
            asked[0] = 1
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                texts = ["\\boxed{" + text + "}" for text in json.loads(line)]
                gold, answer = [parse(text, parsing_timeout=None) for text in texts]
                verdict = UNPARSED
                if gold and answer:
                    verdict = RIGHT if verify(gold, answer, timeout_seconds=None) else WRONG
            except Exception:  # whatever math-verify stumbles over: the answer is counted as unparsed
                verdict = UNPARSED
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(verdict, flush=True)
            asked[0] = 0
        os._exit(3)

    limit = megabytes << 20
    if resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY:
        limit = min(limit, resource.getrlimit(resource.RLIMIT_AS)[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":  # elsewhere address space is no measure of memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    parse(r"\boxed{\frac{1}{2}}", parsing_timeout=None)  # fills the parser's caches once, before the forks
    code = 3
    while code != 0:  # 0: end of input
        child = os.fork()
        if child == 0:
            serve()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if asked[0]:  # killed at work: by SIGALRM in time, or for its memory
            print(code if code < 0 else CRASH, flush=True)
            asked[0] = 0


class Verifier:
    """math-verify in processes that can be killed. No answer costs more than ANSWER_SECONDS, _MEGABYTES."""

    def __init__(self, workers: int = os.cpu_count(), spread=lambda function, *lists: function(*lists)):
        """spread(function, *lists): by what the work is shared among the processes of a run."""
        self.spread = spread
        self.idle = queue.SimpleQueue()
        for _ in range(workers):
            self.idle.put(self.start_worker())
        self.threads = ThreadPoolExecutor(workers)
        self.verdict = lru_cache(maxsize=10_000)(self.ask)
        if self.ask("1", "1") != RIGHT:
            raise RuntimeError("math-verify does not find that 1 equals 1: is it installed?")

    def start_worker(self) -> subprocess.Popen:
        """In a session of its own: Ctrl-C is for the trainer."""
        command = [sys.executable, __file__, str(ANSWER_SECONDS), str(ANSWER_MEGABYTES)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, text=True, start_new_session=True)

    def ask(self, gold: str, answer: str) -> int:
        worker = self.idle.get()
        try:
            worker.stdin.write(json.dumps([gold, answer]) + "\n")
            worker.stdin.flush()
            verdict = worker.stdout.readline()
        except BrokenPipeError:
            verdict = ""
        if not verdict:  # somebody has killed the worker
            worker = self.start_worker()
        self.idle.put(worker)
        return int(verdict or CRASH)

    def __call__(self, golds: list[str], responses: list[str]) -> list[int | None]:
        """RIGHT, WRONG, UNPARSED, TIMEOUT or another signal for each response, None for one without a box."""
        def judge(gold, response):
            answer = boxed_answer(response)
            if answer is None or len(answer) > ANSWER_CHARACTERS:
                return None if answer is None else UNPARSED
            return self.verdict(gold, answer)
        return self.spread(lambda *lists: list(self.threads.map(judge, *lists)), golds, responses)

    def judge(self, rows, codec) -> tuple[list[str], list[int | None]]:
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
