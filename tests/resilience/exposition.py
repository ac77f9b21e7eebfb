"""Reads Prometheus' text format."""

from __future__ import annotations


def samples_of(text: str) -> dict[str, float]:
    """Name with labels -> value; a sample that stands there twice is an error."""
    pairs = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    found = {name: float(value) for name, value in pairs}
    assert len(found) == len(pairs), "a sample stands there twice"
    return found


def names_of(text: str) -> set[str]:
    """Of the metrics that have samples."""
    return {sample.partition("{")[0] for sample in samples_of(text)}
