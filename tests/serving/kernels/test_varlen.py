from __future__ import annotations

import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn

from lightning_llm.serving.kernels import varlen
from lightning_llm.serving.kernels.paged import LayerCache
from tests.serving.kernels.cases import LAYER, Case, attend, build, check


@pytest.mark.skipif(
    "block_table" not in inspect.signature(varlen_attn).parameters,
    reason="needs a torch whose kernels take block tables",
)
@pytest.mark.parametrize("window", [None, 7])
def test_torch_takes_the_arguments_that_it_is_given(window: int | None) -> None:
    case = Case(((20, 1), (0, 30)), sliding_window=window)
    q, cache, batch = build(case, torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        views = LayerCache(*(None if part is None else fake.from_tensor(part) for part in cache.layer(LAYER)))
        out = attend(varlen.attend, case, fake.from_tensor(q), views, batch)
    assert out.shape == q.shape
    assert out.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 1, 9, 100])
def test_a_step_on_the_device(window: int | None) -> None:
    device = torch.device("cuda")
    if reason := varlen.missing(device):
        pytest.skip(f"the kernel {reason}")
    varlen.activate(device)
    seqs = ((150, 1), (40, 70), (0, 1), (3, 4))
    case = Case(seqs, block_size=16, head_dim=64, sliding_window=window)
    check(varlen.attend, case, torch.bfloat16, device="cuda", atol=2e-2, rtol=2e-2)
