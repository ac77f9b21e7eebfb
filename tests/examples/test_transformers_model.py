"""The example of a transformers model: same run in every layout, and the commands of its README."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from examples.transformers_model.causal_lm import CausalLMModule
from tests.examples.runs import LAYOUTS, assert_same_run
from tests.strategies.training import VOCAB

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
TIED = {"tie_word_embeddings": True}


def make(model: str, **config: Any) -> CausalLMModule:
    return CausalLMModule(model, config={**SMALL, **config}, learning_rate=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("world_size", "sizes"), LAYOUTS)
def test_every_layout_gives_the_same_run(family: str, world_size: int, sizes: dict[str, Any]) -> None:
    assert_same_run(partial(make, family, **(TIED if family == "qwen3" else {})), world_size, sizes)
