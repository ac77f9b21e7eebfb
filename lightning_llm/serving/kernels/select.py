"""Which attention kernel runs where. A kernel is a row of `KERNELS`; to add one, add a row.

Called by the runner once, when it is built.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.kernels import cpu, reference
from lightning_llm.serving.kernels.paged import PagedKernel


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a kernel must be able to do: where it runs, and with which types.

    Attributes:
        dtype: Of queries, and of keys and values before they are quantised.
        kv_dtype: "auto", "int8" or "fp8", as the cache keeps them.
    """

    device: torch.device
    dtype: torch.dtype
    kv_dtype: str


@dataclass(frozen=True)
class Kernel:
    """A row of the table.

    Attributes:
        name: What users force it by.
        refuses: Why it cannot serve a need, as the end of a sentence; None if it can. Must not import what may be
            missing.
        load: Makes it ready and returns it; called when it is chosen.
    """

    name: str
    refuses: Callable[[Need], str | None]
    load: Callable[[Need], PagedKernel]


def _varlen_refuses(need: Need) -> str | None:
    if need.device.type != "cuda":
        return f"runs on CUDA devices, not on {need.device.type}"
    if need.dtype not in (torch.float16, torch.bfloat16) or need.kv_dtype != "auto":
        return f"takes float16 and bfloat16, not {need.dtype} with kv_dtype {need.kv_dtype!r}"
    from lightning_llm.serving.kernels import varlen

    return varlen.missing(need.device)


def _load_varlen(need: Need) -> PagedKernel:
    from lightning_llm.serving.kernels import varlen

    varlen.activate(need.device)
    return varlen.attend


def _triton_refuses(need: Need) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    if need.dtype == torch.float64:
        return "takes float16, bfloat16 and float32, not float64"
    if need.device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else f"runs on CUDA devices, not on {need.device.type} (but for TRITON_INTERPRET=1)"
    if need.kv_dtype == "fp8" and torch.cuda.get_device_capability(need.device) < (8, 9):
        return "reads 8-bit floats from compute capability 8.9 on"
    return None


def _load_triton(need: Need) -> PagedKernel:
    from lightning_llm.serving.kernels import triton_paged

    return triton_paged.attend


def _cpu_refuses(need: Need) -> str | None:
    return None if need.device.type == "cpu" else f"runs on CPUs, not on {need.device.type}"


# The first that does not refuse is "auto": on CPUs, a native kernel belongs before "cpu". On CUDA the two do not refuse
# the same things; the reference is for what both leave, and for devices that nobody thought of.
KERNELS: tuple[Kernel, ...] = (
    Kernel("cpu", _cpu_refuses, lambda need: cpu.attend),
    Kernel("varlen", _varlen_refuses, _load_varlen),
    Kernel("triton", _triton_refuses, _load_triton),
    Kernel("reference", lambda need: None, lambda need: reference.attend),
)


def select_kernel(
    device: torch.device | str,
    dtype: torch.dtype,
    kv_dtype: str = "auto",
    *,
    kernel: str = "auto",
) -> tuple[str, PagedKernel]:
    """The best kernel for a need (see `Need`), or the one that `kernel` names; its name and itself.

    Raises:
        ConfigurationError: There is no kernel of that name, or it cannot do this; it says why.
    """
    need = Need(device=torch.device(device), dtype=dtype, kv_dtype=kv_dtype)
    names = [row.name for row in KERNELS]
    if kernel != "auto" and kernel not in names:
        raise ConfigurationError(f"There is no attention kernel {kernel!r}: use auto, {', '.join(names)}.")
    for row in KERNELS:
        if kernel in ("auto", row.name):
            reason = row.refuses(need)
            if reason is None:
                return row.name, row.load(need)
            if kernel != "auto":
                raise ConfigurationError(f"The attention kernel {kernel!r} {reason}: use another, or auto.")
    raise AssertionError("the reference refuses nothing")
