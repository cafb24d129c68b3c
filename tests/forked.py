"""A script in a process of its own that does not import torch anew: forked from one that has it already."""
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from subprocess import CompletedProcess

# The standard library's server of forks; it imports once what every run of the toy needs.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["common", "transformers.models.qwen2.modeling_qwen2"])


def become(script: str, flags: tuple[str, ...], cwd: Path, environment: dict[str, str], output: Path):
    """What `python script flags` does, with its output in the files output/stdout and output/stderr."""
    for stream, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


def run_forked(script: str, flags: tuple[str, ...], cwd: Path, environment: dict[str, str], output: Path,
               seconds: float) -> CompletedProcess:
    """As subprocess.run, for scripts that read no environment variable in their imports and have no exit hooks."""
    process = SERVER.Process(target=become, args=(script, flags, cwd, environment, output))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"{script} {flags} took more than {seconds} s")
    return CompletedProcess([script, *flags], process.exitcode, (output / "stdout").read_text(),
                            (output / "stderr").read_text())
