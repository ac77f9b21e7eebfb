"""What runs in a rank that `lightning-llm launch` has started: the user's program, and a report if it fails."""

from __future__ import annotations

import atexit
import json
import os
import runpy
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_llm._processes import die_with
from lightning_llm.resilience.beats import sender_of_process
from lightning_llm.resilience.restarts import FAILED

WATCHED = ("fit", "validate", "test", "predict")  # whose trainers get a Heartbeat: they are watched from the start


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a rank has failed.

    Attributes:
        time: Seconds of the node's clock: which rank of it was first.
        text: The exception.
        place: Its class and stack, the same whenever it is raised there.
        consequence: Whether it was raised by torch.distributed, as it is on ranks whose peer has gone.
    """

    time: float
    text: str
    place: str
    consequence: bool

    @classmethod
    def of(cls, error: BaseException) -> Report:
        """Of an exception that has been caught."""
        frames = traceback.extract_tb(error.__traceback__)
        return cls(
            time=time.monotonic(),
            text=f"{type(error).__name__}: {error}".splitlines()[0],
            place="\n".join([type(error).__name__, *(f"{frame.filename}:{frame.lineno}" for frame in frames)]),
            consequence=bool(frames) and "/torch/distributed/" in frames[-1].filename,
        )


def report_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves its report."""
    return folder / f"failure-rank{rank}.json"


def read_report(folder: Path, rank: int) -> Report | None:
    """What a rank has left, if it has."""
    try:
        return Report(**json.loads(report_file(folder, rank).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def run(program: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path | None) -> None:
    """Runs a program as the launcher's users write it behind `--`, and ends this process with its exit code.

    Args:
        program: A script, `-m MODULE`, or a command of `lightning-llm`, with arguments.
        environment: Of this rank: torchrun's variables.
        folder: The monitor's, and for the report.
        log: File for stdout and stderr; None leaves them.
    """
    die_with(os.getppid())
    os.setsid()  # Ctrl-C comes through the launcher, once; and all that this rank starts can be ended with it
    os.environ.update(environment)
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    code = _run(list(program), folder)
    atexit._run_exitfuncs()  # multiprocessing's processes leave without
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _run(program: list[str], folder: Path) -> int:
    try:
        if program[0] == "-m":
            sys.argv = program[1:]
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        elif program[0].endswith(".py"):
            sys.argv = program
            sys.path.insert(0, str(Path(program[0]).resolve().parent))
            runpy.run_path(program[0], run_name="__main__")
        else:
            sys.argv = ["lightning-llm", *program]
            if program[0] in WATCHED:
                sender_of_process(folder, int(os.environ["RANK"]))
            runpy.run_module("lightning_llm", run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return FAILED
    except BaseException as error:
        report = Report.of(error)
        rank = os.environ["RANK"]
        report_file(folder, int(rank)).write_text(json.dumps(asdict(report)))
        if report.consequence:  # where a peer has gone, each of the others would print where it waited for it
            print(f"rank {rank}: {report.text}", file=sys.stderr)
        else:
            traceback.print_exc()
        return FAILED
    return 0
