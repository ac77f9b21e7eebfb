"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def until(condition: Callable[[], Found], limit: float = 60.0, what: str = "it") -> Found:
    """What a condition gives as soon as that is true.

    Args:
        condition: Asked again and again.
        limit: Seconds.
        what: Is waited for, for the failure's text.
    """
    deadline = time.monotonic() + limit
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {limit} s: {what}"
        time.sleep(0.02)
    return found
