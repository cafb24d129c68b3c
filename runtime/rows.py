"""What travels through the loop: a problem, a response to it as a row, and rows as the tensors of a batch."""
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence


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


@dataclass(eq=False)
class Row:
    """One response to one prompt: a rollout of the policy or a demonstration."""
    problem: Problem
    response: list[int]                      # token ids, with EOS unless it was cut
    sampler_logp: list[float] | None = None  # log-probs of its tokens by the sampler; None: not sampled
    is_demo: bool = False
    reward: float = 0.0
    advantage: float = 0.0
    old_logp: torch.Tensor | None = None     # (tokens of the response,), by Run.score


@dataclass
class Batch:
    """B rows as tensors: prompts and responses, right-padded to S tokens, and responses alone, to T."""
    tokens: torch.Tensor      # (B, S) ids
    positions: torch.Tensor   # (B, T) where in S a response token stands
    mask: torch.Tensor        # (B, T) true on response tokens, from lengths: EOS is a token like any other
    old_logp: torch.Tensor    # (B, T)
    advantages: torch.Tensor  # (B,)
    is_demo: torch.Tensor     # (B,) bool


def collate(rows: list[Row], device) -> Batch:
    start = torch.tensor([[len(row.problem.prompt)] for row in rows])
    length = torch.tensor([[len(row.response)] for row in rows])
    offset = torch.arange(int(length.max()))
    mask = offset < length
    tokens = pad_sequence([torch.tensor(row.problem.prompt + row.response) for row in rows], batch_first=True)
    old_logp = [torch.zeros(len(row.response)) if row.old_logp is None else row.old_logp for row in rows]
    batch = Batch(tokens, (start + offset) * mask, mask, pad_sequence(old_logp, batch_first=True),
                  torch.tensor([row.advantage for row in rows]), torch.tensor([row.is_demo for row in rows]))
    return Batch(**{name: tensor.to(device) for name, tensor in vars(batch).items()})


def micro_batches(rows: list[Row], micro_tokens: int) -> list[list[Row]]:
    """Rows sorted by length, cut where rows x longest would exceed the budget (a longer row stands alone).

    Also where a row is a quarter longer than the shortest: padding then costs a tenth at most, on average.
    """
    def size(row):
        return len(row.problem.prompt) + len(row.response)
    parts = []
    for row in sorted(rows, key=size):
        if (not parts or (len(parts[-1]) + 1) * size(row) > micro_tokens
                or size(row) > 1.25 * size(parts[-1][0])):
            parts.append([])
        parts[-1].append(row)
    return parts


class Codec:
    """Between text and tokens, in one place for sampler, trainer and demonstrations."""

    def __init__(self, tokenizer):
        self.tokenizer, self.eos = tokenizer, tokenizer.eos_token_id

    def ended(self, row: Row) -> bool:
        """Has the response its EOS, or was it cut?"""
        return row.response[-1] == self.eos

    def text(self, row: Row) -> str:
        """The response without its EOS."""
        return self.tokenizer.decode(row.response[:-1] if self.ended(row) else row.response)

    def encode(self, problem: Problem, response: str) -> list[int]:
        """Token ids of a response, with EOS, and without a leading <think> that the prompt has already."""
        if problem.text.rstrip().endswith("<think>"):
            response = response.removeprefix("<think>\n")
        return self.tokenizer(response, add_special_tokens=False)["input_ids"] + [self.eos]
