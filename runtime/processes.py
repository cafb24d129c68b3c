"""The processes of a run: one, or all that torchrun has started. They do the same and share what is dear.

Every process holds every row of a step and goes through the same loop, so counts, normalisers, schedules,
buffers and checkpoints are those of the whole without a word about it. What costs time is shared: responses
(whole groups), verdicts, forward and backward passes: each process does its part, gather() gives it to all.
"""
import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = timedelta(hours=4)  # of a process that waits for others, who may download or sample
store = None                   # through which processes hear of each other's end; None: there is one alone
exit_code = 0                  # of a process that comes to its own end


def start():
    """Joins the others, of whom torchrun's environment tells; alone on a card, makes FSDP2's group of one."""
    global store
    if dist.is_initialized():
        return
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
    elif torch.cuda.is_available():
        own, rank, world = dist.HashStore(), 0, 1
    else:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"  # gloo for objects, and for what --offload keeps in host memory
    dist.init_process_group(backend, store=store or own, rank=rank, world_size=world, timeout=PATIENCE)
    atexit.register(leave)
    if world == 1:
        store = None
    else:
        threading.Thread(target=end_with_the_others, args=(store.clone(),), daemon=True).start()
    if rank:  # one process prints
        sys.stdout = sys.stderr = open(os.devnull, "w")


def leave():
    """At a process's end, when all is written: of several each ends at once, without the teardown of Python.

    That may abort: threads of gloo and of the store are still waiting for processes that have gone.
    """
    if world() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    if dist.is_initialized() and "vllm" not in sys.modules:  # vLLM does it itself, after its own groups
        dist.destroy_process_group()


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """The first process is the one that writes."""
    return rank() == 0


def local_world() -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world() > 1 else 1


def workers() -> int:
    """Processes for verification: cores that this one may use, at most 32, shared with those beside it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(32, cores) // local_world())


# ------------------------------------------------------------------------------------------ shared work
def gather(value: object = None) -> list:
    """The values of all processes in the order of their ranks. Nobody goes on before everybody is here."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def spread(function: Callable[..., list], *lists: list) -> list:
    """function(*lists), which has a result for each of their items: a process works on every world-th."""
    results = [None] * len(lists[0])
    for start, part in enumerate(gather(function(*[items[rank()::world()] for items in lists]))):
        results[start::world()] = part
    return results


@contextlib.contextmanager
def first_of_machine_ahead() -> Iterator[None]:
    """Where a file or a cache is made on first use: by one process, which then lets the others in."""
    ahead = not int(os.environ.get("LOCAL_RANK", 0))
    if not ahead:
        gather()
    yield
    if ahead:
        gather()


# ------------------------------------------------------------------------------------------ their end
def end_all(code: int, explain: Callable[[], None]):
    """After a failure: the first process that fails explains, and all end; alone, the caller ends this one.

    What the others run into is a consequence, and a collective that waits for one of them would never end.
    """
    if store is None:
        explain()
        return
    if store.add("failed", 1) == 1:
        sys.stderr = sys.__stderr__
        explain()
        sys.stderr.flush()
        store.set("ended", "")
    else:
        with contextlib.suppress(dist.DistError):  # who was first may have been killed
            store.wait(["ended"], timedelta(seconds=10))
    os._exit(code)


def end_with_the_others(own_store: dist.Store):
    """A thread's work: it waits for a failure elsewhere while the process may hang in a collective."""
    try:
        own_store.wait(["ended"], timedelta(days=365))
    except dist.DistError:  # the store is gone: the run is over
        return
    os._exit(1)
