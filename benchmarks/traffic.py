"""What a rank sends: every collective and message that goes through c10d, call by call.

All of them, FSDP's collectives, DTensor's functional ones, a pipeline's messages and our own, end in an operator of
torch's `c10d` library, whatever thread or C++ function calls it. A kernel before those operators' own looks at the
tensors and passes them on; a dispatch mode would see the same, but Tensor subclasses that attention masks are made of
cannot be built under one. Two witnesses that know nothing of it tell whether it missed some: torch's profiler
(`profile_calls`) and the kernel's count of bytes on this process's sockets (`socket_bytes`).

Written against torch 2.13; an operator that is not in the table is an error, not a zero.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import _scoped_library
from torch.utils._pytree import tree_leaves


class Sent(NamedTuple):
    """One call on this rank."""

    group: str
    """Name of the process group."""
    kind: str
    """`all_gather`, `reduce_scatter`, `all_reduce`, `all_to_all`, `send`, `receive`, `broadcast`, ..."""
    payload: int
    """Bytes of the tensors that it was about: the whole of what was gathered, reduced, scattered, sent or received."""
    sent: float
    """Bytes that this rank has to send, at the least: `(n - 1) / n` of the payload in an all-gather or a reduce-scatter
    over n ranks, twice that in an all-reduce, which is one of each (Thakur et al.,
    https://doi.org/10.1177/1094342005051521), and what is for others in an all-to-all."""


@contextmanager
def count_traffic() -> Iterator[list[Sent]]:
    """Writes down what this rank sends within it, in the order of the calls.

    Raises:
        NotImplementedError: This torch has an operator of c10d that the table does not know.
    """
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("c10d::")}
    unknown = names - OPERATIONS.keys() - SILENT
    if unknown:
        raise NotImplementedError(f"{sorted(unknown)} are not in the table of collectives: add them to OPERATIONS")
    calls: list[Sent] = []
    # A key that every call passes and that these operators have no kernel for.
    key = "BackendSelect"
    after = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)

    def watch(name: str) -> Callable[..., Any]:
        operator = getattr(torch.ops.c10d, name.partition("::")[2]).default
        arguments = [argument.name for argument in operator._schema.arguments]
        kind, measure = OPERATIONS[name]

        def kernel(keys: Any, *args: Any, **keywords: Any) -> Any:
            call = _Call(dict(zip(arguments, args, strict=False)) | keywords)
            calls.append(Sent(call.group.group_name, kind, *measure(call)))
            return operator.redispatch(keys & after, *args, **keywords)

        return kernel

    with _scoped_library("c10d", "IMPL") as library:
        for name in names - SILENT:
            library.impl(name.partition("::")[2], watch(name), key, with_keyset=True)
        yield calls


@dataclass(frozen=True)
class _Call:
    """An operator's arguments by name."""

    arguments: dict[str, Any]

    def bytes_of(self, *names: str) -> int:
        """Bytes of the tensors in the first of these arguments that there is."""
        return nbytes(next(self.arguments[name] for name in names if name in self.arguments))

    @property
    def group(self) -> dist.ProcessGroup:
        return dist.ProcessGroup.unbox(self.arguments["process_group"])

    @property
    def others(self) -> int:
        return self.group.size() - 1


