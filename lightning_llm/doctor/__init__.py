"""Is it fit for a run? `collect` looks at this machine, `cluster` at all ranks together; `lightning-llm doctor`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_llm.doctor.machine import collect
    from lightning_llm.doctor.report import Finding, render, to_json

_HOMES = {"Finding": "report", "collect": "machine", "render": "report", "to_json": "report"}
__all__ = ["Finding", "collect", "render", "to_json"]


def __getattr__(name: str) -> Any:
    """Public names, fetched when they are asked for: `--help` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
