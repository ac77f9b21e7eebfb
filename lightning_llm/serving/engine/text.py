"""Tokens to text, as they come: never half a character, never the beginning of a stop text.

The engine makes one `TextStream` for each answer, pushes the tokens of each step and sends what comes back.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from functools import lru_cache

from tokenizers import Tokenizer

from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.engine.vocabulary import vocabulary_of

_LONGEST_CHARACTER = 4  # bytes in UTF-8


class TextStream:
    """The text of one answer. What `push` and `finish` return, put together, is the text up to the stop.

    Args:
        tokenizer: The model's tokenizer.
        params: `stop`, `include_stop_str_in_output`, `min_tokens` and `skip_special_tokens` count here.
        prompt_ids: The prompt: whether the answer begins a text, or goes on after one, decides about leading spaces.

    Attributes:
        stop_reason: The stop text that ended the answer; None if none did. Tokens pushed after it do nothing.
        num_tokens: How many tokens count: the one that completes the stop is the last.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.vocabulary = vocabulary_of(tokenizer)
        self.stop_reason: str | None = None
        self.num_tokens = 0
        self._params = params
        self._skipped = self.vocabulary.special_ids if params.skip_special_tokens else frozenset()
        self._is_first = all(token in self._skipped for token in prompt_ids)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder.decode(self._end_of(prompt_ids))  # a prompt may end within a character
        self._stops = stop_texts(params.stop) if params.stop else None
        self._state = 0  # of `_stops`: how far the text's end is into a stop text
        self._held = ""  # decoded, but it may be the beginning of a stop text

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes tokens and returns the new text that is certain to stay; often "" while something may yet change."""
        ready = []
        for token in token_ids:
            if self.stop_reason is not None:
                break
            self.num_tokens += 1
            if token in self._skipped:
                continue
            data = self.vocabulary.bytes_of(token, first=self._is_first)
            self._is_first = False
            ready.append(self._take(self._decoder.decode(data)))
        return "".join(ready)

    def finish(self) -> str:
        """Returns what was held back. The answer is over."""
        if self.stop_reason is not None:
            return ""
        ready = self._take(self._decoder.decode(b"", final=True))
        if self.stop_reason is None:
            ready, self._held = ready + self._held, ""
        return ready

    def _end_of(self, prompt_ids: Sequence[int]) -> bytes:
        end = b""
        for token in reversed(prompt_ids):
            if len(end) >= _LONGEST_CHARACTER:
                break
            end = self.vocabulary.bytes_of(token) + end
        return end

    def _take(self, text: str) -> str:
        """Adds decoded text and returns what no stop text can claim any more."""
        if self._stops is None or not text:
            return text
        if self.num_tokens <= self._params.min_tokens:
            return text  # too early to stop, also for a stop text that would end later
        for place, character in enumerate(text):
            self._state = self._stops.step(self._state, character)
            found = self._stops.found[self._state]
            if found is not None:
                self.stop_reason = found
                seen, self._held = self._held + text[: place + 1], ""
                return seen if self._params.include_stop_str_in_output else seen[: len(seen) - len(found)]
        seen = self._held + text
        certain = len(seen) - self._stops.depth[self._state]
        self._held = seen[certain:]
        return seen[:certain]


class StopTexts:
    """Finds any of several texts in one that comes a character at a time (Aho and Corasick 1975).

    A state stands for the longest end of the text that begins a stop text; 0 is none. Each character costs the same,
    however many stop texts there are and however long.

    Attributes:
        depth: Characters of that end, by state: what must be held back.
        found: The stop text that ends here, by state (the longest, if several do); None if none does.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._shorter = [0]  # by state: the state of the next shorter end that begins a stop text
        self.depth = [0]
        self.found: list[str | None] = [None]
        for text in texts:
            state = 0
            for character in text:
                following = self._next[state].get(character)
                if following is None:
                    following = self._next[state][character] = len(self._next)
                    self._next.append({})
                    self._shorter.append(0)
                    self.depth.append(self.depth[state] + 1)
                    self.found.append(None)
                state = following
            self.found[state] = text
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for character, following in self._next[state].items():
                shorter = self._shorter[following] = self.step(self._shorter[state], character)
                if self.found[following] is None:
                    self.found[following] = self.found[shorter]
                waiting.append(following)

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while (following := self._next[state].get(character)) is None:
            if state == 0:
                return 0
            state = self._shorter[state]
        return following


@lru_cache(maxsize=64)
def stop_texts(texts: tuple[str, ...]) -> StopTexts:
    """The finder of these texts; the answers of one request share it."""
    return StopTexts(texts)
