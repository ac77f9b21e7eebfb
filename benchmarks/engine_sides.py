"""The sides of engines.py: DeepSpeed alone, ours around it, Lightning's strategy for it, and `LLM3DStrategy`."""

from __future__ import annotations

import argparse
import ctypes
import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bare_deepspeed import BareDeepSpeed, make_optimizer
from bare_loop import Recipe
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from profiling import Profiles
from torch import Tensor
from training_job import Job

from lightning_llm import LLM3DDeepSpeedStrategy, LLM3DStrategy, LLMModule
from lightning_llm.models.weights import load_weights
from lightning_llm.planner.schedules import schedule_kind
from lightning_llm.strategies.deepspeed.ops import import_deepspeed, prepare_ops

RANKS = 2
SIDES = ("deepspeed", "ours", "lightning", "llm3d")


@dataclass(frozen=True)
class Layout:
    """One row of the table, on two ranks.

    Attributes:
        name: Of the row.
        zero_stage: Of every side.
        batch_size: Sequences per optimizer step over all data ranks.
        tensor: Ranks that share each layer.
        pipeline: Ranks that share the layers.
        offloads: Whether optimizer states are in host memory, and stepped there.
    """

    name: str
    zero_stage: int
    batch_size: int
    tensor: int = 1
    pipeline: int = 1
    offloads: bool = False

    @classmethod
    def parse(cls, text: str) -> Layout:
        """`zero2` or `zero2:16`."""
        name, _, batch = text.partition(":")
        if name not in LAYOUTS or not (batch.isdigit() or not batch):
            raise argparse.ArgumentTypeError(f"{text!r} is no layout; write one of {', '.join(LAYOUTS)}, or NAME:BATCH")
        layout = replace(LAYOUTS[name], batch_size=int(batch)) if batch else LAYOUTS[name]
        if layout.batch_size % layout.data:
            raise argparse.ArgumentTypeError(f"{text!r}: batch is not divisible by data({layout.data})")
        return layout

    @property
    def data(self) -> int:
        """Ranks with different samples."""
        return RANKS // self.tensor // self.pipeline

    @property
    def data_rank(self) -> int:
        """This rank's place among them."""
        return dist.get_rank() if self.data > 1 else 0

    @property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's `zero_optimization`."""
        return {"stage": self.zero_stage} | ({"offload_optimizer": {"device": "cpu"}} if self.offloads else {})

    def sides(self, wanted: Sequence[str]) -> list[str]:
        """Those of `wanted` that have this layout: Lightning's knows data ranks alone, and FSDP no states apart."""
        has = {"lightning": self.data == RANKS, "llm3d": not self.offloads}
        return [side for side in wanted if has.get(side, True)]


# With batches that make a step of the default model about half a second long on two free cores.
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("zero1", 1, 16),
        Layout("zero2", 2, 16),
        Layout("zero3", 3, 16),
        Layout("zero2-offload", 2, 16, offloads=True),
        Layout("pp2", 1, 16, pipeline=2),
        Layout("tp2", 1, 16, tensor=2),
    )
}


# ---- whose turn it is ----


class Turns:
    """Lets one side at a time work; the others sleep. Made before the processes are, which share it.

    Sides follow each other in their order, in the next round in the opposite one, and so on.
    """

    def __init__(self, sides: Sequence[str], rounds: int) -> None:
        context = multiprocessing.get_context("fork")
        self._gates = {side: context.Semaphore(0) for side in sides}
        self._order = [side for turn in range(rounds) for side in (sides if turn % 2 == 0 else reversed(sides))]
        self._gates[self._order[0]].release()

    def wait(self, side: str) -> None:
        """Until it is this side's turn. To be called by one process of a side."""
        self._gates[side].acquire()

    def passed(self, side: str, turn: int) -> None:
        """Ends this side's `turn`-th turn, and begins the next one's."""
        mine = [place for place, other in enumerate(self._order) if other == side]
        behind = mine[turn] + 1
        if behind < len(self._order):
            self._gates[self._order[behind]].release()


class Meter:
    """Times the steps of one side on one rank, each in its turn and from a barrier; and their peak memory.

    Times are `(wall, cpu)` seconds of this rank. Memory is bytes that this process has beyond those it began with.
    """

    def __init__(self, side: str, turns: Turns, job: Job[Layout], began_with: int) -> None:
        self.side = side
        self.job = job
        self.seconds: list[tuple[float, float]] = []
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.memory = 0
        self.profiles = Profiles((side,), first=job.warmup, last=job.warmup + job.steps) if job.profile else None
        self._turns = turns
        self._began_with = began_with

    @property
    def done(self) -> bool:
        return len(self.seconds) == self.job.total_steps

    def begin(self) -> None:
        """Waits for the turn, then starts."""
        if dist.get_rank() == 0:
            self._turns.wait(self.side)
        dist.barrier()
        if len(self.seconds) == self.job.warmup:
            reset_peak_memory()
        dist.barrier()
        if self.profiles is not None:
            self.profiles.start(self.side, len(self.seconds))
        self._began = time.perf_counter(), time.process_time()

    def end(self, loss: Tensor, norm: Tensor | float) -> None:
        """Stops, and passes the turn on when all ranks have."""
        wall, cpu = time.perf_counter(), time.process_time()
        if self.profiles is not None:
            self.profiles.stop(self.side)
        self.seconds.append((wall - self._began[0], cpu - self._began[1]))
        if self.done:
            self.memory = peak_memory() - self._began_with
        self.losses.append(float(loss))
        self.norms.append(float(norm))
        dist.barrier()
        if dist.get_rank() == 0:
            self._turns.passed(self.side, len(self.seconds) - 1)


