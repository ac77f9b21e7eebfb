"""What each parallel axis costs, measured beside theory: a pipeline's bubbles, and the bytes of every collective.

    python benchmarks/axes.py [--parts bubbles bytes] [--plots docs/images]

Both parts run real processes on gloo; see README.md beside this file for what is measured and how.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: ranks are forked and share the cores
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would write a line at each start and stop

import argparse
import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning
import torch
from bubbles import Case, run_steps, summarize, timeline
from layout_traffic import TrafficCase, run_layout, summarize_traffic
from ranks import run_on_ranks

from lightning_llm import DecoderConfig
from lightning_llm.planner.schedules import SCHEDULES

# Name, processes, and what `LLM3DStrategy` is told.
LAYOUTS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("dp2 zero3", 2, {"data_parallel_size": 2}),
    ("dp2 zero2", 2, {"data_parallel_size": 2, "zero_stage": 2}),
    ("dp2 zero1", 2, {"data_parallel_size": 2, "zero_stage": 1}),
    ("dp2 zero0", 2, {"data_parallel_size": 2, "zero_stage": 0}),
    ("dp2 replicate", 2, {"data_parallel_size": 2, "replicate_size": 2}),
    ("tp2", 2, {"tensor_parallel_size": 2}),
    ("tp2 whole sequences", 2, {"tensor_parallel_size": 2, "sequence_parallel": False}),
    ("pp2", 2, {"pipeline_parallel_size": 2}),
    ("cp2 allgather", 2, {"context_parallel_size": 2}),
    ("cp2 ulysses", 2, {"context_parallel_size": 2, "context_parallel_method": "ulysses"}),
    ("cp2 ring", 2, {"context_parallel_size": 2, "context_parallel_method": "ring"}),
    ("dp2 ep2", 2, {"data_parallel_size": 2, "expert_parallel_size": 2}),
    ("dp2 tp2", 4, {"data_parallel_size": 2, "tensor_parallel_size": 2}),
    ("tp2 pp2", 4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
)


# -- bubbles --


def bubble_cases(ranks: int, microbatches: list[int], seconds: float) -> list[Case]:
    """Every schedule with every number of microbatches that it takes."""
    return [
        Case(
            schedule=kind.name,
            ranks=ranks,
            stages_per_rank=kind.resolve_stages_per_rank(),
            microbatches=count,
            seconds=seconds,
        )
        for kind in SCHEDULES
        for count in microbatches
        if kind.fits(count, ranks, kind.resolve_stages_per_rank())
    ]


BUBBLE_HEADER = (
    f"{'schedule':<22}{'ranks':>6}{'micro':>7}{'theory':>9}{'order':>8}   {'measured min / median / max':<29}"
    f"{'worst rank':>11}{'sleep':>8}"
)


def bubble_row(row: dict[str, Any]) -> str:
    """One line of the table."""
    mean = row["mean_rank"]
    return (
        f"{row['schedule']:<22}{row['ranks']:>6}{row['microbatches']:>7}{row['theory']:>9.3f}{row['order']:>8.3f}   "
        f"{mean['min']:>6.3f} / {mean['median']:.3f} / {mean['max']:<12.3f}{row['worst_rank']['median']:>11.3f}"
        f"{row['sleep_over_asked']['median']:>8.2f}"
    )


def measure_bubbles(arguments: argparse.Namespace) -> dict[str, Any]:
    """The table, and a timeline of each schedule on the most ranks and with the number of microbatches to draw."""
    rows, timelines = [], {}
    print(f"\nBubbles: share of a step in which ranks wait, {arguments.steps} steps each\n{BUBBLE_HEADER}")
    for ranks in arguments.ranks:
        cases = bubble_cases(ranks, arguments.microbatches, arguments.seconds)
        results = run_on_ranks(run_steps, ranks, cases, arguments.steps, timeout=arguments.timeout)
        for index, case in enumerate(cases):
            steps = [rank[index] for rank in results]
            rows.append(summarize(case, steps))
            print(bubble_row(rows[-1]), flush=True)
            if (ranks, case.microbatches) == (max(arguments.ranks), arguments.drawn):
                timelines[case.schedule] = timeline(steps)
    return {"rows": rows, "timelines": timelines}


# -- bytes --


def traffic_cases(arguments: argparse.Namespace) -> list[TrafficCase]:
    """The layouts that were asked for, the ones with experts on a model that has some."""
    return [
        TrafficCase(
            name=name,
            ranks=ranks,
            settings=settings,
            config=DecoderConfig.preset("tiny-moe" if "expert_parallel_size" in settings else "tiny"),
            batch_size=arguments.batch_size,
            seq_len=arguments.seq_len,
        )
        for name, ranks, settings in LAYOUTS
        if name in arguments.layouts
    ]


TRAFFIC_HEADER = f"{'layout':<21}{'axis':<10}{'operation':<16}{'calls':>6}{'sent':>12}{'least':>12}{'ratio':>9}"


def traffic_rows(row: dict[str, Any]) -> str:
    """The lines of one layout."""
    lines = []
    for part in row["rows"]:
        if part["sent"] or part["least"]:
            ratio = f"{part['sent'] / part['least']:.4f}" if part["least"] else "-"
            lines.append(
                f"{'':<21}{part['axis']:<10}{part['kind']:<16}{part['calls']:>6.1f}{part['sent']:>12,.0f}"
                f"{part['least']:>12,.0f}{ratio:>9}"
            )
    lines[0] = f"{row['name']:<21}{lines[0][21:]}"
    sockets = row["on_sockets"] / row["on_sockets_expected"]
    lines.append(
        f"{'':<21}{'all':<32}{row['sent']:>12,.0f}{row['least']:>12,.0f}{row['ratio']:>9.4f}   on the sockets over "
        f"counted: {sockets:.4f}; first step: {row['first_step_more']:+,.0f}"
    )
    return "\n".join(lines)


def measure_bytes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The table."""
    print(f"\nBytes that a rank sends in one step, mean over ranks\n{TRAFFIC_HEADER}")
    rows = []
    for case in traffic_cases(arguments):
        results = run_on_ranks(run_layout, case.ranks, case, timeout=arguments.timeout)
        rows.append(summarize_traffic(case, results))
        print(traffic_rows(rows[-1]), flush=True)
    return {"rows": rows}


