"""Muon and AdamW with moments in bfloat16: the curve of one process in every layout."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.strategies.training import SMALL, on_deepspeed, skip_unless_built, train

STEPS = 5
TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
EP2 = {"expert_parallel_size": 2}
MUON = {"optimizer": "muon"}
TIED = SMALL.replace(tie_word_embeddings=True)
MIXTURE = SMALL.replace(
    num_hidden_layers=2,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    qk_norm=True,
    model_type=None,
)
# Widths that neither two nor four ranks share evenly, three matrices of a shape.
UNEVEN = SMALL.replace(num_hidden_layers=3, intermediate_size=54, hidden_size=36, head_dim=8)


def losses(world_size: int, sizes: dict[str, Any], config: Any, optimizer: dict[str, Any], precision: str) -> Any:
    """Of `STEPS` steps and of the validation after them, on this rank."""
    arguments = {"max_steps": STEPS, "precision": precision, "val_check_interval": STEPS}
    seen = train(world_size, sizes, config, module_arguments=optimizer, **arguments)
    return [*seen["losses"], seen["metrics"]["val_loss"]]


def compare(world_size: int, sizes: dict[str, Any], config: Any, optimizer: Any, precision: str, atol: float) -> None:
    reference = run_distributed(losses, 1, 1, {}, config, optimizer, precision)[0]
    assert len(reference) == STEPS + 1 and max(reference) - min(reference) > 0.1, "the steps must matter"
    for seen in run_distributed(losses, world_size, world_size, sizes, config, optimizer, precision):
        assert seen == pytest.approx(reference, abs=atol)


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        pytest.param(2, {}, id="dp2"),
        pytest.param(2, TP2, id="tp2"),
        pytest.param(2, PP2, id="pp2"),
        pytest.param(4, TP2, id="dp2 x tp2"),
        pytest.param(2, on_deepspeed(0, **PP2), id="DeepSpeed pp2"),
    ],
)
def test_muon_in_float32(world_size: int, sizes: dict[str, Any]) -> None:
    """Its products are in bfloat16, and rounded alike, since every matrix is whole when it is multiplied."""
    compare(world_size, sizes, SMALL, MUON, "32-true", 1e-4)


@pytest.mark.parametrize(
    ("world_size", "sizes", "config"),
    [
        pytest.param(4, TP2, UNEVEN, id="dp2 x tp2, uneven"),
        pytest.param(4, {"replicate_size": 2}, SMALL, id="replicate2 x shard2"),
        pytest.param(4, {**TP2, **PP2}, TIED, id="pp2 x tp2, tied"),
        pytest.param(2, EP2, MIXTURE, id="dp2, ep2"),
        pytest.param(4, EP2, MIXTURE, id="dp4, ep2 x efsdp2"),
        pytest.param(4, {**EP2, **TP2}, MIXTURE, id="dp2 x tp2, ep2 x efsdp2"),
        pytest.param(4, EP2, MIXTURE.replace(moe_intermediate_size=15), id="dp4, ep2 x efsdp2, by experts"),
    ],
)
def test_muon_in_float64(world_size: int, sizes: dict[str, Any], config: Any) -> None:
    """Nothing but the order of sums differs."""
    compare(world_size, sizes, config, MUON, "64-true", 1e-9)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (on_deepspeed(1), "Muon orthogonalises whole matrices, and zero_stage=1 gives each rank flat ranges"),
        (on_deepspeed(0, **TP2), "Muon orthogonalises whole matrices, and tensor_parallel_size=2 leaves each rank a"),
    ],
)
def test_muon_is_refused_where_deepspeed_takes_matrices_apart(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_distributed(losses, 2, 2, sizes, SMALL, MUON, "32-true")


@pytest.mark.parametrize(
    ("world_size", "sizes", "optimizer"),
    [
        pytest.param(4, TP2, "adamw", id="adamw"),
        pytest.param(4, TP2, "muon", id="muon"),
        pytest.param(2, on_deepspeed(2, offload_optimizer="cpu"), "adamw", id="adamw, DeepSpeed"),
    ],
)
def test_moments_in_bfloat16(world_size: int, sizes: dict[str, Any], optimizer: str) -> None:
    skip_unless_built(sizes)
    compare(world_size, sizes, SMALL, {"optimizer": optimizer, "optimizer_state_dtype": "bfloat16"}, "32-true", 1e-4)
