"""What a checkpoint costs, beside torch.distributed.checkpoint: how long training stands still, writing, and restoring.

    python benchmarks/checkpoint.py [--rounds 7] [--megabytes 600] [--verify sample|full|none] [--folder DIR]
    python benchmarks/checkpoint.py --accelerator cuda --ranks 1 --tokens 4096

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
from torch.distributed.fsdp import fully_shard

from lightning_llm import Decoder, DecoderConfig
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.checkpoint.saver import CheckpointSaver, RunState

CPU = ": CPU of all ranks"


class Training:
    """A decoder that is sharded by FSDP, in float32, with AdamW. A step is a real one: forward, backward, optimizer.

    Args:
        megabytes: Of weights and both moments on all ranks, at least.
        tokens: Of a step, on each rank.
        device: Of this rank.
    """

    def __init__(self, megabytes: float, tokens: int, device: str) -> None:
        layers, size = 0, 0
        while size < megabytes * 1e6:
            layers += 1
            config = DecoderConfig(
                vocab_size=8192,
                hidden_size=1024,
                intermediate_size=2816,
                num_hidden_layers=layers,
                num_attention_heads=16,
            )
            size = sum(12 * math.prod(shape) for shape in config.parameter_shapes().values())
        torch.manual_seed(0)
        with torch.device(device):
            self.model = Decoder(config)
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        for block in self.model.model.layers.values():
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.tokens = torch.randint(0, 8192, (1, tokens + 1), device=device)
        self.step()

    def step(self) -> None:
        logits = self.model(self.tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits[0], self.tokens[0, 1:]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        catch_up()

    def state(self) -> dict[str, Tensor]:
        """Weights and both moments, by name."""
        named = dict(self.model.named_parameters())
        moments = {
            f"optimizer.{kind}.{name}": self.optimizer.state[parameter][kind]
            for kind in ("exp_avg", "exp_avg_sq")
            for name, parameter in named.items()
        }
        return {f"model.{name}": parameter.detach() for name, parameter in named.items()} | moments


class Sides:
    """The operations that take turns, each on all ranks. A time is the slowest rank's, from a common start."""

    def __init__(self, training: Training, folder: Path, verify: str) -> None:
        self.training = training
        self.state = training.state()
        self.folder = folder
        self.group = dist.new_group(backend="gloo")  # their thread must not use the one that training uses
        self.background = CheckpointSaver(background=True, verify=verify)  # type: ignore[arg-type]
        self.foreground = CheckpointSaver(verify=verify)  # type: ignore[arg-type]
        self.seconds: dict[str, list[float]] = {}

    def timed(self, name: str, act: Callable[[], Any]) -> Any:
        dist.barrier()
        began = time.perf_counter()
        result = act()
        catch_up()
        self.note(name, time.perf_counter() - began)
        return result

    def note(self, name: str, seconds: float, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.MAX) -> None:
        of_all = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(of_all, operation)
        self.seconds.setdefault(name, []).append(float(of_all))

    def path(self, name: str) -> Path:
        """An empty place, the same on all ranks, on a disk that has finished what came before."""
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            os.sync()
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

    def save_ours_overlapped(self) -> None:
        """With nothing to overlap: how long the copy takes that a step has to hide."""
        path = self.path("ours-overlapped")
        dist.barrier()
        began = time.perf_counter()
        self.background.save(self.run_state(), path, [self.training.optimizer])
        self.background.wait_for_snapshot()
        self.note("ours, overlapped: until copied", time.perf_counter() - began)
        self.background.wait()
        self.background.finished()

    # -- with a step of the training right behind the save --

    def step_alone(self) -> None:
        dist.barrier()
        self.step("step, nothing saved")

    def step(self, name: str) -> None:
        """One step of the training; what threads do beside it is in the CPU time."""
        began, used = time.perf_counter(), time.process_time()
        self.training.step()
        seconds, cpu = time.perf_counter() - began, time.process_time() - used
        self.note(name, seconds)
        self.note(name + CPU, cpu, dist.ReduceOp.SUM)

    def step_behind_theirs(self) -> None:
        path = self.path("theirs-async-step")
        dist.barrier()
        future = dcp.async_save(self.state, checkpoint_id=path, process_group=self.group)
        self.step("step, behind theirs")
        future.result()  # type: ignore[union-attr]

    def step_behind_ours_copied(self) -> None:
        path = self.path("ours-copied")
        dist.barrier()
        self.background.save(self.run_state(), path)
        self.step("step, behind ours copied")
        self.background.wait()
        self.background.finished()

    def step_behind_ours_overlapped(self) -> None:
        path = self.path("ours-overlapped")
        kept = {name: tensor.clone() for name, tensor in list(self.state.items())[::5]}
        dist.barrier()
        began = time.perf_counter()
        self.background.save(self.run_state(), path, [self.training.optimizer])
        blocked = time.perf_counter() - began
        self.step("step, behind ours overlapped")  # with what it waits
        self.background.wait()
        outcome = self.background.finished()
        assert outcome is not None and outcome.error is None, outcome
        self.note("ours, overlapped: blocked in save", blocked)
        self.note("ours, overlapped: blocked at the step", outcome.waited)
        self.note("ours, overlapped: blocked", blocked + outcome.waited)
        found = {name: torch.empty_like(tensor) for name, tensor in kept.items()}
        Checkpoint.open(path).read_into(found)
        assert all(torch.equal(local(found[name]), local(tensor)) for name, tensor in kept.items())

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
            local(tensor).zero_()


