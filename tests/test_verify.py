"""The verifier: right on ordinary answers, and never held up, filled up or ended by a hostile one."""
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from runtime import verification
from runtime.verification import CRASH, RIGHT, TIMEOUT, UNPARSED, WRONG, boxed_answer


def response(answer: str) -> str:
    return f"<think>\nwell\n</think>\nSo it is \\boxed{{{answer}}}."


# ------------------------------------------------------------------------------------------- the box
@pytest.mark.parametrize("text, answer", (
    (response("7"), "7"),
    (response(r"\frac{1}{2}"), r"\frac{1}{2}"),
    (response(""), ""),
    (response(r"\{1, 2\}"), r"\{1, 2\}"),          # escaped braces are no braces
    (response(r"\left\{x\right."), r"\left\{x\right."),
    (response(r"\\{2}"), r"\\{2}"),                # a line break and then a brace
    (response("\n7\n"), "\n7\n"),
    (r"</think>\boxed{1} and \boxed{2}", "2"),     # the last one
    (r"</think>\boxed{1 \boxed{2}}", "2"),
    (r"</think>\boxed{1} and \boxed{2", None),     # never closed
    (r"</think>\boxed{{1}", None),
    (r"<think>\boxed{1}</think> 1", None),         # a thought is no answer
    (r"<think>\boxed{1}", None),
    (r"\boxed{1}", None),                          # no </think>
    (r"\boxed{1}</think>", None),
    (r"</think>\boxed{1}</think>\boxed{2}", "2"),
    (r"</think>\boxed{1}</think>", None),
    (r"</think>\boxed 1", "1"),
    (r"</think>$\boxed\frac{1}{2}$", r"\frac{1}{2}"),
    (r"</think>\boxed {1}", "1"),
    ("</think>\\boxed\n{1}", "1"),
    (r"</think>\fbox{1}", "1"),
    (r"</think>\boxed{1} or \fbox {2}", "2"),
    (r"</think>\boxed{1}: I put it into a \boxed{}", "1"),  # the last one with content
    (r"</think>\boxed{1} \boxed{ } \fbox{} \boxed", "1"),
    (r"</think>\boxed{}\boxed{ }", " "),
    (r"</think>\boxed{1} \boxedblank{2}", "1"),   # another command
    (r"</think>\boxed", ""),
    ("</think>", None),
    ("", None),
))
def test_boxed_answer(text, answer):
    assert boxed_answer(text) == answer


PLAIN = st.text(st.characters(exclude_characters="{}\\")) | st.sampled_from((r"\{", r"\}", r"\\", r"\a"))
BALANCED = st.recursive(PLAIN, lambda inner: st.lists(inner).map("".join) | inner.map("{{{}}}".format))


@given(BALANCED, st.text(st.characters(exclude_characters="\\}")))
def test_any_balanced_answer_comes_out_whole(answer, after):
    assert boxed_answer(f"<think></think>\\boxed{{{answer}}}{after}") == answer


# ------------------------------------------------------------------------------------- ordinary answers
@pytest.fixture(scope="module")
def impatient():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "ANSWER_SECONDS", 1.0)
        verifier = verification.Verifier(workers=2)
        yield verifier
        verifier.close()


@pytest.fixture
def verifier(impatient, monkeypatch):
    """One that gives up after a second, and knows nothing yet."""
    monkeypatch.setattr(impatient, "known", {})
    return impatient


def test_ordinary_answers(verifier):
    cases = (
        ("7", "7", RIGHT), ("7", "8", WRONG), ("07", "7", RIGHT), ("-3", "-3.0", RIGHT), ("-3", "3", WRONG),
        (r"\frac{1}{2}", "0.5", RIGHT), (r"\frac{1}{2}", "1/2", RIGHT), (r"\frac12", r"\frac13", WRONG),
        (r"\sqrt{8}", r"2\sqrt{2}", RIGHT), (r"\pi", "3.14", WRONG), ("1,234", "1234", RIGHT),
        ("x^2-1", "(x-1)(x+1)", RIGHT), ("x^2-1", "(x-1)(x+2)", WRONG), ("(1,2)", "(1, 2)", RIGHT),
        ("(1,2)", "(2,1)", WRONG), (r"\{1,2\}", r"\{2,1\}", RIGHT), ("7", "", UNPARSED), ("A", "A", RIGHT),
    )
    verdicts = verifier([gold for gold, _, _ in cases], [response(answer) for _, answer, _ in cases])
    assert [(gold, answer, verdict) for (gold, answer, _), verdict in zip(cases, verdicts)] == list(cases)


def test_without_a_box_there_is_no_verdict(verifier):
    assert verifier(["7"] * 3, ["7", r"<think>\boxed{7}", r"<think></think>\boxed{7"]) == [None] * 3


