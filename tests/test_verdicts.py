r"""Verdicts on pairs of a reference and an answer, of the kinds in which answers are written and guessed.

The pairs are in verdicts.jsonl, by kind, each with the verdict that a mathematician would give.
"""
import json
import random
import time

import pytest
from conftest import TESTS
from hypothesis import given
from hypothesis import strategies as st

from runtime import toy
from runtime.normalise import comparable, normalise, same
from runtime.problems import load_problems
from runtime.rows import Codec
from runtime.verification import RIGHT, UNPARSED, WRONG

PAIRS = [json.loads(line) for line in (TESTS / "verdicts.jsonl").read_text().splitlines()]
KINDS = list(dict.fromkeys(pair["kind"] for pair in PAIRS))


def boxes(answers) -> list[str]:
    return [f"<think>\nwell\n</think>\n\\boxed{{{answer}}}" for answer in answers]


@pytest.mark.parametrize("kind", KINDS)
def test_pairs(verifier, kind):
    pairs = [pair for pair in PAIRS if pair["kind"] == kind]
    verdicts = verifier([pair["gold"] for pair in pairs], boxes(pair["answer"] for pair in pairs))
    assert {True, False} == {pair["right"] for pair in pairs}
    for pair, verdict in zip(pairs, verdicts):
        assert (verdict == RIGHT) == pair["right"], pair
        assert verdict in (RIGHT, WRONG, UNPARSED), pair


# Known limits: the verdict, and not what a mathematician would say.
LIMITS = (
    # refused
    ("x>2 and x<6", "(2,6)", WRONG),                  # no conditions with `and`
    (r"e^{i\pi}", "-1", WRONG),                       # i is a letter
    (r"11 \frac{1}{2}\%", r"11.5\%", UNPARSED),       # a mixed number of percent does not parse
    ("5y", "5", WRONG), ("5", "5y", WRONG),           # a letter is a variable
    ("B. 12", "12", WRONG),                           # of a choice only the letter counts
    ("20 red apples", "20 apples", WRONG),            # units are compared as text
    (r"36\text{ km/h}", r"10\text{ m/s}", WRONG),     # and only simple ones are converted
    ("20°C", "20", WRONG),                            # C is a letter
    ("0.5", "0,5", WRONG),                            # a list of 0 and 5
    ("110_2", "6_{10}", WRONG),                       # numbers in other bases are not converted
    ("7", r"\text{seven}", WRONG),                    # nor numbers in words
    ("(1,4)", r"\{x \mid 1<x<4\}", UNPARSED),         # sets with a condition do not parse
    # paid
    ("x^2+1=0", "x^2+2=0", RIGHT),                    # two equations without a real solution are equal to it
    ("p+q=1", "1", RIGHT),                            # the value at the end of an equation
    ("6", "6-5i=6", RIGHT),                           # or of a chain with other letters than one name
    ("(1,2)", r"\{1,2\}", RIGHT),                     # pairs, sets of two and open intervals
    ("a=1,b=2", "(2,1)", RIGHT),                      # values of several names, in any order
    (r"(-\infty,1)\cup(2,\infty)", "x<1 and x>2", RIGHT),  # of several conditions one holds
    ("40", r"40\%", RIGHT),                           # n% for n, and for n/100
    ("5", "5m", RIGHT),                               # the letters of units are no variables beside a number
    ("345", "345_7", RIGHT), ("110_2", "110", RIGHT),  # a base, like a unit, may be left out or put behind
    (r"x+\frac{1}{801!}", r"x+\frac{1}{803!}", RIGHT),  # only numbers are compared in more than their first digits
)


def test_limits_that_are_known(verifier):
    verdicts = verifier([gold for gold, _, _ in LIMITS], boxes(answer for _, answer, _ in LIMITS))
    assert [(*pair[:2], verdict) for pair, verdict in zip(LIMITS, verdicts)] == list(LIMITS)


