"""What a checkpoint costs, beside torch.distributed.checkpoint: how long training stands still, writing, and restoring.

    python benchmarks/checkpoint.py [--rounds 7] [--megabytes 600] [--verify sample|full|none] [--folder DIR]

See README.md beside this file for what is measured and how.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: ranks are forked and share the cores

import argparse
import json
import math
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lightning_llm import DecoderConfig
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.checkpoint.saver import CheckpointSaver, RunState

RANKS = 4


def make_state(megabytes: float) -> dict[str, Tensor]:
    """Weights and both moments of a decoder as FSDP shards them, float32."""
    shapes: dict[str, tuple[int, ...]] = {}
    layers = 0
    while sum(12 * math.prod(shape) for shape in shapes.values()) < megabytes * 1e6:
        layers += 1
        shapes = DecoderConfig(
            vocab_size=8192,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=layers,
            num_attention_heads=16,
        ).parameter_shapes()
    mesh = init_device_mesh("cpu", (RANKS,))
    state: dict[str, Tensor] = {}
    for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
        for name, shape in shapes.items():
            assert shape[0] % RANKS == 0
            mine = torch.empty(shape[0] // RANKS, *shape[1:]).uniform_(-1, 1)
            state[f"{kind}.{name}"] = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)
    return state


class Sides:
    """The operations that take turns, each on all ranks. A time is the slowest rank's, from a common start."""

    def __init__(self, state: dict[str, Tensor], folder: Path, verify: str) -> None:
        self.state = state
        self.folder = folder
        self.group = dist.new_group(backend="gloo")  # their thread must not use the one that training uses
        self.background = CheckpointSaver(background=True, verify=verify)  # type: ignore[arg-type]
        self.foreground = CheckpointSaver(verify=verify)  # type: ignore[arg-type]
        self.seconds: dict[str, list[float]] = {}

    def timed(self, name: str, act: Callable[[], Any]) -> Any:
        dist.barrier()
        began = time.perf_counter()
        result = act()
        self.note(name, time.perf_counter() - began)
        return result

    def note(self, name: str, seconds: float) -> None:
        slowest = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        self.seconds.setdefault(name, []).append(float(slowest))

    def path(self, name: str) -> Path:
        """An empty place, the same on all ranks."""
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        dist.barrier()
        return self.folder / name

    def save_theirs(self) -> None:
        path = self.path("theirs")
        self.timed("theirs, save", lambda: dcp.save(self.state, checkpoint_id=path))

    def save_theirs_async(self) -> None:
        path = self.path("theirs-async")
        dist.barrier()
        began = time.perf_counter()
        future = dcp.async_save(self.state, checkpoint_id=path, process_group=self.group)
        blocked = time.perf_counter() - began
        future.result()  # type: ignore[union-attr]
        self.note("theirs, async: until written", time.perf_counter() - began)
        self.note("theirs, async: blocked", blocked)

    def save_ours(self) -> None:
        path = self.path("ours")
        self.timed("ours, save", lambda: self.foreground.save(self.run_state(), path))

    def save_ours_async(self) -> None:
        path = self.path("ours-async")
        dist.barrier()
        began = time.perf_counter()
        self.background.save(self.run_state(), path)
        blocked = time.perf_counter() - began
        self.background.wait()
        self.note("ours, async: until committed", time.perf_counter() - began)
        self.note("ours, async: blocked", blocked)
        outcome = self.background.finished()
        assert outcome is not None and outcome.error is None, outcome

    def run_state(self) -> RunState:
        return RunState(step=1, tensors=self.state)

    def load_theirs(self) -> None:
        self.forget()
        self.timed("theirs, load", lambda: dcp.load(self.state, checkpoint_id=self.folder / "theirs"))

    def load_ours(self) -> None:
        self.forget()
        self.timed("ours, verify and load", lambda: Checkpoint.open(self.folder / "ours").read_into(self.state))

    def forget(self) -> None:
        """So that what is loaded is what was stored."""
        for tensor in self.state.values():
            tensor.to_local().zero_()  # type: ignore[attr-defined]


def measure(megabytes: float, rounds: int, verify: str, folder: str) -> dict[str, Any]:
    """All sides, taking turns, on this rank."""
    warnings.filterwarnings("ignore")
    state = make_state(megabytes)
    kept = {name: tensor.to_local().clone() for name, tensor in list(state.items())[:3]}  # type: ignore[attr-defined]
    sides = Sides(state, Path(folder), verify)
    for turn in range(rounds + 1):
        sides.save_theirs()
        sides.save_ours()
        sides.save_theirs_async()
        sides.save_ours_async()
        for load in (sides.load_theirs, sides.load_ours):
            load()
            assert all(torch.equal(state[name].to_local(), value) for name, value in kept.items())  # type: ignore
        if turn == 0:
            sides.seconds.clear()  # the first round makes plans, buffers and processes
    sides.background.close()
    return {"seconds": sides.seconds, "bytes": sum(t.numel() * t.dtype.itemsize for t in state.values())}


RATIOS = (
    ("blocked, ours / theirs async", "ours, async: blocked", "theirs, async: blocked", 1.0),
    ("blocked, ours / theirs sync save", "ours, async: blocked", "theirs, save", 0.05),
    ("background write, ours / theirs", "ours, async: until committed", "theirs, async: until written", 1.10),
    ("foreground save, ours / theirs", "ours, save", "theirs, save", 1.10),
    ("verify and load / their plain load", "ours, verify and load", "theirs, load", 1.3),
)


def summary(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=float, default=600.0)
    parser.add_argument("--verify", choices=["full", "sample", "none"], default="sample")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "checkpoint.json")
    parser.add_argument("--check", action="store_true", help="fail if a median ratio is above what is accepted")
    arguments = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=arguments.folder) as folder:
        found = run_on_ranks(measure, RANKS, arguments.megabytes, arguments.rounds, arguments.verify, folder)[0]
    seconds = found["seconds"]
    print(f"{found['bytes'] / 1e6:.0f} MB on {RANKS} ranks, {arguments.rounds} rounds, verify={arguments.verify!r}\n")
    print(f"{'seconds':<36}{'min':>9}{'median':>9}{'max':>9}")
    for name, values in seconds.items():
        print(f"{name:<36}" + "".join(f"{value:>9.3f}" for value in summary(values).values()))
    print(f"\n{'ratio':<36}{'min':>9}{'median':>9}{'max':>9}{'accepted':>10}")
    ratios, good = {}, True
    for name, ours, theirs, accepted in RATIOS:
        ratios[name] = summary([a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)])
        good &= ratios[name]["median"] <= accepted
        print(f"{name:<36}" + "".join(f"{value:>9.3f}" for value in ratios[name].values()) + f"{accepted:>10.2f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_at_start": load,
        "bytes": found["bytes"],
        "ranks": RANKS,
        "verify": arguments.verify,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "ratios": ratios,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if good or not arguments.check else 1


if __name__ == "__main__":
    sys.exit(main())
