"""What stands around the devices of a node: host memory, which offloaded states fill, and disks.

`devices.py` says which host a device usually has. Memory modules are in GiB, disks and bandwidths in powers of ten.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GIB = 1024**3
GB = 10**9  # data sheets count in powers of ten

# Enterprise drives of 3.84 TB on PCIe 4.0 (for example Samsung PM9A3): 6.8 GB/s read, 4.0 GB/s written, at best.
DRIVE, DRIVE_READ, DRIVE_WRITE = 3840, 6.8, 4.0


@dataclass(frozen=True, kw_only=True)
class Host:
    """A node without its devices.

    Attributes:
        name: What messages call it.
        memory: Bytes.
        memory_bandwidth: Of all its channels, bytes per second.
        disk: Bytes of local NVMe.
        disk_read, disk_write: Of all its drives together, bytes per second, at best.
        source: Where the figures stand.
    """

    name: str
    memory: float
    memory_bandwidth: float
    disk: float
    disk_read: float
    disk_write: float
    source: str


def _host(name: str, *, gib: float, bandwidth: float, drives: int, source: str) -> Host:
    return Host(
        name=name,
        memory=gib * GIB,
        memory_bandwidth=bandwidth * GB,
        disk=drives * DRIVE * GB,
        disk_read=drives * DRIVE_READ * GB,
        disk_write=drives * DRIVE_WRITE * GB,
        source=source,
    )


DGX_B200 = _host(
    "DGX B200", gib=2048, bandwidth=716.8, drives=8,
    source="NVIDIA DGX B200 user guide: 2 TB, two Xeon 8570 (8 channels of DDR5-5600 each), 8 NVMe of 3.84 TB",
)  # fmt: skip
DGX_H100 = _host(
    "DGX H100", gib=2048, bandwidth=614.4, drives=8,
    source="NVIDIA DGX H100 user guide: 2 TB, two Xeon 8480C (8 channels of DDR5-4800 each), 8 NVMe of 3.84 TB",
)  # fmt: skip
DGX_A100 = _host(
    "DGX A100", gib=2048, bandwidth=409.6, drives=8,
    source="NVIDIA DGX A100 640GB data sheet: 2 TB, two EPYC 7742 (8 channels of DDR4-3200 each), 30 TB of NVMe",
)  # fmt: skip
DGX_A100_320 = _host(
    "DGX A100 320GB", gib=1024, bandwidth=409.6, drives=4,
    source="NVIDIA DGX A100 320GB data sheet: 1 TB, two EPYC 7742 (8 channels of DDR4-3200 each), 15 TB of NVMe",
)  # fmt: skip
# Cards are put into whatever server there is, so these are guesses, which `Cluster` settings replace.
SERVER = _host(
    "server", gib=1024, bandwidth=409.6, drives=2, source="nominal: two sockets of 8 channels of DDR4-3200, two drives"
)
WORKSTATION = _host(
    "workstation", gib=256, bandwidth=204.8, drives=1, source="nominal: 8 channels of DDR4-3200, one drive"
)
# A rank on a CPU computes in host memory: there is nothing to offload to.
NONE = replace(WORKSTATION, name="host", memory=0, memory_bandwidth=50 * GB, disk=0)
