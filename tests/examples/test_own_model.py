"""The example of a user's own model: same run in every layout, and the commands of its README."""

from __future__ import annotations

from typing import Any

import pytest

from examples.own_model.gpt import GPTModule
from tests.examples.runs import LAYOUTS, assert_same_run
from tests.strategies.training import SEQ_LEN, VOCAB


def make() -> GPTModule:
    return GPTModule(VOCAB, hidden_size=32, num_layers=3, num_heads=4, max_seq_len=SEQ_LEN, learning_rate=1e-2)


@pytest.mark.parametrize(("world_size", "sizes"), [*LAYOUTS, pytest.param(2, {"context_parallel_size": 2}, id="cp2")])
def test_every_layout_gives_the_same_run(world_size: int, sizes: dict[str, Any]) -> None:
    assert_same_run(make, world_size, sizes)
