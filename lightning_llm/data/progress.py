"""How far a long job over text is, on stderr: a bar on a terminal, a plain line now and then elsewhere, or nothing.

`tokenize.py` calls this.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Progress on stderr; `Progress(False)` says nothing."""

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown

    def note(self, text: str) -> None:
        """A line of its own."""
        if self.shown:
            print(f"tokenize: {text}", file=sys.stderr, flush=True)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Progress through `total` bytes; gives the function to call with the bytes just done."""
        if not self.shown:
            yield lambda count: None
        elif sys.stderr.isatty():
            columns = (
                TextColumn("{task.description:<10}"),
                BarColumn(),
                DownloadColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            with RichProgress(*columns, console=Console(stderr=True)) as bar:
                task = bar.add_task(what, total=total)
                yield lambda count: bar.advance(task, count)
        else:
            yield self._lines(what, total)

    def _lines(self, what: str, total: int) -> Callable[[int], None]:
        done, last = 0, time.monotonic()

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                self.note(f"{what}: {human(done)} of {human(total)} ({done / max(total, 1):.0%})")

        return advance


def human(count: float) -> str:
    """Bytes for people: `human(12_300_000)` is "12.3 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
