"""Log lines: what they say, what they never say, and that uvicorn's are not beside them."""

from __future__ import annotations

import io
import json
import logging
import logging.config
from collections.abc import Iterator

import pytest
import uvicorn

from lightning_llm.serving.engine.outputs import Usage
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.server.observability.logs import LogFormat, log_config, log_request
from lightning_llm.serving.server.observability.record import RequestRecord, ResponseRecord

NAMES = ("lightning_llm", "litserve", "uvicorn", "uvicorn.access")


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    kept = [(logging.getLogger(name), dict(logging.getLogger(name).__dict__)) for name in NAMES]
    yield
    for logger, state in kept:
        logger.__dict__.update(state)
        logger.manager._clear_cache()


def logged(format: LogFormat, *calls: tuple, level: str = "INFO") -> list[str]:
    """Lines that `log_request` writes."""
    logging.config.dictConfig(log_config(format, level))
    stream = io.StringIO()
    logging.getLogger("lightning_llm").handlers[0].stream = stream
    for call in calls:
        log_request(*call)
    return stream.getvalue().splitlines()


def answered(prompt: str | None = None) -> RequestRecord:
    return RequestRecord(
        request_id="chatcmpl-1",
        model="tiny",
        params=SamplingParams(),
        prompt=prompt,
        arrival=10.0,
        first_token=10.25,
        prompt_tokens=12,
        completion_tokens=5,
        cached_tokens=8,
        finish_reasons=["stop"],
        usages=[Usage(12, 5, 8, 0, 0, 0, 0)],
    )


def response(**kwargs: object) -> ResponseRecord:
    values: dict[str, object] = {"method": "POST", "route": "/v1/chat/completions", "path": "/v1/chat/completions"}
    values |= {
        "status": 200,
        "duration": 0.4123,
        "stream": True,
        "request_id": "r-1",
        "client": "10.0.0.7",
        "headers": {"authorization": "Bearer sk-1"},
    }
    return ResponseRecord(**(values | kwargs))


def test_a_request_is_one_json_object():
    (line,) = logged("json", (response(), answered()))
    fields = json.loads(line)
    assert fields.pop("time").endswith("+00:00")
    assert fields == {
        "level": "info",
        "logger": "lightning_llm.serving.requests",
        "message": "POST /v1/chat/completions 200",
        "request_id": "r-1",
        "response_id": "chatcmpl-1",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "duration": 0.4123,
        "client": "10.0.0.7",
        "client_disconnected": False,
        "model": "tiny",
        "operation": "chat",
        "stream": True,
        "engine": 0,
        "prompt_tokens": 12,
        "cached_tokens": 8,
        "completion_tokens": 5,
        "time_to_first_token": 0.25,
        "finish_reason": "stop",
    }


def test_a_request_is_one_line_for_a_person():
    (line,) = logged("text", (response(disconnected=True), answered()))
    assert line[8:] == (
        " info    POST /v1/chat/completions 200, 412 ms, 12 (8 cached) -> 5 tokens, first after 250 ms, stop, "
        "client gone, r-1"
    )


@pytest.mark.parametrize("format", ["json", "text"])
def test_what_a_client_sends_begins_no_line_of_its_own(format):
    (line,) = logged(format, (response(route="other", path="/a\n\x1b[2J09:00:00 info fine", status=404),))
    assert "\x1b" not in line
    assert "404" in line


@pytest.mark.parametrize("format", ["json", "text"])
def test_keys_are_never_logged_and_prompts_only_if_they_are_given(format):
    (plain,) = logged(format, (response(), answered()))
    assert "sk-1" not in plain and "what is it" not in plain
    (told,) = logged(format, (response(), answered(prompt="what is it?")))
    assert "what is it?" in told


def test_levels_follow_the_status_and_probes_are_quiet():
    probe = response(method="GET", route="/livez", path="/livez")
    told_to_wait = response(method="GET", route="/readyz", path="/readyz", status=503)
    responses = [probe, told_to_wait, response(status=503), response(status=404)]
    lines = [json.loads(line) for line in logged("json", *((one,) for one in responses))]
    assert [(line["level"], line["status"]) for line in lines] == [("error", 503), ("info", 404)]
    assert len(logged("json", (probe,), level="DEBUG")) == 1


def test_an_exception_stays_in_its_json_line():
    logging.config.dictConfig(log_config("json"))
    stream = io.StringIO()
    logging.getLogger("lightning_llm").handlers[0].stream = stream
    try:
        raise ValueError("of two\nlines")
    except ValueError:
        logging.getLogger("lightning_llm.serving").exception("It failed")
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: of two\nlines" in json.loads(line)["exception"]


def test_uvicorn_takes_it_and_has_no_access_log_of_its_own():
    uvicorn.Config(app=None, log_config=log_config("json"), log_level="info")
    assert logging.getLogger("uvicorn.access").handlers == []
    assert not logging.getLogger("uvicorn.access").propagate
    assert type(logging.getLogger("uvicorn").handlers[0].formatter).__name__ == "JSONFormatter"
