"""Metrics: vLLM's names and buckets, counters that never go back, and what is measured of a request."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from lightning_llm.serving.engine.outputs import EngineStats, Update, Usage
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.server.observability.metrics import RequestObserver, ServerMetrics, one_two_five
from lightning_llm.serving.server.observability.record import RequestRecord, ResponseRecord

STATS = EngineStats(
    num_requests_running=3,
    num_requests_waiting=2,
    num_requests_swapped=1,
    blocks_total=100,
    blocks_free=25,
    blocks_cached=40,
    swap_blocks_used=4,
    num_preemptions=5,
    prefix_cache_queries=600,
    prefix_cache_hits=256,
    prompt_tokens=700,
    generation_tokens=80,
    steps=10,
    requests_finished={"stop": 6, "length": 2, "abort": 1},
    step_tokens=780,
    step_sizes=[4, 0, 0, 3, 0, 0, 0, 0, 3],
)

# vllm/v1/metrics/loggers.py, as the text format has them: name -> type
VLLM = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "num_preemptions_total": "counter",
    "prompt_tokens_total": "counter",
    "prompt_tokens_cached_total": "counter",
    "generation_tokens_total": "counter",
    "prefix_cache_queries_total": "counter",
    "prefix_cache_hits_total": "counter",
    "request_success_total": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "request_params_n": "histogram",
    "request_params_max_tokens": "histogram",
    "request_num_preemptions": "histogram",
    "iteration_tokens_total": "histogram",
}


def make_metrics(**kwargs) -> ServerMetrics:
    return ServerMetrics("tiny", max_model_len=128, **kwargs)


def samples(metrics: ServerMetrics, accept: str = "") -> dict[tuple, float]:
    """Value by name and labels other than the model's."""
    text, content_type = metrics.render(accept)
    parse = parse_openmetrics if "openmetrics" in content_type else parse_text
    return {
        (sample.name, *(value for name, value in sorted(sample.labels.items()) if name != "model_name")): sample.value
        for family in parse(text.decode())
        for sample in family.samples
    }


def usage(**kwargs) -> Usage:
    values = {"prompt_tokens": 12, "completion_tokens": 5, "cached_tokens": 8, "preemptions": 1}
    return Usage(**(values | {"queued": 0.4, "prefill": 0.02, "decode": 0.8} | kwargs))


@pytest.mark.parametrize("prefix", ["lightning_llm", "vllm"])
def test_names_and_types_are_vllms_under_both_prefixes(prefix):
    metrics = make_metrics(vllm_names=True)
    metrics.set_engines({0: STATS})
    text = metrics.render()[0].decode()
    for name, kind in VLLM.items():
        assert f"# TYPE {prefix}:{name} {kind}\n" in text
    assert "_created" not in text


def test_vllm_names_are_an_option():
    assert b"vllm:" not in make_metrics().render()[0]


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "text/html,*/*",
        "text/plain;version=1.0.0;escaping=allow-utf-8",
        "application/openmetrics-text",
        "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5",  # Prometheus 2
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8,text/plain;q=0.5",  # Prometheus 3
    ],
)
def test_every_format_parses_and_says_the_same(accept):
    metrics = make_metrics(vllm_names=True)
    metrics.set_engines({0: STATS, 1: replace(STATS, generation_tokens=7)})
    found = samples(metrics, accept)
    assert found["lightning_llm:num_requests_waiting", "0"] == 2
    assert found["lightning_llm:kv_cache_usage_perc", "0"] == 0.75
    assert found["lightning_llm:generation_tokens_total", "1"] == 7
    assert found["vllm:generation_tokens_total", "1"] == 7
    assert found["lightning_llm:request_success_total", "0", "abort"] == 1
    assert found["lightning_llm:request_success_total", "0", "error"] == 0
    assert ("openmetrics" in metrics.render(accept)[1]) == ("openmetrics" in accept)


def test_steps_by_tokens_are_a_histogram():
    metrics = make_metrics()
    metrics.set_engines({0: STATS})
    found = samples(metrics)
    name = "lightning_llm:iteration_tokens_total"
    assert [found[f"{name}_bucket", "0", bound] for bound in ("1.0", "4.0", "8.0", "256.0", "16384.0", "+Inf")] == [
        4,
        4,
        7,
        10,
        10,
        10,
    ]
    assert found[f"{name}_count", "0"] == STATS.steps
    assert found[f"{name}_sum", "0"] == STATS.step_tokens


