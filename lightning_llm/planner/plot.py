"""A plan as a picture: memory by part, the pipeline's schedule, the mesh. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner.hosts import GIB
from lightning_llm.planner.plan import Plan

FORMATS = (".svg", ".png", ".pdf")
COLORS = {"F": "#1f77b4", "B": "#2ca02c", "I": "#98df8a", "W": "#ff7f0e"}
KINDS = {"F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights"}
MAX_CELLS = 4096  # ranks drawn in the mesh


def save_plot(plan: Plan, path: str | Path) -> Path:
    """Draws a plan into a file, in the format that its name says; returns the path.

    Raises:
        ConfigurationError: matplotlib is not installed, or the file's ending is no format.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ConfigurationError(f"--plot {path}: the name must end in {', '.join(FORMATS)}.")
    try:
        import matplotlib
    except ImportError:
        raise ConfigurationError(
            "A plot needs matplotlib, which is not installed: pip install 'lightning-llm[plot]'."
        ) from None
    matplotlib.use("Agg")  # no display is needed, nor asked for
    from matplotlib import pyplot

    figure, (memory, pipeline, mesh) = pyplot.subplots(
        3, 1, figsize=(12, 10), gridspec_kw={"height_ratios": [1.2, 2, 1.4]}, layout="constrained"
    )
    figure.suptitle(f"{plan.model} on {plan.devices} x {plan.device}: {plan.layout.describe()}", fontsize=10)
    _draw_memory(memory, plan)
    _draw_pipeline(pipeline, plan)
    _draw_mesh(mesh, plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _draw_memory(axes: Any, plan: Plan) -> None:
    left = 0.0
    for name, size in plan.estimate.memory.parts().items():
        if size:
            axes.barh(0, size / GIB, left=left, label=f"{name.replace('_', ' ')} {size / GIB:.1f}")
            left += size / GIB
    axes.axvline(plan.device_memory / GIB, color="black", linestyle="--", label="device")
    axes.set(yticks=[], xlabel="GiB on the fullest device", ylim=(-0.6, 1.8))
    axes.legend(ncols=6, fontsize=7, loc="upper left")


def _draw_pipeline(axes: Any, plan: Plan) -> None:
    for rank, spans in enumerate(plan.timeline.spans):
        for kind, color in COLORS.items():
            bars = [(start, end - start) for action, start, end in spans if action.kind == kind]
            if bars:
                label = KINDS[kind] if rank == 0 else None
                axes.broken_barh(bars, (rank - 0.45, 0.9), color=color, edgecolor="white", linewidth=0.2, label=label)
    axes.set(xlabel=f"seconds; {plan.estimate.bubble:.1%} idle", ylabel="pipeline rank")
    axes.invert_yaxis()
    axes.set_yticks(range(len(plan.timeline.spans)))
    axes.legend(fontsize=7, loc="upper right")


def _draw_mesh(axes: Any, plan: Plan) -> None:
    layout = plan.layout
    columns = layout.context_parallel_size * layout.tensor_parallel_size
    ranks = min(layout.world_size, MAX_CELLS // columns * columns)
    rows = ranks // columns
    per_stage = layout.world_size // columns // layout.pipeline_parallel_size
    # Stages side by side, their data ranks from left to right, tensor and context ranks from top to bottom.
    grid = [[row // per_stage for row in range(rows)] for _ in range(columns)]
    axes.imshow(grid, aspect="auto", cmap="tab20", interpolation="nearest")
    cut = "" if ranks == layout.world_size else ", cut off"
    axes.set(xlabel=f"data ranks of each pipeline stage (a color a stage){cut}", ylabel="tensor, context")
