"""What clients may ask for: everything else is refused with the name of the field."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.errors import RequestError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": 5}, "stop must be a list, not 5"),
        ({"stop": [5]}, "stop must be texts"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list, not 5"),
        ({"stop_token_ids": "5"}, "stop_token_ids must be a list, not '5'"),
        ({"logit_bias": [1]}, r"logit_bias must map token ids to numbers, not \[1\]"),
        ({"grammar": "x"}, "grammar must be a Grammar, not 'x'"),
        ({"temperature": "1"}, "temperature must be a finite number, not '1'"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty must be at least 0.01 and at most 100, not 1e-40"),
        ({"seed": 2**63}, "seed must be"),
    ],
    ids=str,
)
def test_what_is_of_the_wrong_type_or_size_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        SamplingParams(**fields)
    assert refused.value.param == next(iter(fields))


def test_what_may_be_left_out() -> None:
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None, seed=-1) == SamplingParams()  # type: ignore[arg-type]
    assert SamplingParams(stop="x", stop_token_ids=[1, 2]) == SamplingParams(stop=("x",), stop_token_ids=(1, 2))  # type: ignore[arg-type]
