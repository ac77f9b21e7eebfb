"""`BenchClient`: one streamed completion at a time from an OpenAI-compatible server, with the time of every piece."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Literal

import aiohttp

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.bench.datasets import Prompt
from lightning_llm.serving.bench.metrics import RequestResult

Endpoint = Literal["/v1/completions", "/v1/chat/completions"]

_LONGEST_ERROR = 300  # characters of a server's answer that are worth showing


class BenchClient:
    """Asks a server.

    Args:
        url: `http://host:port`; a path `/v1` behind it does no harm.
        model: What the server calls it; None: the first that it lists.
        endpoint: Where to ask. Chat needs prompts that are texts.
        api_key: Sent as a bearer token.
        ignore_eos: Answers go on until `max_tokens` (an extension of vLLM's, which we have too).
        temperature: 0 is greedy.
        timeout: Seconds for a whole answer.

    `async with` opens its connections, and finds the server.

    Raises:
        ConfigurationError: There is no such server, or no such model.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        endpoint: Endpoint = "/v1/completions",
        api_key: str | None = None,
        ignore_eos: bool = False,
        temperature: float = 0.0,
        timeout: float = 600.0,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self.endpoint = endpoint
        self._body = {"temperature": temperature, "stream": True, "stream_options": {"include_usage": True}}
        if ignore_eos:
            self._body["ignore_eos"] = True
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = timeout

    async def __aenter__(self) -> BenchClient:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._timeout),
        )
        try:
            await self._find_model()
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def _find_model(self) -> None:
        try:
            async with self._session.get(self.url + "/v1/models") as response:
                answer = await response.text()
                listed = json.loads(answer) if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ConfigurationError(
                f"There is no server that answers at {self.url}: {_words(error)}. Start one with "
                "`lightning-llm serve MODEL --port P`, or give another --url."
            ) from error
        if response.status in (401, 403):
            raise ConfigurationError(
                f"{self.url} wants an API key (HTTP {response.status}): give --api-key, or set OPENAI_API_KEY."
            )
        names = [one.get("id") for one in listed.get("data", [])] if isinstance(listed, dict) else []
        if self.model is None:
            if not names:
                raise ConfigurationError(f"{self.url} does not list its models: say with --model which one to ask.")
            self.model = names[0]
        elif names and self.model not in names:
            raise ConfigurationError(f"{self.url} has no model {self.model!r}; it has {', '.join(map(str, names))}.")

    async def complete(self, prompt: Prompt, start: float | None = None) -> RequestResult:
        """Asks, and reads the answer to its end.

        Args:
            prompt: What.
            start: When it was due, by `time.perf_counter`; None is now.

        Returns:
            What was seen; an error is in it.
        """
        result = RequestResult(time.perf_counter() if start is None else start, prompt_tokens=prompt.num_tokens)
        try:
            url = self.url + self.endpoint
            async with self._session.post(url, json=self._body | self._question(prompt)) as response:
                if response.status != 200:
                    result.error = f"HTTP {response.status}: {_message(await response.text())}"
                else:
                    result.error = await self._read(response, result)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            result.error = _words(error)
        return result

    def _question(self, prompt: Prompt) -> dict[str, Any]:
        asked: dict[str, Any] = {"model": self.model, "max_tokens": prompt.max_tokens}
        if self.endpoint == "/v1/completions":
            return asked | {"prompt": prompt.content}
        return asked | {"messages": [{"role": "user", "content": prompt.content}]}

    async def _read(self, response: aiohttp.ClientResponse, result: RequestResult) -> str | None:
        """Notes the times of a stream; returns what went wrong."""
        finished = False
        usage: dict[str, Any] = {}
        async for when, event in _events(response):
            if "error" in event:
                return _message(json.dumps(event))
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                finished |= choice.get("finish_reason") is not None
                # A token may be half a character, and then comes without text. A chat's first piece is no token: it
                # says who speaks; nor is an empty last one.
                if choice.get("text") is not None or (choice.get("delta") or {}).get("content"):
                    result.times.append(when)
        result.prompt_tokens = usage.get("prompt_tokens") or result.prompt_tokens
        result.output_tokens = usage.get("completion_tokens") or len(result.times)
        del result.times[result.output_tokens :]  # an end that came by itself
        if not finished:
            return "The stream ended before the answer did."
        return None if result.times else "The answer has no tokens."


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[float, dict[str, Any]]]:
    """Server-sent events with the time at which they came; those of one packet came at the same time."""
    rest = b""
    async for data in response.content.iter_any():
        when = time.perf_counter()
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (text := line[5:].strip()) != b"[DONE]":
                yield when, json.loads(text)


def _message(answer: str) -> str:
    """The sentence in an error object; if it is none, its beginning."""
    try:
        error = json.loads(answer)["error"]
        return error if isinstance(error, str) else str(error["message"])
    except (ValueError, KeyError, TypeError):
        return answer[:_LONGEST_ERROR]


def _words(error: BaseException) -> str:
    """An exception as one says it; some have no text of their own."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.os_error.strerror or str(error.os_error)
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__
