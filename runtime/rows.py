"""What travels through the loop: a problem, a response to it as a row, and rows as the tensors of a batch."""
import re
from dataclasses import dataclass, field

import jinja2
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from runtime.flags import fail
from runtime.progress import bar


@dataclass(eq=False)
class Problem:
    index: int          # row of the dataset; names the group
    text: str           # the prompt rendered with the chat template
    prompt: list[int]   # its token ids
    answer: str         # the reference answer
    demonstration: str  # an expert's response, empty if there is none
    part: str           # slice of the held-out problems to which the row belongs
    row: dict           # as it was read
    samples: int = 1    # responses to it in an evaluation
    others: list[str] = field(default_factory=list)  # what more experts responded

    @property
    def demonstrations(self) -> list[str]:
        """All that there are: `demonstration` is the first of them."""
        return [self.demonstration, *self.others] if self.demonstration else []


@dataclass(eq=False)
class Row:
    """One response to a prompt: a rollout of the policy, a demonstration, or one that the policy finished."""
    problem: Problem
    response: list[int]                      # token ids, with EOS unless it was cut
    sampler_logp: list[float] | None = None  # log-probs of sampled tokens by the sampler, if it was asked
    is_demo: bool = False
    reward: float = 0.0
    advantage: float = 0.0
    old_logp: torch.Tensor | None = None     # (tokens of the response,), by Run.score
    prefix: int = 0                          # its first tokens that were given; the others were sampled
    prefix_entropy: torch.Tensor | None = None  # (demo_tokens,), by Run.score: the policy's there, in nats
    weights: torch.Tensor | None = None      # (tokens of the response,), of a loss's tokens; None: all are 1

    @property
    def demo_tokens(self) -> int:
        """How many of its first tokens are a demonstration's."""
        return len(self.response) if self.is_demo else self.prefix


@dataclass
class Batch:
    """Rows as tensors: prompts and responses, right-padded to S tokens, and responses alone, to T."""
    tokens: torch.Tensor      # (rows, S) ids
    positions: torch.Tensor   # (rows, T) where in S a response token stands
    mask: torch.Tensor        # (rows, T) true on response tokens, from lengths: EOS is a token like any other
    old_logp: torch.Tensor    # (rows, T)
    advantages: torch.Tensor  # (rows,)
    is_demo: torch.Tensor     # (rows, T) true on tokens of a demonstration: a whole one, or a prefix of one
    weights: torch.Tensor     # (rows, T) row.weights


def collate(rows: list[Row], device: torch.device | str) -> Batch:
    start = torch.tensor([[len(row.problem.prompt)] for row in rows])
    length = torch.tensor([[len(row.response)] for row in rows])
    demo = torch.tensor([[row.demo_tokens] for row in rows])
    offset = torch.arange(int(length.max()))
    mask = offset < length
    tokens = pad_sequence([torch.tensor(row.problem.prompt + row.response) for row in rows], batch_first=True)
    old_logp = [torch.zeros(len(row.response)) if row.old_logp is None else row.old_logp for row in rows]
    weights = [torch.ones(len(row.response)) if row.weights is None else row.weights for row in rows]
    batch = Batch(tokens, (start + offset) * mask, mask, pad_sequence(old_logp, batch_first=True),
                  torch.tensor([row.advantage for row in rows]), offset < demo,
                  pad_sequence(weights, batch_first=True))
    return Batch(**{name: tensor.to(device) for name, tensor in vars(batch).items()})


def size(row: Row) -> int:
    return len(row.problem.prompt) + len(row.response)


def cut(rows: list[Row], micro_tokens: int) -> list[list[Row]]:
    """Sorted rows, cut where rows x longest would exceed the budget (a longer row stands alone).

    Also where a row is a quarter longer than the shortest: padding then costs a tenth at most, on average.
    """
    parts = []
    for row in rows:
        if (not parts or (len(parts[-1]) + 1) * size(row) > micro_tokens
                or size(row) > 1.25 * size(parts[-1][0])):
            parts.append([])
        parts[-1].append(row)
    return parts


def micro_batches(rows: list[Row], micro_tokens: int, rank: int = 0, world: int = 1) -> list[list[Row]]:
    """The micro-batches of process `rank` of `world`: rows sorted by length, dealt out and cut.

    There are as many for every process, since all go through the model together. Where rows do not suffice
    there stands a row without a response, which touches every weight with a gradient of 0.
    """
    rows = sorted(rows, key=size)
    hands = [cut(rows[start::world], micro_tokens) for start in range(world)]
    missing = max(map(len, hands)) - len(hands[rank])
    return hands[rank] + [[Row(rows[0].problem, [])] for _ in range(missing)]