def test_the_reference_comes_first(verifier):
    """The comparison is not symmetric: of these two orders one is right and the other wrong."""
    assert verifier(["6", "6m"], [response("6m"), response("6")]) == [RIGHT, WRONG]


def test_a_thousand_ordinary_answers_take_seconds(verifier):
    golds = [f"\\frac{{{i}}}{{7}}" if i % 3 else str(i) for i in range(1024)]
    answers = [f"{i}/7" if i % 3 else f"{i}.0" for i in range(1024)]
    answers[1::2] = [f"{i + 1}/7" for i in range(1, 1024, 2)]
    start = time.perf_counter()
    verdicts = verifier(golds, [response(answer) for answer in answers])
    assert time.perf_counter() - start < 100  # 1 to 2 on two idle cores
    assert verdicts[::2] == [RIGHT] * 512
    assert set(verdicts[1::2]) == {WRONG}


# ------------------------------------------------------------------------------------------- asked once
@pytest.fixture
def counted(verifier, monkeypatch):
    """The verifier, and the list of what its processes are asked."""
    asked, ask = [], verifier.ask

    def counting_ask(*texts):
        asked.append(texts)
        return ask(*texts)

    monkeypatch.setattr(verifier, "ask", counting_ask)
    return verifier, asked


def test_nothing_is_asked_twice_in_a_run(counted):
    """Neither in a batch nor later; a reference and an answer of the same text are two questions."""
    verifier, asked = counted
    golds, answers = ["7", "7", "1/2", "7", "7", "1/2"], ["7.0", "8", "0.5", "7.0", "8", "0.5"]
    expected = [RIGHT, WRONG, RIGHT] * 2
    for _ in range(2):
        assert verifier(golds, [response(answer) for answer in answers]) == expected
        assert verifier.check_golds(["7", "1/2", "7"]) == [RIGHT] * 3
    assert sorted(asked) == [("1/2",), ("1/2", "0.5"), ("7",), ("7", "7.0"), ("7", "8")]


def test_an_answer_that_is_the_reference_to_the_letter_is_right_unasked(counted):
    """As it is for the processes that would be asked."""
    verifier, asked = counted
    texts = ["7", r"\frac{1}{2}", "x^2-1", "east", "", "?", r"\frac{1}{", tower(9, 4), "12 cm", "\ud800"]
    boxable = [text for text in texts if verification.box_content(f"{{{text}}}", 0) == text]
    assert len(boxable) > 8
    assert verifier(boxable, [response(text) for text in boxable]) == [RIGHT] * len(boxable)
    assert not asked
    assert verifier.decide([(text, text) for text in boxable]) == [RIGHT] * len(boxable)


def test_what_is_known_is_bounded_and_the_newest(counted, monkeypatch):
    verifier, asked = counted
    monkeypatch.setattr(verification, "KNOWN_VERDICTS", 10)
    questions = [(str(i % 3), str(i)) for i in range(25)]
    expected = [RIGHT if i < 3 else WRONG for i in range(25)]
    assert verifier.decide(questions) == expected
    assert len(verifier.known) == 10
    assert verifier.decide(questions[15:]) == expected[15:]
    assert len(asked) == 25
    assert verifier.decide(questions[:3]) == expected[:3]
    assert len(asked) == 28 and len(verifier.known) == 10


def test_a_verdict_is_remembered_however_many_come_after(monkeypatch, counted):
    verifier, asked = counted
    monkeypatch.setattr(verifier, "ask", lambda *texts: asked.append(texts) or WRONG)
    questions = [("7", str(number)) for number in range(12_000)]
    for _ in range(2):
        assert verifier.decide(questions) == [WRONG] * 12_000
    assert len(asked) == 12_000


def test_processes_share_what_is_asked_and_all_know_it(counted, monkeypatch):
    """Each asks its half of what is new, and has the others' half from them."""
    verifier, asked = counted
    halves = []

    def spread(ask_all, questions):
        halves.append((questions[0::2], questions[1::2]))
        verdicts = [None] * len(questions)
        verdicts[0::2], verdicts[1::2] = ask_all(questions[0::2]), [WRONG] * len(questions[1::2])  # by the other
        return verdicts

    monkeypatch.setattr(verifier, "spread", spread)
    answers = ["1.0", "2.0", "1.0", "3.0"]
    assert verifier(["1", "1", "1", "3"], map(response, answers)) == [RIGHT, WRONG, RIGHT, RIGHT]
    assert verifier(["1", "1"], map(response, answers)) == [RIGHT, WRONG]
    assert halves == [([("1", "1.0"), ("3", "3.0")], [("1", "2.0")]), ([], [])]
    assert asked == [("1", "1.0"), ("3", "3.0")]


