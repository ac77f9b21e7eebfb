"""What the load generator asks: prompts of known lengths, the same for the same seed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from lightning_llm.errors import ConfigurationError

# ShareGPT's prompts and answers as vLLM's published runs of 500 of them report: means in tokens (vLLM's blog,
# 2024-09-05). The spread is that of a log-normal, whose tail is about as long as that of such conversations.
SHAREGPT_INPUT, SHAREGPT_OUTPUT = 202, 179
SHAREGPT_SIGMA = 1.0
SHAREGPT_SHORTEST, SHAREGPT_LONGEST = 4, 1024


@dataclass(frozen=True)
class Prompt:
    """What to ask.

    Attributes:
        content: Text, or token ids.
        max_tokens: Of the answer.
    """

    content: str | list[int]
    max_tokens: int

    @property
    def num_tokens(self) -> int:
        """Of the prompt; 0 where only the server can know."""
        return 0 if isinstance(self.content, str) else len(self.content)


def random_prompts(
    count: int,
    *,
    input_len: int | Sequence[int],
    output_len: int | Sequence[int],
    prefix_len: int = 0,
    vocab_size: int,
    seed: int,
) -> list[Prompt]:
    """Random token ids.

    Args:
        count: How many.
        input_len: Tokens of each, its shared beginning aside; one number for all or one for each.
        output_len: Tokens of each answer, likewise.
        prefix_len: Tokens that all begin with, before `input_len` others.
        vocab_size: Token ids are below it.
        seed: Decides them.
    """
    draw = np.random.default_rng(seed)
    prefix = draw.integers(vocab_size, size=prefix_len).tolist()
    inputs = [input_len] * count if isinstance(input_len, int) else input_len
    outputs = [output_len] * count if isinstance(output_len, int) else output_len
    return [
        Prompt(prefix + draw.integers(vocab_size, size=one).tolist(), most)
        for one, most in zip(inputs, outputs, strict=True)
    ]


def sharegpt_lengths(count: int, *, seed: int) -> tuple[list[int], list[int]]:
    """Lengths of prompts and of answers as in ShareGPT's conversations, in tokens: many short ones, a few long ones."""
    draw = np.random.default_rng([seed, 1])

    def lengths(mean: float) -> list[int]:
        drawn = draw.lognormal(math.log(mean) - SHAREGPT_SIGMA**2 / 2, SHAREGPT_SIGMA, count)
        return np.clip(np.rint(drawn), SHAREGPT_SHORTEST, SHAREGPT_LONGEST).astype(int).tolist()

    return lengths(SHAREGPT_INPUT), lengths(SHAREGPT_OUTPUT)


def as_texts(prompts: Sequence[Prompt], decode: Callable[[list[int]], str]) -> list[Prompt]:
    """The same as texts. Encoded again, they have about as many tokens, not exactly."""
    return [one if isinstance(one.content, str) else Prompt(decode(one.content), one.max_tokens) for one in prompts]


def prompts_of_file(path: str | Path, count: int, *, output_len: int) -> list[Prompt]:
    """The prompts of a file, from its beginning, and again if it has too few.

    Args:
        path: JSON lines: `{"prompt": text or token ids}`, and `"max_tokens"` if not `output_len`.
        count: How many.
        output_len: Tokens of an answer whose line does not say.

    Raises:
        ConfigurationError: There is no such file, or a line is not of this form.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--dataset {path}: {error}") from error
    known = [_prompt(line, f"{path}, line {n}", output_len) for n, line in enumerate(lines, 1) if line.strip()]
    if not known:
        raise ConfigurationError(f"--dataset {path} is empty: give a prompt on each line.")
    return list(islice(cycle(known), count))


def _prompt(line: str, where: str, output_len: int) -> Prompt:
    try:
        fields: Any = json.loads(line)
    except ValueError as error:
        raise ConfigurationError(f"{where} is not JSON: {error}") from error
    content = fields.get("prompt") if isinstance(fields, dict) else None
    is_ids = isinstance(content, list) and all(type(token) is int for token in content)
    if not content or not (isinstance(content, str) or is_ids):
        raise ConfigurationError(f'{where} has no prompt: write {{"prompt": "text"}}, or token ids instead of a text.')
    most = fields.get("max_tokens", output_len)
    if type(most) is not int or most < 1:
        raise ConfigurationError(f"{where}: max_tokens must be a positive integer, not {most!r}.")
    return Prompt(content, most)
