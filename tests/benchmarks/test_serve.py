"""What benchmarks/serve.py makes of what it measures, and that an engine driven by it answers everybody."""

from __future__ import annotations

import pytest
import torch
from effects import drive, join
from over_http import KEYS, _compare
from taking_turns import ratios, spread

from lightning_llm.serving.bench.datasets import random_prompts
from tests.serving.engine.models import make_decoder, make_engine


def engine(**settings):
    sizes = {"kv_cache_blocks": 64, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    return make_engine(make_decoder("llama", torch.float32), **(sizes | settings))


def test_ratios_are_those_of_neighbours() -> None:
    assert ratios([2.0, 9.0, 1.0], [1.0, 3.0, 4.0]) == {"min": 0.25, "median": 2.0, "max": 3.0}
    assert ratios([2.0], [1.0, 3.0]) == {"min": 2.0, "median": 2.0, "max": 2.0}  # one side gave up after its first turn
    assert ratios([], [1.0]) is None and spread([]) is None


def test_sides_are_compared_by_round() -> None:
    def run(value: float) -> dict[str, float]:
        return dict.fromkeys(KEYS, value)

    found = _compare({"ours": [run(1.0), run(2.0)], "litserve": [run(3.0), run(4.0)]})
    assert found["litserve_over_ours"]["p99_ttft_ms"] == {"min": 2.0, "median": 2.5, "max": 3.0}
    without = _compare({"ours": [run(0.0)], "litserve": [run(3.0)]})
    assert without["litserve_over_ours"]["request_goodput"] is None


def test_every_request_is_driven_to_its_end() -> None:
    prompts = random_prompts(6, input_len=9, output_len=[1, 2, 3, 4, 5, 6], vocab_size=90, seed=0)
    arrivals = [0.0, 0.0, 0.0, 0.0, 0.0, 0.05]
    found = drive(engine(), prompts, arrivals)
    assert [one.output_tokens for one in found.results] == [1, 2, 3, 4, 5, 6]
    assert [one.start - found.results[0].start for one in found.results] == pytest.approx(arrivals)
    assert all(one.ttft > 0 and one.e2el <= found.duration for one in found.results)
    assert 1 < found.most_running <= 4


@pytest.mark.parametrize("batching", ["chunked", "continuous"])
def test_a_newcomer_joins_streams_that_run(batching: str) -> None:
    streams = random_prompts(2, input_len=5, output_len=14, vocab_size=90, seed=0)
    [newcomer] = random_prompts(1, input_len=12, output_len=2, vocab_size=90, seed=1)
    running, joined = join(engine(batching=batching), streams, newcomer)
    assert [len(one.times) for one in (*running, joined)] == [14, 14, 2]
    assert all(one.times[7] <= joined.start < one.times[-1] for one in running)


def test_a_static_cache_holds_fewer_sequences() -> None:
    prompts = random_prompts(4, input_len=9, output_len=8, vocab_size=90, seed=0)
    most = {
        kind: drive(engine(kv=kind, kv_cache_blocks=24, max_model_len=48), prompts, [0.0] * 4).most_running
        for kind in ("static", "paged")
    }
    assert most == {"static": 2, "paged": 4}
