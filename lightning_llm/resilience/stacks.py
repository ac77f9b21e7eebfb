"""Python stacks of ranks that get on no more, and whose differs from the others'.

A rank writes them when it is asked, from the thread that sends its beats: a hung collective leaves that one free. Where
a C extension holds the interpreter's lock, no thread can; there `faulthandler` writes them from a signal's handler,
which needs no lock. It is not used elsewhere, since it may crash a process whose threads run (Python 3.11).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

SIGNAL = signal.SIGUSR2
_THREAD = re.compile(r"^(Current thread|Thread) .+ \(most recent call first\):$")
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$')


def file_of(folder: Path, rank: int) -> Path:
    """Where a rank's stacks are written."""
    return folder / f"stacks-rank{rank}.txt"


def write(folder: Path, rank: int) -> None:
    """Writes this process's stacks, the main thread's last, in faulthandler's form."""
    frames = sys._current_frames()
    threads = sorted(threading.enumerate(), key=lambda thread: thread is threading.main_thread())
    lines = []
    for thread in threads:
        frame = frames.get(thread.ident or 0)
        lines.append(f"Thread {thread.name} (most recent call first):")
        while frame is not None:
            lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_name}')
            frame = frame.f_back
        lines.append("")
    made = file_of(folder, rank).with_suffix(".new")
    made.write_text("\n".join(lines))
    made.replace(file_of(folder, rank))


def register(folder: Path, rank: int) -> IO[str]:
    """Has a signal write this process's stacks too; returns the open file."""
    file = _held(folder, rank).open("w")
    faulthandler.register(SIGNAL, file=file, all_threads=True, chain=False)
    return file


def unregister(file: IO[str]) -> None:
    """Undoes it."""
    faulthandler.unregister(SIGNAL)
    file.close()


def await_answers(folder: Path, ranks: Iterable[int], wait: float = 2.0) -> dict[int, str]:
    """What ranks that were asked have written, by rank; those that are slower than `wait` seconds are left out."""
    return _await({rank: file_of(folder, rank) for rank in ranks}, wait)


def of_held(pids: Mapping[int, int], folder: Path, wait: float = 2.0) -> dict[int, str]:
    """The stacks of ranks whose interpreter is held, by the signal."""
    files = {rank: _held(folder, rank) for rank in pids}
    for rank, pid in pids.items():
        if files[rank].exists():  # else the signal would end a process that has no handler
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, SIGNAL)
    return _await(files, wait)


def odd_ones(stacks: Mapping[int, str]) -> list[int]:
    """Ranks whose training does not stand where most others' does."""
    places = {rank: place(text) for rank, text in stacks.items()}
    common, times = Counter(places.values()).most_common(1)[0] if places else (None, 0)
    return [rank for rank, where in places.items() if where != common] if times * 2 > len(places) else []


def place(stacks: str) -> tuple[str, ...]:
    """Where the main thread stands: its innermost frames, each as `file:line function`."""
    threads: list[list[str]] = []
    for line in stacks.splitlines():
        frame = _FRAME.match(line)
        if _THREAD.match(line):
            threads.append([])
        elif frame and threads:
            threads[-1].append(f"{frame[1]}:{frame[2]} {frame[3]}")
    return tuple(threads[-1][:3]) if threads else ()


def _await(files: Mapping[int, Path], wait: float) -> dict[int, str]:
    deadline = time.monotonic() + wait
    found: dict[int, str] = {}
    while len(found) < len(files) and time.monotonic() < deadline:
        time.sleep(0.1)
        for rank, path in files.items():
            with contextlib.suppress(OSError):
                text = path.read_text(errors="replace")
                if text:
                    found[rank] = text
    return found


def _held(folder: Path, rank: int) -> Path:
    return folder / f"held-rank{rank}.txt"
