"""What failures cost a run under `lightning-llm launch`, and what being watched costs one that has none.

    python benchmarks/resilience.py                          # make bench-resilience: about seven minutes
    python benchmarks/resilience.py --kinds kill --every 30 --failures 4
    python benchmarks/resilience.py --quick                  # whether it works, not how fast it is

Ranks are killed and suspended in turns while they train, one in `--every` seconds: time is compressed, a cluster's
failures of hours come within minutes. What counts is the cost of one: found after, training again after, steps done
twice. From it follows the share of time that trains (ETTR) at one failure in 30 minutes, which is printed too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from taking_turns import print_table, say, spread

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
PROCESS = re.compile(r"rank (\d+) is process (\d+)")
RARELY = 1800.0  # seconds between failures, for which the share is told


@dataclass(frozen=True)
class Step:
    """An optimizer step that ended.

    Attributes:
        attempt: From 0.
        step: Its number.
        time: When, seconds of the machine's monotonic clock.
    """

    attempt: int
    step: int
    time: float


@dataclass
class Failure:
    """What was done to a rank, and when it was heard and made good; seconds of the same clock."""

    kind: str
    done: float
    found: float = 0.0


def summarize(steps: Sequence[Step], failures: Sequence[Failure]) -> dict[str, Any]:
    """Times of a run and of its failures.

    Args:
        steps: As they ended.
        failures: Each of which has ended an attempt.
    """
    by_attempt = {number: [step for step in steps if step.attempt == number] for number in range(len(failures) + 1)}
    gaps = [
        later.time - earlier.time
        for attempt in by_attempt.values()
        for earlier, later in zip(attempt, attempt[1:], strict=False)
    ]
    step_time = statistics.median(gaps)
    wall = steps[-1].time - steps[0].time
    useful = (max(step.step for step in steps) - steps[0].step) * step_time
    rows = []
    for number, failure in enumerate(failures):
        before, after = by_attempt[number], by_attempt[number + 1]
        rows.append(
            {
                "kind": failure.kind,
                "found": failure.found - failure.done,
                "again": after[0].time - failure.done,
                "lost_steps": before[-1].step - after[0].step + 1,
            }
        )
    cost = (wall - useful) / len(failures) if failures else 0.0
    return {
        "step_time": step_time,
        "wall": wall,
        "useful": useful,
        "ettr": useful / wall,
        "cost_of_a_failure": cost,
        "ettr_at_one_in_30_minutes": RARELY / (RARELY + cost),
        "failures": rows,
    }


def run_file(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    callbacks = [
        ("resilience_steps.StepTimes", {"path": str(folder / "steps")}),
        (
            "lightning_llm.callbacks.AsyncDistributedCheckpoint",
            {
                "dirpath": str(folder / "checkpoints"),
                "every_n_train_steps": options.save_every,
                "save_top_k": 2,
                "monitor": "step",
                "mode": "max",
            },
        ),
    ]
    return {
        "seed_everything": 0,
        "model": {"model": options.model, "warmup_steps": 2},
        "data": {"path": str(folder / "data"), "batch_size": options.batch_size, "seq_len": options.seq_len},
        "trainer": {
            "accelerator": "cpu",
            "strategy": {"class_path": "lightning_llm.LLM3DStrategy", "init_args": {"tensor_parallel_size": 2}},
            "max_steps": 1_000_000,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
            "default_root_dir": str(folder),
            "callbacks": [{"class_path": path, "init_args": arguments} for path, arguments in callbacks],
        },
    }


def steps_in(path: Path) -> list[Step]:
    return [Step(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


class Launched:
    """A launcher with its run, and what it has said."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.steps_file = folder / "steps"
        (folder / "run.yaml").write_text(yaml.safe_dump(run_file(folder, options)))
        words = ["launch", f"--nproc-per-node={options.ranks}", "--max-restarts=1000", "--", "fit", "-c", "run.yaml"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lightning_llm", *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)
        self.pids: dict[int, int] = {}
        self.restarts: list[float] = []
        self.said: list[str] = []

    def listen(self) -> None:
        """Takes up what was said since the last time."""
        assert self.process.stderr is not None
        for line in self.process.stderr.readlines():
            self.said.append(line)
            found = {int(rank): int(pid) for rank, pid in PROCESS.findall(line)}
            if found:
                self.pids = found
            if "starting again" in line:
                self.restarts.append(time.monotonic())
        if self.process.poll() is not None:
            raise SystemExit("".join(["the launcher has ended:\n", *self.said[-20:]]))

    def until_steps(self, attempt: int, count: int) -> list[Step]:
        """Waits until an attempt has done so many steps; returns all."""
        while True:
            self.listen()
            steps = steps_in(self.steps_file)
            if sum(step.attempt == attempt for step in steps) >= count:
                return steps
            time.sleep(0.02)

    @property
    def cpu(self) -> float:
        """Processor seconds that the launcher itself has taken until now."""
        return sum(psutil.Process(self.process.pid).cpu_times()[:2])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(120)


def fail(launched: Launched, options: argparse.Namespace) -> Iterator[Failure]:
    """Does harm to ranks in turns, and waits each time until training goes on."""
    for number in range(options.failures):
        launched.until_steps(number, 5)  # it trains
        due = time.monotonic() + options.every * random.uniform(0.5, 1.5)
        while time.monotonic() < due:
            launched.listen()
            time.sleep(0.02)
        kind = options.kinds[number % len(options.kinds)]
        rank, pid = random.choice(list(launched.pids.items()))
        failure = Failure(kind, time.monotonic())
        os.kill(pid, SIGNALS[kind])
        launched.until_steps(number + 1, 1)
        failure.found = launched.restarts[number]
        say(f"{number + 1}: {kind} of rank {rank}, again after {time.monotonic() - failure.done:.1f} s")
        yield failure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", choices=list(SIGNALS), default=list(SIGNALS))
    parser.add_argument("--failures", type=int, default=6)
    parser.add_argument("--every", type=float, default=45.0, help="seconds between failures, on average")
    parser.add_argument("--save-every", type=int, default=20, help="steps")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one failure, soon")
    parser.add_argument("--json", type=Path, help="a file for the results")
    options = parser.parse_args()
    if options.quick:
        options.failures, options.every, options.kinds = 1, 2.0, ["kill"]
    random.seed(options.seed)
    with tempfile.TemporaryDirectory(prefix="bench-resilience-") as name:
        folder = Path(name)
        text = Path(__file__).parent.parent / "docs"
        tokenize = ["tokenize", "--input", text, "--output", folder / "data", "--vocab-size", "512"]
        subprocess.run([sys.executable, "-m", "lightning_llm", *map(str, tokenize)], check=True, capture_output=True)
        load = os.getloadavg()[0]
        launched = Launched(folder, options)
        try:
            launched.until_steps(0, 1)  # from here on it has imported what it needs
            began, cpu = time.monotonic(), launched.cpu
            failures = list(fail(launched, options))
            steps = launched.until_steps(options.failures, 20)
            launcher_share = (launched.cpu - cpu) / (time.monotonic() - began)
            launched.stop()
        finally:
            launched.process.kill()
    found = summarize(steps, failures)
    found |= {"launcher_share_of_a_core": launcher_share, "load": load, "every": options.every, "ranks": options.ranks}
    show(found)
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        found |= {"settings": settings, "raw": [asdict(failure) for failure in failures]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def show(found: dict[str, Any]) -> None:
    kinds = sorted({row["kind"] for row in found["failures"]})
    of = {kind: [row for row in found["failures"] if row["kind"] == kind] for kind in kinds}
    columns = ("failure", "times", "found after, s", "training after, s", "steps done twice")
    rows = [
        (kind, len(group), *(spread([row[name] for row in group]) for name in ("found", "again", "lost_steps")))
        for kind, group in of.items()
    ]
    print_table("min / median / max", columns, rows)
    print(
        f"\nstep {found['step_time']:.3f} s; {found['wall']:.0f} s, of which {found['useful']:.0f} s trained: "
        f"{found['ettr']:.1%} at one failure in about {found['every']:.0f} s\none failure costs "
        f"{found['cost_of_a_failure']:.1f} s: {found['ettr_at_one_in_30_minutes']:.1%} at one in 30 minutes\n"
        f"the launcher itself takes {found['launcher_share_of_a_core']:.2%} of a core"
    )


if __name__ == "__main__":
    main()
