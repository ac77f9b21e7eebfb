"""Precisions: types, the loss scale, and runs in each of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.precision import COMPUTE_DTYPES, PARAMETER_DTYPES, LLMPrecision


@pytest.mark.parametrize("name", ["16-true", "transformer-engine", "fp8"])
def test_another_precision_is_refused_with_those_that_are_there(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"precision='{name}' is not available") as refused:
        LLMPrecision(name)
    assert all(available in str(refused.value) for available in PARAMETER_DTYPES)


@pytest.mark.parametrize(("name", "dtype"), PARAMETER_DTYPES.items())
def test_a_precision_decides_the_types(name: str, dtype: torch.dtype) -> None:
    plugin, linear = LLMPrecision(name), nn.Linear(2, 2)
    assert plugin.convert_module(linear).weight.dtype == dtype
    with plugin.module_init_context():
        assert nn.Linear(2, 2).weight.dtype == dtype
    assert torch.get_default_dtype() == torch.float32
    with plugin.forward_context():
        made = torch.ones(2)
        output = linear(made.to(dtype))
    assert made.dtype == dtype
    assert output.dtype == dtype
    assert torch.get_default_dtype() == torch.float32
    assert plugin.mp_policy.param_dtype == COMPUTE_DTYPES.get(name)
