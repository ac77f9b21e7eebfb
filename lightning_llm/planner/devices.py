"""The one table of devices: peaks, memory and links, each from a data sheet.

The planner computes with it; `callbacks/throughput.py` finds the peak of the device that a run is on.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner import hosts
from lightning_llm.planner.hosts import GB, Host

TFLOPS = 10**12


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a device can do at best.

    Attributes:
        name: What the command line calls it.
        marks: Parts of the name that `torch.cuda.get_device_name` gives, by which a running device is known.
        bfloat16: Dense peak of matrix products in bfloat16 (float16 alike), FLOP/s. NVIDIA's sheets quote twice that,
            with sparsity.
        float8: Dense peak in float8, FLOP/s; None where there are no such units.
        float32: Dense peak in float32 as torch uses it by default (no TF32), FLOP/s.
        memory: Bytes.
        memory_bandwidth: Bytes per second.
        node_link: To a device in the same node, bytes per second and direction, all links together.
        network_link: To another node, bytes per second and direction, this device's share.
        host_link: To host memory, bytes per second and direction, this device's share when all of a node copy at once.
        host: What a node with such devices usually has besides.
        per_node: Devices in a node, usually.
        source: Where the figures stand.
    """

    name: str
    marks: tuple[str, ...]
    bfloat16: float
    float8: float | None
    float32: float
    memory: float
    memory_bandwidth: float
    node_link: float
    network_link: float
    host_link: float
    host: Host
    per_node: int
    source: str

    def peak(self, dtype: str) -> float:
        """Dense peak of matrix products, FLOP/s.

        Args:
            dtype: "bfloat16", "float32" or "float8".
        """
        peak = {"bfloat16": self.bfloat16, "float32": self.float32, "float8": self.float8}[dtype]
        if peak is None:
            raise ConfigurationError(f"Device {self.name} has no {dtype} matrix units. Use bf16 there.")
        return peak


def _device(
    name: str,
    *marks: str,
    bf16: float,
    fp8: float | None,
    fp32: float,
    memory: float,
    bandwidth: float,
    link: float,
    network: float,
    pcie: float,
    host: Host,
    source: str,
    per_node: int = 8,
) -> Device:
    """A row in the units of data sheets: TFLOP/s, GB, GB/s."""
    return Device(
        name=name,
        marks=marks,
        bfloat16=bf16 * TFLOPS,
        float8=None if fp8 is None else fp8 * TFLOPS,
        float32=fp32 * TFLOPS,
        memory=memory * GB,
        memory_bandwidth=bandwidth * GB,
        node_link=link * GB,
        network_link=network * GB,
        host_link=pcie * GB,
        host=host,
        per_node=per_node,
        source=source,
    )