def measure(megabytes: float, tokens: int, device: str, rounds: int, verify: str, folder: str) -> dict[str, Any]:
    """All sides, taking turns, on this rank."""
    warnings.filterwarnings("ignore")
    training = Training(megabytes, tokens, device)
    sides = Sides(training, Path(folder), verify)
    state = sides.state
    for turn in range(rounds + 1):
        kept = {name: local(tensor).clone() for name, tensor in list(state.items())[::5]}
        take_turns(turn, sides.save_theirs, sides.save_ours)
        take_turns(turn, sides.save_theirs_async, sides.save_ours_async, sides.save_ours_overlapped)
        take_turns(
            turn,
            sides.step_alone,
            sides.step_behind_ours_overlapped,
            sides.step_behind_ours_copied,
            sides.step_behind_theirs,
        )
        # The steps have changed the state: the loads bring it back, so that all rounds are alike.
        for load in (sides.load_theirs, sides.load_ours):
            load()
            assert all(torch.equal(local(state[name]), value) for name, value in kept.items())
        if turn == 0:
            sides.seconds.clear()  # the first round makes plans, buffers and processes
    sides.background.close()
    return {"seconds": sides.seconds, "bytes": sum(t.numel() * t.dtype.itemsize for t in state.values())}


def take_turns(turn: int, *operations: Callable[[], None]) -> None:
    """All of them, each coming first as often as the others."""
    for number in range(len(operations)):
        operations[(turn + number) % len(operations)]()


def catch_up() -> None:
    """Waits until the device has done what it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def local(tensor: Tensor) -> Tensor:
    """A rank's part, in place."""
    return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


RATIOS = (
    ("blocked, ours / theirs async", "ours, async: blocked", "theirs, async: blocked", 1.0),
    ("blocked, ours / theirs sync save", "ours, async: blocked", "theirs, save", None),
    ("blocked, ours overlapped / theirs async", "ours, overlapped: blocked", "theirs, async: blocked", 1.0),
    ("blocked, ours overlapped / theirs sync", "ours, overlapped: blocked", "theirs, save", 0.05),
    ("step behind ours overlapped / alone", "step, behind ours overlapped", "step, nothing saved", None),
    ("step behind ours copied / alone", "step, behind ours copied", "step, nothing saved", None),
    ("step behind theirs / alone", "step, behind theirs", "step, nothing saved", None),
    ("the same, overlapped, in CPU time", f"step, behind ours overlapped{CPU}", f"step, nothing saved{CPU}", None),
    ("the same, copied, in CPU time", f"step, behind ours copied{CPU}", f"step, nothing saved{CPU}", None),
    ("the same, theirs, in CPU time", f"step, behind theirs{CPU}", f"step, nothing saved{CPU}", None),
    ("background write, ours / theirs", "ours, async: until committed", "theirs, async: until written", 1.10),
    ("foreground save, ours / theirs", "ours, save", "theirs, save", 1.10),
    ("verify and load / their plain load", "ours, verify and load", "theirs, load", 1.3),
)


def summary(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--megabytes", type=float, default=600.0)
    parser.add_argument("--tokens", type=int, default=64, help="of each rank in a training step")
    parser.add_argument("--verify", choices=["full", "sample", "none"], default="sample")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "checkpoint.json")
    parser.add_argument("--check", action="store_true", help="fail if a median ratio is above what is accepted")
    arguments = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=arguments.folder) as folder:
        sizes = (arguments.megabytes, arguments.tokens, arguments.accelerator, arguments.rounds)
        found = run_on_ranks(
            measure,
            arguments.ranks,
            *sizes,
            arguments.verify,
            folder,
            accelerator=arguments.accelerator,
            timeout=3600.0,
        )[0]
    seconds = found["seconds"]
    where = f"{arguments.ranks} ranks ({arguments.accelerator})"
    print(f"{found['bytes'] / 1e6:.0f} MB on {where}, {arguments.rounds} rounds, verify={arguments.verify!r}\n")
    print(f"{'seconds':<46}{'min':>9}{'median':>9}{'max':>9}")
    for name, values in seconds.items():
        print(f"{name:<46}" + "".join(f"{value:>9.3f}" for value in summary(values).values()))
    print(f"\n{'ratio':<46}{'min':>9}{'median':>9}{'max':>9}{'accepted':>10}")
    ratios, good = {}, True
    for name, ours, theirs, accepted in RATIOS:
        ratios[name] = summary([a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)])
        good &= accepted is None or ratios[name]["median"] <= accepted
        limit = f"{accepted:>10.2f}" if accepted is not None else ""
        print(f"{name:<46}" + "".join(f"{value:>9.3f}" for value in ratios[name].values()) + limit)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_at_start": load,
        "bytes": found["bytes"],
        "ranks": arguments.ranks,
        "accelerator": arguments.accelerator,
        "tokens": arguments.tokens,
        "verify": arguments.verify,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "ratios": ratios,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if good or not arguments.check else 1


if __name__ == "__main__":
    sys.exit(main())
