"""A plan on the terminal: the lines to paste, tables of memory and traffic, drawings of mesh and pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterable

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_llm.planner.choice import needs
from lightning_llm.planner.engines import TITLES
from lightning_llm.planner.hosts import GB, GIB
from lightning_llm.planner.layout import Layout
from lightning_llm.planner.plan import Plan
from lightning_llm.planner.strategy import strategy_of
from lightning_llm.planner.timeline import Timeline

BAR = 30
WIDTH = 96  # columns of the pipeline's drawing
MAX_ROWS = 16


def render(plan: Plan, console: Console | None = None) -> None:
    """Prints everything that a plan says."""
    console = console or Console(highlight=False, soft_wrap=True)
    layout = plan.layout
    tokens = layout.global_batch * plan.workload.seq_len
    console.print(
        f"[bold]{plan.model}[/bold] ({plan.num_parameters / 1e9:.1f}B parameters) on {plan.devices} x {plan.device}, "
        f"{plan.devices_per_node} a node, {plan.device_memory / GIB:.0f} GiB each"
    )
    console.print(
        f"{layout.global_batch:,} sequences of {plan.workload.seq_len:,} tokens a step ({tokens / 1e6:.1f}M tokens), "
        f"{plan.workload.precision}\n"
    )
    if not plan.fits:
        console.print(f"[red]It does not fit:[/red] it needs {_over(plan)}.\n")
    console.print(Text(yaml.safe_dump(plan.run_file(), sort_keys=False)), end="")
    for title, lines in (("why", plan.reasons), ("where this departs from the usual advice", plan.departures)):
        if lines:
            console.print(f"\n[bold]{title}[/bold]")
            for line in lines:
                console.print(Text(f"- {line}"))
    for other in plan.others:
        console.print(f"\n[bold]with {TITLES[other.engine]}[/bold]")
        console.print(Text(f"- {other.why}{'' if other.layout is None else ': ' + needs(other)}."))
        if other.layout is not None:
            console.print(Text(yaml.safe_dump({"strategy": strategy_of(other.layout)}, sort_keys=False)), end="")
    console.print()
    console.print(_memory_table(plan))
    if plan.traffic:
        console.print(_traffic_table(plan))
    console.print(_time_table(plan))
    console.print(_saving_table(plan))
    console.print(_effectiveness_table(plan))
    if plan.runner_ups:
        console.print(_runner_up_table(plan))
    console.print(f"[bold]mesh[/bold]\n{draw_mesh(layout, plan.devices_per_node)}")
    if layout.pipeline_parallel_size > 1:
        console.print(f"\n[bold]pipeline[/bold] ({layout.pipeline_schedule}, one step)")
        console.print(Text(draw_timeline(plan.timeline)))


def _over(plan: Plan) -> str:
    """What there is not enough of."""
    result = plan.estimate
    if result.memory.total > plan.device_memory:
        return f"{result.memory.total / plan.device_memory:.2f}x the memory of a device"
    if result.host_bytes > plan.host_memory:
        return f"{result.host_bytes / GB:,.0f} GB of host memory a node, of {plan.host_memory / GB:,.0f}"
    return f"{result.disk_bytes / GB:,.0f} GB of NVMe a node, of {plan.disk / GB:,.0f}"


def _memory_table(plan: Plan) -> Table:
    memory = plan.estimate.memory
    rank = f", pipeline rank {plan.estimate.memory_rank}" if plan.layout.pipeline_parallel_size > 1 else ""
    table = Table(title=f"memory of the fullest device{rank}", title_justify="left", box=None, pad_edge=False)
    for name, justify in (("part", "left"), ("GiB", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, size in memory.parts().items():
        table.add_row(name.replace("_", " "), f"{size / GIB:.2f}", "█" * round(BAR * size / plan.device_memory))
    share = memory.total / plan.device_memory
    table.add_row("total", f"{memory.total / GIB:.2f}", f"{share:.0%} of {plan.device_memory / GIB:.0f} GiB")
    for place, size, whole in (
        ("host memory of a node", plan.estimate.host_bytes, plan.host_memory),
        ("NVMe of a node", plan.estimate.disk_bytes, plan.disk),
    ):
        if size:
            table.add_row(place, f"{size / GIB:.2f}", f"{size / whole:.0%} of {whole / GIB:,.0f} GiB" if whole else "")
    return table


def _traffic_table(plan: Plan) -> Table:
    table = Table(title="\ntraffic of a device per step", title_justify="left", box=None, pad_edge=False)
    for name, justify in (("axis", "left"), ("sends GB", "right"), ("over", "left"), ("s", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for axis, entry in plan.traffic.items():
        table.add_row(axis, f"{entry.sends / 1e9:.2f}", entry.link, f"{entry.seconds:.3f}", entry.note)
    return table


def _figures(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column("what")
    table.add_column("figure", justify="right")
    for what, figure in rows:
        table.add_row(what, figure)
    return table


def _time_table(plan: Plan) -> Table:
    result = plan.estimate
    return _figures(
        "time of a step",
        (
            ("compute, and communication that it waits for", f"{result.pipeline_seconds * (1 - result.bubble):.3f} s"),
            ("idle in the pipeline", f"{result.pipeline_seconds * result.bubble:.3f} s ({result.bubble:.1%})"),
            ("parameters and gradients, not hidden", f"{result.exposed_seconds:.3f} s"),
            ("optimizer", f"{result.optimizer_seconds:.3f} s"),
            ("step", f"{result.step_seconds:.3f} s"),
            ("tokens per second and device", f"{result.tokens_per_second_per_device:,.0f}"),
            ("MFU", f"{result.mfu:.1%}"),
        ),
    )


def _saving_table(plan: Plan) -> Table:
    saving = plan.saving
    return _figures(
        "checkpoints in the background",
        (
            ("a device writes", f"{saving.bytes_per_device / GIB:.2f} GiB"),
            ("training stands still", f"{saving.blocked:.2f} s"),
            ("written", f"{saving.written:.0f} s later"),
            ("a failure", f"every {saving.mtbf / 3600:.1f} h"),
            ("best interval (Young, Daly)", f"{saving.interval:.0f} s, every_n_train_steps={plan.steps_between_saves}"),
        ),
    )


def _effectiveness_table(plan: Plan) -> Table:
    weighed = plan.effectiveness
    run, parts = weighed.run, weighed.shares
    planned = f"every {run.planned_every / 3600:.0f} h" if math.isfinite(run.planned_every) else "none"
    compared = "formula" if run.shape == 1 else f"simulated: bursts, shape {run.shape:g}"
    return _figures(
        f"effective training time (ETTR) with a save every {run.interval:.0f} s",
        (
            ("a failure is noticed after, assumed or given", f"{run.detection:.0f} s"),
            ("and the run trains again after, assumed or given", f"{run.restart:.0f} s"),
            ("trains", f"{parts.trains:.2%}"),
            ("saves", f"{parts.saves:.2%}"),
            ("is done again after failures", f"{parts.lost:.2%}"),
            ("waits until failures are noticed", f"{parts.detects:.2%}"),
            ("restarts", f"{parts.restarts:.2%}"),
            (f"planned interruptions ({planned})", f"{parts.planned:.2%}"),
            (
                f"simulated runs of {weighed.days:g} days: 5%, half, 95% are below",
                f"{weighed.p5:.2%}, {weighed.p50:.2%}, {weighed.p95:.2%}",
            ),
            ("every, by Young and Daly", f"{weighed.young_daly:.0f} s: {weighed.young_daly_trains:.2%}"),
            (f"every, best found ({compared})", f"{weighed.best:.0f} s: {weighed.best_trains:.2%}"),
        ),
    )


def _runner_up_table(plan: Plan) -> Table:
    table = Table(title="\nrunner-ups", title_justify="left", box=None, pad_edge=False)
    for name, justify in (("s a step", "right"), ("MFU", "right"), ("GiB", "right"), ("layout", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for other in plan.runner_ups:
        table.add_row(
            f"{other.step_seconds:.2f}", f"{other.mfu:.1%}", f"{other.memory_bytes / GIB:.1f}", other.layout.describe()
        )
    return table


def draw_mesh(layout: Layout, per_node: int) -> str:
    """The grid of ranks as text: a row a group of ranks that share samples, nodes marked by bars."""
    columns = layout.context_parallel_size * layout.tensor_parallel_size
    width = len(str(layout.world_size - 1))
    rows = layout.world_size // columns
    per_stage = rows // layout.pipeline_parallel_size
    shown = rows if rows <= MAX_ROWS else MAX_ROWS - 2
    lines = []
    for row in [*range(shown), *([rows - 1] if rows > shown else [])]:
        if row == rows - 1 and rows > shown:
            lines.append(f"  ... {rows - shown - 1} more rows")
        ranks = []
        for rank in range(row * columns, (row + 1) * columns):
            ranks.append(("|" if rank % per_node == 0 else " ") + f"{rank:>{width}}")
        lines.append(f"  stage {row // per_stage:<2} data {row % per_stage:<4} tensor {''.join(ranks)}")
    return "\n".join([f"  {layout.world_size} ranks; a bar starts a node", *lines])


def draw_timeline(timeline: Timeline, width: int = WIDTH) -> str:
    """The schedule as text, a row a rank: digits are forwards of a microbatch (its last digit), `b`, `i` and `w` are
    backwards (whole, of inputs, of weights), dots are idle. Of a long schedule only its beginning is drawn."""
    forward = min(span.end - span.start for spans in timeline.spans for span in spans if span.action.kind == "F")
    cell = min(max(timeline.makespan / width, forward / 4), forward)
    shown = min(width, math.ceil(timeline.makespan / cell))
    lines = []
    for rank, spans in enumerate(timeline.spans):
        cells = ["."] * shown
        for action, start, end in spans:
            mark = str(action.microbatch % 10) if action.kind == "F" else action.kind.lower()
            for column in range(round(start / cell), min(shown, round(end / cell))):
                cells[column] = mark
        lines.append(f"  {rank:>3} {''.join(cells)} {timeline.bubble(rank):5.1%} idle")
    if shown * cell < timeline.makespan:
        lines.append(f"  the first {shown * cell:.2f} of {timeline.makespan:.2f} s; a column is {cell:.3f} s")
    return "\n".join(lines)
