"""Traffic counted by hand for small cases, and the link that each axis lives on."""

from __future__ import annotations

import pytest

from lightning_llm.planner.devices import device
from lightning_llm.planner.estimate import traffic
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.traffic import link_of, links_of, ring
from tests.planner.shapes import h100s, shape_of

WORKLOAD = Workload(seq_len=4096)
H100 = device("h100")


def test_a_ring_sends_all_but_its_own_part() -> None:
    assert ring(800, 8) == 700
    assert ring(800, 1) == 0


def test_axes_that_fit_into_a_node_use_its_links() -> None:
    assert link_of(H100, 8, stride=1, size=8).kind == "node"
    assert link_of(H100, 8, stride=2, size=4).kind == "node"
    outside = link_of(H100, 8, stride=8, size=4)
    assert outside.kind == "network"
    assert outside.bandwidth == pytest.approx(0.8 * H100.network_link)
    # A ring over whole nodes enters and leaves each node once, over all its ports.
    assert link_of(H100, 8, stride=1, size=64).bandwidth == pytest.approx(0.8 * 8 * H100.network_link)


def test_tensor_ranks_are_neighbours_and_stages_far_apart() -> None:
    layout = Layout(tensor_parallel_size=8, data_parallel_size=4, pipeline_parallel_size=4)
    kinds = {axis: link.kind for axis, link in links_of(layout, H100, 8).items()}
    assert kinds["tp"] == "node" and kinds["fsdp"] == kinds["pp"] == "network"


def test_sharded_data_parallelism_gathers_twice_and_reduces_once_per_microbatch() -> None:
    shape = shape_of("llama3-8b")
    n = shape.num_parameters
    ends = shape.embedding.gathered(1, 1) + shape.final.gathered(1, 1)  # gathered once: the backward begins there
    for microbatches in (1, 3):
        layout = Layout(data_parallel_size=8, microbatches=microbatches)
        sends = traffic(shape, layout, WORKLOAD, h100s(8))
        assert set(sends) == {"fsdp"}
        assert sends["fsdp"].sends == pytest.approx(microbatches * (2 * (2 * n - ends) + 4 * n) * 7 / 8)
    kept = traffic(shape, Layout(data_parallel_size=8, zero_stage=2), WORKLOAD, h100s(8))
    assert kept["fsdp"].sends == pytest.approx((2 * n + 4 * n) * 7 / 8)
    summed = traffic(shape, Layout(data_parallel_size=8, zero_stage=0), WORKLOAD, h100s(8))
    assert summed["fsdp"].sends == pytest.approx(2 * 4 * n * 7 / 8)


def test_a_pipeline_gathers_once_per_step_and_sends_its_boundaries() -> None:
    shape = shape_of("llama3-8b")
    layout = Layout(data_parallel_size=4, pipeline_parallel_size=2, microbatches=8)
    sends = traffic(shape, layout, WORKLOAD, h100s(8))
    boundary = 2 * 4096 * shape.hidden
    assert sends["pp"].sends == 8 * boundary
    half = max(  # the stage with the embedding, and the one with the head, are equal but for the last norm
        sum(unit.gathered(1, 1) for unit in shape.layers[:16]) + end.gathered(1, 1)
        for end in (shape.embedding, shape.final)
    )
    assert sends["fsdp"].sends == pytest.approx((2 + 4) * half * 3 / 4)


def test_tensor_parallelism_sends_four_activations_each_way_and_again_when_recomputed() -> None:
    shape = shape_of("llama3-8b")
    hidden = 2 * 4096 * shape.hidden * 7 / 8
    plain = traffic(shape, Layout(tensor_parallel_size=8), WORKLOAD, h100s(8))["tp"].sends
    again = traffic(shape, Layout(tensor_parallel_size=8, recompute="full"), WORKLOAD, h100s(8))["tp"].sends
    ends = 2 * 2 * hidden  # embedding and head
    assert plain == pytest.approx(32 * 2 * 4 * hidden + ends)
    assert again == pytest.approx(32 * 3 * 4 * hidden + ends)


def test_replicas_sum_their_shards() -> None:
    shape = shape_of("llama3-8b")
    sends = traffic(shape, Layout(data_parallel_size=16, replicate_size=2), WORKLOAD, h100s(16))
    assert sends["replicate"].sends == pytest.approx(2 * 4 * shape.num_parameters / 8 / 2, rel=1e-3)
    assert sends["fsdp"].link == "node" and sends["replicate"].link == "network"


def test_context_ranks_pass_keys_and_values_round() -> None:
    shape = shape_of("llama3-8b")
    sends = traffic(shape, Layout(context_parallel_size=4), WORKLOAD, h100s(4))["cp"].sends
    keys_values = 2 * 2 * 1024 * 8 * 128
    assert sends == 32 * 3 * 3 * keys_values  # once forward; keys, values and their gradients backward
