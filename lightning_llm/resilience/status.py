"""What a monitor shows of its node: `/healthz` for probes, `/metrics` for Prometheus."""

from __future__ import annotations

import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import get_args

from lightning_llm.errors import ConfigurationError
from lightning_llm.resilience.beats import Phase
from lightning_llm.resilience.restarts import Kind
from lightning_llm.resilience.watch import Cause, Verdict, Watch


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
        self._counts: Counter[str] = Counter(dict.fromkeys(get_args(Cause), 0))
        self._restarts: Counter[str] = Counter(dict.fromkeys(get_args(Kind), 0))

    def count(self, verdict: Verdict) -> None:
        """A verdict that is new."""
        self._counts[verdict.cause] += 1

    def restarted(self, kind: Kind) -> None:
        """The launcher starts the ranks again, after a failure of this kind."""
        self._restarts[kind] += 1

    def health(self) -> tuple[int, str]:
        """HTTP status and text: 200 where all is well, 503 with what is wrong."""
        if self.verdicts:
            return 503, "\n".join(map(str, self.verdicts)) + "\n"
        return 200, "ok\n"

    def metrics(self) -> str:
        """In Prometheus' text format."""
        now = time.monotonic()
        ranks = sorted(self._watch.ranks.items())
        samples: dict[str, tuple[str, str, dict[str, float]]] = {
            "rank_step": ("gauge", "Optimizer steps done", {f'rank="{n}"': rank.step for n, rank in ranks}),
            "rank_alive_age_seconds": (
                "gauge",
                "Seconds since the last sign of life",
                {f'rank="{n}"': now - rank.alive_at for n, rank in ranks},
            ),
            "rank_progress_age_seconds": (
                "gauge",
                "Seconds since the last progress",
                {f'rank="{n}"': now - rank.progress_at for n, rank in ranks},
            ),
            "rank_phase": (
                "gauge",
                "1 for the phase that a rank is in",
                {
                    f'rank="{n}",phase="{phase}"': int(rank.phase == phase)
                    for n, rank in ranks
                    for phase in get_args(Phase)
                },
            ),
            "verdicts_total": (
                "counter",
                "What was found wrong, by cause",
                {f'cause="{cause}"': times for cause, times in self._counts.items()},
            ),
            "restarts_total": (
                "counter",
                "Restarts by the launcher, by what ended the ranks",
                {f'cause="{kind}"': times for kind, times in self._restarts.items()},
            ),
        }
        lines = []
        for name, (kind, text, values) in samples.items():
            full = f"lightning_llm_{name}"
            lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
            lines += [f"{full}{{{labels}}} {value}" for labels, value in values.items()]
        return "\n".join(lines) + "\n"


def serve(status: Status, port: int) -> ThreadingHTTPServer:
    """Answers on a port, from a thread.

    Raises:
        ConfigurationError: The port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802  the name is http.server's
            code, text = {
                "/healthz": status.health,
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
