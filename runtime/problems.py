"""Problems and demonstrations: read from the toy, the Hub or a file, checked row by row, and rendered."""
import hashlib
import random
import re
from collections import Counter, defaultdict
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

import jinja2

from runtime.cache import kept_verdicts
from runtime.files import READERS, as_text, load_dataset, read_file
from runtime.flags import TOYS, Args, check, fail
from runtime.progress import bar, waiting
from runtime.reward import OwnReward
from runtime.rows import Codec, Problem
from runtime.verification import RIGHT, UNPARSED, Verifier

SYSTEM = ("Think step by step before you answer. Write your thinking between <think> and </think>, "
          "and after it the final answer in \\boxed{}.")


def read_rows(source: str, held_out: bool = False) -> list[dict]:
    """The rows of the toy, of a Hub dataset (held-out ones of its split `test`) or of a local file."""
    if source in TOYS:
        from runtime import toy
        return [row for row in toy.make_rows()[held_out] if source == "toy" or row["data_source"] == "easy"]
    path = Path(source)
    if path.suffix in READERS and not path.is_file():
        fail(f"{source}: no such file")
    if path.is_file() and path.stat().st_size == 0:
        fail(f"{source} is empty")
    if path.exists() and path.suffix not in READERS:
        fail(f"{source}: not a {', '.join(READERS)} file")
    try:
        if path.is_file():
            rows = read_file(path)
        else:
            print(f"{source}: no file here, so it is loaded from the Hub", flush=True)
            splits = load_dataset(source)
            split = "test" if held_out and "test" in splits else "train"
            if split not in splits:
                fail(f"{source} has no split {split}, only {', '.join(splits)}")
            rows = splits[split].to_list()
    except Exception as error:  # whatever a parser or the network says of the user's data is passed on
        fail(f"{source} cannot be read as a dataset: {error}: {error.__cause__ or ''}")
    columns = set(rows[0]) if rows else {"problem", "answer"}
    for name, other in (("question", "problem"), ("final_answer", "answer")):  # as some benchmarks have them
        if name in columns and other not in columns:
            columns.add(other)
            rows = [row | {other: row[name]} for row in rows]
    if not ({"problem", "answer"} <= columns or {"prompt", "reward_model"} <= columns):
        fail(f"{source}: needs the columns `problem` and `answer`, or `prompt` and `reward_model`; "
             f"it has {', '.join(sorted(columns))}")
    return rows


