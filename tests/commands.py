"""Runs `lightning-llm` in a forked process: a process of its own, but with torch imported already.

For commands that start no other processes, which would begin anew all the same; those are called by tests/test_cli.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import lightning_llm.strategies.run_file  # noqa: F401  imported here once instead of in every process
from lightning_llm.cli import main


def call_forked(
    *arguments: object, timeout: float = 120, run: Callable[[], int] = main
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run([COMMAND, *arguments])` would give."""
    argv = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory(prefix="command-") as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        pid = _fork(argv, files, run)
        deadline = time.monotonic() + timeout
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise subprocess.TimeoutExpired(argv, timeout)
            time.sleep(0.02)
        code = os.waitstatus_to_exitcode(ended[1])
        return subprocess.CompletedProcess(argv, code, *(file.read_text() for file in files))


def _fork(argv: list[str], files: list[Path], run: Callable[[], int]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for file, number in zip(files, (1, 2), strict=True):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        # pytest may have put something else in their place
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        sys.argv = ["lightning-llm", *argv]
        code = run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
