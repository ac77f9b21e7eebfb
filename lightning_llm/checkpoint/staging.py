"""A rank's file in memory: what the background process writes while training goes on.

The buffer is an anonymous file (memfd) that both processes map, so that nothing is sent between them, nothing is left
behind when they die, and the size of /dev/shm does not matter. It is kept from save to save.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor
from typing_extensions import Buffer

from lightning_llm.checkpoint.files import TensorEntry, make_header
from lightning_llm.checkpoint.planning import DTYPE_NAMES


def layout(tensors: Mapping[str, Tensor]) -> list[TensorEntry]:
    """Places of tensors in a file, widest elements first, so that each is aligned."""
    entries, start = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        size = tensor.numel() * tensor.dtype.itemsize
        entries.append(TensorEntry(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), start, size))
        start += size
    return entries


def stream(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[Buffer]:
    """A file's bytes in order; one tensor at a time comes to the host, and none is copied that lies there already."""
    entries = layout(tensors)
    yield make_header(entries, metadata)
    for entry in entries:
        yield bytes_of(tensors[entry.name])


def bytes_of(tensor: Tensor) -> Buffer:
    """A tensor's bytes; its own memory if that is contiguous and the host's."""
    if not tensor.numel():
        return b""  # its strides may be such that no view of it as bytes is possible
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class StagingBuffer:
    """Memory shared with the background process, with one file's content.

    Attributes:
        descriptor: To map it in the other process.
        size: Bytes of the content.
    """

    def __init__(self) -> None:
        self.descriptor = _anonymous_file()
        self.size = 0
        self._map: mmap.mmap | None = None
        self._memory: Tensor | None = None
        self._pinned = False

    def stage(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], left_out: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """Copies tensors of any device here, as the file that they will be; returns when they may be changed again.

        Args:
            tensors: By their names in the file.
            metadata: For the file's header.
            left_out: Names of tensors that somebody else copies.

        Returns:
            Where these belong, by name.
        """
        entries = layout(tensors)
        header = make_header(entries, metadata)
        self.size = len(header) + sum(entry.size for entry in entries)
        on_device = {name: tensor.device for name, tensor in tensors.items() if tensor.is_cuda}
        memory = self._reserve(self.size, pin=bool(on_device))
        memory[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        places: dict[str, Tensor] = {}
        for entry in entries:
            start, tensor = len(header) + entry.start, tensors[entry.name].detach()
            if entry.size:
                place = memory[start : start + entry.size].view(tensor.dtype).view(tensor.shape)
                if entry.name in left_out:
                    places[entry.name] = place
                else:
                    place.copy_(tensor, non_blocking=True)
        for device in {device for name, device in on_device.items() if name not in left_out}:
            torch.cuda.synchronize(device)
        return places

    def _reserve(self, size: int, pin: bool) -> Tensor:
        if self._memory is not None and len(self._memory) >= size:
            return self._memory
        self._release()
        os.ftruncate(self.descriptor, size)
        self._map = mmap.mmap(self.descriptor, size)
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8)
        if pin:
            self._pinned = int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0)) == 0
        return self._memory

    def _release(self) -> None:
        if self._pinned and self._memory is not None:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
            self._pinned = False
        self._memory = None
        self._map = None

    def close(self) -> None:
        """Gives the memory back."""
        self._release()
        os.close(self.descriptor)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("lightning_llm_checkpoint", 0)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
