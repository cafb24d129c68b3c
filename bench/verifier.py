"""The verifier under load: ten thousand answers, of which one in twenty is hostile.

    python bench/verifier.py                            # 10,000 answers in up to 14 minutes
    python bench/verifier.py --answers 600

Every honest answer must get the verdict that it gets without hostile ones beside it. A hostile one may cost
ANSWER_SECONDS of one worker. The memory of this process and of the workers, which last, must stay flat, and
that of their children, which do not, within ANSWER_MEGABYTES. After close() no process may be left.

The result is a line in bench/results/verifier.json; the exit code is 1 if a check fails. Linux only: it reads
/proc.
"""
import argparse
import json
import os
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime.verification import ANSWER_MEGABYTES, ANSWER_SECONDS, NAMES, TIMEOUT, Verifier  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "verifier.json"
SPARE_SECONDS = 60       # for the honest answers
GROWTH, SPARE = 1.2, 16  # of the peak, from the first third of the time to the last: a factor, megabytes


def boxed(answer: str) -> str:
    return f"<think>\nwell\n</think>\nSo it is \\boxed{{{answer}}}."


def nested(before: str, inside: str, after: str, depth: int) -> str:
    return before * depth + inside + after * depth


# Each shape makes another (gold, response) of every number, so that no verdict comes out of a cache.
HONEST = (
    lambda i: (str(i), boxed(f"{i}.0")),
    lambda i: (str(i), boxed(str(i + 1))),
    lambda i: (rf"\frac{{{i}}}{{7}}", boxed(f"{i}/7")),
    lambda i: (rf"\frac{{{i}}}{{7}}", boxed(rf"\dfrac{{{i}}}{{6}}")),
    lambda i: (rf"\sqrt{{{2 * i * i}}}", boxed(rf"{i}\sqrt{{2}}")),
    lambda i: (f"x^2-{i * i}", boxed(f"(x-{i})(x+{i})")),
    lambda i: (f"x^2-{i * i}", boxed(f"(x-{i})(x+{i + 2})")),
    lambda i: (f"({i},{i + 1})", boxed(rf"\left({i}, {i + 1}\right)")),
    lambda i: (rf"\{{{i},{i + 1}\}}", boxed(rf"\{{{i + 1},{i}\}}")),
    lambda i: (rf"({i},\infty)", boxed(rf"[{i},\infty)")),
    lambda i: (f"{i}", boxed("")),                            # unparsed
    lambda i: (f"{i}", boxed(" " * 10_001 + f"{i}")),         # too long
    lambda i: (f"{i}", f"<think>\\boxed{{{i}}}</think> {i}"),  # no box after </think>
    lambda i: (f"{i}", f"<think></think>\\boxed{{{i}"),       # a box without end
)
HOSTILE = (
    lambda i: ("42", boxed(nested(f"{i}^{{", "9", "}", 3 + i % 10))),
    lambda i: ("42", boxed(rf"\frac{{5^{{\left(5^{{5^{{{i}^{{5}}}}}} - 4\right)}} - 5}}{{16}}")),
    lambda i: ("42", boxed(f"{99_999_999 + i}!")),
    lambda i: ("42", boxed(nested("(", str(50 + i), ")!", 3 + i % 3))),
    lambda i: ("42", boxed(rf"\binom{{10^9+{i}}}{{5 \cdot 10^8}}")),
    lambda i: ("42", boxed(nested("(", str(i), ")", 2500 + i))),
    lambda i: ("42", boxed(nested(r"\frac{1}{1+", str(i), "}", 400))),
    lambda i: ("42", boxed(nested(r"\sqrt{1+", str(i), "}", 300))),
    lambda i: ("42", boxed(nested("|", str(i), "|", 1000))),
    lambda i: ("42", boxed(rf"\sum_{{k=1}}^{{10^9+{i}}} \frac{{1}}{{k^2+k!}}")),
    lambda i: ("42", boxed(rf"\prod_{{k=1}}^{{10^8+{i}}} k")),
    lambda i: ("42", boxed(rf"\int_0^{{{i}}} \sin(x^x)^{{x!}} e^{{\tan(x)}} dx")),
    lambda i: ("42", boxed(rf"\{{{','.join(map(str, range(i, i + 2000)))}\}}")),
    lambda i: ("42", boxed(r"\begin{pmatrix}" + ("&".join([f"x^{i}"] * 20) + r"\\") * 20 + r"\end{pmatrix}")),
    lambda i: ("42", boxed(f"2^{{{16_000_000_000 + i}}}")),
    lambda i: ("42", boxed("7" * 9000 + str(i))),
    lambda i: ("42", boxed("7" * 200_000 + str(i))),
    lambda i: ("42", boxed("a" * 1_000_000 + str(i))),
    lambda i: ("42", boxed(r"1\pm" * 500 + str(i))),
    lambda i: ("42", boxed("+".join(rf"\frac{{{i}}}{{{k}}}" for k in range(1, 600)))),
    lambda i: ("42", boxed("=".join(["1"] * 1000 + [str(i)]))),
    lambda i: ("42", boxed(rf"x^{{{i}}}+\sin(x^x)-e^{{x!}}=\log(x)+{i}^x")),
    lambda i: ("42", boxed(f"{i}\x00" + "".join(map(chr, range(1, 32))) + "\ud800\u0660\u202e" * 500)),
    lambda i: ("42", r"<think></think>\boxed{" * 5000 + "{" * 100_000 + str(i)),
    lambda i: (nested(f"{i}^{{", "7", "}", 4), boxed("42")),  # hostile golds
    lambda i: (nested("(", str(i), ")", 2500 + i), boxed("42")),
    lambda i: ("7" * 200_000 + str(i), boxed("42")),
    lambda i: (f"x^{{{i}}}+e^{{x!}}=1", boxed(f"x^{{{i}}}+e^{{x!}}=2^x")),
)