def read_demonstration(value: object) -> str | None:
    """An expert's response: text, or what the assistant says last in chat messages; None: neither."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        said = [message for message in value if message.get("role", "assistant") == "assistant"]
        value = said[-1] if said else None
        if value is None:
            return None
    if isinstance(value, dict):
        value = value.get("content")
        if isinstance(value, list) and all(isinstance(part, dict) for part in value):  # as parts of a message
            value = "".join(part["text"] for part in value if isinstance(part.get("text"), str))
    if value is None or value == []:
        return ""
    return value if isinstance(value, str) else None


def read_problem(row: dict, system: str) -> tuple[list[dict], str, list[str | None]]:
    """(chat messages, answer, demonstrations) of a row in either schema; ValueError: why not.

    Without a system message, not even the row's own, if `system` is empty. A demonstration is empty where
    there is none, and None if it is neither text nor chat messages.
    """
    if isinstance(row.get("prompt"), list):  # the schema of Elliott/Openr1-Math-46k-8192
        messages, gold = row["prompt"], row.get("reward_model")
        demonstration, several = row.get("target"), row.get("target_lst")  # the latter in AMPO's data
        answer = gold.get("ground_truth") if isinstance(gold, dict) else None
    else:
        messages = [{"role": "user", "content": row.get("problem")}]
        messages = [{"role": "system", "content": system}, *messages] if system else messages
        answer = row.get("answer")
        demonstration, several = row.get("demonstration"), row.get("demonstrations")
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(messages, list) or not messages:
        raise ValueError("without a problem")
    for message in messages:
        text, role = [isinstance(message, dict) and message.get(name) for name in ("content", "role")]
        if not isinstance(role, str) or not isinstance(text, str) or not text.strip():
            raise ValueError("whose problem is empty or not text")
    if not isinstance(answer, (str, int, float, Decimal)) or answer != answer or not str(answer).strip():
        raise ValueError("without an answer")
    messages = [{name: message[name] for name in ("role", "content")} for message in messages
                if system or message["role"] != "system"]
    answer, several = as_text(answer), several if isinstance(several, list) else [several]
    demonstrations = [read_demonstration(value) for value in (demonstration, *several)]
    try:
        said = [message["content"] for message in messages]
        "".join([*said, answer, *filter(None, demonstrations)]).encode()
    except UnicodeEncodeError:  # which JSON can hold and no tokenizer takes
        raise ValueError("with half of a surrogate pair in its text") from None
    return messages, answer, demonstrations


def render(codec: Codec, messages: list[dict], prompt_end: str) -> str:
    """The prompt's text: BOS if the tokenizer adds one, the chat template's text, prompt_end; each once."""
    text = codec.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = text.removesuffix(prompt_end)
    if prompt_end.strip() and text.rstrip().endswith(prompt_end.strip()):  # it may end in other white space
        text = text.rstrip().removesuffix(prompt_end.strip())
    return codec.bos * (not text.startswith(codec.bos)) + text + prompt_end


def load_problems(
    source: str, rows: list[dict], codec: Codec, verifier: Verifier | OwnReward, max_prompt: int,
    system: str = SYSTEM, prompt_end: str = "", part: str = "",
) -> list[Problem]:
    """The usable rows, rendered with the chat template. What is left out is counted and said.

    system: message for rows that have none; empty: rows get none, and lose their own.
    part: the slice of rows that name none; by default the source's name.
    """
    left_out, problems, seen, unread = Counter(), [], set(), 0
    for index, row in enumerate(bar(rows, desc=f"{source}: prompts", unit="row")):
        try:
            messages, answer, demonstrations = read_problem(row, system)
            text = render(codec, messages, prompt_end)
        except ValueError as error:
            left_out[str(error)] += 1
            continue
        except jinja2.TemplateError as error:
            left_out[f"that the chat template refuses: {error} (--system none gives no system message)"] += 1
            continue
        prompt = []
        if len(text) <= 100 * max_prompt:  # a tokenizer may take minutes for megabytes
            prompt = codec.tokens(text)
        if not 0 < len(prompt) <= max_prompt:
            left_out[f"with a prompt of more than --max_prompt {max_prompt} tokens"] += 1
        elif text in seen and "response" not in row:  # responses to one problem are samples
            left_out["that another row repeats"] += 1
        else:
            seen.add(text)
            unread += demonstrations.count(None)
            first, *others = dict.fromkeys(codec.until_end(said) for said in demonstrations if said) or [""]
            problems.append(Problem(index, text, prompt, answer, first,
                                    str(row.get("data_source") or part or Path(source).stem), row,
                                    others=others))
    with (waiting(f"{source}: verifying the references and demonstrations of {len(problems)} problems"),
          kept_verdicts(source, problems, verifier)):
        unusable = find_unusable_golds(problems, verifier)
        for problem in problems:
            if problem.answer in unusable:
                left_out[unusable[problem.answer]] += 1
        problems = [problem for problem in problems if problem.answer not in unusable]
        for reason, count in left_out.items():
            if count:
                print(f"{source}: left out {count} of {len(rows)} rows {reason}")
        if unread:
            print(f"{source}: left out {unread} demonstrations that are neither text nor chat messages")
        leave_out_demonstrations(source, problems, verifier)
    if not problems:
        fail(f"{source}: none of its {len(rows)} rows can be used")
    return problems


def find_unusable_golds(problems: list[Problem], verifier: Verifier | OwnReward) -> dict[str, str]:
    """Answers that no response can be compared with, and why: the reason names the first such answer."""
    golds = list(dict.fromkeys(problem.answer for problem in problems))
    unusable, reasons = {}, {}
    for gold, verdict in zip(golds, verifier.check_golds(golds)):
        if verdict != RIGHT:
            reason = "math-verify does not find equal to itself"
            if verdict == UNPARSED:
                reason = "math-verify holds only as text, so that an equal one in another form would be wrong"
            unusable[gold] = reasons.setdefault(reason, f"whose answer {reason}; the first is {gold[:80]!r}")
    return unusable


def leave_out_demonstrations(source: str, problems: list[Problem], verifier: Verifier | OwnReward):
    """Takes away, and counts, demonstrations whose answer is missing or wrong: nobody should imitate them."""
    demonstrated = [(problem, text) for problem in problems for text in problem.demonstrations]
    verdicts = verifier([problem.answer for problem, _ in demonstrated], [text for _, text in demonstrated])
    left_out, right = Counter(), defaultdict(list)
    for (problem, text), verdict in zip(demonstrated, verdicts):
        if verdict == RIGHT:
            right[problem].append(text)
        else:
            left_out["that box no answer after </think>" if verdict is None else
                     "whose answer is not the reference"] += 1
    for problem in problems:
        problem.demonstration, *problem.others = right[problem] or [""]
    for reason, count in left_out.items():
        print(f"{source}: left out {count} of {len(demonstrated)} demonstrations {reason}")


def read_data(args: Args) -> tuple[list[dict], list[tuple[str, int, list[dict]]]]:
    """Rows to train on, none with --eval_only, and (name, samples, rows) for each source in --eval_data."""
    if args.eval_only and not args.eval_data:
        fail("--eval_only needs --eval_data")
    held_out = []
    for source in filter(None, args.eval_data.split(",")):
        name, samples = re.fullmatch(r"(.+?)(?:@(\d+))?", source).groups()
        check(f"--eval_data {source}: the number of samples", int(samples or 1), 1)
        if samples and int(samples) > 1 and args.eval_temperature == 0:
            fail(f"--eval_data {source}: at --eval_temperature 0 all {samples} responses are the same")
        if name in [other for other, _, _ in held_out]:
            fail(f"--eval_data names {name} twice")
        held_out.append((name, int(samples or 1), read_rows(name, held_out=True)))
    return [] if args.eval_only else read_rows(args.data), held_out


def fingerprint(train_rows: list[dict], held_out_rows: list[tuple[str, int, list[dict]]]) -> str:
    """What tells the rows that read_data has read from others."""
    digest = hashlib.sha256()
    for row in train_rows + [row for _, _, rows in held_out_rows for row in rows]:
        digest.update(repr(row).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def slice_names(sources: list[str]) -> dict[str, str]:
    """A name for each source: without folders and ending, as far as that tells it from the others."""
    def name(source: str, depth: int) -> str:
        path = Path(source)
        whole = depth > len(path.parts)
        return source if whole else "/".join([*path.parts[-depth:-1], path.stem])

    depths = dict.fromkeys(sources, 1)
    while True:
        names = {source: name(source, depth) for source, depth in depths.items()}
        taken = Counter(names.values())
        if max(taken.values(), default=1) == 1:
            return names
        for source, shared in names.items():
            depths[source] += taken[shared] > 1


def load_data(
    args: Args, train_rows: list[dict], held_out_rows: list[tuple[str, int, list[dict]]], codec: Codec,
    verifier: Verifier | OwnReward,
) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on and held-out problems from what read_data has read."""
    none = args.system == "none" or args.system.isspace()
    options = {"system": "" if none else args.system or SYSTEM, "prompt_end": args.prompt_end}
    problems = []
    if not args.eval_only:
        problems = load_problems(args.data, train_rows, codec, verifier, args.max_prompt, **options)
        row = problems[0].row
        if not args.system and isinstance(row.get("prompt"), list) and row["prompt"][0]["role"] == "system":
            options["system"] = row["prompt"][0]["content"]  # tested in the words in which it is trained
    if not held_out_rows:
        problems = random.Random(0).sample(problems, len(problems))
        texts = list(dict.fromkeys(problem.text for problem in problems))  # a text may have several responses
        texts = set(texts[:min(128, len(texts) // 10)])
        held_out = {problem.text: problem for problem in problems if problem.text in texts}
        return [problem for problem in problems if problem.text not in texts], list(held_out.values())
    held_out = []
    names = slice_names([name for name, _, _ in held_out_rows])
    for name, samples, rows in held_out_rows:
        part = load_problems(name, rows, codec, verifier, args.max_prompt, part=names[name], **options)
        for problem in part:
            problem.samples = samples
        held_out += part
    shared = {problem.text for problem in problems} & {problem.text for problem in held_out}
    if shared:
        print(f"{args.data}: {len(shared)} of the {len(held_out)} held-out problems are trained on too")
    return problems, held_out


@lru_cache(maxsize=8)
def epoch_order(seed: str, size: int) -> list[int]:
    return random.Random(seed).sample(range(size), size)


def draw(problems: list[Problem], stream: str, start: int, count: int) -> list[Problem]:
    """Problems start, start + 1, ... of a stream, which goes through all of them in a new order every epoch.

    Streams of different names, which have the seed in them, are independent of each other.
    """
    size, drawn = len(problems), []
    for number in range(start, start + count):
        order = epoch_order(f"{stream} {number // size}", size)
        drawn.append(problems[order[number % size]])
    return drawn
