"""What `Trainer(strategy=LLM3DStrategy(...))` costs over a bare torch loop of the same parallelism.

    python benchmarks/train_overhead.py [--layouts 1 tp2 dp2-tp2:32] [--profile] [--accelerator cuda]

Both sides live in the same processes and take turns, step by step; see README.md beside this file.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: ranks are forked and share the cores
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would write a line at each start and stop

import argparse
import json
import logging
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from bare_loop import BareLoop, Recipe
from lightning.pytorch import Callback, LightningModule, Trainer
from profiling import Profiles, print_profile
from ranks import run_on_ranks
from taking_turns import ratios, spread
from torch import Tensor
from training_job import Job

from lightning_llm import LLM3DStrategy
from lightning_llm.callbacks.throughput import dense_bf16_peak
from lightning_llm.models.module import resolve_config

# Layouts and their sequences per step, which make a step of the default model about one second long on two free cores.
DEFAULT_LAYOUTS = ("1:28", "tp2:32", "pp2:40", "dp2-tp2:32", "dp2-tp2-pp2:16")
ACCEPTED_RATIO = 1.10
RECIPE = ("fused", "accelerator", "precision", "compile")  # what of a recipe can be asked for


@dataclass(frozen=True)
class Layout:
    """One row of the table: ranks of each axis, and sequences per optimizer step over all data ranks."""

    name: str
    pipeline: int
    data: int
    tensor: int
    batch_size: int

    @classmethod
    def parse(cls, text: str) -> Layout:
        """`dp2-tp2-pp2:32` or `1:16`; axes that are not named have one rank."""
        match = re.fullmatch(r"(1|(?:dp|tp|pp)\d+(?:-(?:dp|tp|pp)\d+)*)(?::(\d+))?", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is no layout; write 1, tp2, dp2-tp2, dp2-tp2-pp2:32, ...")
        name, batch_size = match[1], int(match[2] or 16)
        sizes = {axis: int(size) for axis, size in re.findall(r"(dp|tp|pp)(\d+)", name)}
        layout = cls(name, sizes.get("pp", 1), sizes.get("dp", 1), sizes.get("tp", 1), batch_size)
        if batch_size % layout.data:
            raise argparse.ArgumentTypeError(f"{text!r}: batch({batch_size}) is not divisible by data({layout.data})")
        return layout

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.pipeline * self.data * self.tensor


class TakingTurns(Callback):
    """Runs and times one bare step after each step of the Trainer, and the Trainer's step from callback to callback.

    Times are `(wall, cpu)` seconds of this rank: from a barrier, so that all ranks start together, until its device has
    caught up; all threads' CPU.
    """

    def __init__(self, bare: BareLoop, profiles: Profiles | None) -> None:
        self.bare = bare
        self.profiles = profiles
        self.seconds: dict[str, list[tuple[float, float]]] = {"bare": [], "trainer": []}
        self.losses: dict[str, list[float | None]] = {"bare": [], "trainer": []}
        self.norms: dict[str, list[float]] = {"bare": [], "trainer": []}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("trainer")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop("trainer")
        metrics = trainer.callback_metrics
        self._note("trainer", metrics["train_loss"], metrics["grad_norm"])
        self._start("bare")
        loss, norm = self.bare.step()
        self._stop("bare")
        self._note("bare", loss, norm)
        self._start("trainer")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.profiles is not None:
            self.profiles.stop("trainer")

    def _start(self, side: str) -> None:
        dist.barrier()
        self._catch_up()
        if self.profiles is not None:
            self.profiles.start(side, len(self.seconds[side]))
        self._began = time.perf_counter(), time.process_time()

    def _stop(self, side: str) -> None:
        self._catch_up()
        wall, cpu = time.perf_counter(), time.process_time()
        if self.profiles is not None:
            self.profiles.stop(side)
        self.seconds[side].append((wall - self._began[0], cpu - self._began[1]))

    def _catch_up(self) -> None:
        if self.bare.device.type == "cuda":
            torch.cuda.synchronize()

    def _note(self, side: str, loss: Tensor | None, norm: Tensor) -> None:
        self.losses[side].append(None if loss is None else float(loss))
        self.norms[side].append(float(norm))


def measure(job: Job[Layout]) -> dict[str, Any]:
    """Both sides on this rank; what it saw, in plain data."""
    torch.set_num_threads(job.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    layout = job.layout
    sizes = (layout.pipeline, layout.data, layout.tensor)
    data_rank = dist.get_rank() // layout.tensor % layout.data
    profiles = Profiles(("bare", "trainer"), first=job.warmup, last=job.warmup + job.steps) if job.profile else None
    turns = TakingTurns(BareLoop(job.config, sizes, job.recipe, job.loader(data_rank)), profiles)
    strategy = LLM3DStrategy(
        data_parallel_size=layout.data,
        tensor_parallel_size=layout.tensor,
        pipeline_parallel_size=layout.pipeline,
        compile=job.recipe.compile,
    )
    job.trainer(strategy, turns, layout.name).fit(job.module(), job.loader(data_rank))
    return {
        "seconds": turns.seconds,
        "losses": turns.losses,
        "norms": turns.norms,
        "profile": profiles.results() if profiles else None,
        "device": torch.cuda.get_device_name() if job.recipe.accelerator == "cuda" else platform.machine(),
    }


def summarize(job: Job[Layout], ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One layout's row: times of the slowest rank, CPU time of all ranks, ratios of neighbouring steps.

    Raises:
        RuntimeError: The two sides did not compute the same.
    """
    # The bare loop's loss stays where it was made; the Trainer shows the same one to all ranks.
    by_step = zip(*(rank["losses"]["bare"] for rank in ranks), strict=True)
    job.check_equal_work(
        {
            "bare": [statistics.fmean(loss for loss in step if loss is not None) for step in by_step],
            "trainer": ranks[0]["losses"]["trainer"],
        },
        ranks[0]["norms"],
    )
    wall, cpu = {}, {}
    for side in ("bare", "trainer"):
        wall[side], cpu[side] = job.step_times([rank["seconds"][side] for rank in ranks])
    peak = dense_bf16_peak(ranks[0]["device"])
    tokens = job.layout.batch_size * job.seq_len
    flops = tokens * job.config.flops_per_token(job.seq_len) / job.layout.world_size
    return {
        "layout": asdict(job.layout),
        "device": ranks[0]["device"],
        "tokens": tokens,
        "mfu": peak and {side: flops / statistics.median(seconds) / peak for side, seconds in wall.items()},
        "ratio": ratios(wall["trainer"], wall["bare"]),
        "cpu_ratio": ratios(cpu["trainer"], cpu["bare"]),
        "bare_seconds": spread(wall["bare"]),
        "trainer_seconds": spread(wall["trainer"]),
        "steps": {f"{side}_{kind}": values[side] for kind, values in (("wall", wall), ("cpu", cpu)) for side in values},
    }


