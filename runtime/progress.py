"""What a run is doing where that takes time: a bar with the time left, or a line. Else nothing."""
import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from runtime.flags import say

PATIENCE = 5.0     # seconds of silence before something is shown
AGAIN = 60.0       # seconds between lines on the same thing
FILE_EVERY = 10.0  # seconds between updates of a bar that goes to a file


class LateBar(tqdm):
    """tqdm alone shows a bar before its delay is over if a line is written meanwhile, an error's too."""

    def due(self) -> bool:
        return time.time() >= getattr(self, "start_t", 0) + self.delay

    def refresh(self, **options: Any):
        if self.due():
            super().refresh(**options)

    def clear(self, **options: Any):
        if self.due():
            super().clear(**options)


def bar(items: Iterable | None = None, **options: Any) -> tqdm:
    """A bar over the items, below the run's own bar, from PATIENCE seconds on; it goes away at its end.

    options: those of tqdm. vLLM takes this function as it is.
    """
    place = {} if sys.stderr.isatty() else {"position": 0, "mininterval": FILE_EVERY}  # a file has no cursor
    return LateBar(items, **place, **options, delay=PATIENCE, leave=False)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says `what` is being done once it has taken PATIENCE seconds, and again every AGAIN seconds.

    For what has no number of parts to count. Around a block, or a function's decorator.
    """
    start, done = time.monotonic(), threading.Event()

    def tell():
        wait = PATIENCE
        while not done.wait(wait):
            say(f"{what} ... ({time.monotonic() - start:.0f} seconds so far)")
            wait = AGAIN

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def show_only_downloads():
    """Of the libraries' bars the Hub's (what, how large, time left), unless the user has hidden them."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging
    hidden = are_progress_bars_disabled()  # by HF_HUB_DISABLE_PROGRESS_BARS
    logging.disable_progress_bar()  # which hides the Hub's too
    if not hidden:
        enable_progress_bars()
