"""What `Trainer(strategy=LLM3DDeepSpeedStrategy(...))` costs over DeepSpeed's engine in a hand-written loop.

    python benchmarks/engines.py [--layouts zero2 pp2:16] [--sides deepspeed ours] [--profile]

Beside them Lightning's own strategy for DeepSpeed, and `LLM3DStrategy`; see README.md beside this file.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: ranks are forked and share the cores

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from bare_loop import Recipe
from engine_sides import LAYOUTS, RANKS, SIDES, Layout, Turns, run_side
from profiling import print_profile
from ranks import run_groups
from taking_turns import ratios, spread
from training_job import Job

from lightning_llm import DecoderConfig
from lightning_llm.strategies.deepspeed.ops import import_deepspeed

ACCEPTED_RATIO = 1.05


def summarize(job: Job[Layout], found: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One layout's row: times of the slowest rank, CPU time and memory of all ranks, ratios of neighbouring steps.

    Args:
        job: What was run.
        found: By side, what `run_side` returned on each rank.

    Raises:
        RuntimeError: Two sides did not compute the same.
    """
    # The bare loop's loss stays where it was made; the Trainer's is the same on all ranks.
    job.check_equal_work(
        {
            side: [statistics.fmean(step) for step in zip(*(rank["losses"] for rank in ranks), strict=True)]
            for side, ranks in found.items()
        },
        {side: ranks[0]["norms"] for side, ranks in found.items()},
    )
    wall, cpu = {}, {}
    for side, ranks in found.items():
        wall[side], cpu[side] = job.step_times([rank["seconds"] for rank in ranks])
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
