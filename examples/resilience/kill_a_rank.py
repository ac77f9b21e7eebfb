"""Trains, kills ranks with `kill -9` while they train, and compares the losses with those of a run left in peace.

    python examples/resilience/kill_a_rank.py [--kills 2] [further arguments of fit]

Runs examples/resilience/train.yaml twice, from the repository's root. Prints what the launcher said, how long restarts
took, and whether the two curves are the same to the last bit.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

RUN_FILE = "examples/resilience/train.yaml"
ROOT = Path("runs/resilience")
PROCESS = re.compile(r"rank (\d+) is process (\d+)")


def steps_of(metrics: Path) -> dict[int, float]:
    """Training loss by step, of one attempt's CSV file."""
    with metrics.open() as file:
        return {int(row["step"]): float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]}


def attempts() -> list[Path]:
    """The CSV files of all attempts, the latest one last."""
    return sorted(ROOT.glob("logs/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)


def curve() -> dict[int, float]:
    """Training loss by step, of all attempts; a step that was done again counts as it was done last."""
    return {step: loss for metrics in attempts() for step, loss in steps_of(metrics).items()}


def run(name: str, kills: Sequence[int], arguments: Sequence[str]) -> tuple[int, dict[int, float]]:
    """Launches the run file, kills ranks at the given steps; returns the launcher's exit code and the curve.

    What the run leaves is kept as `runs/resilience/<name>`.
    """
    for left in ("logs", "checkpoints", name):
        shutil.rmtree(ROOT / left, ignore_errors=True)
    command = [sys.executable, "-m", "lightning_llm", "launch", "--", "fit", "-c", RUN_FILE, *arguments]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for line in watch(launcher, list(kills)):
        print(line, flush=True)
    losses = curve()
    (ROOT / name).mkdir()
    for left in ("logs", "checkpoints"):
        (ROOT / left).rename(ROOT / name / left)
    return launcher.returncode, losses


def watch(launcher: subprocess.Popen[str], due: list[int]) -> Iterator[str]:
    """What the launcher says, and what is done to its ranks at the steps that are due."""
    ranks: dict[int, int] = {}
    killed: tuple[int, float] | None = None
    assert launcher.stderr is not None
    os.set_blocking(launcher.stderr.fileno(), False)
    while launcher.poll() is None:
        for line in launcher.stderr.readlines():
            if line.startswith("launch:"):
                yield line.rstrip()
            ranks |= {int(rank): int(process) for rank, process in PROCESS.findall(line)}
        step = newest_step()
        if killed is not None and ranks and step != killed[0]:
            yield f"--- step {step}, {time.monotonic() - killed[1]:.1f} s after the kill"
            killed = None
        if killed is None and due and ranks and step >= due[0]:
            due.pop(0)
            rank, process = random.choice(list(ranks.items()))
            yield f"--- step {step}: kill -9 {process}, which is rank {rank}"
            os.kill(process, signal.SIGKILL)
            killed = step, time.monotonic()
            ranks.clear()
        time.sleep(0.05)


def newest_step() -> int:
    """That was logged last, by the present attempt."""
    return max((step for metrics in attempts()[-1:] for step in steps_of(metrics)), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=2)
    options, arguments = parser.parse_known_args()
    print("A run in peace", flush=True)
    _, expected = run("peaceful", [], arguments)
    print(f"\nThe same, with {options.kills} kills", flush=True)
    apart = max(expected, default=0) // (options.kills + 1)
    code, losses = run("troubled", [apart * (number + 1) for number in range(options.kills)], arguments)
    same = losses == expected
    print(f"\nExit code {code}; {len(losses)} losses, {'the same' if same else 'NOT the same'} to the last bit")
    return 0 if same and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
