"""The device table: complete, plausible, and found by name."""

from __future__ import annotations

import pytest

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner.devices import DEVICES, Device, device, device_named


@pytest.mark.parametrize("row", DEVICES, ids=lambda row: row.name)
def test_every_row_is_in_plausible_units_and_names_its_source(row: Device) -> None:
    assert row.source and row.per_node >= 1
    assert 1e12 <= row.float32 <= row.bfloat16 < 1e16
    assert row.float8 is None or 1.9 < row.float8 / row.bfloat16 < 2.1
    assert 16e9 < row.memory < 1e12
    # Memory is faster than links, and links within a node are no slower than the network.
    assert row.memory_bandwidth > row.node_link >= row.network_link


def test_names_are_unique_and_found() -> None:
    assert len({row.name for row in DEVICES}) == len(DEVICES)
    assert device("H100") is device("h100")
    with pytest.raises(ConfigurationError, match="no device 'h1000'.*a100-40g"):
        device("h1000")


@pytest.mark.parametrize(
    ("full_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100 80GB PCIe", "a100-80g"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GB200", None),
    ],
)
def test_a_running_device_is_known_by_its_full_name(full_name: str, name: str | None) -> None:
    row = device_named(full_name)
    assert (row.name if row else None) == name


def test_a_device_without_float8_units_says_so() -> None:
    with pytest.raises(ConfigurationError, match="a100-80g has no float8"):
        device("a100-80g").peak("float8")
