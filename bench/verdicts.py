"""How often the verdict here is another one than math-verify's alone, on the references of real data.

    python bench/verdicts.py FILE    # parquet, jsonl, json or csv, as for --data; ten minutes for 2,000 rows

Every reference is compared with answers that are made of it: in forms in which models write right answers, and
in forms of wrong ones. The last lines say which references cannot be used at all.
"""
import argparse
import logging
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from math_verify import parse, verify  # noqa: E402

from runtime.problems import read_problem, read_rows  # noqa: E402
from runtime.verification import NAMES, RIGHT, Verifier  # noqa: E402

RIGHT_FORMS = {  # an answer, from the reference
    "itself": lambda gold: gold,
    "in dollar signs": lambda gold: f"${gold.strip('$')}$",
    "display style": lambda gold: rf"\displaystyle {gold}".replace(r"\frac", r"\dfrac"),
    "with a name": lambda gold: gold if "=" in gold else f"x = {gold}",
    "with a dot": lambda gold: f"{gold}.",
}
WRONG_FORMS = {  # from the reference and another one
    "another": lambda gold, other: other,
    "another with a name": lambda gold, other: f"x = {other}",
    "either": lambda gold, other: rf"{gold} \text{{ or }} {other}",
    "from one to the other": lambda gold, other: rf"{other} \to {gold}",
    "a false chain": lambda gold, other: f"{other} = {gold}",
}


def alone(gold: str, answer: str) -> bool:
    """math-verify's own verdict, as the papers' code asks for it."""
    gold, answer = [parse(f"\\boxed{{{text}}}", parsing_timeout=3) for text in (gold, answer)]
    return verify(gold, answer, timeout_seconds=3)


def compare(name: str, golds: list[str], answers: list[str], verifier: Verifier) -> int:
    """Prints, and returns, how many verdicts change."""
    responses = [f"</think>\\boxed{{{answer}}}" for answer in answers]
    ours = [verdict == RIGHT for verdict in verifier(golds, responses)]
    theirs = [alone(gold, answer) for gold, answer in zip(golds, answers)]
    changed = [pair for pair, our, their in zip(zip(golds, answers, ours), ours, theirs) if our != their]
    gained = sum(right for _, _, right in changed)
    print(f"{name}: of {len(golds)}, math-verify alone has {sum(theirs)} right; here {gained} more become "
          f"right and {len(changed) - gained} become wrong, such as {changed[:3]}", flush=True)
    return len(changed)


def main():
    logging.disable(logging.CRITICAL)  # math-verify warns of every parse that it gives up
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file")
    golds = Counter(read_problem(row, "")[1] for row in read_rows(parser.parse_args().file))
    unique, verifier = list(golds), Verifier()
    others = [next(other for other in unique[i + 1:] + unique if other.strip("$") != gold.strip("$"))
              for i, gold in enumerate(unique)]
    print(f"{golds.total()} rows, {len(unique)} different references")
    for forms, arguments in ((RIGHT_FORMS, [unique]), (WRONG_FORMS, [unique, others])):
        changed = [compare(name, unique, list(map(form, *arguments)), verifier)
                   for name, form in forms.items()]
        print(f"in all {sum(changed)} of {len(changed) * len(unique)} verdicts change\n")
    for gold, verdict in zip(unique, verifier.check_golds(unique)):
        if verdict != RIGHT:
            print(f"{golds[gold]} rows cannot be used, {NAMES.get(verdict, 'crash')}: {gold}")
    verifier.close()


if __name__ == "__main__":
    main()