def processes() -> list[tuple[int, int, int, float]]:
    """(pid, parent, session, resident megabytes) of every process that lives."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        if fields[0] not in "ZX":
            megabytes = int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            found.append((int(path.parent.name), int(fields[1]), int(fields[3]), megabytes))
    return found


class Watch:
    """Samples the memory of this process, of its workers, and of the children in which they verify."""

    def __init__(self):
        self.workers, self.samples, self.end = set(), defaultdict(list), threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()

    def sample(self):
        while not self.end.wait(0.2):
            found = processes()
            self.workers |= {pid for pid, parent, _, _ in found if parent == os.getpid()}
            own = [size for pid, _, _, size in found if pid == os.getpid()]
            workers = [size for pid, _, _, size in found if pid in self.workers]
            children = [size for _, parent, _, size in found if parent in self.workers]
            for name, sizes in (("this process", own), ("workers", workers), ("children", children)):
                self.samples[name].append(sum(sizes))
            self.samples["largest child"].append(max(children, default=0))

    def stop(self) -> int:
        """The number of processes that are left in the workers' sessions: each has one of its own."""
        self.end.set()
        self.thread.join()
        return sum(session in self.workers for _, _, session, _ in processes())

    def peaks(self) -> dict[str, list[int]]:
        """Megabytes, the peak of each third of the time."""
        thirds = {}
        for name, samples in self.samples.items():
            size = len(samples) // 3
            thirds[name] = [round(max(samples[start:start + size])) for start in (0, size, 2 * size)]
        return thirds


def judge(pairs: list[tuple[str, str]], workers: int) -> tuple[list, float, int, Watch]:
    """Verdicts of a new verifier, the seconds that they took, processes left after close(), the samples."""
    verifier = Verifier(workers)
    watch, start = Watch(), time.perf_counter()
    verdicts = verifier([gold for gold, _ in pairs], [response for _, response in pairs])
    seconds = time.perf_counter() - start
    verifier.close()
    return verdicts, seconds, watch.stop(), watch


def counts(verdicts) -> dict[str, int]:
    return dict(Counter(NAMES.get(verdict, "crash") for verdict in verdicts).most_common())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--hostile", type=float, default=0.05, help="share of them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    hostile = round(args.answers * args.hostile)
    honest = args.answers - hostile
    pairs = [HONEST[i % len(HONEST)](i // len(HONEST) + 2) for i in range(honest)]
    pairs += [HOSTILE[i % len(HOSTILE)](i // len(HOSTILE) + 2) for i in range(hostile)]
    assert len(set(pairs)) == args.answers, "a shape gives the same for two numbers"
    alone, seconds_alone, left_alone, _ = judge(pairs[:honest], args.workers)
    print(f"{honest} honest answers alone: {counts(alone)} in {seconds_alone:.1f} s", flush=True)

    order = random.Random(args.seed).sample(range(args.answers), args.answers)
    shuffled, seconds, left, watch = judge([pairs[i] for i in order], args.workers)
    verdicts = dict(zip(order, shuffled))
    limit = hostile * ANSWER_SECONDS / args.workers + SPARE_SECONDS
    changed = [pairs[i] for i in range(honest) if verdicts[i] != alone[i]]
    hostile_verdicts = counts(verdicts[i] for i in range(honest, args.answers))
    peaks = watch.peaks()
    print(f"with {hostile} hostile ones: {seconds:.1f} s, of at most {limit:.0f}")
    print(f"hostile: {hostile_verdicts}")
    print(f"honest with another verdict than alone: {len(changed)}, {changed[:5]}")
    print(f"peak megabytes in each third of the time: {peaks}; processes left: {left_alone + left}")
    checks = {"same verdicts": not changed and set(alone) == NAMES.keys() - {TIMEOUT},
              "time": seconds <= limit, "no process left": left_alone + left == 0,
              "memory flat": all(peaks[name][2] <= GROWTH * peaks[name][0] + SPARE
                                 for name in ("this process", "workers")),
              "memory of an answer": max(peaks["largest child"]) <= ANSWER_MEGABYTES}
    result = vars(args) | {
        "honest_verdicts": counts(alone), "hostile_verdicts": hostile_verdicts,
        "seconds_alone": round(seconds_alone, 1), "seconds": round(seconds, 1), "seconds_limit": limit,
        "peak_megabytes": peaks, "checks": checks}
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a") as file:
        file.write(json.dumps(result) + "\n")
    print(", ".join(f"{name}: {'ok' if good else 'FAILED'}" for name, good in checks.items()))
    sys.exit(not all(checks.values()))


if __name__ == "__main__":
    main()
