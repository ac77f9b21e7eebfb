"""`Prompts`: what a model is to read, as tokens; what it cannot read is refused before anybody spends time on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lightning_llm.serving.errors import RequestError
from lightning_llm.serving.server.http.client import EngineLike
from lightning_llm.serving.server.http.limits import off_loop

T = TypeVar("T")


class Prompts:
    """Turns texts into tokens.

    Args:
        client: Its tokenizer is used, and its limits hold.
        max_inputs: Most answers of one request, to all its prompts together.
    """

    def __init__(self, client: EngineLike, max_inputs: int) -> None:
        self._client = client
        self._max_inputs = max_inputs
        self._longest: int | None = None
        # Templates are rendered one after the other: what waits for its turn must not keep threads from others.
        self._renderer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chat-template")

    async def encode(self, text: str, param: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of what the model is to read. What cannot fit is not even looked at: that takes seconds.

        Raises:
            RequestError: It is too long, or nothing.
        """
        await self.check_length(len(text), param)
        encode = self._client.tokenizer.encode
        return await off_loop(len(text), lambda: encode(text, add_special_tokens=add_special_tokens))

    async def check_length(self, characters: int, param: str) -> None:
        """Refuses a text that cannot fit, whatever its tokens are."""
        if characters > self._client.max_model_len * await self._longest_token():
            raise RequestError(
                f"The model's context is {self._client.max_model_len} tokens: {param} has {characters} characters.",
                param=param,
                code="context_length_exceeded",
            )

    async def render(self, work: Callable[[], T]) -> T:
        """Does what asks the chat template, in a thread: what templates do is not known to be short."""
        return await asyncio.get_running_loop().run_in_executor(self._renderer, work)

    async def _longest_token(self) -> int:
        """Bytes, and so at least the characters, that one token may stand for."""
        if self._longest is None:
            spell = self._client.tokenizer.token_bytes
            self._longest = await off_loop(
                self._client.vocab_size, lambda: max(len(spell(token)) for token in range(self._client.vocab_size))
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
        if not 1 <= len(prompts) <= self._max_inputs:
            raise RequestError(f"{param} has {len(prompts)} texts: send 1 to {self._max_inputs}.", param=param)
        if len(prompts) * n > self._max_inputs:
            raise RequestError(
                f"{len(prompts)} prompts with {n} answers each are {len(prompts) * n} answers; a request may have "
                f"{self._max_inputs}: lower n or send fewer prompts.",
                param="n",
            )
        encoded = []
        for place, one in enumerate(prompts):
            where = param if one is given or len(prompts) == 1 else f"{param}[{place}]"
            if isinstance(one, str):
                ids = await self.encode(one, where, add_special_tokens=add_special_tokens)
            else:
                ids = one
            self.check(ids, where)
            encoded.append(ids)
        return encoded

    def check(self, ids: Sequence[int], param: str) -> None:
        """Refuses what no engine can begin with."""
        if not ids:
            raise RequestError(f"{param} has no tokens: give at least one.", param=param)
        self.check_ids(ids, param)

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Refuses more tokens than a context has, and ids that the model does not have."""
        if len(ids) > self._client.max_model_len:
            raise RequestError(
                f"The model's context is {self._client.max_model_len} tokens: {param} has {len(ids)}.",
                param=param,
                code="context_length_exceeded",
            )
        if (largest := max(ids, default=0)) >= self._client.vocab_size:
            raise RequestError(
                f"{param}: token id {largest} is not in the vocabulary of {self._client.vocab_size}.", param=param
            )
