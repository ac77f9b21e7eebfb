"""Prometheus metrics with vLLM's names and buckets, so that its dashboards, alerts and autoscalers work here too.

What the engines count is read from their `EngineStats` when somebody scrapes; what clients feel is measured in the API
process, as updates pass through it (`RequestObserver`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from lightning_llm.serving.engine.outputs import EngineStats, Update, Usage
from lightning_llm.serving.errors import EngineDiedError, RequestError
from lightning_llm.serving.server.observability.record import RequestRecord, ResponseRecord

PREFIX = "lightning_llm"
VLLM_PREFIX = "vllm"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

# vllm/v1/metrics/buckets.py, seconds
TIME_TO_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
INTER_TOKEN_LATENCY = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
    *(1920.0, 7680.0),
)
ANSWERS = (1, 2, 5, 10, 20)
PREEMPTIONS = (0, 1, 2, 5, 10, 20)

_LABELS = ("model_name", "engine")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Requests that are being computed.", lambda stats: stats.num_requests_running),
    "num_requests_waiting": (
        "Requests that wait for their turn, swapped out ones included.",
        lambda stats: stats.num_requests_waiting,
    ),
    "num_requests_swapped": ("Requests swapped out to the host.", lambda stats: stats.num_requests_swapped),
    "kv_cache_usage_perc": ("Share of the KV cache that requests hold; 1 is all.", lambda stats: stats.kv_cache_usage),
    "kv_cache_blocks": ("Blocks of the KV cache.", lambda stats: stats.blocks_total),
    "kv_cache_blocks_free": (
        "Blocks that no request holds, findable ones included.",
        lambda stats: stats.blocks_free,
    ),
    "kv_cache_blocks_cached": ("Blocks that a prompt can find again.", lambda stats: stats.blocks_cached),
    "swap_blocks_used": ("Blocks of the host that swapped out requests hold.", lambda stats: stats.swap_blocks_used),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], int]]] = {
    "num_preemptions": ("Times that a request had to make room.", lambda stats: stats.num_preemptions),
    "prompt_tokens": ("Tokens of prompts that were computed.", lambda stats: stats.prompt_tokens),
    "generation_tokens": ("Tokens that were generated.", lambda stats: stats.generation_tokens),
    "prefix_cache_queries": ("Tokens looked for in the prefix cache.", lambda stats: stats.prefix_cache_queries),
    "prefix_cache_hits": ("Tokens found in the prefix cache.", lambda stats: stats.prefix_cache_hits),
    "engine_steps": ("Steps of the engine.", lambda stats: stats.steps),
}


def one_two_five(most: int) -> tuple[int, ...]:
    """vLLM's buckets for counts: 1, 2, 5, 10, 20, 50, ... up to `most`."""
    powers = range(len(str(most)))
    return tuple(bound for power in powers for one in (1, 2, 5) if (bound := one * 10**power) <= most)


