"""`RandomInit`: any part of any tensor can be drawn alone, and the statistics are those promised."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.models import initialization
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.initialization import RandomInit

CONFIG = DecoderConfig.preset("tiny")
SHAPES = CONFIG.parameter_shapes()


def everything(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(None) for _ in shape)


# Larger than one block of rows, smaller than one row per block, and one-dimensional.
TENSORS = {
    "model.embed_tokens.weight": (4096, 256),
    "model.layers.0.mlp.down_proj.weight": (256, 704),
    "wide.weight": (3, initialization._BLOCK_ELEMENTS + 5),
    "flat.weight": (initialization._BLOCK_ELEMENTS * 2 + 7,),
    "stacked.weight": (6, 100, 700),
}
WHOLE = {name: RandomInit(CONFIG, 3).read(name, everything(shape), shape) for name, shape in TENSORS.items()}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(list(TENSORS)))
def test_a_box_is_a_slice_of_the_whole(data, name):
    shape = TENSORS[name]
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    box = tuple(slice(start, stop) for start, stop in bounds)
    assert torch.equal(RandomInit(CONFIG, 3).read(name, box, shape), WHOLE[name][box])


def test_same_seed_same_weights_other_seed_or_name_others():
    shape = (64, 64)
    box = everything(shape)
    one = RandomInit(CONFIG, 0).read("a.weight", box, shape)
    assert torch.equal(one, RandomInit(CONFIG, 0).read("a.weight", box, shape))
    assert not torch.equal(one, RandomInit(CONFIG, 1).read("a.weight", box, shape))
    assert not torch.equal(one, RandomInit(CONFIG, 0).read("b.weight", box, shape))


PINNED = [[0.00043342626, 0.0026050226, -0.0092576444, -0.0096391737]]


def test_weights_are_pinned():
    """Runs must be repeatable across versions of this package: changing these numbers is a breaking change."""
    drawn = RandomInit(CONFIG, 0).read("model.embed_tokens.weight", (slice(0, 1), slice(0, 4)), (4096, 256))
    torch.testing.assert_close(drawn, torch.tensor(PINNED), rtol=1e-5, atol=1e-7)


def test_statistics():
    source = RandomInit(CONFIG, 0)
    for name, shape in SHAPES.items():
        drawn = source.read(name, everything(shape), shape)
        assert drawn.dtype == torch.float32
        if name.endswith("norm.weight"):
            assert torch.equal(drawn, torch.ones(shape))
            continue
        std = 0.02
        if "o_proj" in name or "down_proj" in name:
            std /= math.sqrt(2 * CONFIG.num_hidden_layers)
        assert drawn.std().item() == pytest.approx(std, rel=0.02)
        assert abs(drawn.mean().item()) < 5 * std / math.sqrt(drawn.numel())
    assert torch.equal(source.read("x.q_proj.bias", everything((8,)), (8,)), torch.zeros(8))


def test_rows_across_blocks_are_uncorrelated():
    whole = WHOLE["model.embed_tokens.weight"]
    rows = initialization._BLOCK_ELEMENTS // 256
    assert rows < 4096
    correlation = torch.corrcoef(torch.stack((whole[0], whole[rows], whole[2 * rows])))
    assert (correlation - torch.eye(3)).abs().max() < 0.3


def test_wrong_boxes_are_refused():
    with pytest.raises(ValueError, match="1 slices does not fit"):
        RandomInit(CONFIG).read("a.weight", (slice(0, 1),), (4, 4))
    with pytest.raises(ValueError, match="step 2"):
        RandomInit(CONFIG).read("a.weight", (slice(0, 4, 2), slice(None)), (4, 4))