def test_counters_go_on_when_a_worker_starts_again_and_stay_when_it_is_away():
    metrics = make_metrics()
    metrics.set_engines({0: STATS, 1: STATS})
    fresh = replace(STATS, prompt_tokens=3, generation_tokens=1, steps=1, requests_finished={}, step_sizes=[1])
    metrics.set_engines({0: fresh})
    found = samples(metrics)
    assert found["lightning_llm:prompt_tokens_total", "0"] == 703
    assert found["lightning_llm:request_success_total", "0", "stop"] == 6
    assert found["lightning_llm:prompt_tokens_total", "1"] == 700
    assert ("lightning_llm:num_requests_running", "1") not in found


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 9)), max_size=30))
def test_a_counter_is_the_sum_over_all_lives_of_a_worker(lives):
    metrics = make_metrics()
    metrics.set_engines({0: replace(STATS, steps=0, generation_tokens=0)})
    expected = steps = tokens = 0
    for restarts, more_steps, more_tokens in lives:
        if restarts and steps and more_steps < steps:  # else it cannot be seen from outside
            steps = tokens = 0
        steps, tokens, expected = steps + more_steps, tokens + more_tokens, expected + more_tokens
        metrics.set_engines({0: replace(STATS, steps=steps, generation_tokens=tokens)})
    assert samples(metrics)["lightning_llm:generation_tokens_total", "0"] == expected


class Clock:
    """Time that goes on when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def watch(metrics: ServerMetrics, record: RequestRecord, clock: Clock) -> RequestObserver:
    return RequestObserver(metrics, record, clock)


def test_what_a_client_feels_is_measured():
    metrics, clock = make_metrics(), Clock()
    params = SamplingParams(n=2, max_tokens=50)
    observer = watch(metrics, RequestRecord(request_id="a", model="tiny", params=params, arrival=99.5), clock)
    for index in (0, 1):
        observer.on_update(Update("a", index, [5], "x"))
    clock.now = 100.1
    observer.on_update(Update("a", 0, [6], "y", finish_reason="stop", usage=usage()))
    clock.now = 102.0
    observer.on_update(Update("a", 1, [7], "", finish_reason="length", usage=usage(completion_tokens=1)))
    observer.on_finish()
    observer.on_finish()
    found = samples(metrics)

    def measured(name: str) -> tuple[float, float]:
        return found[f"lightning_llm:{name}_count", "0"], pytest.approx(found[f"lightning_llm:{name}_sum", "0"])

    assert measured("time_to_first_token_seconds") == (1, 0.5)
    assert measured("inter_token_latency_seconds") == (2, 2.1)
    assert measured("e2e_request_latency_seconds") == (1, 2.5)
    assert measured("request_queue_time_seconds") == (2, 0.8)
    assert measured("request_inference_time_seconds") == (2, 1.64)
    assert measured("request_time_per_output_token_seconds") == (1, 0.2)
    assert measured("request_prompt_tokens") == (1, 12)
    assert measured("request_generation_tokens") == (2, 6)
    assert measured("request_num_preemptions") == (2, 2)
    assert measured("request_params_n") == (1, 2)
    assert measured("request_params_max_tokens") == (1, 50)
    assert found["lightning_llm:prompt_tokens_cached_total", "0"] == 8
    assert found["lightning_llm:time_to_first_token_seconds_bucket", "0", "0.5"] == 1
    assert found["lightning_llm:time_to_first_token_seconds_bucket", "0", "0.25"] == 0


def test_a_request_that_its_client_gave_up_has_no_latency():
    metrics, clock = make_metrics(), Clock()
    observer = watch(metrics, RequestRecord(request_id="a", model="tiny", params=SamplingParams(), arrival=99), clock)
    observer.on_update(Update("a", 0, [5], "x"))
    observer.on_finish()
    found = samples(metrics)
    assert found["lightning_llm:e2e_request_latency_seconds_count", "0"] == 0
    assert found["lightning_llm:time_to_first_token_seconds_count", "0"] == 1
    assert found["lightning_llm:request_params_n_count", "0"] == 1


def test_an_embedding_is_measured_without_tokens():
    metrics = make_metrics()
    observer = RequestObserver(metrics, RequestRecord(request_id="e", model="tiny", operation="embeddings"))
    usage_of = usage(completion_tokens=0)
    observer.on_update(Update("e", finish_reason="stop", usage=usage_of, embedding=[1.0], worker=3))
    observer.on_finish()
    found = samples(metrics)
    assert found["lightning_llm:e2e_request_latency_seconds_count", "3"] == 1
    assert ("lightning_llm:time_to_first_token_seconds_count", "3") in found
    assert found["lightning_llm:time_to_first_token_seconds_count", "3"] == 0


def test_clients_cannot_make_up_label_values():
    metrics = make_metrics()
    for number in range(50):
        metrics.count_response(
            ResponseRecord(method=f"M{number}", route="other", path=f"/{number}", status=404, duration=0.1)
        )
    assert samples(metrics)["lightning_llm:http_requests_total", "other", "other", "404"] == 50


def test_buckets_of_counts():
    assert one_two_five(100) == (1, 2, 5, 10, 20, 50, 100)
    assert one_two_five(4096) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