HEADER = (
    f"{'layout':<14}{'ranks':>6}{'batch':>6}{'bare s':>9}{'trainer s':>11}   {'ratio min / median / max':<27}"
    f"{'of CPU time':>11}"
)


def table_row(row: dict[str, Any]) -> str:
    layout, ratio = Layout(**row["layout"]), row["ratio"]
    return (
        f"{layout.name:<14}{layout.world_size:>6}{layout.batch_size:>6}{row['bare_seconds']['median']:>9.3f}"
        f"{row['trainer_seconds']['median']:>11.3f}   "
        f"{ratio['min']:>6.3f} / {ratio['median']:.3f} / {ratio['max']:<10.3f}{row['cpu_ratio']['median']:>11.3f}"
    ) + ("" if row["mfu"] is None else f"   MFU {row['mfu']['bare']:.3f} bare, {row['mfu']['trainer']:.3f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--layouts",
        nargs="+",
        type=Layout.parse,
        default=[Layout.parse(text) for text in DEFAULT_LAYOUTS],
        metavar="NAME[:BATCH]",
        help=f"what to measure, each with its sequences per step (default: {' '.join(DEFAULT_LAYOUTS)})",
    )
    parser.add_argument(
        "--model", default="tiny", help="a preset of DecoderConfig, or a folder with a config.json (default: tiny)"
    )
    parser.add_argument("--seq-len", type=int, default=128, help="tokens per sequence (default: 128)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each side (default: 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each side before them (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process (default: 1)")
    parser.add_argument(
        "--fused",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the bare loop's AdamW is the fused one (default: yes, since it is the faster one)",
    )
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu", help="of every rank (default: cpu)")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true", help="(default: 32-true)")
    parser.add_argument("--compile", action="store_true", help="compile each block, on both sides")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one layout (default: 600)")
    parser.add_argument("--profile", action="store_true", help="show where the Trainer's step goes; writes no results")
    parser.add_argument("--check", action="store_true", help=f"fail where a median ratio is above {ACCEPTED_RATIO}")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results" / "train_overhead.json",
        help="where the results go (default: benchmarks/results/train_overhead.json)",
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load average {load:.1f} before the start", flush=True)
    if load > 0.5:
        print("Something else is running: ratios will be wide, and results are not worth keeping.", flush=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="train-overhead-") as folder:
        for index, layout in enumerate(arguments.layouts):
            job = Job(
                layout=layout,
                config=resolve_config(arguments.model),
                seq_len=arguments.seq_len,
                steps=arguments.steps,
                warmup=arguments.warmup,
                threads=arguments.threads,
                folder=folder,
                profile=arguments.profile,
                recipe=Recipe(**{name: getattr(arguments, name) for name in RECIPE}),
            )
            ranks = run_on_ranks(
                measure, layout.world_size, job, accelerator=arguments.accelerator, timeout=arguments.timeout
            )
            rows.append(summarize(job, ranks))
            if index == 0 or arguments.profile:
                print(HEADER)
            print(table_row(rows[-1]), flush=True)
            if arguments.profile:
                print_profile(
                    {side: [rank["profile"][side] for rank in ranks] for side in ("bare", "trainer")}, job.steps
                )
    if not arguments.profile:
        write(arguments, load, rows)
    too_slow = [row["layout"]["name"] for row in rows if row["ratio"]["median"] > ACCEPTED_RATIO]
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
        },
        "run": {name: getattr(arguments, name) for name in ("model", "seq_len", "steps", "warmup", "threads", *RECIPE)},
        "layouts": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