def peak_memory() -> int:
    """Most bytes that this process had in memory since the last `reset_peak_memory`."""
    return _status("VmHWM")


def reset_peak_memory() -> None:
    """Gives back what was freed, and counts anew."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


# ---- the sides ----


def run_side(side: str, turns: Turns, job: Job[Layout]) -> dict[str, Any]:
    """All steps of one side on this rank; what it saw, in plain data."""
    meter = Meter(side, turns, job, began_with=_status("VmRSS"))
    torch.set_num_threads(job.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if side in ("deepspeed", "lightning"):  # the other ones do it themselves
        prepare_ops(["cpu_adam"] if job.layout.offloads else [])
        import_deepspeed("cpu").init_distributed(dist_init_required=False)
    with redirect_stdout(StringIO()):  # DeepSpeed's pipeline tells of its stages
        (run_bare if side == "deepspeed" else run_trainer)(meter, job)
    return {
        "seconds": meter.seconds,
        "losses": meter.losses,
        "norms": meter.norms,
        "memory": meter.memory,
        "profile": meter.profiles.results() if meter.profiles else None,
    }


def run_bare(meter: Meter, job: Job[Layout]) -> None:
    layout = job.layout
    microbatches = 1
    if layout.pipeline > 1:
        microbatches = schedule_kind("1F1B").choose_microbatches("auto", layout.batch_size, layout.pipeline)
    bare = BareDeepSpeed(
        job.config,
        job.recipe,
        job.loader(layout.data_rank, microbatches),
        layout.zero,
        tensor=layout.tensor,
        stages=layout.pipeline,
        microbatches=microbatches,
    )
    while not meter.done:
        meter.begin()
        meter.end(*bare.step())


class InTurn(Callback):
    """Times the Trainer's steps from callback to callback, all that it does between them included."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics, strategy = trainer.callback_metrics, trainer.strategy
        engine = strategy.deepspeed_engine if isinstance(strategy, DeepSpeedStrategy) else None
        self.meter.end(metrics["train_loss"], engine.get_global_grad_norm() if engine else metrics["grad_norm"])
        if not self.meter.done:
            self.meter.begin()


def run_trainer(meter: Meter, job: Job[Layout]) -> None:
    trainer = job.trainer(make_strategy(meter.side, job.layout), InTurn(meter), f"{job.layout.name}-{meter.side}")
    trainer.fit(job.module(ForLightning if meter.side == "lightning" else LLMModule), job.loader(job.layout.data_rank))


def make_strategy(side: str, layout: Layout) -> Strategy:
    """The strategy of a side that runs under the Trainer."""
    if side == "lightning":
        return LightningOnCPU(config={"zero_optimization": layout.zero, "zero_allow_untested_optimizer": True})
    kind: Callable[..., Strategy] = LLM3DStrategy
    if side == "ours":
        kind = partial(LLM3DDeepSpeedStrategy, offload_optimizer="cpu" if layout.offloads else None)
    return kind(
        data_parallel_size=layout.data,
        tensor_parallel_size=layout.tensor,
        pipeline_parallel_size=layout.pipeline,
        zero_stage=layout.zero_stage,
    )


class LightningOnCPU(DeepSpeedStrategy):
    """Lightning's own strategy without its question for CUDA devices, on processes that are connected already."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # its number is handed to DeepSpeed


class ForLightning(LLMModule):
    """With what Lightning's strategy leaves to the user: weights in time, and DeepSpeed's optimizer for the host."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # In configure_model ZeRO-3 would already have taken away what weights are loaded into.
        self.model = self.build_model()
        load_weights(self.model, self.weight_source())

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        strategy = self.trainer.strategy
        assert isinstance(strategy, DeepSpeedStrategy) and isinstance(strategy.config, dict)
        if "offload_optimizer" in strategy.config["zero_optimization"]:
            settings = self.optimizer_settings
            recipe = Recipe(
                learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, betas=settings.betas
            )
            made["optimizer"] = make_optimizer(list(self.parameters()), recipe, on_host=True)
            made["lr_scheduler"]["scheduler"] = type(made["lr_scheduler"]["scheduler"])(
                made["optimizer"], made["lr_scheduler"]["scheduler"].lr_lambdas[0]
            )
        return made
