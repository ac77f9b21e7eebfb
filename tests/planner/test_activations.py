"""The activation formulas against what autograd really saves for one block of the decoder."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.planner.activations import block_bytes, blocks_of, logits_bytes
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.shape import Shape, cut_stages
from tests.planner.shapes import shape_of

FLOAT32 = 4


def saved_bytes(block: nn.Module, x: Tensor, recompute: bool) -> int:
    """Bytes of the storages that autograd keeps for a backward, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    if recompute:
        return x.untyped_storage().nbytes()  # non-reentrant checkpointing keeps its inputs by reference
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("batch", "seq", "kv_heads"), [(1, 256, 8), (2, 512, 2), (3, 128, 4)])
def test_a_block_keeps_what_the_table_says(batch: int, seq: int, kv_heads: int, qk_norm: bool) -> None:
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        qk_norm=qk_norm,
    )
    shape = Shape.of(config)
    x = torch.randn(batch, seq, 256, requires_grad=True)
    planned = block_bytes(
        shape, shape.layers[0], Layout(microbatch_size=batch), Workload(seq_len=seq, precision="32-true")
    )
    # Two things that torch's CPU kernels keep and its CUDA kernels do not: rms_norm is composed of smaller operations
    # there, which keep what is normalised; and attention's output is laid out by heads, so that o_proj needs a copy.
    tokens = batch * seq
    composed = 2 * 256 + ((8 + kv_heads) * 32 if qk_norm else 0)
    on_cpu_alone = FLOAT32 * tokens * (composed + 8 * 32)
    block = Decoder(config).model.layers["0"]
    assert saved_bytes(block, x, recompute=False) - on_cpu_alone == planned.kept
    assert saved_bytes(block, x, recompute=True) == planned.kept_full


def test_a_layer_in_the_papers_units() -> None:
    """Bytes per token and hidden width, as Korthikanti et al. write them (34, with dropout and GELU): two norms' inputs
    and outputs 2 each, q and attention's output 2 each, k and v 2 * kv / heads each, SwiGLU four times its width."""
    shape = shape_of("llama3-8b")
    layout, workload = Layout(), Workload(seq_len=8192)
    per_token = block_bytes(shape, shape.layers[0], layout, workload).kept / 8192 / shape.hidden
    kv = shape.kv_heads * shape.head_dim / shape.hidden
    assert per_token == pytest.approx(2 * (4 + 2 + 2 * kv + 4 * 14336 / 4096), rel=0.01)  # the rest is float32 scalars


@given(st.sampled_from([1, 2, 4, 8]), st.booleans(), st.sampled_from(["bf16-mixed", "32-true"]))
@settings(deadline=None)
def test_recomputation_keeps_less_and_tensor_parallelism_shares(tensor: int, sequence: bool, precision: str) -> None:
    shape, workload = shape_of("llama3-70b"), Workload(seq_len=8192, precision=precision)
    one = block_bytes(shape, shape.layers[0], Layout(), workload)
    many = block_bytes(
        shape, shape.layers[0], Layout(tensor_parallel_size=tensor, sequence_parallel=sequence), workload
    )
    # Over many tensor ranks "selective" keeps little less than "none": what is whole (row-parallel products, gathered
    # inputs) is not shared, and it keeps all of that.
    assert many.kept_full < many.kept_selective
    assert many.kept_selective < many.kept or tensor > 4
    assert one.kept / tensor <= many.kept * (1 + 1e-12) and many.kept <= one.kept
    assert many.kept_full == one.kept_full / (tensor if sequence else 1)


def test_every_nth_block_is_recomputed() -> None:
    shape = shape_of("small")
    (stage,) = cut_stages(shape, (6,))
    assert {(kind.recompute, kind.number) for kind in blocks_of(stage, 4)} == {("full", 2), ("none", 4)}
    assert {(kind.recompute, kind.number) for kind in blocks_of(stage, "selective")} == {("selective", 6)}


def test_logits_are_shared_by_tensor_and_context_ranks() -> None:
    shape, workload = shape_of("llama3-8b"), Workload(seq_len=8192)
    one = logits_bytes(shape, Layout(), workload)
    assert one.output == 2 * 8192 * 128256 and one.loss == 4 * 8192 * 128256
    shared = logits_bytes(shape, Layout(tensor_parallel_size=4, context_parallel_size=2), workload)
    assert shared.output == one.output / 8
