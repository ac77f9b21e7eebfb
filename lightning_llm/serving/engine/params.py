"""`SamplingParams`: how the tokens of a request are chosen, and when it ends. Names and defaults are vLLM's."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_llm.serving.errors import RequestError

MAX_N = 64
MAX_LOGPROBS = 20  # OpenAI's limit
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Grammar:
    """What the answer must look like, as text that the grammar compiler reads.

    Attributes:
        kind: A JSON schema, a regular expression, any JSON object, or a grammar in Lark's language.
        text: The schema, expression or grammar; empty for "json_object".
    """

    kind: Literal["json_schema", "regex", "json_object", "lark"]
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen, and when it ends.

    Raises:
        RequestError: A value is of the wrong type or out of its range; `param` names the field.
    """

    n: int = 1
    """Answers to the one prompt; they share the blocks of its keys and values."""
    temperature: float = 1.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that make up this much probability (arXiv:1904.09751)."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 or -1: from all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest's probability (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or answer (arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the answer has."""
    frequency_penalty: float = 0.0
    """Taken off once for each time that the answer has the token."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = None
    """Makes the draw repeatable, whatever else runs; None or -1: a new draw each time."""
    max_tokens: int | None = 16
    """Most tokens of an answer; None: as many as the context has room for."""
    min_tokens: int = 0
    """No end-of-text or stop token before so many."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, beside the model's own."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Go on after the model's end-of-text token, as measurements do."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report log-probabilities of at each step, beside the chosen one's; None: no
    log-probabilities at all."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    skip_special_tokens: bool = True
    grammar: Grammar | None = None
    """What the answer must look like."""

    def __post_init__(self) -> None:
        self._set("stop", (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop))
        self._set("stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids))
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise RequestError(
                f"logit_bias must map token ids to numbers, not {self.logit_bias!r}.", param="logit_bias"
            )
        self._set("logit_bias", dict(self.logit_bias or {}))
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise RequestError(f"grammar must be a Grammar, not {self.grammar!r}.", param="grammar")
        if self.seed == -1:
            self._set("seed", None)
        _check_int("n", self.n, 1, MAX_N)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_int("top_k", self.top_k, -1)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)
        _check_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}.", param="min_tokens"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, not {getattr(self, name)!r}.", param=name)
        self._check_stops()
        self._check_bias()

    def _set(self, name: str, value: Any) -> None:
        # The dataclass is frozen for its users; bringing values into one form is part of making it.
        object.__setattr__(self, name, value)

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop has {len(self.stop)} texts; {MAX_STOP_STRINGS} at most.", param="stop")
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise RequestError(
                    f"stop must be texts of 1 to {MAX_STOP_LENGTH} characters, not {str(text)[:40]!r}.", param="stop"
                )
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0)

    def _check_bias(self) -> None:
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias", token, 0)
            _check_number("logit_bias", bias, -100.0, 100.0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuses token ids that the model does not have.

        Raises:
            RequestError: One of `logit_bias` or `stop_token_ids` is outside the vocabulary.
        """
        for name, tokens in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in tokens:
                if token >= vocab_size:
                    raise RequestError(
                        f"{name}: token id {token} is not in the vocabulary of {vocab_size}.", param=name
                    )

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


def _tuple(name: str, values: Any) -> tuple[Any, ...]:
    if values is None:
        return ()
    if not isinstance(values, Collection) or isinstance(values, bytes | Mapping | str):
        raise RequestError(f"{name} must be a list, not {values!r}.", param=name)
    return tuple(values)


def _check_int(name: str, value: Any, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} must be an integer, not {value!r}.", param=name)
    if value < least or (most is not None and value > most):
        span = f"at least {least}" if most is None else f"{least} to {most}"
        raise RequestError(f"{name} must be {span}, not {value}.", param=name)


def _check_number(name: str, value: Any, least: float, most: float, *, above: bool = False) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise RequestError(f"{name} must be a finite number, not {value!r}.", param=name)
    if value > most or value < least or (above and value == least):
        raise RequestError(
            f"{name} must be {'above' if above else 'at least'} {least:g} and at most {most:g}, not {value!r}.",
            param=name,
        )
