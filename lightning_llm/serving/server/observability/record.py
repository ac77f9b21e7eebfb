"""`RequestRecord`: all that is known of one request at its end, for metrics, log and trace alike."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_llm.serving.engine.outputs import Update, Usage
from lightning_llm.serving.engine.params import SamplingParams

Operation = Literal["chat", "text_completion", "embeddings"]  # gen_ai.operation.name


@dataclass(kw_only=True)
class RequestRecord:
    """One request to a model, from its arrival to its end. Times are seconds of `time.monotonic`.

    Attributes:
        request_id: Its name in logs, and for the client.
        model: As served.
        operation: What was asked for.
        params: How to answer; None for embeddings.
        stream: Whether the answer goes out piece by piece.
        prompt: As text, for the log; forgotten unless an option says that prompts are logged.
        engine: The worker that has it.
        arrival: When it came.
        first_token: When the first token of any answer came back.
        finish_reasons: Of the answers that have ended, by index.
        usages: Theirs.
        error: What went wrong in the engine.
    """

    request_id: str
    model: str
    operation: Operation = "chat"
    params: SamplingParams | None = None
    stream: bool = False
    prompt: str | None = field(default=None, repr=False)
    engine: int = 0
    arrival: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    finish_reasons: dict[int, str] = field(default_factory=dict)
    usages: dict[int, Usage] = field(default_factory=dict)
    error: str | None = None

    def take(self, update: Update) -> None:
        """Notes the end of an answer."""
        if update.finish_reason is not None:
            self.finish_reasons[update.index] = update.finish_reason
        if update.usage is not None:
            self.usages[update.index] = update.usage
        self.error = update.error or self.error

    @property
    def num_answers(self) -> int:
        """How many were asked for."""
        return 1 if self.params is None else self.params.n

    @property
    def is_answered(self) -> bool:
        """Whether every answer came to an end of its own."""
        return len(self.finish_reasons) == self.num_answers

    @property
    def prompt_tokens(self) -> int | None:
        """Of the prompt; None until an answer has ended."""
        return next((usage.prompt_tokens for usage in self.usages.values()), None)

    @property
    def cached_tokens(self) -> int | None:
        """Of the prompt, found in the prefix cache."""
        return next((usage.cached_tokens for usage in self.usages.values()), None)

    @property
    def completion_tokens(self) -> int | None:
        """Of the answers that have ended."""
        return sum(usage.completion_tokens for usage in self.usages.values()) if self.usages else None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds."""
        return None if self.first_token is None else self.first_token - self.arrival


@dataclass(kw_only=True)
class ResponseRecord:
    """How an HTTP response went out.

    Attributes:
        method: "GET", "POST", ...
        route: The route's path as it was declared, or "other": a client cannot make up new ones.
        path: What was asked for, without the query.
        status: HTTP's.
        duration: Seconds from the request's arrival to the response's last byte.
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
    disconnected: bool = False
    error_type: str | None = None
    request_id: str | None = None
    client: str | None = None
    server: tuple[str, int | None] | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
