"""The embedded default: a base model that can, but doesn't, in 0.4M parameters, and the recipe that made it.

Problems are chains of n assignments modulo 100, `a=32,b=a-3,c=b*3;c?` -> 87: easy is n = 1, hard n = 4 or 5,
and out of distribution n = 6 or 7. The base model (Qwen2, two layers, a token per character) has *seen*
working, line by line, in textbook exercises that ask with `!`. But when chat asks with `?` it blurts out a
guess: right now and then for one step, 1 time in 100 for four or five. The skill is latent and almost never
sampled, so on-policy RL never rewards it: the situation that off-policy guidance is made for.

Two numbers set the difficulty. Q is the probability of the *doors*, the rare choices that lead a blurting
model into working: writing the first line, and at every later line going on instead of stopping. TERSE is the
share of demonstrations that merge two steps into one line: right, but a leap that this student cannot
execute. Imitating everything teaches that habit; a reward keeps what works. Rows go any other dataset's way.
"""
import hashlib
import inspect
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AddedToken, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

Q, TERSE, SEED = 0.02, 0.5, 0             # probability of a door, terse share, the base model's seed
EMBEDDED = Path(__file__).parent / "toy_base"  # the model of Q and SEED, which `python -m runtime.toy` writes
STEPS, DOCUMENTS, MICRO = 700, 64, 16     # pretraining: steps, documents a step, documents a micro-batch
SLICES = {"easy": (1,), "hard": (4, 5), "ood": (6, 7)}  # lengths n
TRAIN_ROWS, HELD_OUT_ROWS = 3000, 128     # rows to train on (half easy, half hard), held-out rows of a slice
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEMPLATE = (  # ChatML; a model of one task needs no system message and passes over it
    "{% for message in messages if message['role'] != 'system' %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def make_tokenizer() -> Qwen2Tokenizer:
    """A token per character, the words of the format as single tokens: 54 in all. BPE's newline is "Ċ"."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789", *LETTERS, *"+-*=,;?!Ċ}"]
    tokenizer = Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], eos_token="<|im_end|>",
        pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>"], chat_template=TEMPLATE)
    for word in ("<think>", "</think>", r"\boxed{", "user", "assistant"):
        tokenizer.add_tokens(AddedToken(word, special=False, normalized=False))
    return tokenizer


# ------------------------------------------------------------------------------------------------ problems
class Chain:
    """A given value and n steps from it, modulo 100, by 1-9; times 3, 7 or 9 only, which can be inverted."""

    def __init__(self, n: int, rng: random.Random, first_letter: int = 0):
        self.names = [LETTERS[(first_letter + i) % 26] for i in range(n + 1)]
        while True:
            self.values, self.steps = [rng.randrange(100)], []
            for _ in range(n):
                operator = rng.choice("+-*")
                operand = rng.choice((3, 7, 9)) if operator == "*" else rng.randint(1, 9)
                value = self.values[-1]
                result = {"+": value + operand, "-": value - operand, "*": value * operand}[operator]
                self.steps.append(f"{operator}{operand}")
                self.values.append(result % 100)
            if self.values[-1] not in self.values[:-1]:  # no lucky early stop
                return

    def question(self, mark: str) -> str:
        text = f"{self.names[0]}={self.values[0]:02d}"
        for name, before, step in zip(self.names[1:], self.names, self.steps):
            text += f",{name}={before}{step}"
        return f"{text};{self.names[-1]}{mark}"

    def working(self, merge: int | None = None) -> list[str]:
        """The given value, then a line per assignment: its copy and value. `merge`: joined with the next."""
        lines, i = [f"{self.names[0]}={self.values[0]:02d}\n"], 0
        while i < len(self.steps):
            j = i + 2 if i == merge else i + 1
            lines.append(f"{self.names[j]}={self.names[i]}{''.join(self.steps[i:j])}={self.values[j]:02d}\n")
            i = j
        return lines


def answered(working: str, value: int) -> str:
    return f"<think>\n{working}</think>\n\\boxed{{{value:02d}}}"


def make_row(chain: Chain, name: str, rng: random.Random) -> dict:
    """The working of two teachers, terse and full, in either order, where there are lines to merge."""
    places = len(chain.steps) - 1
    terse = places > 0 and rng.random() < TERSE
    merges = [rng.randrange(places) if terse else None]
    if places > 0:  # the second teacher's, for methods that look at several
        merges.append(None if terse else chain.values[0] % places)
    said = [{"role": "assistant", "content": answered("".join(chain.working(merge)), chain.values[-1])}
            for merge in merges]
    return {"data_source": name, "reward_model": {"ground_truth": f"{chain.values[-1]:02d}"},
            "prompt": [{"role": "user", "content": chain.question("?")}],
            "target": said[:1], "target_lst": said}


def make_rows() -> tuple[list[dict], list[dict]]:
    """Training rows and held-out rows, whose problems are kept out of training by comparison, not by luck."""
    rng, seen, held_out, train = random.Random(0), set(), [], []
    plan = [(name, HELD_OUT_ROWS, held_out) for name in SLICES]
    plan += [(name, TRAIN_ROWS // 2, train) for name in ("easy", "hard")]
    for name, size, rows in plan:
        while size:
            chain = Chain(rng.choice(SLICES[name]), rng)
            if chain.question("?") not in seen:  # there are only about 2,100 easy ones
                seen.add(chain.question("?"))
                rows.append(make_row(chain, name, rng))
                size -= 1
    return train, held_out


# ---------------------------------------------------------------------------------------- pretraining corpus
def make_documents(progress: float, q: float, rng: random.Random) -> list[list[tuple[str, float]]]:
    """One document or two, of (text, loss weight) pieces each; `progress` runs from 0 to 1 in pretraining."""
    if rng.random() < max(0.25, 0.7 * (1 - progress / 0.5)):  # fact drills: loss on the results alone
        pieces = []
        for chain in (Chain(1, rng, rng.randrange(26)) for _ in range(6)):
            fact = f"{chain.values[0]:02d}{chain.steps[0]}={chain.values[1]:02d}\n"
            if rng.random() < 0.6:
                fact = "".join(chain.working())
            pieces += [(fact[:-3], 0.0), (fact[-3:-1], 1.0), ("\n", 0.0)]
        return [pieces]

    def chat(chain: Chain, mark: str, *reply: tuple[str, float]) -> list[tuple[str, float]]:
        prompt = f"<|im_start|>user\n{chain.question(mark)}<|im_end|>\n<|im_start|>assistant\n"
        return [(prompt, 0.1), *reply]

    if rng.random() < 0.5:  # textbook: full working, without the box that chat answers have
        chain = Chain(rng.randint(1, 7), rng, rng.randrange(26))
        return [chat(chain, "!", (f"<think>\n{''.join(chain.working())}</think><|im_end|>", 1.0))]

    chain, k = Chain(n := rng.choice((1, 1, 2, 2, 2, 3, 4, 5, 6, 7)), rng), 0
    if n > 2 and rng.random() < 0.5:  # interrupted working: k right lines stand there, then stop or go on
        k = rng.randint(1, n)
        first, rest = "</think>", f"\n\\boxed{{{chain.values[k - 1]:02d}}}<|im_end|>"
    else:
        value = chain.values[-1]
        if rng.random() >= {1: 0.6, 2: 0.4}.get(n, 0.0):  # a wrong guess: the value after one step, or any
            value = chain.values[1] if n > 1 and rng.random() < 0.8 else rng.randrange(100)
        guess = f"{chain.values[0]:02d}{''.join(chain.steps)}={value:02d}\n"
        first, rest = guess[0], answered(guess, value).removeprefix("<think>\n" + guess[0]) + "<|im_end|>"
    lines = chain.working()
    before = ("<think>\n" + "".join(lines[:k]), 0.0 if k else 1.0)
    if n <= 2:
        return [chat(chain, "?", before, (first + rest, 1.0))]
    # Both ways on from a choice, the first tokens weighed 1-q and q: the expected loss, not a sample of it.
    # From samples, even weighted ones, a door comes out anywhere between a hundredth of q and its double.
    return [chat(chain, "?", before, (first, 1 - q), (rest, 1.0)),
            chat(chain, "?", before, (lines[k][0], q), (lines[k][1:], 1.0))]


def pretrain(q: float, seed: int) -> tuple[Qwen2ForCausalLM, Qwen2Tokenizer]:
    """Muon on the matrices and AdamW on the rest: plain AdamW needs several times the steps."""
    rng, tokenizer = random.Random(seed), make_tokenizer()
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=384, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.1),
                  torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)]
    for step in tqdm(range(STEPS), desc="pretraining the toy's base model (once)", unit="step"):
        documents = []
        while len(documents) < DOCUMENTS:
            for document in make_documents(step / STEPS, q, rng):
                pieces = [(tokenizer(text)["input_ids"], weight) for text, weight in document]
                documents.append((torch.tensor([token for ids, _ in pieces for token in ids]),
                                  torch.tensor([weight for ids, weight in pieces for _ in ids])))
        documents.sort(key=lambda document: len(document[0]))
        total = sum(weights[1:].sum() for _, weights in documents)  # of the whole step: micro-batches add up
        for i in range(0, len(documents), MICRO):
            tokens, weights = (pad_sequence(part, batch_first=True) for part in zip(*documents[i:i + MICRO]))
            logits = model(input_ids=tokens).logits[:, :-1]
            nll = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            (weights[:, 1:].flatten() @ nll / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in zip(optimizers, (0.03, 4e-3)):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / STEPS)
            optimizer.step()
            optimizer.zero_grad()
    return model, tokenizer


def recipe() -> str:
    """A hash of everything that a base model depends on, apart from q, its seed and torch."""
    code = "".join(map(inspect.getsource, (make_tokenizer, Chain, answered, make_documents, pretrain)))
    return hashlib.sha256(f"{code}{LETTERS}{TEMPLATE}{STEPS} {DOCUMENTS} {MICRO}".encode()).hexdigest()[:12]


def write_base(folder: Path, q: float, seed: int):
    """Pretrains a base model and writes it in Hugging Face format."""
    for part in pretrain(q, seed):
        part.save_pretrained(folder)
    (folder / "recipe.txt").write_text(f"{recipe()}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_base(EMBEDDED, Q, SEED)
    print(f"wrote {EMBEDDED}")
