"""`Service`: what all routes share: the engine, the settings, how prompts become tokens and answers come back."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from starlette.requests import Request

from lightning_llm.serving.engine.outputs import Completion, TokenLogprob, Update
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.errors import EngineDiedError, RequestError
from lightning_llm.serving.server.http.client import EngineLike
from lightning_llm.serving.server.http.errors import APIError, EngineFailedError, unavailable
from lightning_llm.serving.server.http.limits import LONG
from lightning_llm.serving.server.http.params import grammar_param
from lightning_llm.serving.server.http.requests import MAX_PRIORITY, EmbeddingRequest, SamplingBody
from lightning_llm.serving.server.http.responses import PromptTokensDetails, UsageInfo
from lightning_llm.serving.server.http.settings import HTTPSettings
from lightning_llm.serving.server.http.sse import EventStream

T = TypeVar("T")


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


class Service:
    """Answers prompts with the engine.

    Args:
        client: The engine.
        settings: Limits and choices.
        observer: Is told of every prompt.
    """

    def __init__(self, client: EngineLike, settings: HTTPSettings, observer: Observer | None = None) -> None:
        self.client = client
        self.settings = settings
        self.observer = observer
        self.started = int(time.time())
        self._longest: int | None = None
        # Templates are rendered one after the other: what waits for its turn must not keep threads from others.
        self._renderer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chat-template")

    @property
    def fingerprint(self) -> str:
        """Changes when answers may change although the request did not."""
        identity = f"{self.client.model_name}/{self.client.max_model_len}/{self.started}"
        return "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:10]

    # -- before the engine --

    def admit(self, model: str | None) -> None:
        """Refuses what this server cannot answer now, or at all.

        Raises:
            APIError: 503: there is no engine, or it is about to end; 404: the model is another.
        """
        if self.client.draining:
            raise unavailable("The server is about to end; send this to another.")
        if not self.client.ready:
            raise unavailable("The model is not loaded.")
        self.check_model(model)

    def check_model(self, model: str | None) -> None:
        """404 for a model that is not served."""
        if model is not None and model != self.client.model_name:
            name = model if len(model) <= 64 else model[:64] + "..."
            raise APIError(404, f"The model {name!r} does not exist.", param="model", code="model_not_found")

    async def encode_prompt(self, text: str, param: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of what the model is to read. What cannot fit is not even looked at: that takes seconds.

        Raises:
            RequestError: It is too long, or nothing.
        """
        await self.check_length(len(text), param)
        encode = self.client.tokenizer.encode
        return await off_loop(len(text), lambda: encode(text, add_special_tokens=add_special_tokens))

    async def check_length(self, characters: int, param: str) -> None:
        """Refuses a text that cannot fit, whatever its tokens are."""
        if characters > self.client.max_model_len * await self._longest_token():
            raise RequestError(
                f"The model's context is {self.client.max_model_len} tokens: {param} has {characters} characters.",
                param=param,
                code="context_length_exceeded",
            )

    async def render(self, work: Callable[[], T]) -> T:
        """Does what asks the chat template, in a thread: what templates do is not known to be short."""
        return await asyncio.get_running_loop().run_in_executor(self._renderer, work)

    async def _longest_token(self) -> int:
        """Bytes, and so at least the characters, that one token may stand for."""
        if self._longest is None:
            spell = self.client.tokenizer.token_bytes
            self._longest = await off_loop(
                self.client.vocab_size, lambda: max(len(spell(token)) for token in range(self.client.vocab_size))
            )
        return self._longest

    async def encode_all(
        self,
        given: str | list[str] | list[int] | list[list[int]],
        param: str,
        *,
        n: int = 1,
        add_special_tokens: bool = True,
    ) -> list[list[int]]:
        """Prompts in all of OpenAI's four forms, each of which will have `n` answers.

        Raises:
            RequestError: There are none, too many, or one is empty or too long.
        """
        prompts: Sequence[str | list[int]]
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            prompts = [given]  # type: ignore[list-item]
        else:
            prompts = given  # type: ignore[assignment]
        if not 1 <= len(prompts) <= self.settings.max_inputs:
            raise RequestError(f"{param} has {len(prompts)} texts: send 1 to {self.settings.max_inputs}.", param=param)
        if len(prompts) * n > self.settings.max_inputs:
            raise RequestError(
                f"{len(prompts)} prompts with {n} answers each are {len(prompts) * n} answers; a request may have "
                f"{self.settings.max_inputs}: lower n or send fewer prompts.",
                param="n",
            )
        encoded = []
        for place, one in enumerate(prompts):
            where = param if one is given or len(prompts) == 1 else f"{param}[{place}]"
            if isinstance(one, str):
                ids = await self.encode_prompt(one, where, add_special_tokens=add_special_tokens)
            else:
                ids = one
            self.check_prompt(ids, where)
            encoded.append(ids)
        return encoded

    def check_prompt(self, ids: Sequence[int], param: str) -> None:
        """Refuses what no engine can begin with."""
        if not ids:
            raise RequestError(f"{param} has no tokens: give at least one.", param=param)
        self.check_ids(ids, param)

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Refuses more tokens than a context has, and ids that the model does not have."""
        if len(ids) > self.client.max_model_len:
            raise RequestError(
                f"The model's context is {self.client.max_model_len} tokens: {param} has {len(ids)}.",
                param=param,
                code="context_length_exceeded",
            )
        if (largest := max(ids, default=0)) >= self.client.vocab_size:
            raise RequestError(
                f"{param}: token id {largest} is not in the vocabulary of {self.client.vocab_size}.", param=param
            )

    def job(
        self,
        request: Request,
        body: SamplingBody | EmbeddingRequest,
        kind: str,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        param: str = "prompt",
        pooling: Literal["mean", "last"] | None = None,
    ) -> Job:
        """What the engine is to do; `kind` begins the id. Prefixes are shared within what authentication put in
        `request.state.cache_salt`, and within the client's own salt in that."""
        tenant = request.scope.get("state", {}).get("cache_salt", "")
        return Job(
            request=request,
            stream=bool(getattr(body, "stream", False)),
            id=f"{kind}-{uuid.uuid4().hex}",
            prompts=prompts,
            param=param,
            params=params,
            grammar_param="response_format" if params.grammar is None else grammar_param(body),
            priority=max(-MAX_PRIORITY, min(body.priority, MAX_PRIORITY)),
            cache_salt=json.dumps([tenant, body.cache_salt]) if body.cache_salt else tenant,
            pooling=pooling,
        )

    # -- from the engine --

    async def run(self, job: Job) -> AsyncGenerator[tuple[int, Update], None]:
        """What comes of all prompts: the place of the prompt, and the update. Closing it cancels them all.

        Raises:
            RequestError: One of them cannot be answered; the others are cancelled.
            EngineDiedError: The engine is gone.
            EngineFailedError: One of them failed.
        """
        if len(job.prompts) == 1:
            async with aclosing(self._updates(job, 0)) as updates:
                async for update in updates:
                    yield 0, update
            return
        arrived: asyncio.Queue[tuple[int, Update | Exception | None]] = asyncio.Queue()

        async def pump(place: int) -> None:
            try:
                async with aclosing(self._updates(job, place)) as updates:
                    async for update in updates:
                        arrived.put_nowait((place, update))
            except Exception as error:
                arrived.put_nowait((place, error))
            else:
                arrived.put_nowait((place, None))

        pumps = [asyncio.ensure_future(pump(place)) for place in range(len(job.prompts))]
        try:
            left = len(pumps)
            while left:
                place, item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield place, item
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _updates(self, job: Job, place: int) -> AsyncGenerator[Update, None]:
        updates = self.client.generate(
            job.prompts[place],
            job.params,
            request_id=job.id if len(job.prompts) == 1 else f"{job.id}-{place}",
            priority=job.priority,
            cache_salt=job.cache_salt,
            pooling=job.pooling,
        )
        watch = None if self.observer is None else self.observer(job, place)
        try:
            async with aclosing(updates):
                async for update in updates:
                    if watch is not None:
                        watch.on_update(update)
                    if update.error is not None or update.finish_reason in ("error", "abort"):
                        raise EngineFailedError(update.error or "aborted")
                    yield update
        except Exception as error:
            if watch is not None:
                watch.on_error(error)
            if isinstance(error, RequestError):
                param = {"prompt": job.param, "response_format": job.grammar_param}.get(error.param or "", error.param)
                raise RequestError(str(error), param=param, code=error.code) from None
            if isinstance(error, EngineDiedError) and self.client.draining:
                raise unavailable(str(error)) from None
            raise

    def stream(self, events: AsyncGenerator[Any, None], request_id: str) -> EventStream:
        """An answer piece by piece."""
        return EventStream(events, request_id=request_id, ping_interval=self.settings.ping_interval)

    async def collect(self, job: Job) -> tuple[list[list[Answer]], Tally]:
        """All answers, by prompt and index, and what they cost."""
        answers = [[Answer(Completion(index)) for index in range(job.params.n)] for _ in job.prompts]
        tally = job.tally()
        async with aclosing(self.run(job)) as updates:
            async for place, update in updates:
                answer = answers[place][update.index]
                answer.completion.add(update)
                answer.prompt_logprobs = update.prompt_logprobs or answer.prompt_logprobs
                tally.add(place, update)
        return answers, tally


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Does `work` of some size, in a thread if it is long."""
    return await asyncio.to_thread(work) if size > LONG else work()
