"""What a rank does alone: who it is, how fast it multiplies, whether its memory holds what is written into it."""

from __future__ import annotations

import platform
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import Tensor

from lightning_llm._version import __version__
from lightning_llm.doctor.cluster.measurements import Compute, Device, Memory
from lightning_llm.doctor.cluster.rank import Rank
from lightning_llm.doctor.machine import cpu_name_and_flags
from lightning_llm.errors import ConfigurationError

CHUNK = 256 * 2**20  # bytes of memory that are written at a time
MIXER = 0x9E3779B97F4A7C15 - 2**64  # odd, so that no two words of a pattern are equal, and their bits look random


def describe(rank: Rank) -> list[Device]:
    """Takes the rank's device and tells what it is."""
    cuda = torch.cuda.is_available() if rank.settings.device == "auto" else rank.settings.device == "cuda"
    host = socket.gethostname()
    if not cuda:
        rank.device = torch.device("cpu")
        name, unit = cpu_name_and_flags()[0], f"{host}/cpu"
    elif not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: torch sees no GPU here.")
    else:
        # A launcher that shows each task one GPU numbers it 0 for all of them.
        rank.device = torch.device("cuda", rank.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(rank.device)
        properties = torch.cuda.get_device_properties(rank.device)
        name, unit = properties.name, f"{host}/{properties.uuid}"
    return [
        Device(
            rank=rank.rank,
            host=host,
            local_rank=rank.local_rank,
            name=name,
            unit=unit,
            free_memory=free_memory(rank.device),
            versions=versions(rank.device),
        )
    ]


def versions(device: torch.device) -> dict[str, str]:
    """Of what should be the same on all ranks."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "lightning_llm": __version__}
    if device.type == "cuda":
        found["CUDA"] = torch.version.cuda or torch.version.hip or "?"
        if torch.distributed.is_nccl_available():
            found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        driver = Path("/proc/driver/nvidia/version")
        if driver.is_file() and (number := re.search(r"\d+\.\d+(\.\d+)?", driver.read_text())):
            found["driver"] = number[0]
    return found


def multiply(rank: Rank) -> list[Compute]:
    """Times the same product in rounds: of small integers, so that the result is exact in any order of summing.

    On CUDA in bfloat16 and on all devices at once, as in training, where they share power and cooling. Ranks that share
    a processor take turns: at once they would measure how the system shares it out.
    """
    cuda = rank.device.type == "cuda"
    # As in training: the dtype of mixed precision, and products large enough to draw the device's power.
    dtype = torch.float32 if not cuda else torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    size, least = (8192, 0.1) if cuda else (768, 0.04)
    values = torch.arange(size * size, device=rank.device).remainder_(7).sub_(3).view(size, size)
    matrix = values.to(dtype)
    out = torch.empty_like(matrix)
    rank.tell("computing its first product")
    seconds, digests, shares = [], [], []
    with torch.no_grad(), _exact_sums():
        with rank.in_turn(0):
            _time_products(rank, matrix, out, 1)
            products = max(1, round(least / _time_products(rank, matrix, out, 1)[0]))
        for number in range(rank.settings.rounds):
            with rank.in_turn(number + 1):
                taken, share = _time_products(rank, matrix, out, products)
                seconds.append(taken)
                shares.append(share)
                digests.append(int(out.view(torch.int16 if cuda else torch.int32).sum(dtype=torch.int64)))
    own = None if cuda or torch.get_num_threads() > 1 else sorted(shares)[len(shares) // 2]
    return [
        Compute(
            rank=rank.rank,
            dtype=str(dtype).removeprefix("torch."),
            flops=2.0 * size**3,
            seconds=[seconds],
            digests=digests,
            processor_share=own,
        )
    ]


@contextmanager
def _exact_sums() -> Iterator[None]:
    """Lets no kernel round the parts that it splits a sum into: how it splits differs from device to device."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


def _time_products(rank: Rank, matrix: Tensor, out: Tensor, products: int) -> tuple[float, float]:
    """Seconds of one of so many products, and this thread's processor time over the wall's."""
    torch.mm(matrix, matrix, out=out)  # caches are cold after another rank's turn
    rank.synchronize()
    processor, began = time.thread_time(), time.perf_counter()
    for _ in range(products):
        torch.mm(matrix, matrix, out=out)
    rank.synchronize()
    wall = time.perf_counter() - began
    return wall / products, (time.thread_time() - processor) / wall


def check_memory(rank: Rank) -> list[Memory]:
    """Writes a pattern in which every word is another, reads it back, then the same with every bit turned."""
    sharers = sum(peer.unit == rank.own.unit for peer in rank.peers)
    goal = int(free_memory(rank.device) * rank.settings.memory_share / sharers)
    rank.barrier("free")  # nobody has written before all have looked how much is free
    rank.tell("checking its memory")
    chunks = write(rank.device, goal, rank.settings.memory_seconds / 4)  # what follows takes about three times as long
    wrong = wrong_words(chunks, turned=False)
    for number, chunk in enumerate(chunks):
        fill(chunk, number).bitwise_not_()
    wrong += wrong_words(chunks, turned=True)
    return [Memory(rank=rank.rank, checked=sum(chunk.nbytes for chunk in chunks), wrong=wrong)]


def write(device: torch.device, goal: int, seconds: float) -> list[Tensor]:
    """Takes memory in chunks and fills them, as far as there is time; one chunk's room is left to read them back.

    All is written before anything is read: what is read at once may come from a cache.
    """
    words = max(1, min(CHUNK, goal // 2) // 8)
    until = time.monotonic() + seconds
    chunks: list[Tensor] = []
    while not chunks or (len(chunks) + 2) * words * 8 <= goal and time.monotonic() < until:
        chunks.append(fill(torch.empty(words, dtype=torch.int64, device=device), len(chunks)))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return chunks


def fill(chunk: Tensor, number: int) -> Tensor:
    """Writes what only this place in it, and no chunk of another number, holds."""
    torch.arange(number * chunk.numel(), (number + 1) * chunk.numel(), out=chunk)
    return chunk.mul_(MIXER)


def wrong_words(chunks: Sequence[Tensor], *, turned: bool) -> int:
    """How many words are not as `fill` wrote them, or the same with every bit turned."""
    expected = torch.empty_like(chunks[0])
    wrong = 0
    for number, chunk in enumerate(chunks):
        fill(expected, number)
        if turned:
            expected.bitwise_not_()
        if not torch.equal(chunk, expected):
            wrong += int((chunk != expected).sum())
    return wrong


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken: of the GPU, or of what the system and the control group leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, *_left_in_groups())


def _left_in_groups() -> list[int]:
    """What the limits of this process's control groups (version 2) leave, from the inmost outwards."""
    listing, root = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
    own = listing.read_text().rpartition("0::/")[2].strip() if listing.is_file() else ""
    left = [2**63 - 1]
    for group in (root / own, *(root / own).parents):
        try:
            limit = (group / "memory.max").read_text().strip()
            if limit != "max":
                left.append(max(0, int(limit) - int((group / "memory.current").read_text())))
        except OSError:  # no such group, or no limits in it
            continue
    return left