# -------------------------------------------------------------------------------------- hostile answers
def tower(base, height):
    return "^{".join([str(base)] * height) + "}" * (height - 1)


def nested(before, after, depth, inside="1"):
    return before * depth + inside + after * depth


# Shapes with sizes, not strings: each reaches another part of the parser or of the comparison.
SLOW = {  # longer than the limit
    "power tower": lambda: tower(9, 4),
    "higher tower": lambda: tower(7, 12),
    "tower in a fraction": lambda: rf"\dfrac{{5^{{\left({tower(5, 4)} - 4\right)}} - 5}}{{16}}",
    "factorial": lambda: "99999999!",
    "factorials of factorials": lambda: nested("(", ")!", 4, "50"),
    "binomial": lambda: r"\binom{10^9}{5 \cdot 10^8}",
    "parentheses": lambda: nested("(", ")", 3000),
    "fractions": lambda: nested(r"\frac{1}{1+", "}", 400),
    "roots": lambda: nested(r"\sqrt{1+", "}", 300),
    "sum": lambda: r"\sum_{k=1}^{10^9} \frac{1}{k^2+k!}",
    "product": lambda: r"\prod_{k=1}^{10^8} k",
    "integral": lambda: r"\int_0^1 \sin(x^x)^{x!} e^{\tan(x)} dx",
    "set": lambda: rf"\{{{','.join(map(str, range(2000)))}\}}",
    "matrix": lambda: r"\begin{pmatrix}" + ("&".join(["x^9"] * 20) + r"\\") * 20 + r"\end{pmatrix}",
    "big power": lambda: "2^{16000000000}",
}
STRANGE = {  # within the limit or not, but never right
    "digits": lambda: "7" * 9000,
    "200,000 digits": lambda: "7" * 200_000,
    "a megabyte of text": lambda: "a" * 1_000_000,
    "words": lambda: "yes " * 2000,
    "NUL": lambda: "1\x001",
    "lone surrogate": lambda: "\ud800\udc00\udfff1",
    "controls": lambda: "".join(map(chr, range(1, 32))),
    "other alphabets": lambda: "\u0660\u4e03\U0001d7d9\u202e" * 500,
    "line breaks": lambda: "1\n\r\u2028\u0085" * 500,
    "commas": lambda: "1," * 2000,
    "plus-minus": lambda: r"1\pm" * 500 + "1",
    "equations": lambda: "=".join(["1"] * 1000),
    "bars": lambda: "|" * 2000,
    "backslashes": lambda: "\\\\" * 2000,
    "unknown commands": lambda: r"\evil{1}" * 500,
    "two equations": lambda: r"x^{17}+\sin(x^x)-e^{x!}=\log(x)+17^x",
}
HOSTILE = SLOW | STRANGE


def test_hostile_answers_cost_at_most_the_limit_each_and_spoil_no_other(verifier):
    """All of them in one batch with ordinary answers in between: these keep their verdicts."""
    responses, golds = [], []
    for shape in HOSTILE.values():
        responses += [response(shape()), response("41"), response("42")]
        golds += ["42", "42", "42"]
    start = time.perf_counter()
    verdicts = verifier(golds, responses)
    # Two workers, one processor second each; the rest is for a busy machine. Without limits it is hours.
    assert time.perf_counter() - start < len(HOSTILE) * 1.0 / 2 * 10
    assert verdicts[1::3] == [WRONG] * len(HOSTILE)
    assert verdicts[2::3] == [RIGHT] * len(HOSTILE)
    named = dict(zip(HOSTILE, verdicts[0::3]))
    assert RIGHT not in [named[name] for name in SLOW]
    assert [named[name] for name in SLOW].count(TIMEOUT) > len(SLOW) / 2  # a fast machine ends a few
    assert RIGHT not in named.values()


@pytest.mark.parametrize("name", ("power tower", "factorial", "parentheses"))
def test_a_hostile_reference_costs_no_more(verifier, name):
    start = time.perf_counter()
    assert verifier([HOSTILE[name](), "42"], [response("42")] * 2) == [TIMEOUT, RIGHT]
    assert time.perf_counter() - start < 100  # 1 second, and the rest for a busy machine


def test_the_time_between_answers_is_not_an_answers(verifier):
    """An update may take minutes; whoever waits for its next answer is not ended for it."""
    assert verifier(["1", "2"], [response("1"), response("3")]) == [RIGHT, WRONG]
    time.sleep(1.5)
    assert verifier(["3", "4"], [response("4"), response("4")]) == [WRONG, RIGHT]


