"""Checkpoints as tables for the terminal. `lightning-llm verify` and `checkpoints` print them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from lightning_llm.checkpoint.inspection import Inspection, Survey

WIDTH = 160  # where there is no terminal that has one
STYLES = {"ok": "green", "verified": "green", "not verified": "yellow"}
BAD = "bold red"
_SHORT = {
    "data_parallel_size": "dp",
    "tensor_parallel_size": "tp",
    "pipeline_parallel_size": "pp",
    "context_parallel_size": "cp",
    "expert_parallel_size": "ep",
    "replicate_size": "replicas",
}


def show_files(found: Sequence[Inspection], console: Console | None = None) -> None:
    """Every file of verified checkpoints with its state, and what is wrong."""
    console = console or _console()
    for checkpoint in found:
        manifest = checkpoint.manifest
        title = Text(checkpoint.path, style="bold")
        if manifest is not None:
            title.append(f"  step {manifest.step}, {decimal(manifest.size)}, {manifest.algorithm}", style="default")
        console.print(title, soft_wrap=True)
        table = _table("file", ">size", "digest", "state")
        for file, size, digest, state in checkpoint.files():
            table.add_row(Text(file), decimal(size), digest, Text(state, style=STYLES.get(state, BAD)))
        if table.rows:
            console.print(table)
        for problem in checkpoint.problems:
            console.print(Text(str(problem), style=BAD), soft_wrap=True)
        for file in checkpoint.unlisted:
            console.print(Text(f"{file}: the manifest does not list it, so it is ignored"), soft_wrap=True)
        console.print()
    bad = [checkpoint.name for checkpoint in found if checkpoint.problems]
    many = f"{len(bad)} of {len(found)} checkpoints" if len(found) > 1 else "it"
    verdict = Text(f"{many} cannot be loaded: {', '.join(bad)}", style=BAD) if bad else Text("all good", style="green")
    console.print(verdict, soft_wrap=True)


def show_survey(survey: Survey, console: Console | None = None) -> None:
    """A folder of checkpoints, newest first."""
    console = console or _console()
    table = _table("", "name", ">step", "created", ">size", ">files", "mesh", "holds", "status")
    for checkpoint in survey.checkpoints:
        manifest, status = checkpoint.manifest, checkpoint.status
        described = [""] * 6
        if manifest is not None:
            mesh = " ".join(
                f"{_SHORT[axis]}{size}" for axis, size in manifest.mesh.items() if size > 1 and axis in _SHORT
            )
            holds = "weights" if manifest.weights_only else "all"
            described = [str(manifest.step), manifest.created, decimal(manifest.size), str(manifest.world_size)]
            described += [mesh, holds]
        mark = "->" if checkpoint.name == survey.loaded else ""
        style = STYLES.get(status, BAD)
        table.add_row(mark, Text(checkpoint.name), *described, Text(status, style=style))
    if table.rows:
        console.print(table)
    for checkpoint in survey.checkpoints:
        for problem in checkpoint.problems:
            console.print(Text(f"{checkpoint.name}/{problem}", style=BAD), soft_wrap=True)
        if checkpoint.note is not None and not checkpoint.problems:
            console.print(f"{checkpoint.name}: noted as damaged on {checkpoint.note.get('found')}", soft_wrap=True)
    for alias, target in sorted(survey.aliases.items()):
        console.print(Text(f"{alias} -> {target}"), soft_wrap=True)
    if survey.drafts:
        size = decimal(sum(survey.drafts.values()))
        console.print(f"drafts of saves that are under way or were interrupted: {len(survey.drafts)}, {size}")
    if survey.loaded is not None:
        console.print(Text(f"-> {survey.loaded} is what a run goes on from"), soft_wrap=True)
    else:
        console.print(Text("there is nothing that a run could go on from", style=BAD))


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def _table(*columns: str) -> Table:
    """A table with these columns, those with > aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column[:1] == ">" else "left", overflow="fold")
    return table
