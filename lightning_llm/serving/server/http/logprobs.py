"""Log-probabilities as OpenAI's clients know them: those of a chat, and the older ones of a completion."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_llm.serving.engine.outputs import TokenLogprob
from lightning_llm.serving.server.http.client import Tokenizer
from lightning_llm.serving.server.http.responses import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob

_LEAST = -9999.0  # OpenAI's word for impossible: JSON has no infinity


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[TokenLogprob], top: int) -> ChatLogprobs:
    """Of a chat's tokens, with the `top` likeliest at each place."""
    content = []
    for token in tokens:
        text, data = _spell(tokenizer, token.token_id)
        likeliest = [
            TopLogprob(token=name, logprob=_finite(logprob), bytes=list(raw))
            for other, logprob in token.top[:top]
            for name, raw in [_spell(tokenizer, other)]
        ]
        content.append(
            ChatLogprob(token=text, logprob=_finite(token.logprob), bytes=list(data), top_logprobs=likeliest)
        )
    return ChatLogprobs(content=content, refusal=None)


class CompletionLogprobsWriter:
    """Writes those of one completion, piece by piece: `text_offset` goes on from where the last piece ended.

    Args:
        tokenizer: Knows the tokens' texts.
        top: How many of the likeliest to tell at each place.
    """

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._offset = 0

    def write(self, token_ids: Iterable[int], logprobs: Iterable[TokenLogprob | None]) -> CompletionLogprobs:
        """Of some tokens; None for those that have none."""
        piece = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[] if self._top else None, text_offset=[])
        for token_id, logprob in zip(token_ids, logprobs, strict=False):
            text, _ = _spell(self._tokenizer, token_id)
            piece.tokens.append(text)
            piece.token_logprobs.append(None if logprob is None else _finite(logprob.logprob))
            piece.text_offset.append(self._offset)
            if piece.top_logprobs is not None:
                piece.top_logprobs.append(None if logprob is None else self._likeliest(logprob))
            self._offset += len(text)
        return piece

    def _likeliest(self, token: TokenLogprob) -> dict[str, float]:
        """By text; of tokens with the same text (which are parts of characters) the likeliest counts."""
        found: dict[str, float] = {}
        for other, logprob in [*token.top[: self._top], (token.token_id, token.logprob)]:
            found.setdefault(_spell(self._tokenizer, other)[0], _finite(logprob))
        return found


def _spell(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    data = tokenizer.token_bytes(token)
    return data.decode("utf-8", errors="replace"), data


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
