"""What the routes need of an engine and of a tokenizer. The LitServe seam and `ModelTokenizer` have it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal, Protocol

from lightning_llm.serving.engine.outputs import EngineStats, Update
from lightning_llm.serving.engine.params import SamplingParams


class Tokenizer(Protocol):
    """Text <-> token ids of the served model."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation; raises `RequestError` where the template cannot render it."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for."""


class EngineLike(Protocol):
    """The engine, as the process that speaks HTTP sees it."""

    @property
    def model_name(self) -> str:
        """What clients call the model."""

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows."""

    @property
    def default_sampling_params(self) -> Mapping[str, Any]:
        """Of `SamplingParams`, where a request leaves them out: what the model's makers say."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its answer."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""

    @property
    def ready(self) -> bool:
        """Whether an engine is loaded and alive."""

    @property
    def draining(self) -> bool:
        """Whether the server is about to end: what runs is finished, nothing new begins."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str = "",
        pooling: Literal["mean", "last"] | None = None,
    ) -> AsyncGenerator[Update, None]:
        """What comes of a prompt until all its answers have ended. Closing the iterator cancels it.

        Raises:
            RequestError: It cannot be answered.
            EngineDiedError: There is no engine any more that could.
        """

    async def stats(self) -> Mapping[int, EngineStats]:
        """Of each engine that answers, by its worker."""
