"""Logs: a line of JSON, or one for human eyes, per request at its end and per whatever else has something to say.

Prompts, answers and keys are in none of them; an option of the server puts prompts in.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal

from lightning_llm.serving.server.observability.record import RequestRecord, ResponseRecord

log = logging.getLogger("lightning_llm.serving.requests")

LogFormat = Literal["json", "text"]

# Asked for every few seconds by probes, scrapers and pages: a line each would bury the others.
QUIET_ROUTES = frozenset({"/health", "/livez", "/readyz", "/metrics", "/playground/state"})


def log_config(format: LogFormat = "json", level: str = "INFO") -> dict[str, Any]:
    """What `logging.config.dictConfig` and uvicorn's `log_config` take: all of us on stderr, no access log beside ours.

    What LitServe and uvicorn only inform of is left out, unless all is asked for: they say that they run while nobody
    can connect yet. uvicorn's `log_level` counts for its own loggers, whatever this says.

    Args:
        format: "json" for machines, "text" for a terminal.
        level: Least that is logged.
    """
    formatter = JSONFormatter if format == "json" else TextFormatter
    ours = {"handlers": ["stderr"], "level": level.upper(), "propagate": False}
    theirs = ours | {"level": library_level(level)}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"ours": {"()": formatter}},
        "handlers": {
            "stderr": {"class": "logging.StreamHandler", "stream": "ext://sys.stderr", "formatter": "ours"},
        },
        "loggers": {
            "lightning_llm": ours,
            "litserve": theirs,
            "uvicorn": theirs,
            "uvicorn.access": {"handlers": [], "propagate": False},
        },
    }


def library_level(level: str) -> str:
    """Of LitServe and uvicorn, where this is ours."""
    return "WARNING" if level.upper() == "INFO" else level.upper()


def log_request(response: ResponseRecord, request: RequestRecord | None = None) -> None:
    """The one line of a request: how it was answered, and what the model did for it if it got so far."""
    if response.route in QUIET_ROUTES and (response.status < 400 or response.status == 503):  # an answer to a probe
        level = logging.DEBUG
    elif response.status >= 500 or (request is not None and request.error is not None):
        level = logging.ERROR
    else:
        level = logging.INFO
    if log.isEnabledFor(level):
        where = response.path if response.route == "other" else response.route
        message = f"{response.method} {where[:200]} {response.status}"
        log.log(level, "%s", message, extra={"fields": _fields(response, request)})


def _fields(response: ResponseRecord, request: RequestRecord | None) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "request_id": response.request_id,
        "method": response.method,
        "route": response.route,
        "status": response.status,
        "duration": round(response.duration, 6),
        "client": response.client,
        "client_disconnected": response.disconnected,
        "error_type": response.error_type,
    }
    if request is not None:
        ttft = request.time_to_first_token
        fields |= {
            "response_id": request.request_id,
            "model": request.model,
            "operation": request.operation,
            "stream": response.stream,
            "engine": request.engine,
            "prompt_tokens": request.prompt_tokens,
            "cached_tokens": request.cached_tokens,
            "completion_tokens": request.completion_tokens,
            "time_to_first_token": None if ttft is None else round(ttft, 6),
            "finish_reason": ",".join(request.finish_reasons) or None,
            "error": request.error,
            "prompt": request.prompt,
        }
    return {name: value for name, value in fields.items() if value is not None}


class JSONFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, the fields of a request, an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """A line for a terminal: `09:31:02 info  POST /v1/chat/completions 200 in 412 ms, 12 -> 34 tokens, ...`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and an exception below it."""
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        parts = [record.getMessage(), *_told(getattr(record, "fields", {}))]
        # A path or a request id is what a client sent: it must not draw on the terminal or begin lines of its own.
        text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in ", ".join(parts))
        line = f"{clock} {record.levelname.lower():<7} {text}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _told(fields: dict[str, Any]) -> list[str]:
    told = []
    if "duration" in fields:
        told.append(f"{fields['duration'] * 1e3:.0f} ms")
    if "completion_tokens" in fields:
        cached = f" ({fields['cached_tokens']} cached)" if fields.get("cached_tokens") else ""
        told.append(f"{fields['prompt_tokens']}{cached} -> {fields['completion_tokens']} tokens")
    if "time_to_first_token" in fields:
        told.append(f"first after {fields['time_to_first_token'] * 1e3:.0f} ms")
    if "finish_reason" in fields:
        told.append(fields["finish_reason"])
    if fields.get("client_disconnected"):
        told.append("client gone")
    told += [fields[name] for name in ("error_type", "error") if name in fields]
    if "prompt" in fields:
        told.append(f"prompt {fields['prompt']!r}")
    if "request_id" in fields:
        told.append(fields["request_id"])
    return told
