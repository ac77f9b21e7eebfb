"""Compiles one grammar in a process of its own, so that one made to eat time, memory or stack harms nobody.

`grammar.py` runs this file as a script, with nothing of this package (and so no torch) to load, and imports it for what
the trial and the real compilation must have in common.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import sys
import threading
from typing import TYPE_CHECKING

import psutil
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_SECONDS = 2  # of CPU time: how busy the machine is does not change the answer
_STEPS = 64
_MEMORY = 512 * 2**20  # bytes of address space, the interpreter's own 100 MiB or so among them
# An eighth of what threads usually have: what passes here does not overflow the stack of whoever compiles it next.
_STACK = 2**20

# Runs of whitespace end: a model that knows no better than to go on with spaces would do so until max_tokens.
_JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}"}


def limits() -> LLParserLimits:
    """What compiling, and each step of following, a grammar may cost; beyond, llguidance gives up with an error."""
    return LLParserLimits(
        max_lexer_states=50_000,  # up to 2 kB each
        max_grammar_size=200_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def to_llguidance(kind: str, text: str) -> str:
    """A grammar in llguidance's own form.

    Raises:
        ValueError: A schema that is not JSON.
    """
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "lark":
        return LLMatcher.grammar_from_lark(text)
    schema = '{"type": "object"}' if kind == "json_object" else text
    return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)


class _Bytes:
    """The smallest tokenizer: a trial is of the grammar, and no tokenizer makes a bad grammar good."""

    eos_token_id = 256
    bos_token_id = None
    tokens = [*(bytes([byte]) for byte in range(256)), b"<eos>"]
    special_token_ids = [256]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _try(kind: str, text: str) -> dict[str, str | int]:
    tokens = LLTokenizer(TokenizerWrapper(_Bytes()))
    process = psutil.Process()
    before = process.memory_info().rss
    try:
        grammar = to_llguidance(kind, text)
    except ValueError as error:
        return {"error": str(error), "bytes": 0}
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=limits())
    _walk(matcher)
    return {"error": matcher.get_error(), "bytes": max(0, process.memory_info().rss - before)}


def _walk(matcher: LLMatcher) -> None:
    """Follows the grammar for some steps: one that compiles in no time may still take seconds for a step."""
    choose = random.Random(0).choice
    for _ in range(_STEPS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [byte for byte in range(256) if mask >> byte & 1]
        if matcher.is_error() or matcher.is_stopped() or not allowed:
            return
        matcher.consume_token(choose(allowed))


def _main() -> None:
    line = sys.stdin.readline()
    if not line:  # whoever kept this process ready is gone
        return
    # At the soft limit of CPU time comes SIGXCPU, at the hard one SIGKILL, which looks like that of the machine.
    most = {resource.RLIMIT_AS: _MEMORY, resource.RLIMIT_CPU: _SECONDS, resource.RLIMIT_CORE: 0}
    for limit, value in most.items():
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit of address space
            resource.setrlimit(limit, (value, value + 1))
    threading.stack_size(_STACK)
    request = json.loads(line)
    thread = threading.Thread(target=lambda: print(json.dumps(_try(request["kind"], request["text"])), flush=True))
    thread.start()
    thread.join()


if __name__ == "__main__":
    _main()