# -- the command --


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=("bubbles", "bytes"), default=["bubbles", "bytes"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4], help="of the pipelines (default: 2 4)")
    parser.add_argument(
        "--microbatches", nargs="+", type=int, default=[4, 8, 16], help="per step of a pipeline (default: 4 8 16)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.04,
        help="of the forward of one microbatch on one rank; the backward takes twice as long (default: 0.04)",
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each pipeline (default: 5)")
    parser.add_argument("--drawn", type=int, default=8, help="microbatches of the drawn timelines (default: 8)")
    names = [name for name, _, _ in LAYOUTS]
    parser.add_argument("--layouts", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {names}")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step where bytes are counted")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens of each")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one set of processes")
    parser.add_argument("--plots", type=Path, help="a folder for pictures (SVG); needs matplotlib")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results" / "axes.json",
        help="where the results go (default: benchmarks/results/axes.json)",
    )
    parser.add_argument("--draw-only", action="store_true", help="measure nothing: draw what is in --output")
    arguments = parser.parse_args()
    if arguments.draw_only and arguments.plots is None:
        parser.error("--draw-only needs --plots")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if not arguments.draw_only:
        measure(arguments)
    if arguments.plots is not None:
        from axes_plots import draw

        for path in draw(json.loads(arguments.output.read_text()), arguments.plots):
            print(f"drawn: {path}")
    return 0


def measure(arguments: argparse.Namespace) -> None:
    """Runs the parts, prints the tables and writes the results, as JSON. Parts that are not run keep their results."""
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for part, run in (("bubbles", measure_bubbles), ("bytes", measure_bytes)):
        if part in arguments.parts:
            before = os.getloadavg()[0]
            print(f"{os.cpu_count()} cores, load average {before:.1f} before the start", flush=True)
            found = run(arguments)
            results[part] = {"machine": machine(before), **found}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {arguments.output}")


def machine(load_before: float) -> dict[str, Any]:
    """What was measured on."""
    return {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
