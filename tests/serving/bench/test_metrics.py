"""The figures of a run, from times that are known."""

from __future__ import annotations

import pytest

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.bench.metrics import RequestResult, is_good, parse_goodput, statistics_of, summarize

# Due at 10 s: the first token after 0.2 s, the others 0.1, 0.1 and 0.3 s apart.
FOUR = RequestResult(start=10.0, times=[10.2, 10.3, 10.4, 10.7], prompt_tokens=5, output_tokens=4)
ONE = RequestResult(start=11.0, times=[11.05], prompt_tokens=7, output_tokens=1)
FAILED = RequestResult(start=11.0, times=[11.1], output_tokens=1, error="HTTP 503: full")


def test_latencies_of_a_request() -> None:
    assert FOUR.ttft == pytest.approx(0.2)
    assert FOUR.e2el == pytest.approx(0.7)
    assert FOUR.tpot == pytest.approx(0.5 / 3)
    assert FOUR.itls == pytest.approx([0.1, 0.1, 0.3])
    assert ONE.tpot == 0 and ONE.itls == []


def test_time_per_token_counts_tokens_not_pieces() -> None:
    two_pieces = RequestResult(start=0.0, times=[1.0, 3.0], output_tokens=5)
    assert two_pieces.tpot == pytest.approx(2.0 / 4) and two_pieces.itls == [2.0]


def test_summary() -> None:
    found = summarize([FOUR, ONE, FAILED], 2.0, {"ttft": 100.0})
    assert (found["completed"], found["failed"], found["errors"]) == (2, 1, {"HTTP 503: full": 1})
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (12, 5)
    assert found["request_throughput"] == 1.0 and found["output_throughput"] == 2.5
    assert found["total_token_throughput"] == 8.5
    assert found["request_goodput"] == 0.5  # ONE alone had its token within 100 ms
    assert found["mean_ttft_ms"] == pytest.approx(125)
    assert found["mean_tpot_ms"] == pytest.approx(500 / 3)  # an answer of one token has none
    assert found["median_itl_ms"] == found["p50_itl_ms"] == pytest.approx(100)
    assert found["p99_itl_ms"] == pytest.approx(100 + 0.98 * 200)
    assert found["p90_e2el_ms"] == pytest.approx(50 + 0.9 * 650)


def test_percentiles_lie_between_neighbours() -> None:
    found = statistics_of("itl", [second / 1000 for second in range(1, 101)])
    assert found == pytest.approx(
        {
            "mean_itl_ms": 50.5,
            "std_itl_ms": 28.866070,
            "median_itl_ms": 50.5,
            "p50_itl_ms": 50.5,
            "p90_itl_ms": 90.1,
            "p99_itl_ms": 99.01,
        }
    )


def test_nothing_measured_is_no_number() -> None:
    found = summarize([FAILED], 1.0)
    assert found["mean_ttft_ms"] is None and found["p99_e2el_ms"] is None
    assert found["request_goodput"] is None and found["output_throughput"] == 0


def test_goodput_wants_every_limit_kept() -> None:
    limits = parse_goodput(["ttft:200.001", "tpot:170", "e2el:1000"])
    assert limits == {"ttft": 200.001, "tpot": 170.0, "e2el": 1000.0}
    assert is_good(FOUR, limits)
    for name, limit in (("ttft", 199), ("tpot", 166), ("e2el", 699)):
        assert not is_good(FOUR, limits | {name: limit})


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:fast", "ttft:0", "ttft:-3", "ttft:nan", "itl:20"])
def test_goodput_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is not NAME:MILLISECONDS"):
        parse_goodput([text])
