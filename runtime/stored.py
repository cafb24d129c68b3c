"""Rows that are kept: demonstrations, rows in a checkpoint and in a file, the policy's experience."""
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from runtime import processes
from runtime.flags import Args, fail
from runtime.problems import draw
from runtime.rows import Codec, Problem, Row


class Demonstrations:
    """The demonstrations of the training data as rows."""

    def __init__(self, args: Args, problems: list[Problem], codec: Codec, state: dict, log: Callable):
        self.args, self.problems, self.codec, self.state, self.log = args, problems, codec, state, log
        self.number = self.count_fitting()
        self.given = 0  # how many were asked for and given

    def count_fitting(self) -> int:
        """How many fit in L tokens; says how many do not, and if there is none."""
        responses = [(problem, text) for problem in self.problems for text in problem.demonstrations]
        limit = self.args.max_response
        fitting = self.codec.count_fitting(responses, limit)
        if fitting < len(responses):
            print(f"{self.args.data}: {len(responses) - fitting} of {len(responses)} demonstrations have "
                  f"more than --max_response {limit} tokens and will be left out")
        if self.problems and not fitting:
            print(f"{self.args.data}: no problem has a demonstration that can be used")
        return fitting

    def require(self, share: float, beside: int, weight: float):
        """Ends the run at its start if none fits, or if `share` of a step's rows is none beside its rollouts.

        Unless their largest weight is 0: then none is needed.
        """
        if not weight:
            return
        if not self.number:
            fail(f"{self.args.data}: no problem has a demonstration that fits in --max_response "
                 f"{self.args.max_response}")
        if round(share / (1 - share) * beside) == 0:
            fail(f"--expert_share {share}: beside {beside} rollouts this rounds to no demonstration; raise "
                 "it, --prompts or --n")

    def of(self, problem: Problem) -> Row | None:
        """A problem's demonstration with EOS, the first of several that fits; None if there is none."""
        return next(iter(self.all(problem)), None)

    def all(self, problem: Problem) -> list[Row]:
        """A problem's demonstrations with EOS; those of more than L tokens are left out and counted."""
        responses = [self.codec.encode(problem, text) for text in problem.demonstrations]
        fitting = [response for response in responses if len(response) <= self.args.max_response]
        if responses:
            self.log("demonstrations/left_out", len(responses) - len(fitting), 0)
        self.given += len(fitting)
        return [Row(problem, response, is_demo=True) for response in fitting]

    def with_reference(self, row: Row) -> tuple[Row, int]:
        """The demonstration with the reference in the place of its own answer, without EOS, to be scored.

        Its own is what the last box holds. Returns the row and how many tokens at its end are the reference.
        """
        before, box, _ = self.codec.text(row).rpartition("\\boxed{")
        before = before if box else f"{self.codec.text(row)}\n"  # it may be right in another kind of box
        answer = self.codec.tokens(row.problem.answer)
        reasoning = self.codec.encode(row.problem, before + "\\boxed{")[:-1]
        return Row(row.problem, reasoning + answer, is_demo=True), len(answer)

    def next(self, count: int) -> list[Row]:
        """The next `count` of a stream of their own, in the seed's order, without those that do not fit."""
        rows, start = [], self.state.get("drawn", 0)
        self.state["drawn"] = start
        while len(rows) < count:
            drawn = draw(self.problems, f"{self.args.seed} experts", self.state["drawn"], 1)
            rows += filter(None, map(self.of, drawn))
            self.state["drawn"] += 1
            if not rows and self.state["drawn"] - start > 2 * len(self.problems):
                fail(f"{self.args.data}: no demonstration fits in --max_response {self.args.max_response}")
        for row in rows:
            row.advantage = 1.0  # imitated, not compared: rows of advantage 0 are left out of micro-batches
        return rows