def nbytes(tensors: Any) -> int:
    """Bytes of a tensor, or of all tensors in nested lists."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))


# -- payload and least bytes sent, of each kind --


def _all_gather(call: _Call) -> tuple[int, float]:
    mine = call.bytes_of("input_tensor", "input_list", "input_tensors", "inputs")
    return mine * call.group.size(), mine * call.others


def _reduce_scatter(call: _Call) -> tuple[int, float]:
    whole = call.bytes_of("input_tensor", "input_tensors", "inputs")
    return whole, whole * call.others / call.group.size()


def _all_reduce(call: _Call) -> tuple[int, float]:
    whole = call.bytes_of("tensors")
    return whole, 2 * whole * call.others / call.group.size()


def _all_to_all(call: _Call) -> tuple[int, float]:
    arguments = call.arguments
    if "input_tensors" in arguments:  # one tensor for each rank
        parts = [nbytes(tensor) for tensor in arguments["input_tensors"]]
        return sum(parts), sum(parts) - parts[call.group.rank()]
    tensor = arguments["input"]
    whole = nbytes(tensor)
    splits = arguments.get("input_split_sizes") or []
    if not splits or not tensor.shape[0]:
        return whole, whole * call.others / call.group.size()
    return whole, whole - whole // tensor.shape[0] * splits[call.group.rank()]


def _broadcast(call: _Call) -> tuple[int, float]:
    whole = call.bytes_of("tensors")
    return whole, whole * call.others if call.arguments["root_rank"] == call.group.rank() else 0


def _reduce(call: _Call) -> tuple[int, float]:
    whole = call.bytes_of("tensors")
    return whole, 0 if call.arguments["root_rank"] == call.group.rank() else whole


def _gather(call: _Call) -> tuple[int, float]:
    mine = call.bytes_of("input_tensors")
    return mine * call.group.size(), 0 if call.arguments["root_rank"] == call.group.rank() else mine


def _scatter(call: _Call) -> tuple[int, float]:
    part = call.bytes_of("output_tensors")
    return part * call.group.size(), part * call.others if call.arguments["root_rank"] == call.group.rank() else 0


def _send(call: _Call) -> tuple[int, float]:
    whole = call.bytes_of("tensors")
    return whole, whole


def _receive(call: _Call) -> tuple[int, float]:
    return call.bytes_of("tensors"), 0


def _nothing(call: _Call) -> tuple[int, float]:
    return 0, 0


OPERATIONS: dict[str, tuple[str, Callable[[_Call], tuple[int, float]]]] = {
    "c10d::allgather_": ("all_gather", _all_gather),
    "c10d::_allgather_base_": ("all_gather", _all_gather),
    "c10d::allgather_coalesced_": ("all_gather", _all_gather),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", _all_gather),
    "c10d::reduce_scatter_": ("reduce_scatter", _reduce_scatter),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", _reduce_scatter),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", _reduce_scatter),
    "c10d::allreduce_": ("all_reduce", _all_reduce),
    "c10d::allreduce_coalesced_": ("all_reduce", _all_reduce),
    "c10d::alltoall_": ("all_to_all", _all_to_all),
    "c10d::alltoall_base_": ("all_to_all", _all_to_all),
    "c10d::broadcast_": ("broadcast", _broadcast),
    "c10d::reduce_": ("reduce", _reduce),
    "c10d::gather_": ("gather", _gather),
    "c10d::scatter_": ("scatter", _scatter),
    "c10d::send": ("send", _send),
    "c10d::recv_": ("receive", _receive),
    "c10d::recv_any_source_": ("receive", _receive),
    "c10d::barrier": ("barrier", _nothing),
    "c10d::monitored_barrier_": ("barrier", _nothing),
}
# Operators of c10d that send nothing.
SILENT = {"c10d::check_for_nan"}


# -- two witnesses --


@contextmanager
def profile_calls() -> Iterator[Counter[str]]:
    """Counts calls of each kind as torch's profiler sees them; the counter is filled at the end."""
    calls: Counter[str] = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watch:
        yield calls
    for event in watch.key_averages():
        if event.key.startswith("c10d::") and event.key not in SILENT:
            calls[OPERATIONS[event.key][0]] += event.count


def socket_bytes() -> int:
    """Bytes that this process has sent through its open TCP sockets so far, as the kernel counted them (Linux 4.19).

    Unlike /proc/net/dev it does not see what other processes of the machine send.
    """
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            copy = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # closed meanwhile: the listing itself has one
            continue
        with copy:
            if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent, again = struct.unpack_from("<QQ", info, _TCPI_BYTES_SENT)
                total += sent - again
    return total


_TCPI_BYTES_SENT = 200  # offset in struct tcp_info (linux/tcp.h); what was sent again follows
