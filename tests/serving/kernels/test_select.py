from __future__ import annotations

import importlib.util

import pytest
import torch

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.kernels import cpu, reference
from lightning_llm.serving.kernels.select import select_kernel


def test_a_cpu_has_its_own_kernel() -> None:
    assert select_kernel("cpu", torch.bfloat16, "int8") == ("cpu", cpu.attend)


def test_a_device_that_nobody_thought_of_gets_the_reference() -> None:
    assert select_kernel("meta", torch.float64) == ("reference", reference.attend)


def test_a_kernel_can_be_forced() -> None:
    assert select_kernel("cpu", torch.float32, kernel="reference") == ("reference", reference.attend)


@pytest.mark.parametrize(
    ("kernel", "device", "dtype", "words"),
    [
        ("fast", "cpu", torch.float32, "no attention kernel 'fast': use auto, cpu, varlen, triton, reference"),
        ("varlen", "cpu", torch.bfloat16, "runs on CUDA devices, not on cpu"),
        ("varlen", "cuda", torch.float32, "takes float16 and bfloat16, not torch.float32"),
        ("cpu", "cuda", torch.float32, "runs on CPUs, not on cuda"),
        ("triton", "cpu", torch.float64, "needs the package triton|not float64"),
    ],
)
def test_a_kernel_that_cannot_do_it_says_why(kernel: str, device: str, dtype: torch.dtype, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        select_kernel(device, dtype, kernel=kernel)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton_runs_on_a_cpu_only_when_it_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigurationError, match="TRITON_INTERPRET=1"):
        select_kernel("cpu", torch.float32, kernel="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select_kernel("cpu", torch.float32, kernel="triton")[0] == "triton"
