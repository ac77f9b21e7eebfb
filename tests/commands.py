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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import lightning_llm.strategies.run_file  # noqa: F401  imported here once instead of in every process
from lightning_llm.cli import main


def call_forked(
    *arguments: object, timeout: float = 120, run: Callable[[], int] = main
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run([COMMAND, *arguments])` would give."""
    command = start_forked(*arguments, run=run)
    [done] = wait_for([command], timeout)
    if done.returncode == -signal.SIGKILL:
        raise subprocess.TimeoutExpired(command.argv, timeout)
    return done


@dataclass(frozen=True)
class Forked:
    """A command that runs."""

    pid: int
    argv: list[str]
    folder: Path


def start_forked(
    *arguments: object,
    run: Callable[[], int] = main,
    environment: Mapping[str, str] | None = None,
    first: Callable[[], object] = lambda: None,
) -> Forked:
    """Begins what `call_forked` waits for.

    Args:
        arguments: Of the command.
        run: What it does.
        environment: Variables that it has beside ours.
        first: Called in its process before the command.
    """
    argv = [str(argument) for argument in arguments]
    folder = Path(tempfile.mkdtemp(prefix="command-"))
    return Forked(_fork(argv, folder, run, environment or {}, first), argv, folder)


def wait_for(commands: Iterable[Forked], timeout: float) -> list[subprocess.CompletedProcess[str]]:
    """What the commands gave; those that still run after `timeout` seconds are killed."""
    done = []
    deadline = time.monotonic() + timeout
    for command in commands:
        while not (ended := os.waitpid(command.pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(command.pid, signal.SIGKILL)
                ended = os.waitpid(command.pid, 0)
                break
            time.sleep(0.02)
        code = os.waitstatus_to_exitcode(ended[1])
        texts = [(command.folder / name).read_text() for name in ("stdout", "stderr")]
        done.append(subprocess.CompletedProcess(command.argv, code, *texts))
    return done


def _fork(
    argv: list[str],
    folder: Path,
    run: Callable[[], int],
    environment: Mapping[str, str],
    first: Callable[[], object],
) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
        # pytest may have put something else in their place
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        sys.argv = ["lightning-llm", *argv]
        os.environ.update(environment)
        first()
        code = run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