class ServerMetrics:
    """All metrics of one API process, in a registry of their own.

    Args:
        model_name: The model as served; a label of everything.
        max_model_len: Longest sequence in tokens, to which buckets go.
        vllm_names: Expose everything under `vllm:` as well.
    """

    def __init__(self, model_name: str, *, max_model_len: int, vllm_names: bool = False) -> None:
        self.model_name = model_name
        self.registry = CollectorRegistry()
        self._prefixes = (PREFIX, VLLM_PREFIX) if vllm_names else (PREFIX,)
        self._engines = _EngineCollector(model_name)
        self.registry.register(self._engines)

        def histogram(name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"{PREFIX}:{name}", documentation, _LABELS, buckets=buckets, registry=self.registry)

        tokens = one_two_five(max_model_len)
        self._histograms = {
            name: histogram(name, documentation, buckets)
            for name, documentation, buckets in (
                ("time_to_first_token_seconds", "From arrival to the first token.", TIME_TO_FIRST_TOKEN),
                ("inter_token_latency_seconds", "From one token to the next.", INTER_TOKEN_LATENCY),
                (
                    "request_time_per_output_token_seconds",
                    "Mean time per token of an answer after its first.",
                    INTER_TOKEN_LATENCY,
                ),
                ("e2e_request_latency_seconds", "From arrival to the end of the last answer.", REQUEST_LATENCY),
                ("request_queue_time_seconds", "In the queue.", REQUEST_LATENCY),
                ("request_inference_time_seconds", "From the first schedule to the last token.", REQUEST_LATENCY),
                ("request_prefill_time_seconds", "From the first schedule to the first token.", REQUEST_LATENCY),
                ("request_decode_time_seconds", "From the first token to the last.", REQUEST_LATENCY),
                ("request_prompt_tokens", "Tokens of a prompt.", tokens),
                ("request_generation_tokens", "Tokens of an answer.", tokens),
                ("request_params_n", "The parameter n.", ANSWERS),
                ("request_params_max_tokens", "The parameter max_tokens.", tokens),
                ("request_num_preemptions", "Times that one answer had to make room.", PREEMPTIONS),
            )
        }
        self._cached = Counter(
            f"{PREFIX}:prompt_tokens_cached",
            "Tokens of answered prompts that were found in the prefix cache.",
            _LABELS,
            registry=self.registry,
        )
        self._http_requests = Counter(
            f"{PREFIX}:http_requests", "Responses.", ("method", "handler", "status"), registry=self.registry
        )
        self._http_seconds = Histogram(
            f"{PREFIX}:http_request_duration_seconds",
            "From a request's arrival to the last byte of its response.",
            ("method", "handler"),
            buckets=TIME_TO_FIRST_TOKEN,
            registry=self.registry,
        )
        self._measures: dict[int, EngineMeasures] = {}

    def measures(self, engine: int) -> EngineMeasures:
        """Where the requests of a worker are measured."""
        if engine not in self._measures:
            labels = (self.model_name, str(engine))
            self._measures[engine] = EngineMeasures(
                {name: histogram.labels(*labels) for name, histogram in self._histograms.items()},
                self._cached.labels(*labels),
            )
        return self._measures[engine]

    def set_engines(self, stats: Mapping[int, EngineStats]) -> None:
        """Takes in how the workers stand; of one that is missing only the counters are exposed, as they last were."""
        self._engines.set(stats)
        for engine in stats:
            self.measures(engine)  # from its first scrape on there are zeros, from which rates can be told

    def count_lost(self, engine: int, answers: int) -> None:
        """Counts answers that ended with their worker."""
        self._engines.lost[engine] = self._engines.lost.get(engine, 0) + answers

    def count_response(self, response: ResponseRecord) -> None:
        """Counts an HTTP response."""
        method = response.method if response.method in _METHODS else "other"
        self._http_requests.labels(method, response.route, str(response.status)).inc()
        self._http_seconds.labels(method, response.route).observe(response.duration)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """What a scrape gets, and its content type: OpenMetrics where the `Accept` header asks for it, else text."""
        exposition = _Exposition(self.registry, self._prefixes)
        encode, content_type = choose_encoder(accept)
        if "openmetrics" in content_type:
            # What choose_encoder gives turns the colons of samples into underscores (prometheus_client 0.26).
            return openmetrics.generate_latest(exposition, escaping=openmetrics.ALLOWUTF8), OPENMETRICS
        return encode(exposition), content_type


class EngineMeasures:
    """Where the requests of one worker are measured: histograms with their labels filled in."""

    def __init__(self, histograms: Mapping[str, Histogram], cached: Counter) -> None:
        self.time_to_first_token = histograms["time_to_first_token_seconds"].observe
        self.inter_token_latency = histograms["inter_token_latency_seconds"].observe
        self._observe = {name: histogram.observe for name, histogram in histograms.items()}
        self._cached = cached

    def answer(self, usage: Usage, *, first: bool) -> None:
        """An answer has ended; the prompt counts with the first of a request."""
        observe = self._observe
        observe["request_queue_time_seconds"](usage.queued)
        observe["request_prefill_time_seconds"](usage.prefill)
        observe["request_decode_time_seconds"](usage.decode)
        observe["request_inference_time_seconds"](usage.prefill + usage.decode)
        observe["request_generation_tokens"](usage.completion_tokens)
        observe["request_num_preemptions"](usage.preemptions)
        if usage.completion_tokens > 1:
            observe["request_time_per_output_token_seconds"](usage.decode / (usage.completion_tokens - 1))
        if first:
            observe["request_prompt_tokens"](usage.prompt_tokens)
            self._cached.inc(usage.cached_tokens)

    def request(self, record: RequestRecord, seconds: float) -> None:
        """A request is over."""
        if record.is_answered:
            self._observe["e2e_request_latency_seconds"](seconds)
        if record.params is not None and not record.refused:
            self._observe["request_params_n"](record.params.n)
            if record.params.max_tokens is not None:
                self._observe["request_params_max_tokens"](record.params.max_tokens)


