"""What was seen of each request, and what it comes to. Names and definitions are those of vLLM's benchmarks.

TTFT: time to first token. TPOT: time per output token after the first, as a request's mean. ITL: time between two
pieces of a stream. E2EL: until the last token. Times are seconds within, milliseconds in results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from lightning_llm.errors import ConfigurationError

PERCENTILES = (50, 90, 99)
LATENCIES = ("ttft", "tpot", "e2el")


@dataclass
class RequestResult:
    """A request as the client saw it.

    Attributes:
        start: When it was due, on the client's clock.
        times: When each piece of the answer came.
        prompt_tokens: Of the prompt.
        output_tokens: Of the answer, as the server counts them; where it does not, its pieces.
        error: Why there is no whole answer.
    """

    start: float
    times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Until the first piece."""
        return self.times[0] - self.start

    @property
    def e2el(self) -> float:
        """Until the last piece."""
        return self.times[-1] - self.start

    @property
    def tpot(self) -> float:
        """Per token after the first; 0 where there is no other."""
        return (self.times[-1] - self.times[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    @property
    def itls(self) -> list[float]:
        """Between one piece and the next."""
        return [after - before for before, after in pairwise(self.times)]


def parse_goodput(limits: Sequence[str]) -> dict[str, float]:
    """`["ttft:200", "tpot:50"]` as milliseconds by name.

    Raises:
        ConfigurationError: Another form, or another name.
    """
    parsed = {}
    for limit in limits:
        name, _, number = limit.partition(":")
        try:
            parsed[name] = float(number)
        except ValueError:
            parsed[name] = -1.0
        if name not in LATENCIES or not parsed[name] > 0:
            raise ConfigurationError(
                f"--goodput {limit!r} is not NAME:MILLISECONDS, such as ttft:200; names are {', '.join(LATENCIES)}."
            )
    return parsed


def is_good(result: RequestResult, goodput: Mapping[str, float]) -> bool:
    """Whether a request stayed within all limits (milliseconds)."""
    return all(1000 * getattr(result, name) <= limit for name, limit in goodput.items())


def summarize(
    results: Sequence[RequestResult], duration: float, goodput: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """All figures of a run.

    Args:
        results: Of all requests.
        duration: Seconds from the first request to the end of the last.
        goodput: Limits in milliseconds that a request must stay within to be counted as good.

    Returns:
        `completed`, `failed`, `errors` (how often each), totals of tokens, throughputs per second, and for each of
        ttft, tpot, itl and e2el its mean, standard deviation, median and percentiles in ms (`p99_itl_ms`).
    """
    done = [result for result in results if result.error is None]
    inputs, outputs = (sum(getattr(one, name) for one in done) for name in ("prompt_tokens", "output_tokens"))
    figures: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(results) - len(done),
        "errors": dict(Counter(result.error for result in results if result.error is not None).most_common()),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / duration,
        "request_goodput": sum(is_good(one, goodput) for one in done) / duration if goodput else None,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
    }
    figures |= statistics_of("ttft", [one.ttft for one in done])
    figures |= statistics_of("tpot", [one.tpot for one in done if one.output_tokens > 1])
    figures |= statistics_of("itl", [gap for one in done for gap in one.itls])
    figures |= statistics_of("e2el", [one.e2el for one in done])
    return figures


def statistics_of(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """`mean_ttft_ms` and so on; None where nothing was measured."""
    values = 1000 * np.asarray(seconds, dtype=float)
    known = len(values) > 0
    figures = {
        f"mean_{name}_ms": float(values.mean()) if known else None,
        f"std_{name}_ms": float(values.std()) if known else None,
        f"median_{name}_ms": float(np.median(values)) if known else None,
    }
    for percent in PERCENTILES:
        figures[f"p{percent}_{name}_ms"] = float(np.percentile(values, percent)) if known else None
    return figures
