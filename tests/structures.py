"""Compares nested data with what somebody else's types have kept of it."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any


def lost(given: Any, kept: Any, path: str = "") -> list[str]:
    """Where a part of what was given is not, or is otherwise, in what was kept; what was added is no loss."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [place for name, part in given.items() for place in lost(part, kept.get(name), f"{path}.{name}")]
    if isinstance(given, list) and isinstance(kept, list):
        pairs = enumerate(zip_longest(given, kept))
        return [place for number, pair in pairs for place in lost(*pair, f"{path}[{number}]")]
    return [] if given == kept else [path]