# The first row whose mark is in a device's name counts, so longer marks stand first. `network` is one 400 Gbit/s port
# a device (H100 and later), 200 Gbit/s (A100) or 100 Gbit/s, as in the vendors' reference nodes; a workstation has 25.
# Memory is what a sheet says in GB, of which HBM parts hold GiB. `pcie` is x16 of generation 5 (63) or 4 (31.5); in a
# DGX A100 two devices share one.
GIB_PER_GB = 1.024**3
DEVICES: tuple[Device, ...] = (
    _device(
        "b200", "B200", bf16=2250, fp8=4500, fp32=75, memory=180, bandwidth=7700, link=900, network=50,
        pcie=63, host=hosts.DGX_B200,
        source="NVIDIA DGX B200 data sheet (1,440 GB, 64 TB/s and 72 PFLOPS sparse FP8 for 8)",
    ),
    _device(
        "h200-nvl", "H200 NVL", bf16=835, fp8=1670.5, fp32=60, memory=141, bandwidth=4800, link=450, network=50,
        per_node=4, pcie=63, host=hosts.SERVER, source="NVIDIA H200 data sheet, NVL",
    ),
    _device(
        "h200", "H200", bf16=989.4, fp8=1978.9, fp32=67, memory=141, bandwidth=4800, link=450, network=50,
        pcie=63, host=hosts.DGX_H100, source="NVIDIA H200 data sheet, SXM",
    ),
    _device(
        "h100-nvl", "H100 NVL", bf16=835, fp8=1670.5, fp32=60, memory=94, bandwidth=3900, link=300, network=50,
        per_node=2, pcie=63, host=hosts.SERVER, source="NVIDIA H100 data sheet, NVL",
    ),
    _device(
        "h100-pcie", "H100 PCIe", bf16=756, fp8=1513, fp32=51, memory=80 * GIB_PER_GB, bandwidth=2000, link=64,
        network=50, pcie=63, host=hosts.SERVER, source="NVIDIA H100 PCIe data sheet (PCIe 5.0 x16 between cards)",
    ),
    _device(
        "h100", "H100", bf16=989.4, fp8=1978.9, fp32=67, memory=80 * GIB_PER_GB, bandwidth=3350, link=450, network=50,
        pcie=63, host=hosts.DGX_H100, source="NVIDIA H100 data sheet, SXM",
    ),
    _device(
        "a100-80g", "A100 SXM4 80GB", "A100 80GB", bf16=312, fp8=None, fp32=19.5, memory=80 * GIB_PER_GB,
        bandwidth=2039, link=300, network=25, pcie=15.8, host=hosts.DGX_A100, source="NVIDIA A100 data sheet, 80GB SXM",
    ),
    _device(
        "a100-40g", "A100", bf16=312, fp8=None, fp32=19.5, memory=40 * GIB_PER_GB, bandwidth=1555, link=300, network=25,
        pcie=15.8, host=hosts.DGX_A100_320, source="NVIDIA A100 data sheet, 40GB SXM",
    ),
    _device(
        "l40s", "L40S", bf16=362, fp8=733, fp32=91.6, memory=48 * GIB_PER_GB, bandwidth=864, link=32, network=25,
        pcie=31.5, host=hosts.SERVER, source="NVIDIA L40S data sheet (PCIe 4.0 x16 between cards)",
    ),
    _device(
        "l40", "L40", bf16=181, fp8=362, fp32=90.5, memory=48 * GIB_PER_GB, bandwidth=864, link=32, network=25,
        pcie=31.5, host=hosts.SERVER, source="NVIDIA L40 data sheet (PCIe 4.0 x16 between cards)",
    ),
    _device(
        "l4", "L4", bf16=121, fp8=242.5, fp32=30.3, memory=24 * GIB_PER_GB, bandwidth=300, link=32, network=12.5,
        pcie=31.5, host=hosts.SERVER, source="NVIDIA L4 data sheet (PCIe 4.0 x16 between cards)",
    ),
    _device(
        "4090", "RTX 4090", bf16=165.2, fp8=330.3, fp32=82.6, memory=24 * GIB_PER_GB, bandwidth=1008, link=32,
        network=3.1, pcie=31.5, host=hosts.WORKSTATION,
        source="NVIDIA Ada white paper, float32 accumulation (PCIe 4.0 x16 between cards)",
    ),
    _device(
        "3090", "RTX 3090", bf16=71, fp8=None, fp32=35.6, memory=24 * GIB_PER_GB, bandwidth=936, link=32, network=3.1,
        pcie=31.5, host=hosts.WORKSTATION,
        source="NVIDIA GA102 white paper, float32 accumulation (PCIe 4.0 x16 between cards)",
    ),
    _device(
        "mi300x", "MI300X", bf16=1307.4, fp8=2614.9, fp32=163.4, memory=192 * GIB_PER_GB, bandwidth=5300, link=448,
        network=50, pcie=63, host=hosts.DGX_H100,
        source="AMD Instinct MI300X data sheet (7 Infinity Fabric links of 64 GB/s and direction)",
    ),
    # Not a product: what a rank on a shared server may have. For rehearsals without accelerators.
    _device(
        "cpu", bf16=3, fp8=None, fp32=3, memory=32, bandwidth=50, link=10, network=3.1, pcie=50, host=hosts.NONE,
        source="nominal, no data sheet"
    ),
)  # fmt: skip


def device(name: str) -> Device:
    """The row that is called `name`.

    Raises:
        ConfigurationError: There is none; lists them.
    """
    for row in DEVICES:
        if row.name == name.lower():
            return row
    raise ConfigurationError(
        f"There is no device {name!r} in the table. Devices: {', '.join(d.name for d in DEVICES)}."
    )


def device_named(full_name: str) -> Device | None:
    """The row of a running device, or None when it is not in the table.

    Args:
        full_name: As `torch.cuda.get_device_name` gives it. A slice of a device (MIG) counts as unknown.
    """
    if " MIG " in full_name:
        return None
    words = f" {full_name.replace('-', ' ')} "  # "NVIDIA A100-SXM4-80GB", but not the B200 in "NVIDIA GB200"
    return next((row for row in DEVICES if any(f" {mark} " in words for mark in row.marks)), None)