class KeptRows:
    """Rows that outlive their step: they go into every checkpoint and, if asked, to a file and back."""

    def __init__(self, problems: list[Problem], codec: Codec, state: dict, path: Path):
        self.problems, self.codec, self.state, self.path = problems, codec, state, path

    def keep(self, rows: list[Row], in_file: bool):
        """In place of those that were kept before; with in_file they are also appended to the file."""
        if in_file:
            self.save(rows)
        self.state["kept"] = [vars(row) | {"problem": row.problem.index} for row in rows]

    def rows(self) -> list[Row]:
        """Those that are kept, also after --resume; empty if there are none."""
        problems = {problem.index: problem for problem in self.problems}
        return [Row(**values | {"problem": problems[values["problem"]]})
                for values in self.state.get("kept", [])]

    def save(self, rows: list[Row]):
        """Appends responses, with problem and answer, to the file; those that were cut are left out."""
        ended = [row for row in rows if self.codec.ended(row)]
        with open(self.path if processes.first() else os.devnull, "a", encoding="utf-8") as file:
            for row in ended:
                kept = {"answer": row.problem.answer, "response": self.codec.text(row)}
                line = {"problem": row.problem.text} | row.problem.row | kept
                file.write(json.dumps(line, default=str) + "\n")  # str: of dates and decimals
        tqdm.write(f"saved {len(ended)} of {len(rows)} responses in {self.path}; the others were cut")

    def read(self, source: str, max_response: int) -> list[Row]:
        """Rows of the responses that the training data, from the file `source`, have; those that fit."""
        if "response" not in self.problems[0].row:
            fail(f"--offline {source}: it has no column `response`")
        rows = [Row(problem, self.codec.encode(problem, problem.row["response"]))
                for problem in self.problems if isinstance(problem.row["response"], str)]
        fitting = [row for row in rows if len(row.response) <= max_response]
        print(f"{source}: left out {len(self.problems) - len(rows)} rows without a response and "
              f"{len(rows) - len(fitting)} responses of more than {max_response} tokens")
        if not fitting:
            fail(f"--offline {source}: no response can be used")
        self.look_for_thinking(source, fitting)
        return fitting

    def look_for_thinking(self, source: str, rows: list[Row]):
        """Says what becomes of responses without a </think>, behind which the answer is looked for."""
        without = sum("</think>" not in self.codec.text(row) for row in rows)
        self.codec.judged_whole = without == len(rows)
        if self.codec.judged_whole:
            print(f"{source}: none of {len(rows)} responses has a </think>: a boxed answer counts wherever "
                  "it is, in evaluation too; --prompt_end '' leaves <think> out of the prompt")
        elif without:
            print(f"{source}: {without} of {len(rows)} responses have no </think>: they count as wrong")


class Experience:
    """Right responses of earlier steps, by problem, with their log-probs then, in every checkpoint.

    They take 8 bytes a token.
    """

    def __init__(self, problems: list[Problem], state: dict, log: Callable):
        self.problems, self.log = {problem.index: problem for problem in problems}, log
        self.kept = state.setdefault("experience", {"responses": {}, "right": {}, "retired": []})

    @property
    def right(self) -> dict[Problem, int]:
        """Problems that have stored responses: how many rows were right when it was added to last."""
        return {self.problems[index]: count for index, count in self.kept["right"].items()}

    @property
    def retired(self) -> list[Problem]:
        return [self.problems[index] for index in self.kept["retired"]]

    def add(self, right: dict[Problem, list[Row]]):
        """Right rows of a step, with old_logp, by problem. A response that is stored stays as it is."""
        for problem, rows in right.items():
            self.kept["right"][problem.index] = len(rows)
            responses = self.kept["responses"].setdefault(problem.index, [])
            for row in rows:
                tokens = torch.tensor(row.response, dtype=torch.int32)
                if not any(torch.equal(tokens, other) for other, _ in responses):
                    responses.append((tokens, row.old_logp))
        self.log("experience/problems", len(self.kept["right"]))
        self.log("experience/responses", sum(map(len, self.kept["responses"].values())))

    def retire(self, problems: list[Problem]):
        """Forgets the responses to these problems, which are done with."""
        for index in [problem.index for problem in problems]:
            self.kept["responses"].pop(index, None)
            self.kept["right"].pop(index, None)
            if index not in self.kept["retired"]:
                self.kept["retired"].append(index)
        self.log("experience/retired", len(self.kept["retired"]))

    def rows(self, problem: Problem) -> list[Row]:
        """A problem's responses as new rows: given and not sampled, with the old_logp that they came with."""
        return [Row(problem, tokens.tolist(), is_demo=True, old_logp=old_logp)
                for tokens, old_logp in self.kept["responses"][problem.index]]