def test_boxes_without_number_or_end(verifier):
    start = time.process_time()
    many = "</think>" + r"\boxed{1}" * 20_000 + r"\boxed{7}" + r"\boxed{ }\fbox " * 20_000
    endless = ["</think>" + r"\boxed{" * 5000, "</think>" + "{" * 10**6, "</think>" * 10**5]
    assert verifier(["7"] * 4, [many, *endless]) == [RIGHT, None, None, None]
    assert time.process_time() - start < 10


def test_only_so_many_characters_are_read(verifier):
    answer = "7" + " " * (verification.ANSWER_CHARACTERS - 1)
    assert verifier(["7", "7"], [response(answer), response(answer + " ")]) == [RIGHT, UNPARSED]


# ------------------------------------------------------------------------------------------- processes
def processes() -> dict[int, int]:
    """The parent of every process that lives: not of zombies, nor of the `ps` that looks."""
    ps = subprocess.Popen(["ps", "-A", "-o", "pid=,ppid=,stat="], stdout=subprocess.PIPE, text=True)
    rows = [line.split() for line in ps.communicate()[0].splitlines()]
    return {int(pid): int(parent) for pid, parent, state in rows if state[0] != "Z" and int(pid) != ps.pid}


def descendants(ancestor: int) -> set[int]:
    found, parents = {ancestor}, processes()
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {ancestor}


def wait_for_end(pids: set[int], seconds: float) -> set[int]:
    """The processes that still live after so many seconds, or at once none."""
    end = time.monotonic() + seconds
    while pids & processes().keys() and time.monotonic() < end:
        time.sleep(0.1)
    return pids & processes().keys()


def test_no_process_is_left_after_close():
    before = descendants(os.getpid())
    verifier = verification.Verifier(workers=2)
    workers = descendants(os.getpid()) - before
    assert len(workers) >= 2
    assert verifier(["1"], [response("1")]) == [RIGHT]
    verifier.close()
    assert not wait_for_end(workers, 5)


PROGRAM = f"""
import sys, threading
sys.path.insert(0, {str(ROOT)!r})
from runtime import verification
verification.ANSWER_SECONDS = 2.0
verifier = verification.Verifier(workers=2)
threading.Thread(target=verifier, args=(["1"], [{response(tower(9, 4))!r}]), daemon=True).start()
print("begun", flush=True)
threading.Event().wait()
"""


def test_no_process_is_left_when_the_run_is_killed():
    """kill -9 in the middle of an endless answer: the workers end themselves."""
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert program.stdout.readline() == "begun\n"
    time.sleep(0.5)
    workers = descendants(program.pid)
    assert len(workers) >= 4
    program.kill()
    program.communicate()
    assert not wait_for_end(workers, 15)


def test_memory_is_limited(monkeypatch):
    """By the kernel, in the process that works on answers: 2^{16000000000} has two gigabytes."""
    monkeypatch.setattr(verification, "ANSWER_SECONDS", 2.0)
    monkeypatch.setattr(verification, "ANSWER_MEGABYTES", 400)
    before = descendants(os.getpid())
    verifier = verification.Verifier(workers=1)
    workers = descendants(os.getpid()) - before
    assert (400 << 20, 400 << 20) in {resource.prlimit(pid, resource.RLIMIT_AS) for pid in workers}
    hog, ordinary = verifier(["1", "1"], [response(HOSTILE["big power"]()), response("1")])
    verifier.close()
    assert hog != RIGHT
    assert ordinary == RIGHT


@pytest.mark.parametrize("when", ("in the middle of an answer", "between two answers"))
@pytest.mark.parametrize("which", ("the one that works", "its parent"))
def test_a_killed_worker_costs_an_answer_at_most(monkeypatch, which, when):
    """As the system's out-of-memory killer does it: the others keep their verdicts, and nothing is raised."""
    monkeypatch.setattr(verification, "ANSWER_SECONDS", 2.0)
    before = descendants(os.getpid())
    verifier = verification.Verifier(workers=1)
    workers = descendants(os.getpid()) - before
    parent, = [pid for pid in workers if descendants(pid) & workers]
    working, = workers - {parent}
    with ThreadPoolExecutor(1) as thread:
        if when == "in the middle of an answer":
            answer = thread.submit(verifier, ["1"], [response(tower(9, 4))])
            time.sleep(0.5)
        os.kill(working if which == "the one that works" else parent, signal.SIGKILL)
    time.sleep(0.5)
    verdicts = [verifier([str(i)], [response(str(i if i % 3 else 7))])[0] for i in range(2, 14)]
    verifier.close()
    if when == "in the middle of an answer":
        assert answer.result()[0] in (CRASH, TIMEOUT)
    expected = [RIGHT if i % 3 else WRONG for i in range(2, 14)]
    wrong = [verdict for verdict, right in zip(verdicts, expected) if verdict != right]
    assert wrong in ([], [CRASH])
    assert not wait_for_end(workers, 5)