class RequestObserver:
    """Watches one request in the API process; a few microseconds per update.

    Args:
        metrics: Where it is measured.
        record: What is known of it; the observer keeps it up to date.
        clock: Seconds.
    """

    def __init__(
        self, metrics: ServerMetrics, record: RequestRecord, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.record = record
        self._metrics = metrics
        self._measures: EngineMeasures | None = None  # which worker has it is known from its first update
        self._clock = clock
        self._last: dict[int, float] = {}
        self._finished = False

    def on_update(self, update: Update) -> None:
        """What a step brought."""
        record = self.record
        if (measures := self._measures) is None:
            record.engine = update.worker
            measures = self._measures = self._metrics.measures(update.worker)
        if update.token_ids:
            now = self._clock()
            last = self._last.get(update.index)
            if last is not None:
                measures.inter_token_latency(now - last)
            elif record.first_token is None:
                record.first_token = now
                measures.time_to_first_token(now - record.arrival)
            self._last[update.index] = now
            record.completion_tokens += len(update.token_ids)
        if update.finish_reason is not None:
            record.finish_reasons.append(update.finish_reason)
            record.error = update.error or record.error
            if update.usage is not None:
                measures.answer(update.usage, first=not record.usages)
                record.usages.append(update.usage)
                record.cached_tokens = update.usage.cached_tokens

    def on_error(self, error: Exception) -> None:
        """It was refused, or ends before its answers do. What a worker that is gone cannot count any more is counted
        here."""
        record = self.record
        if isinstance(error, RequestError):
            record.refused = True
            return
        if isinstance(error, EngineDiedError):
            answers = 1 if record.params is None else record.params.n
            self._metrics.count_lost(record.engine, answers - len(record.finish_reasons))
        record.error = record.error or str(error) or type(error).__name__

    def on_finish(self) -> None:
        """The request is over, whether answered, failed or given up by its client. Later calls do nothing."""
        if not self._finished:
            self._finished = True
            measures = self._measures or self._metrics.measures(self.record.engine)
            measures.request(self.record, self._clock() - self.record.arrival)


class _Totals:
    """Counts of one worker over all its lives: a worker that starts again counts from zero, its totals do not."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}
        self._now: dict[str, int] = {}

    def set(self, counts: Mapping[str, int]) -> None:
        if any(counts.get(name, 0) < value for name, value in self._now.items()):
            self._before = self.get()
        self._now = dict(counts)

    def get(self) -> dict[str, int]:
        return {name: self._before.get(name, 0) + self._now.get(name, 0) for name in self._before | self._now}


class _EngineCollector(Collector):
    """What the workers say of themselves."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._stats: dict[int, EngineStats] = {}
        self._totals: dict[int, _Totals] = {}
        self.lost: dict[int, int] = {}
        """Answers that ended with their worker, by worker."""

    def set(self, stats: Mapping[int, EngineStats]) -> None:
        self._stats = dict(stats)
        for engine, one in stats.items():
            counts = {name: value(one) for name, (_, value) in _COUNTERS.items()}
            counts |= {f"finished/{reason}": number for reason, number in one.requests_finished.items()}
            counts |= {f"size/{power}": number for power, number in enumerate(one.step_sizes)}
            self._totals.setdefault(engine, _Totals()).set(counts | {"step_tokens": one.step_tokens})

    def collect(self) -> Iterator[Metric]:
        totals = {engine: one.get() for engine, one in sorted(self._totals.items())}
        for name, (documentation, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"{PREFIX}:{name}", documentation, labels=_LABELS)
            for engine, stats in sorted(self._stats.items()):
                gauge.add_metric((self._model_name, str(engine)), value(stats))
            yield gauge
        for name, (documentation, _) in _COUNTERS.items():
            counter = CounterMetricFamily(f"{PREFIX}:{name}", documentation, labels=_LABELS)
            for engine, counts in totals.items():
                counter.add_metric((self._model_name, str(engine)), counts[name])
            yield counter
        yield self._finished(totals)
        yield self._step_sizes(totals)

    def _finished(self, totals: Mapping[int, Mapping[str, int]]) -> Metric:
        counter = CounterMetricFamily(
            f"{PREFIX}:request_success", "Answers that have ended, by why.", labels=(*_LABELS, "finished_reason")
        )
        for engine in sorted(totals.keys() | self.lost.keys()):
            counts = dict(totals.get(engine, {}))
            counts["finished/error"] = counts.get("finished/error", 0) + self.lost.get(engine, 0)
            reasons = {name.removeprefix("finished/") for name in counts if name.startswith("finished/")}
            for reason in sorted({"stop", "length", "abort", "error"} | reasons):
                counter.add_metric((self._model_name, str(engine), reason), counts.get(f"finished/{reason}", 0))
        return counter

    def _step_sizes(self, totals: Mapping[int, Mapping[str, int]]) -> Metric:
        histogram = HistogramMetricFamily(
            f"{PREFIX}:iteration_tokens_total", "Tokens that a step computed.", labels=_LABELS
        )
        for engine, counts in totals.items():
            powers = sum(name.startswith("size/") for name in counts)
            buckets, steps = [], 0
            for power in range(max(powers, 15)):  # up to 16384 at least, as vLLM has them
                steps += counts.get(f"size/{power}", 0)
                buckets.append((f"{2.0**power}", steps))
            buckets.append(("+Inf", steps))
            histogram.add_metric((self._model_name, str(engine)), buckets, counts["step_tokens"])
        return histogram


class _Exposition(Collector):
    """A registry's metrics under each of some prefixes, without the times at which counters were made."""

    def __init__(self, registry: CollectorRegistry, prefixes: Sequence[str]) -> None:
        self._registry = registry
        self._prefixes = prefixes

    def collect(self) -> Iterator[Metric]:
        metrics = list(self._registry.collect())
        for prefix in self._prefixes:
            for metric in metrics:
                named = Metric(_renamed(metric.name, prefix), metric.documentation, metric.type)
                named.samples = [
                    Sample(_renamed(sample.name, prefix), *sample[1:])
                    for sample in metric.samples
                    if not sample.name.endswith("_created")
                ]
                yield named


def _renamed(name: str, prefix: str) -> str:
    return prefix + name.removeprefix(PREFIX)
