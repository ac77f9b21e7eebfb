"""The Triton kernel, on a CUDA device if there is one, else interpreted (see tests/conftest.py)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from tests.serving.kernels.cases import Case, cases, check

pytest.importorskip("triton")
from lightning_llm.serving.kernels import triton_paged  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter (triton 3.9) keeps bfloat16 as integers and multiplies those.
DEVICE_ONLY = (pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device"))
EXACT = {"atol": 2e-6, "rtol": 1e-6}


@given(case=cases)
@settings(max_examples=12, deadline=None)
def test_any_batch_gives_what_the_reference_gives(case: Case) -> None:
    check(triton_paged.attend, case, torch.float32, device=DEVICE, **EXACT)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=DEVICE_ONLY)])
def test_the_types_that_are_served(kv_dtype: str, dtype: torch.dtype) -> None:
    case = Case(((20, 1), (0, 30), (70, 1), (3, 4)), kv_dtype=kv_dtype, head_dim=24)
    check(triton_paged.attend, case, dtype, device=DEVICE, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("window", [None, 9, 100])
def test_prompts_and_single_tokens_share_a_step(window: int | None) -> None:
    case = Case(((150, 1), (40, 70), (0, 1), (3, 4)), block_size=16, group=3, kv_heads=1, sliding_window=window)
    check(triton_paged.attend, case, torch.float32, device=DEVICE, **EXACT)
