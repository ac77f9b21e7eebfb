"""`Job`: what the engine is asked for by one HTTP request; what comes of it, and who wants to know."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal, Protocol

from starlette.requests import Request

from lightning_llm.serving.engine.outputs import Completion, TokenLogprob, Update
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.server.http.responses import PromptTokensDetails, UsageInfo


@dataclass
class Tally:
    """What the answers to some prompts cost so far."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached: dict[int, int] = field(default_factory=dict)
    """Tokens found in the prefix cache, by prompt."""

    def add(self, place: int, update: Update) -> None:
        """Counts an update of the prompt at `place`."""
        self.completion_tokens += len(update.token_ids)
        if update.usage is not None:
            self.cached[place] = max(self.cached.get(place, 0), update.usage.cached_tokens)

    def usage(self) -> UsageInfo:
        """As it is told."""
        return UsageInfo(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self.cached.values())),
        )


@dataclass
class Answer:
    """One whole answer to one prompt."""

    completion: Completion
    prompt_logprobs: list[TokenLogprob | None] | None = None


@dataclass(kw_only=True)
class Job:
    """Prompts of one HTTP request, and how they are to be answered.

    Attributes:
        request: Whose they are.
        id: Of the answer, as the client sees it.
        stream: Whether the answer goes out piece by piece.
        prompts: As tokens.
        param: The field that they came in.
        params: For all of them.
        grammar_param: The field that says what the answers must look like.
        priority, cache_salt, pooling: See `Engine.add`.
        created: Seconds since 1970.
    """

    request: Request
    id: str
    stream: bool = False
    prompts: list[list[int]]
    param: str = "prompt"
    params: SamplingParams
    grammar_param: str = "response_format"
    priority: int = 0
    cache_salt: str = ""
    pooling: Literal["mean", "last"] | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def tally(self) -> Tally:
        """With nothing but the prompts."""
        return Tally(sum(map(len, self.prompts)))


class Watch(Protocol):
    """Is shown what comes of a prompt."""

    def on_update(self, update: Update, /) -> object:
        """What a step brought."""

    def on_error(self, error: Exception, /) -> object:
        """It was refused (a `RequestError`), or could not be answered to its end."""


class Observer(Protocol):
    """Whoever wants to know of requests: metrics, logs and traces."""

    def __call__(self, job: Job, place: int, /) -> Watch:
        """A prompt, the one at `place`, goes to the engine."""
