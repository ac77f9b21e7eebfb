"""What `Trainer(strategy=LLM3DDeepSpeedStrategy(...))` costs over DeepSpeed's engine in a hand-written loop.

    python benchmarks/engines.py [--layouts zero2 pp2:16] [--sides deepspeed ours] [--profile]

Beside them Lightning's own strategy for DeepSpeed, and `LLM3DStrategy`; see README.md beside this file.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: ranks are forked and share the cores

import argparse
import ctypes
import json
import logging
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from bare_deepspeed import BareDeepSpeed, make_optimizer
from bare_loop import Recipe
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from profiling import Profiles, print_profile
from ranks import run_groups
from taking_turns import ratios, spread
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from train_overhead import TokenRows

from lightning_llm import DecoderConfig, LLM3DDeepSpeedStrategy, LLM3DStrategy, LLMModule
from lightning_llm.models.weights import load_weights
from lightning_llm.planner.schedules import schedule_kind
from lightning_llm.strategies.deepspeed.ops import import_deepspeed, prepare_ops

RANKS = 2
SIDES = ("deepspeed", "ours", "lightning", "llm3d")
ACCEPTED_RATIO = 1.05
TOLERANCE = 1e-4  # of losses, nats per token; and of gradient norms, relative


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


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every rank of every side is told."""

    layout: Layout
    config: DecoderConfig
    seq_len: int
    steps: int
    warmup: int
    threads: int
    folder: str
    profile: bool
    recipe: Recipe

    @property
    def total_steps(self) -> int:
        """Steps of each side; under the profiler one more, in which collectives are counted."""
        return self.warmup + self.steps + self.profile

    def loader(self, microbatches: int = 1) -> DataLoader:
        """This rank's batches, which are in memory, so that no side waits for a disk."""
        data = self.layout.data
        rows = TokenRows(self.layout.batch_size * (self.total_steps + 1), self.seq_len, self.config.vocab_size)
        sampler: DistributedSampler = DistributedSampler(
            rows, num_replicas=data, rank=dist.get_rank() if data > 1 else 0, shuffle=False
        )
        return DataLoader(rows, batch_size=self.layout.batch_size // data // microbatches, sampler=sampler)


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

    def __init__(self, side: str, turns: Turns, job: Job, began_with: int) -> None:
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


def run_side(side: str, turns: Turns, job: Job) -> dict[str, Any]:
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


def run_bare(meter: Meter, job: Job) -> None:
    layout = job.layout
    microbatches = 1
    if layout.pipeline > 1:
        microbatches = schedule_kind("1F1B").choose_microbatches("auto", layout.batch_size, layout.pipeline)
    bare = BareDeepSpeed(
        job.config,
        job.recipe,
        job.loader(microbatches),
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


def run_trainer(meter: Meter, job: Job) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=make_strategy(meter.side, job.layout),
        max_steps=job.total_steps,
        gradient_clip_val=job.recipe.max_norm,
        callbacks=[InTurn(meter)],
        logger=CSVLogger(job.folder, name=f"{job.layout.name}-{meter.side}"),
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    kind = ForLightning if meter.side == "lightning" else LLMModule
    module = kind(
        job.config,
        learning_rate=job.recipe.learning_rate,
        weight_decay=job.recipe.weight_decay,
        betas=job.recipe.betas,
        schedule="constant",
        warmup_steps=job.recipe.warmup_steps,
    )
    trainer.fit(module, job.loader())


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


# ---- what comes of it ----


def summarize(job: Job, found: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One layout's row: times of the slowest rank, CPU time and memory of all ranks, ratios of neighbouring steps.

    Args:
        job: What was run.
        found: By side, what `run_side` returned on each rank.

    Raises:
        RuntimeError: Two sides did not compute the same.
    """
    check_equal_work(job, found)
    timed = slice(job.warmup, job.warmup + job.steps)
    wall, cpu = {}, {}
    for side, ranks in found.items():
        by_step = list(zip(*(rank["seconds"] for rank in ranks), strict=True))[timed]
        wall[side] = [max(seconds for seconds, _ in step) for step in by_step]
        cpu[side] = [sum(seconds for _, seconds in step) for step in by_step]
    first = next(iter(found))
    return {
        "layout": asdict(job.layout),
        "beside": first,
        "sides": {
            side: {
                "seconds": spread(wall[side]),
                "ratio": ratios(wall[side], wall[first]),
                "cpu_ratio": ratios(cpu[side], cpu[first]),
                "memory": sum(rank["memory"] for rank in ranks),
                "steps": {"wall": wall[side], "cpu": cpu[side]},
            }
            for side, ranks in found.items()
        },
    }


def check_equal_work(job: Job, found: Mapping[str, list[dict[str, Any]]]) -> None:
    """Refuses to compare sides whose losses or gradient norms differ at any step, warm-up included."""
    losses = {side: _mean_losses(ranks) for side, ranks in found.items()}
    first, *others = found
    for side in others:
        for step in range(job.total_steps):
            here, there = losses[side][step], losses[first][step]
            if not abs(here - there) <= TOLERANCE:
                raise RuntimeError(f"{job.layout.name}, step {step}: loss {here} of {side}, {there} of {first}")
            here, there = (found[name][0]["norms"][step] for name in (side, first))
            if not abs(here - there) <= TOLERANCE * max(1.0, there):
                raise RuntimeError(f"{job.layout.name}, step {step}: norm {here} of {side}, {there} of {first}")


def _mean_losses(ranks: list[dict[str, Any]]) -> list[float]:
    """The bare loop's loss stays where it was made; the Trainer's is the same on all ranks."""
    return [statistics.fmean(losses) for losses in zip(*(rank["losses"] for rank in ranks), strict=True)]


HEADER = (
    f"{'layout':<15}{'side':<11}{'batch':>6}{'step s':>9}   {'ratio min / median / max':<27}"
    f"{'of CPU time':>11}{'peak MB':>10}"
)


def table_rows(row: dict[str, Any]) -> list[str]:
    """A line for each side."""
    lines = []
    for side, values in row["sides"].items():
        ratio = values["ratio"]
        lines.append(
            f"{row['layout']['name']:<15}{side:<11}{row['layout']['batch_size']:>6}{values['seconds']['median']:>9.3f}"
            f"   {ratio['min']:>6.3f} / {ratio['median']:.3f} / {ratio['max']:<10.3f}"
            f"{values['cpu_ratio']['median']:>11.3f}{values['memory'] / 1e6:>10.0f}"
        )
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    names = list(LAYOUTS)
    parser.add_argument(
        "--layouts",
        nargs="+",
        type=Layout.parse,
        default=list(LAYOUTS.values()),
        metavar="NAME[:BATCH]",
        help=f"what to measure, each with its sequences per step (default: {' '.join(names)})",
    )
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=list(SIDES), help="ratios are those to the first (default: all)"
    )
    parser.add_argument("--model", default="tiny", help="a preset of DecoderConfig (default: tiny)")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens per sequence (default: 128)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each side (default: 8)")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each side before them (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process (default: 1)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one layout (default: 300)")
    parser.add_argument("--quick", action="store_true", help="small sizes: whether it works, not how fast it is")
    parser.add_argument("--profile", action="store_true", help="show where our step goes; writes no results")
    parser.add_argument("--check", action="store_true", help=f"fail where our median ratio is above {ACCEPTED_RATIO}")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results" / "engines.json",
        help="where the results go (default: benchmarks/results/engines.json)",
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seq_len, arguments.steps, arguments.warmup = 16, 2, 1
        arguments.layouts = [replace(layout, batch_size=4) for layout in arguments.layouts]
    if arguments.profile:
        arguments.sides = ["deepspeed", "ours"]
    return arguments


def main() -> int:
    arguments = parse_arguments()
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load average {load:.1f} before the start", flush=True)
    if load > 0.5:
        print("Something else is running: ratios will be wide, and results are not worth keeping.", flush=True)
    import_deepspeed("cpu")  # once, for all ranks
    rows = []
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        for index, layout in enumerate(arguments.layouts):
            job = Job(
                layout=layout,
                config=DecoderConfig.preset(arguments.model),
                seq_len=arguments.seq_len,
                steps=arguments.steps,
                warmup=arguments.warmup,
                threads=arguments.threads,
                folder=folder,
                profile=arguments.profile,
                recipe=Recipe(),
            )
            sides = layout.sides(arguments.sides)
            turns = Turns(sides, job.total_steps)
            found = run_groups(
                {side: partial(run_side, side, turns) for side in sides}, RANKS, job, timeout=arguments.timeout
            )
            rows.append(summarize(job, found))
            if index == 0 or arguments.profile:
                print(HEADER)
            print("\n".join(table_rows(rows[-1])), flush=True)
            if arguments.profile:
                print_profile({side: [rank["profile"][side] for rank in found[side]] for side in sides}, job.steps)
    if not arguments.profile:
        write(arguments, load, rows)
    too_slow = [
        row["layout"]["name"]
        for row in rows
        if row["beside"] == "deepspeed" and "ours" in row["sides"]
        if row["sides"]["ours"]["ratio"]["median"] > ACCEPTED_RATIO
    ]
    if arguments.check and too_slow:
        print(f"above {ACCEPTED_RATIO}: {', '.join(too_slow)}", file=sys.stderr)
        return 1
    return 0


def write(arguments: argparse.Namespace, load: float, rows: list[dict[str, Any]]) -> None:
    """The results and what they were measured on, as JSON."""
    results = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cores": os.cpu_count(),
            "load_average_before": load,
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "deepspeed": import_deepspeed("cpu").__version__,
        },
        "run": {name: getattr(arguments, name) for name in ("model", "seq_len", "steps", "warmup", "threads", "quick")},
        "layouts": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
