"""`lightning-llm registry list|register|promote|pull`; cli.py calls `main`."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_llm.arguments import run_group
from lightning_llm.errors import ConfigurationError
from lightning_llm.registry.base import LATEST, ModelVersion
from lightning_llm.registry.content import VerificationError
from lightning_llm.registry.opening import open_registry
from lightning_llm.registry.opening import register as register_folder

FAILED = 1


def list_versions(*, name: str | None = None, registry: str | None = None, json: bool = False) -> None:
    """List the versions of all models, or of one.

    Args:
        name: Of one model.
        registry: Folder or URL; by default $LIGHTNING_LLM_REGISTRY, or the folder `registry`.
        json: Print JSON instead of a table.
    """
    where = open_registry(registry)
    versions = where.versions(name)
    if json:
        print(json_module.dumps([version.to_json() for version in versions], indent=2))
    elif versions:
        Console(highlight=False).print(table_of(versions))
    else:
        print(f"{where.url}: no versions{f' of {name}' if name else ''}")


def register(
    folder: str,
    *,
    name: str,
    alias: list[str] | None = None,
    metric: list[str] | None = None,
    checkpoint: str | None = None,
    run: str | None = None,
    registry: str | None = None,
) -> None:
    """Register a folder, such as `export` writes, as a version of a model.

    Args:
        folder: What to register.
        name: Of the model.
        alias: Names to move to it, such as production.
        metric: What was measured, such as val_loss=2.31.
        checkpoint: The checkpoint that it was exported from; step and uuid are read from it.
        run: The training run that it comes from.
        registry: Folder or URL; by default $LIGHTNING_LLM_REGISTRY, or the folder `registry`.
    """
    made = register_folder(
        folder,
        name,
        registry=registry,
        metrics=dict(_metric(text) for text in metric or ()),
        checkpoint=checkpoint,
        run=run,
        aliases=alias or (),
    )
    print(describe(made))


def promote(name: str, version: str, alias: str, *, registry: str | None = None) -> None:
    """Move an alias, such as production, to a version.

    Args:
        name: Of the model.
        version: A number or an alias.
        alias: What to move.
        registry: Folder or URL; by default $LIGHTNING_LLM_REGISTRY, or the folder `registry`.
    """
    print(describe(open_registry(registry).promote(name, version, alias)))


def pull(name: str, target: str, *, version: str = LATEST, registry: str | None = None) -> None:
    """Copy a version into a folder, and verify every file.

    Args:
        name: Of the model.
        target: The folder to make.
        version: A number or an alias.
        registry: Folder or URL; by default $LIGHTNING_LLM_REGISTRY, or the folder `registry`.
    """
    where = open_registry(registry)
    chosen = where.get(name, version)
    folder = where.pull(name, str(chosen.version), target)
    print(f"{folder}: {describe(chosen)}, verified")


COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_versions,
    "register": register,
    "promote": promote,
    "pull": pull,
}


def main(arguments: list[str]) -> int:
    """Runs one of the commands; returns the exit code: 0 done, 1 stored files are damaged, 2 wrong arguments."""
    try:
        return run_group("registry", COMMANDS, arguments)
    except VerificationError as error:
        print(f"lightning-llm registry: {error}", file=sys.stderr)
        return FAILED


def describe(version: ModelVersion) -> str:
    """One line."""
    aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
    number = "without a number yet" if version.version is None else version.version
    return f"{version.name} {number}{aliases} at {version.location}, {version.digest}"


def table_of(versions: list[ModelVersion]) -> Table:
    """A row for each version."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "version", "aliases", "metrics", "step", "from", "created", "digest"):
        right = column in ("version", "step")
        table.add_column(
            column, overflow="fold", justify="right" if right else "left", no_wrap=right or column == "created"
        )
    for version in versions:
        lineage = version.lineage
        source = lineage.run or (Path(lineage.checkpoint).name if lineage.checkpoint else "")
        cells = (
            version.name,
            str(version.version),
            ", ".join(version.aliases),
            ", ".join(f"{name} {value:.4g}" for name, value in sorted(version.metrics.items())),
            "" if lineage.step is None else f"{lineage.step:,}",
            source,
            f"{version.created:%Y-%m-%d %H:%M}",
            version.digest.partition(":")[2][:8],
        )
        table.add_row(*map(Text, cells))
    return table


def _metric(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        if name and equals:
            return name, float(value)
    except ValueError:
        pass
    raise ConfigurationError(f"--metric {text!r} is not NAME=NUMBER, such as val_loss=2.31.")
