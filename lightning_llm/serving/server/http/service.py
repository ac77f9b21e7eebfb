"""`Service`: what all routes share: the engine, the settings, who is let in, and how answers come back."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from starlette.requests import Request

from lightning_llm.serving.engine.outputs import Completion, Update
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.errors import EngineDiedError, RequestError
from lightning_llm.serving.server.http.client import EngineLike
from lightning_llm.serving.server.http.errors import APIError, EngineFailedError, unavailable
from lightning_llm.serving.server.http.jobs import Answer, Job, Observer, Tally
from lightning_llm.serving.server.http.params import grammar_param
from lightning_llm.serving.server.http.prompts import Prompts
from lightning_llm.serving.server.http.requests import MAX_PRIORITY, EmbeddingRequest, SamplingBody
from lightning_llm.serving.server.http.settings import HTTPSettings
from lightning_llm.serving.server.http.sse import EventStream


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
        self.prompts = Prompts(client, self.settings.max_inputs)

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