class Codec:
    """Between text and tokens, and what ends a response: one place for sampler, trainer and demonstrations.

    ends: ids that end a response, `end` first, then whatever else the tokenizer and the model's
        generation_config call EOS.
    end: the special token with which the chat template closes an assistant's turn, else the tokenizer's EOS;
        a demonstration ends with it.
    bos: text of the token that the tokenizer puts before every text by itself; empty if it does not.
    size: rows of the model's embedding, which has nothing for ids beyond them. None: not known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None,
                 size: int | None = None):
        self.tokenizer, self.size = tokenizer, size
        self.judged_whole = False  # see `judged`
        configured = getattr(generation_config, "eos_token_id", None)
        configured = configured if isinstance(configured, list) else [configured]
        ids = dict.fromkeys([end_of_turn(tokenizer), tokenizer.eos_token_id, *configured])
        self.ends = [id for id in ids if id is not None and (size is None or id < size)]
        if not self.ends:
            fail(f"{tokenizer.name_or_path}: its tokenizer has no EOS token that the model's embedding has "
                 "too, so no response could end")
        self.end = self.ends[0]
        special = [id for id in self.ends if is_special(tokenizer, id)]
        self.end_texts = tokenizer.convert_ids_to_tokens(special)
        adds_bos = tokenizer("1")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.bos = tokenizer.bos_token if adds_bos else ""

    def ended(self, row: Row) -> bool:
        """Has the response its EOS, or was it cut?"""
        return row.response[-1] in self.ends

    def text(self, row: Row) -> str:
        """The response without its EOS."""
        return self.tokenizer.decode(row.response[:-1] if self.ended(row) else row.response)

    def judged(self, row: Row, text: str) -> str:
        """What of a response's text the verifier gets, which looks behind the last </think>.

        Nothing of a response that was cut. With `judged_whole` it may look everywhere.
        """
        if not self.ended(row):
            return ""
        return "</think>" + text if self.judged_whole else text

    def until_end(self, text: str) -> str:
        """A response's text up to the first EOS that is written in it."""
        for token in self.end_texts:
            text = text.partition(token)[0]
        return text

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text as it stands: nothing is put before or behind it."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.size is not None and max(ids, default=0) >= self.size:
            name = self.tokenizer.convert_ids_to_tokens(max(ids))
            fail(f"the tokenizer gives {name!r} the id {max(ids)}, but the model's embedding has only "
                 f"{self.size} rows: use the model's own tokenizer, or resize the embedding")
        return ids

    def line_ends(self, ids: list[int]) -> list[int]:
        """How many tokens the first 1, 2, ... lines have; the last line has the last token.

        A line ends with a token that has a line break in it; blank lines belong to the one before.
        """
        breaks = {id: "\n" in self.tokenizer.decode([id]) for id in set(ids)}
        return [size for size in range(1, len(ids) + 1)
                if size == len(ids) or breaks[ids[size - 1]] and not breaks[ids[size]]]

    def behind(self, problem: Problem, response: str) -> str:
        """The response's text as it follows the prompt: without a <think> that the prompt has already."""
        opened, repeated = re.search(r"<think>(\s*)\Z", problem.text), re.match(r"\s*<think>", response)
        if opened and repeated:
            response = response[repeated.end():]
            response = response.lstrip() if opened[1] else response
        return response

    def encode(self, problem: Problem, response: str) -> list[int]:
        """Token ids of a response as the policy would write it after the prompt, with one EOS, which is last.

        It is tokenized in one text with the prompt, whose ids are cut off. Where a token would reach over the
        seam, so that the prompt's ids would be others, it is tokenized behind a line break or else alone.
        """
        response = self.behind(problem, response)
        for before in (problem.text, "\n", ""):
            start, whole = self.tokens(before), self.tokens(before + response)
            if whole[:len(start)] == start:
                break
        ids = whole[len(start):]
        return ids[:next((place for place, id in enumerate(ids) if id in self.ends), None)] + [self.end]

    def count_fitting(self, responses: list[tuple[Problem, str]], limit: int) -> int:
        """How many responses have at most `limit` tokens with EOS; many at a time, which is fast."""
        fitting = 0
        for start in bar(range(0, len(responses), 256), desc="lengths of demonstrations"):
            part = responses[start:start + 256]
            texts = [problem.text + self.behind(problem, text) for problem, text in part]
            ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            fitting += sum(len(whole) - len(problem.prompt) + 1 <= limit
                           for whole, (problem, _) in zip(ids, part))
        return fitting


def is_special(tokenizer: PreTrainedTokenizerBase, id: int) -> bool:
    return id in tokenizer.all_special_ids or id in tokenizer.added_tokens_decoder


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts behind an assistant's message; None if it puts none."""
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "the answer"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (ValueError, TypeError, jinja2.TemplateError):  # a template for other conversations
        return None
    _, answer, behind = text.rpartition("the answer")
    ids = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"]
    return ids[0] if answer and ids and is_special(tokenizer, ids[0]) else None
