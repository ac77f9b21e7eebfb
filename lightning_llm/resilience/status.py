"""What a monitor shows of its node: `/healthz` and `/livez` for probes, `/metrics` for Prometheus."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, NamedTuple, get_args

from lightning_llm.errors import ConfigurationError
from lightning_llm.resilience.beats import Beat, Phase
from lightning_llm.resilience.restarts import Kind
from lightning_llm.resilience.watch import Cause, Verdict, Watch

# What beats may tell of the training and is shown as it came: name -> what it is.
FIGURES = {
    "train_loss": "Loss of a recent optimizer step",
    "val_loss": "Loss of the last validation",
    "grad_norm": "Norm of the gradients before clipping",
    "tokens_per_second": "Tokens per second of all data ranks together",
    "step_time_seconds": "Seconds per optimizer step",
    "mfu_ratio": "Model FLOPs utilization",
}
# What they may tell beside it: a checkpoint outlives the process that made it, and a score has a rank.
CHECKPOINT_STEP, CHECKPOINT_AGE = "checkpoint_step", "checkpoint_age_seconds"
STRAGGLER_SCORE, STRAGGLER_RANK = "straggler_worst_score", "straggler_rank"


class Family(NamedTuple):
    """A metric with its samples, as Prometheus' text format has them.

    Attributes:
        name: Without the prefix `lightning_llm_`.
        kind: What Prometheus calls its type.
        text: What it is.
        samples: Labels, as `name="value"` with commas between, -> value.
    """

    name: str
    kind: Literal["gauge", "counter"]
    text: str
    samples: Mapping[str, float]

    def __str__(self) -> str:
        full = f"lightning_llm_{self.name}"
        lines = [f"# HELP {full} {self.text}", f"# TYPE {full} {self.kind}"]
        for labels, value in self.samples.items():
            lines.append(f"{full}{{{labels}}} {_number(value)}" if labels else f"{full} {_number(value)}")
        return "\n".join(lines) + "\n"


class Status:
    """The node's state, for whoever asks.

    Args:
        watch: Of the ranks.

    Attributes:
        verdicts: That hold now.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self.verdicts: list[Verdict] = []
        self._started = time.time()
        self._counts: Counter[str] = Counter(dict.fromkeys(get_args(Cause), 0))
        self._restarts: Counter[str] = Counter(dict.fromkeys(get_args(Kind), 0))
        self._figures: dict[str, float] = {}
        self._told_by: tuple[int, int] | None = None  # rank and process
        self._checkpoint: tuple[int, float] | None = None  # its step, and when it was committed, by our clock

    @property
    def checkpoint_step(self) -> int:
        """Of the newest checkpoint that was committed while this listened; 0 if none was."""
        return self._checkpoint[0] if self._checkpoint is not None else 0

    def count(self, verdict: Verdict) -> None:
        """A verdict that is new."""
        self._counts[verdict.cause] += 1

    def restarted(self, kind: Kind) -> None:
        """The launcher starts the ranks again, after a failure of this kind."""
        self._restarts[kind] += 1

    def take(self, beat: Beat, now: float) -> None:
        """A beat has arrived, perhaps with what the training has measured."""
        who = beat.rank, beat.pid
        takes_its_place = self._told_by is not None and beat.rank == self._told_by[0]
        if who != self._told_by and (beat.figures or takes_its_place):  # nothing of what the other measured counts
            self._figures, self._told_by = {}, who
        told = dict(beat.figures)
        step, age = told.pop(CHECKPOINT_STEP, None), told.pop(CHECKPOINT_AGE, None)
        if step is not None and age is not None:
            self._checkpoint = (int(step), now - age)
        self._figures = {**self._figures, **told}  # a new one: `metrics` reads from another thread

    def health(self) -> tuple[int, str]:
        """HTTP status and text: 200 where all is well, 503 with what is wrong."""
        if self.verdicts:
            return 503, "\n".join(map(str, self.verdicts)) + "\n"
        return 200, "ok\n"

    def metrics(self) -> str:
        """In Prometheus' text format."""
        families = (*self._of_ranks(), *self._of_training(), *self._of_monitor())
        return "".join(str(family) for family in families if family.samples)

    def _of_ranks(self) -> Iterator[Family]:
        now = time.monotonic()
        ranks = sorted(self._watch.ranks.items())
        yield Family("rank_step", "gauge", "Optimizer steps done", {f'rank="{n}"': rank.step for n, rank in ranks})
        alive = {f'rank="{n}"': now - rank.alive_at for n, rank in ranks}
        yield Family("rank_alive_age_seconds", "gauge", "Seconds since the last sign of life", alive)
        progress = {f'rank="{n}"': now - rank.progress_at for n, rank in ranks}
        yield Family("rank_progress_age_seconds", "gauge", "Seconds since the last progress", progress)
        phases = {
            f'rank="{n}",phase="{phase}"': int(rank.phase == phase) for n, rank in ranks for phase in get_args(Phase)
        }
        yield Family("rank_phase", "gauge", "1 for the phase that a rank is in", phases)
        wrong = {f'rank="{n}",cause="{verdict.cause}"': 1 for verdict in self.verdicts for n in verdict.ranks}
        yield Family("rank_fault", "gauge", "1 for a rank that hangs, is suspended or has died", wrong)
        found = {f'cause="{cause}"': times for cause, times in self._counts.items()}
        yield Family("verdicts_total", "counter", "What was found wrong, by cause", found)

    def _of_training(self) -> Iterator[Family]:
        figures = self._figures
        for name, text in FIGURES.items():
            yield Family(name, "gauge", text, {"": figures[name]} if name in figures else {})
        if STRAGGLER_SCORE in figures and STRAGGLER_RANK in figures:
            score = {f'rank="{int(figures[STRAGGLER_RANK])}"': figures[STRAGGLER_SCORE]}
            text = "Median computing time over that of the slowest rank, which the label names"
            yield Family(STRAGGLER_SCORE, "gauge", text, score)
        if self._checkpoint is not None:
            step, committed = self._checkpoint
            yield Family(CHECKPOINT_STEP, "gauge", "Step of the newest committed checkpoint", {"": step})
            age = {"": time.monotonic() - committed}
            yield Family(CHECKPOINT_AGE, "gauge", "Seconds since the newest checkpoint was committed", age)

    def _of_monitor(self) -> Iterator[Family]:
        restarts = {f'cause="{kind}"': times for kind, times in self._restarts.items()}
        yield Family("restarts_total", "counter", "Restarts by the launcher, by what ended the ranks", restarts)
        yield Family("monitor_start_time_seconds", "gauge", "Unix time of the monitor's start", {"": self._started})


def _number(value: float) -> str:
    if math.isfinite(value):
        return str(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def serve(status: Status, port: int) -> ThreadingHTTPServer:
    """Answers on a port, from a thread.

    Raises:
        ConfigurationError: The port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802  the name is http.server's
            code, text = {
                "/healthz": status.health,
                "/livez": lambda: (200, "ok\n"),  # that there is an answer says it
                "/metrics": lambda: (200, status.metrics()),
            }.get(self.path, lambda: (404, "not found\n"))()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    try:
        server = ThreadingHTTPServer(("", port), Handler)
    except OSError as error:
        raise ConfigurationError(f"port={port} of the heartbeat's monitor: {error.strerror}. Choose another.") from None
    threading.Thread(target=server.serve_forever, name="status", daemon=True).start()
    return server
