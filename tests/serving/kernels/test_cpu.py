from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from lightning_llm.serving.kernels import cpu
from tests.serving.kernels.cases import Case, cases, check

EXACT = {torch.float64: {"atol": 1e-12, "rtol": 1e-12}, torch.float32: {"atol": 2e-6, "rtol": 1e-6}}


@given(case=cases)
@settings(max_examples=60, deadline=None)
def test_any_batch_gives_what_the_reference_gives(case: Case) -> None:
    check(cpu.attend, case, torch.float64, **EXACT[torch.float64])


MIXED = Case(
    tuple((17 * i % 90, 1) for i in range(9)) + ((40, 5), (0, 5), (0, 70), (33, 17)), block_size=16, head_dim=16
)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("group", [1, 2, 3])
def test_a_mixed_batch_in_the_types_that_are_served(window: int | None, kv_dtype: str, group: int) -> None:
    case = Case(**{**vars(MIXED), "sliding_window": window, "kv_dtype": kv_dtype, "group": group})
    check(cpu.attend, case, torch.float32, **EXACT[torch.float32])
    check(cpu.attend, case, torch.bfloat16, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("window", [None, 50, 300])
def test_long_chunks_are_cut_into_rows_that_see_the_right_keys(window: int | None) -> None:
    seqs = ((0, 3 * cpu.CHUNK + 5), (70, cpu.CHUNK), (0, cpu.FEW_QUERIES + 1), (600, 40))
    check(cpu.attend, Case(seqs, kv_heads=1, group=2, sliding_window=window), torch.float64, **EXACT[torch.float64])


def test_a_long_context_is_not_what_short_ones_are_padded_to() -> None:
    blocks = [3, 200, 4, 2, 190, 3]
    groups = list(cpu._similar([0, 1, 2, 3, 4, 5], blocks))
    assert sorted(map(sorted, groups)) == [[0, 2, 3, 5], [1, 4]]
