"""The user's cache folder, and the verdicts on data sets that are kept there: a data set is verified once."""
import contextlib
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from runtime import normalise, processes, verification
from runtime.flags import say
from runtime.reward import OwnReward
from runtime.rows import Problem
from runtime.verification import RIGHT, UNPARSED, WRONG, Verifier

WORTH_KEEPING = 200  # verdicts: fewer are found again in a moment


def cache_folder() -> Path:
    """Where files are that only save time; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minimal-luffy"


def verdict_file(problems: list[Problem]) -> Path:
    """Named by the references, and by what decides the verdicts on them: math-verify and this code.

    Demonstrations need not be in the name: a verdict's key has the answer that was judged.
    """
    digest = hashlib.sha256(platform.python_version().encode())
    for package in ("math-verify", "latex2sympy2_extended", "sympy"):
        digest.update(f"{package} {version(package)} ".encode())
    for module in (normalise, verification):
        digest.update(Path(module.__file__).read_bytes())
    for problem in problems:
        digest.update(repr(problem.answer).encode())
    return cache_folder() / f"verdicts-{digest.hexdigest()[:32]}.json"


def read_verdicts(path: Path) -> dict[bytes, int]:
    """Those of the file, by Verifier's keys; none if there is no file, or a spoiled one, which is said."""
    try:
        verdicts = {bytes.fromhex(key): verdict for key, verdict in json.loads(path.read_text()).items()}
        if not set(verdicts.values()) <= {RIGHT, WRONG, UNPARSED}:
            raise ValueError("it has verdicts that there are not")
        return verdicts
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        say(f"{path} cannot be read, so its data are verified again: {error}")
        return {}


def write_verdicts(path: Path, verdicts: dict[bytes, int]):
    """The file appears whole or not at all, whoever else writes it now."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            new = Path(temporary, path.name)
            new.write_text(json.dumps({key.hex(): verdict for key, verdict in verdicts.items()}))
            os.replace(new, path)
    except OSError as error:
        say(f"{path} cannot be written, so the next start verifies these data again: {error}")


@contextlib.contextmanager
def kept_verdicts(source: str, problems: list[Problem], verifier: Verifier | OwnReward) -> Iterator[None]:
    """Around the verification of a data set's references and demonstrations.

    What an earlier start has found is known to the verifier; what it finds now is kept for the next, unless
    it is little or depends on the machine (timeouts, crashes). With a reward of one's own nothing is kept.
    """
    if not isinstance(verifier, Verifier):
        yield
        return
    try:
        path = verdict_file(problems)
    except RuntimeError as error:  # no home directory
        say(f"verdicts are not kept: {error}")
        yield
        return
    kept = processes.gather(read_verdicts(path) if processes.first() else None)[0]  # the same for all
    if kept:
        print(f"{source}: {len(kept)} verdicts on its answers are those of an earlier start, in {path}",
              flush=True)
    known = kept.keys() | verifier.known.keys()
    verifier.known.update(kept)
    yield
    new = {key: verdict for key, verdict in verifier.known.items()
           if key not in known and verdict in (RIGHT, WRONG, UNPARSED)}
    if len(new) >= WORTH_KEEPING and processes.first():
        write_verdicts(path, kept | new)
