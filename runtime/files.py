"""Rows of a local file, in which numbers keep their text: 1e-7 and 0.10 stay what their author wrote."""
import csv
import json
import re
import sys
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Self

from runtime.flags import fail

if TYPE_CHECKING:
    import datasets


class Written(float):
    """A number with a point or an exponent, and the text of which it was read."""

    def __new__(cls, text: str) -> Self:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


def parse(text: str) -> dict | list | str | int | Written | bool | None:
    """The value of a JSON text. Integers of any size are exact; NaN and Infinity, no JSON, are None."""
    return json.loads(text, parse_float=Written, parse_constant=lambda name: None)


def read_jsonl(path: Path) -> list:
    """A row from each line that is not empty."""
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        lines = enumerate(file, 1)
        while True:
            try:
                number, line = next(lines)
                if line.strip():
                    rows.append(parse(line))
            except StopIteration:
                return rows
            except UnicodeDecodeError as error:
                fail(f"{path}: {error}")
            except (ValueError, RecursionError) as error:
                fail(f"{path}, line {number}: {error}")


def read_json(path: Path) -> list:
    """A list of rows, or lists of values by column, or a row in each line."""
    try:
        values = parse(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        fail(f"{path}: {error}")
    except (ValueError, RecursionError):
        return read_jsonl(path)
    if isinstance(values, dict) and values and all(isinstance(column, list) for column in values.values()):
        if len(set(map(len, values.values()))) > 1:
            fail(f"{path}: its columns are not of one length")
        return [dict(zip(values, row)) for row in zip(*values.values())]
    return [values] if isinstance(values, dict) else values


def read_csv(path: Path) -> list[dict]:
    """Rows of text: an integer column with a gap stays one of integers."""
    csv.field_size_limit(sys.maxsize)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, restkey="", strict=True)
            return list(rows)
    except UnicodeDecodeError as error:
        fail(f"{path}: {error}")
    except csv.Error as error:
        fail(f"{path}, line {rows.line_num}: {error}")


def load_dataset(path: str, data_files: str | None = None) -> "datasets.DatasetDict":
    """`datasets.load_dataset`, imported when it is needed: that takes a moment, and the toy never does."""
    import datasets
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # errors are said in one line here
    return datasets.load_dataset(path, data_files=data_files)


def read_parquet(path: Path) -> list[dict]:
    return load_dataset("parquet", data_files=str(path))["train"].to_list()


READERS = {".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet, ".csv": read_csv}


def read_file(path: Path) -> list[dict]:
    """The file's rows, each with every column; None where it says nothing."""
    rows = READERS[path.suffix](path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        fail(f"{path}: not every row is an object with named values")
    columns = dict.fromkeys(name for row in rows for name in row)
    return [columns | row for row in rows]


def as_text(number: str | int | float | Decimal) -> str:
    r"""A number, or text that may be one, as it stands in mathematics: 1e-7 as 1 \times 10^{-7}."""
    if type(number) is float and number.is_integer() and abs(number) < 2**53:
        number = int(number)  # of a column of integers that a gap has made one of floats
    text = str(number).strip()
    parts = re.fullmatch(r"([+-]?\d+(?:\.\d*)?|[+-]?\.\d+)[eE]([+-]?\d+)", text)
    return rf"{parts[1]} \times 10^{{{int(parts[2])}}}" if parts else text
