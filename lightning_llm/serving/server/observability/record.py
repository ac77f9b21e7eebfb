"""What is known of a request at its end, for metrics, log and trace alike: `RequestRecord`, `ResponseRecord`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lightning_llm.serving.engine.outputs import Usage
from lightning_llm.serving.engine.params import SamplingParams

Operation = Literal["chat", "text_completion", "embeddings"]  # gen_ai.operation.name


@dataclass(kw_only=True)
class RequestRecord:
    """One prompt and its answers, from arrival to end. Times are seconds of `time.monotonic`.

    Attributes:
        request_id: Its name in the engine, and for the client.
        model: As served.
        operation: What was asked for.
        params: How to answer; None for embeddings.
        prompt: As text, where an option says that prompts are logged.
        engine: The worker that has it.
        arrival: When it came.
        first_token: When the first token of any answer came back.
        prompt_tokens: Of the prompt.
        completion_tokens: That came back, of all answers.
        cached_tokens: Of the prompt, found in the prefix cache; known when an answer has ended.
        finish_reasons: Of the answers that have ended.
        usages: Theirs.
        error: What went wrong in the engine, or with it.
        refused: It was not begun: it cannot be answered as it stands.
    """

    request_id: str
    model: str
    operation: Operation = "chat"
    params: SamplingParams | None = None
    prompt: str | None = field(default=None, repr=False)
    engine: int = 0
    arrival: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    finish_reasons: list[str] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)
    error: str | None = None
    refused: bool = False

    @property
    def is_answered(self) -> bool:
        """Whether every answer came to an end of its own."""
        return len(self.finish_reasons) == (1 if self.params is None else self.params.n)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds."""
        return None if self.first_token is None else self.first_token - self.arrival


def joined(records: Sequence[RequestRecord]) -> RequestRecord:
    """The prompts of one HTTP request as one; the first gives name and parameters."""
    if len(records) == 1:
        return records[0]
    known = [record.cached_tokens for record in records if record.cached_tokens is not None]
    return replace(
        records[0],
        prompt="\n".join(record.prompt for record in records if record.prompt is not None) or None,
        first_token=min((record.first_token for record in records if record.first_token is not None), default=None),
        prompt_tokens=sum(record.prompt_tokens for record in records),
        completion_tokens=sum(record.completion_tokens for record in records),
        cached_tokens=sum(known) if known else None,
        finish_reasons=[reason for record in records for reason in record.finish_reasons],
        usages=[usage for record in records for usage in record.usages],
        error=next((record.error for record in records if record.error is not None), None),
    )


@dataclass(kw_only=True)
class ResponseRecord:
    """How an HTTP response went out.

    Attributes:
        method: "GET", "POST", ...
        route: The route's path as it was declared, or "other": a client cannot make up new ones.
        path: What was asked for, without the query.
        status: HTTP's.
        duration: Seconds from the request's arrival to the response's last byte.
        stream: Whether it went out piece by piece.
        disconnected: The client went away before.
        error_type: The exception's name, if one went through.
        request_id: As the response's `X-Request-Id` has it.
        client: The other side's address.
        server: Our address and port.
        headers: Of the request, names in lower case. They may hold keys: never for a log.
    """

    method: str
    route: str
    path: str
    status: int
    duration: float
    stream: bool = False
    disconnected: bool = False
    error_type: str | None = None
    request_id: str | None = None
    client: str | None = None
    server: tuple[str, int | None] | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