# ---------------------------------------------------------------------------------------- one way of writing
@pytest.mark.parametrize("text, normal", (
    ("１２．５", "12.5"), ("٤٢", "42"), ("−3", "-3"), ("2½", r"2\frac{1}{2}"), ("x²+y⁻¹", "x^{2}+y^{-1}"),
    ("a₁₂", "a_{12}"), ("3√5", r"3\sqrt{5}"), ("x<∞", r"x<\infty"), ("12。", "12"),
    ("12.", "12"), (r"12\\", "12"), (".5", ".5"), ("**12**", "12"), (r"\textcolor{red}{12}", "12"),
    (r"\(12\)", "12"), ("$12$", "12"), ("= 12", "12"), ("The answer is 12", "12"), ("Option B", r"\text{option b}"),
    (r"\textbf{(B)}", r"\text{option b}"), ("B. 12", r"\text{option b}"), (r"\text{East}", r"\text{east}"),
    ("(A) or (B)", "(A) or (B)"), ("C and A", "A,C"), ("CA", "A,C"),
    (r"12\,500", "12500"), ("12 500", "12500"), ("12{,}500", "12500"), ("12,\\!500", "12500"), ("12'500", "12500"),
    ("12{,}5", "12.5"), ("(12,500)", "(12,500)"), ("x = 12,500", "12,500"), ("x = 12_5", r"12 \text{base_5}"),
    ("1, 250", "1, 250"), ("1 2", "1 2"), ("7 1/3", r"7\frac{1}{3}"), ("7-1/3", "7-1/3"),
    ("3e-7", r"3 \cdot 10^{-7}"), ("3e", "3e"), ("-2./5", "-2/5"), ("10^-3", "10^{-3}"), ("2i", "2 i"),
    (r"0.1\overline{6}", r"\frac{15}{90}"), (r"0.\dot{1}4\dot{2}", r"\frac{142}{999}"), ("0.(27)", r"\frac{27}{99}"),
    (r"0.666\ldots", r"\frac{6}{9}"), ("0.66", "0.66"), (r"1.414\ldots", "1.414"), ("...", r"\ldots"),
    (r"\mathrm{e}^2", "e^2"), ("12 cm", r"12 \text{cm}"), (r"\frac{1}{2} m", r"\frac{1}{2} m"),
    (r"12\ \mathrm{m}/\mathrm{s}^{2}", r"12 \text{m/s^2}"), ("12元", r"12 \text{元}"), ("5 sq. ft", r"5 \text{sq ft}"),
    (r"\$12", r"12 \text{dollar}"), ("¥5", r"5 \text{¥}"), (r"\pounds 5", r"5 \text{pounds}"),
    ("12 (apples)", r"12 \text{apples}"), (r"12\text{ or more}", "12 or more"), ("12 thousand", "12 thousand"),
    ("12 percent", r"12\%"), ("12th", "12"), ("12x", "12x"), ("12 xy", "12 xy"), (r"2\pi\text{ cm}", r"2\pi \text{cm}"),
    ("12°", r"12^{\circ}"), ("12º", r"12^{\circ}"), ("12˚", r"12^{\circ}"), ("12 degrees", r"12^{\circ}"),
    (r"\text{no solution}", r"\emptyset"), ("infinitely many", r"\infty"), ("]1,2]", "(1,2]"), ("[1,2[", "[1,2)"),
    ("[1,2], [3,4]", "[1,2], [3,4]"), (r"x \in [1,2]", "[1,2]"), ("6:4:2", "(3,2,1)"), ("0:0:0", "(0,0,0)"),
    (r"n\pi, n \in \mathbb{Z}", r"k\pi"), ("C_5^2", r"\binom{5}{2}"), ("C_1^2 e^t", "C_1^2 e^t"), ("", ""),
    ("a·d∙e•f⋅g", r"a\cdot d\cdot e\cdot f\cdot g"), ("1–2—3‐4‑5‒6", "1-2-3-4-5-6"), ("1⁄2", "1/2"),
    ("1、2∶3", "1,2:3"), ("“5”", "5"), ("\u200b\u20605x\ufeff", "5x"), (r"\displaystyle 5", "5"), ("{5}", "5"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\tfrac12", r"\frac12"),
    (r"1, \dots, n", r"1, \ldots , n"), ("7  1/3", r"7\frac{1}{3}"), ("√(x+1)", r"\sqrt{x+1}"), ("√{x}", r"\sqrt{x}"),
    ("\ud800", "\ud800"), (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",) * 2,
))
def test_one_way_of_writing(text, normal):
    assert " ".join(normalise(text).split()) == normal
    assert normalise(normalise(text)) == normalise(text)


PIECES = [*" .,:;()[]{}\\$^_*'\"-+=<>|/%12aAexiZ°½²₁√元", "\\text{", "\\frac", "or "]


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_any_text_has_a_normal_form_that_is_its_own(text):
    normal = normalise(text)
    assert isinstance(normal, str)
    assert same(normal, normalise(text))
    comparable(normal, normalise(text[::-1]))


ATOMS = (". , ; 1 12 _ ^ $ * \\ { } ( ) [ ] = < | / % - ' \" \n½√é元° ² ₂ "
         r"\text{a} \text{ \frac \sqrt( \dot1 \overline{ 0. 0.1 333 ... \ldots x<1or x\inZ C_ 1e9 '123 {,}123 .123 "
         r"A, A. _{ ^{\circ} per cm/ sq. answer the \{ \mod \left \color{ {\rm and percent").split(" ")


def test_time_is_linear_in_the_length():
    """Texts of 10,000 characters that repeat one or a few pieces: no pattern tries them out in all ways."""
    rng = random.Random(0)
    patterns = [*ATOMS, *(atom + " " for atom in ATOMS), *("".join(rng.sample(ATOMS, 3)) for _ in range(60))]
    for pattern in patterns:
        for start, end in (("", ""), ("5", "~x"), ("(", "1")):
            text = start + (pattern * 10_000)[:10_000] + end
            begin = time.process_time()
            normal = normalise(text)
            for gold in ("(0,1)", r"5 \text{cm}", "C", normal):
                comparable(gold, normal + "1")
            assert time.process_time() - begin < 4, (pattern, start, end)  # room for a busy machine


# -------------------------------------------------------------------------------------------------- references
USABLE = ("6.", "18,", "31元", "４", "75°", "8 (coins)", "15 dollars", r"3-\frac{2}{\mathrm{e}}", r"7\mathrm{i}",
          "The answer is 14", "**29**", "A", "(C)", "C. 12", "A,C", "yes", r"\text{even}", "Monday", "New York", "偶数",
          r"\text{no solution}", "x=5", "(1,2)", "]1,4[", "x>5", "ab", r"5 \text{ or } 7", "3e-7", r"\boxed{5}",
          "8:00", "9:30 PM",
          r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\lambda_{\text{initial}} / 2")
TEXT_ONLY = ("", ".", "-", "?", r"\frac{1}{", "n is even and positive for all m", r"1 \le x \le 4:[1,4]",
             r"f(x)=ax+b, where $a$ is an integer", r"m_{\max}=3", "}{", "1" * 10_001)


def test_references_that_can_be_used(verifier):
    assert dict(zip(USABLE, verifier.check_golds(USABLE))) == dict.fromkeys(USABLE, RIGHT)


def test_references_that_are_only_text(verifier):
    assert dict(zip(TEXT_ONLY, verifier.check_golds(TEXT_ONLY))) == dict.fromkeys(TEXT_ONLY, UNPARSED)


def test_rows_with_such_references_are_left_out_counted_and_named(verifier, capsys):
    """Not those whose reference says the same as a usable one, in whatever way it is written."""
    answers = ["1°", "2.", "3元", "f(x)=ax+b, where a is any integer", "a line through the origin, not x=0", "6:00"]
    rows = [{"problem": f"a={i:02d};a?", "answer": answer} for i, answer in enumerate(answers)]
    rows += [{"problem": "b=1;b?", "answer": "1°", "demonstration": response}
             for response in ["<think>\n1\n</think>\n\\boxed 1"]]
    problems = load_problems("rows", rows, Codec(toy.make_tokenizer()), verifier, 60)
    assert [problem.index for problem in problems] == [0, 1, 2, 5, 6]
    assert problems[-1].demonstration  # right, though it is written in another way
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].startswith("rows: left out 2 of 7 rows whose answer math-verify holds only as text")
    assert said[0].endswith(f"the first is {answers[3]!r}")
