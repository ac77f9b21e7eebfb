"""What a doctor has found, and how it is told: machine.py and cluster/ find, commands.py tells."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Status = Literal["ok", "missing", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        section: Which part of the machine, e.g. "accelerators".
        name: What was looked at.
        status: "ok": there; "missing": not there, which is fine unless you want what it is needed for;
            "problem": something that will break a run until it is fixed.
        detail: Version, size or what was seen.
        needed_for: What it serves; empty for plain facts.
        fix: What to do about a missing part or a problem; empty when there is nothing to do.
    """

    section: str
    name: str
    status: Status
    detail: str
    needed_for: str = ""
    fix: str = ""


def render(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Prints the findings as one table, with what to do about each under it.

    Args:
        findings: As `collect` gives them.
        console: Where to print; stdout when None.
    """
    console = console or Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    if any(finding.needed_for for finding in findings):
        table.add_column("needed for", overflow="fold")
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            table.add_row(Text(section, style="bold cyan"))
        mark, style = {"ok": ("ok", "green"), "missing": ("missing", "yellow"), "problem": ("PROBLEM", "bold red")}[
            finding.status
        ]
        row = (f"  {mark}", style), (finding.name, ""), (finding.detail, ""), (finding.needed_for, "")
        table.add_row(*(Text(text, style=of) for text, of in row[: len(table.columns)]))
    console.print(table)
    todo = sorted((finding for finding in findings if finding.fix), key=lambda finding: finding.status != "problem")
    if todo:
        console.print()
    for finding in todo:
        purpose = f" -> needed for {finding.needed_for}" if finding.needed_for else ""
        console.print(
            Text(f"{finding.name}: {finding.status}{purpose} -> {finding.fix}"), soft_wrap=True, highlight=False
        )


def to_json(findings: Sequence[Finding]) -> str:
    """The findings as a JSON list of objects with the fields of `Finding`."""
    return json.dumps([asdict(finding) for finding in findings], indent=2)
