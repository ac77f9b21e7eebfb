"""The pictures of axes.py, as SVG: bubbles, timelines of the schedules, bytes. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Outline

matplotlib.use("Agg")
matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "axes",  # the same figures make the same file
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)

# Forward, gradients of inputs, gradients of weights; the second shade is a rank's second stage.
COLORS = {"F": ("#3b6fb6", "#9dbbe3"), "I": ("#d9822b", "#f0c08f"), "W": ("#3f8f4f", "#a3cfab")}
WORDS = {"F": "forward", "I": "gradients of inputs", "W": "gradients of weights"}
KINDS = {
    "all_gather": "#3b6fb6",
    "reduce_scatter": "#9dbbe3",
    "all_reduce": "#7a5ba8",
    "all_to_all": "#3f8f4f",
    "send": "#d9822b",
}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what there is; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    if "bubbles" in results:
        drawn.append(_save(_bubbles(results["bubbles"]["rows"]), folder / "axes-bubbles.svg"))
        drawn.append(_save(_timelines(results["bubbles"]["timelines"]), folder / "axes-timelines.svg"))
    if "bytes" in results:
        drawn.append(_save(_bytes(results["bytes"]["rows"]), folder / "axes-bytes.svg"))
    return drawn


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    # matplotlib ends lines with spaces
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path


def _bubbles(rows: list[dict[str, Any]]) -> Figure:
    """For each number of ranks: theory as a bar, the measured median and range beside it."""
    sizes = sorted({row["ranks"] for row in rows})
    figure, panels = pyplot.subplots(
        len(sizes), 1, figsize=(8, 2.6 * len(sizes)), layout="constrained", sharey=True, squeeze=False
    )
    for panel, ranks in zip(panels[:, 0], sizes, strict=True):
        shown = [row for row in rows if row["ranks"] == ranks]
        places = _places(row["schedule"] for row in shown)
        measured = [row["mean_rank"] for row in shown]
        panel.bar(places, [row["theory"] for row in shown], 0.8, color="#c9ccd1", label="theory")
        panel.errorbar(
            places,
            [one["median"] for one in measured],
            [[one["median"] - one["min"] for one in measured], [one["max"] - one["median"] for one in measured]],
            fmt="o",
            markersize=4,
            color="#b3261e",
            elinewidth=1,
            label="measured: median, smallest to largest",
        )
        panel.set_xticks(places, [row["microbatches"] for row in shown], fontsize=8)
        for name in dict.fromkeys(row["schedule"] for row in shown):
            own = [place for place, row in zip(places, shown, strict=True) if row["schedule"] == name]
            label = name.replace("ZeroBubble", "\nZeroBubble")
            below = panel.get_xaxis_transform()
            panel.text(sum(own) / len(own), -0.14, label, ha="center", va="top", fontsize=8, transform=below)
        panel.set_ylabel("share of step")
        panel.set_title(f"Waiting, {ranks} pipeline ranks; below each bar its microbatches", loc="left", fontsize=9)
    panels[0, 0].legend(frameon=False, loc="upper right")
    panels[0, 0].set_ylim(0, 1.05 * max(row["mean_rank"]["max"] for row in rows))
    return figure


def _places(names: Iterable[str]) -> list[float]:
    """One after the other, with a gap between schedules."""
    places: list[float] = []
    before = None
    for name in names:
        places.append(0.0 if before is None else places[-1] + (1 if name == before else 2))
        before = name
    return places


def _timelines(timelines: dict[str, list[list[list[Any]]]]) -> Figure:
    """One panel a schedule, one row a rank."""
    figure, panels = pyplot.subplots(
        len(timelines), 1, figsize=(8, 1.35 * len(timelines) + 0.4), layout="constrained", sharex=True, squeeze=False
    )
    for panel, (name, ranks) in zip(panels[:, 0], timelines.items(), strict=True):
        for rank, spans in enumerate(ranks):
            first = min(stage for _, stage, *_ in spans)
            for kind, shades in COLORS.items():
                for turn, color in enumerate(shades):
                    own = [span for span in spans if span[0] == kind and (span[1] > first) == bool(turn)]
                    _add_boxes(panel, rank, [(start, end) for *_, start, end in own], color)
        panel.set_ylim(len(ranks) - 0.5, -0.5)
        panel.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))])
        panel.set_title(name, loc="left", fontsize=9)
    longest = max(span[-1] for ranks in timelines.values() for spans in ranks for span in spans)
    panels[-1, 0].set_xlim(0, longest * 1.01)
    panels[-1, 0].set_xlabel("seconds")
    handles = [Patch(color=COLORS[kind][0], label=word) for kind, word in WORDS.items()]
    handles.append(Patch(color="#d0d0d0", label="lighter: a rank's second stage"))
    figure.legend(handles=handles, loc="outside upper right", ncols=4, frameon=False, fontsize=8)
    return figure


def _add_boxes(panel: Axes, row: int, spans: list[tuple[float, float]], color: str) -> None:
    """All boxes of one colour as one shape, which keeps the file small."""
    if not spans:
        return
    top, bottom = row - 0.4, row + 0.4
    boxes = [
        Outline([(start, top), (end, top), (end, bottom), (start, bottom), (start, top)], closed=True)
        for start, end in spans
    ]
    shape = Outline.make_compound_path(*boxes)
    panel.add_patch(PathPatch(shape, facecolor=color, edgecolor="white", linewidth=0.4))


def _bytes(rows: list[dict[str, Any]]) -> Figure:
    """One bar a layout, by kind of operation; a line where theory's least is."""
    figure, panel = pyplot.subplots(figsize=(8, 0.32 * len(rows) + 1.3), layout="constrained")
    for place, row in enumerate(rows):
        left = 0.0
        for kind, color in KINDS.items():
            sent = sum(part["sent"] for part in row["rows"] if part["kind"] == kind) / 1e6
            panel.barh(place, sent, 0.7, left=left, color=color)
            left += sent
        panel.plot([row["least"] / 1e6] * 2, [place - 0.45, place + 0.45], color="black", linewidth=1.5)
        panel.text(max(left, row["least"] / 1e6) + 0.5, place, f"{row['ratio']:.3f}", va="center", fontsize=8)
    panel.set_yticks(range(len(rows)), [row["name"] for row in rows])
    panel.invert_yaxis()
    panel.set_xlabel("MB that a rank sends in one step; black: the least by theory; number: the ratio")
    handles = [Patch(color=color, label=kind.replace("_", "-")) for kind, color in KINDS.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=5, frameon=False, fontsize=8)
    return figure
