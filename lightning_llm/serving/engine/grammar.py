"""Answers that follow a JSON schema, a regular expression or a grammar: which tokens may come next.

A request's `Grammar` is compiled once and each of its answers gets a copy, which `SamplingState` advances and the
sampler asks what is forbidden. The work is llguidance's (github.com/guidance-ai/llguidance).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.engine.params import Grammar
from lightning_llm.serving.engine.vocabulary import Vocabulary, vocabulary_of
from lightning_llm.serving.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_GRAMMAR_BYTES = 64 * 1024
MAX_REGEX_BYTES = 8 * 1024
_LEAST_BYTES, _BYTES_PER_CHARACTER = 64 * 1024, 16  # that a compiled grammar takes, whatever its trial measured
_TRIAL_TIMEOUT = 10.0  # seconds; the trial limits its own CPU time, so this is for a machine that is very busy
_STEP_SECONDS = 0.5  # of CPU time
_TIMED_OUT = None  # the trial's exit status where it had none
_DID_NOT_BEGIN = 1  # Python's exit status after an exception, such as ImportError
_KILLED_BY_OTHERS = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
_TRIAL = Path(__file__).with_name("_grammar_trial.py")


class GrammarMatcher:
    """Where one answer is in its grammar.

    Args:
        matcher: llguidance's matcher.
        vocab_size: Columns of the model's logits.
        mask_size: Tokens that llguidance knows of; may be more.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, mask_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._mask_size = mask_size
        self._too_slow = False
        self._mask = np.zeros((mask_size + 31) // 32, dtype=np.int32)

    def copy(self) -> GrammarMatcher:
        """Another answer's matcher, which starts from where this one is."""
        return GrammarMatcher(self._matcher.deep_copy(), self._vocab_size, self._mask_size)

    def forbidden(self) -> np.ndarray | None:
        """Which tokens may not come next, `[vocab]` bool; None if that cannot be told, and `error` says why.

        At the end of the grammar, all but the end-of-text tokens.
        """
        begin = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        # llguidance's limits hold most steps to some 30 ms; whatever passes by them may hold up the others only once.
        if time.thread_time() - begin > _STEP_SECONDS:
            self._too_slow = True
        if self.error is not None:
            return None
        allowed = np.unpackbits(self._mask.view(np.uint8), count=self._vocab_size, bitorder="little")
        return allowed == 0

    def accept(self, token_id: int) -> bool:
        """Goes on by a token. A forbidden one returns False and leaves the matcher in an error that stays."""
        return self._matcher.consume_token(token_id)

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete and nothing can follow but the end of text."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any further; None if it can."""
        if self._too_slow:
            return f"a step of it takes more than {_STEP_SECONDS} s"
        return self._matcher.get_error() or None


class GrammarCompiler:
    """Compiles grammars for one model and keeps the last ones. May be called from several threads.

    Args:
        tokenizer: The model's tokenizer.
        vocab_size: Columns of the model's logits; may differ from the tokenizer's.
        eos_token_ids: The model's end-of-text tokens.
        cache_bytes: Memory that compiled grammars may keep, as their trials measured it.

    Attributes:
        cached_bytes: What they keep.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int], *, cache_bytes: int = 256 * 2**20
    ) -> None:
        self._vocabulary = vocabulary_of(tokenizer)
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[Grammar, tuple[GrammarMatcher, int]] = OrderedDict()
        self.cached_bytes = 0
        self._tokens: LLTokenizer | None = None
        self._lock = threading.Lock()  # of the cache and the process; never held for long
        self._tokens_lock = threading.Lock()  # making them takes a second, in which what is cached must be found
        self._ready: subprocess.Popen[str] | None = None  # a process that awaits its grammar: starting takes 0.1 s

    def compile(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the grammar's beginning. Takes up to some seconds: not for the thread that runs the steps.

        Raises:
            RequestError: The grammar is not one, or takes too much time, memory or depth; `param` is "response_format".
            ConfigurationError: llguidance cannot be imported.
        """
        with self._lock:
            known = self._cache.get(grammar)
            if known is not None:
                self._cache.move_to_end(grammar)
                return known[0].copy()
        self._check_size(grammar)
        cost = self._try(grammar)
        matcher = self._compile(grammar)
        with self._lock:
            if grammar not in self._cache and cost <= self._cache_bytes:
                self._cache[grammar] = matcher, cost
                self.cached_bytes += cost
                while self.cached_bytes > self._cache_bytes:
                    _, (_, freed) = self._cache.popitem(last=False)
                    self.cached_bytes -= freed
        return matcher.copy()

    def close(self) -> None:
        """Ends the process that is kept ready for the next grammar; it also ends with this one."""
        with self._lock:
            if self._ready is not None:
                self._ready.kill()
                self._ready.communicate()
                self._ready = None

    def _check_size(self, grammar: Grammar) -> None:
        size = len(grammar.text.encode(errors="surrogatepass"))
        most = MAX_REGEX_BYTES if grammar.kind == "regex" else MAX_GRAMMAR_BYTES
        if size > most:
            raise _refusal(grammar, f"it has {size} bytes; {most} at most")

    def _try(self, grammar: Grammar) -> int:
        """Compiles in a process of its own; returns the bytes that it took."""
        request = json.dumps({"kind": grammar.kind, "text": grammar.text}) + "\n"
        status, output = self._run_trial(request)
        if status in _KILLED_BY_OTHERS:  # the machine was short of memory, or somebody ended what seemed idle
            status, output = self._run_trial(request)
        if status in (_TIMED_OUT, -signal.SIGXCPU):
            raise _refusal(grammar, "compiling it takes too long; make it smaller")
        if status == _DID_NOT_BEGIN:
            raise ConfigurationError(
                "Answers that follow a grammar need the packages llguidance and psutil, and the process that imports "
                "them fails: pip install 'lightning-llm[serve]'."
            )
        if status != 0 or not output:
            raise _refusal(grammar, "compiling it takes too much memory, or it is nested too deeply; make it smaller")
        answer = json.loads(output)
        if answer["error"]:
            raise _refusal(grammar, answer["error"])
        return max(answer["bytes"], _LEAST_BYTES + _BYTES_PER_CHARACTER * len(grammar.text))

    def _run_trial(self, request: str) -> tuple[int | None, str]:
        """The trial's exit status, None if it took too long, and what it printed."""
        with self._lock:
            process, self._ready = self._ready, None
        if process is None or process.poll() is not None:  # a signal to all of a terminal ends this one too
            process = _start_trial()
        try:
            output, _ = process.communicate(request, timeout=_TRIAL_TIMEOUT)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return _TIMED_OUT, ""
        finally:
            with self._lock:
                self._ready = self._ready or _start_trial()

    def _compile(self, grammar: Grammar) -> GrammarMatcher:
        from llguidance import LLMatcher

        from lightning_llm.serving.engine._grammar_trial import limits, to_llguidance

        with self._tokens_lock:
            if self._tokens is None:
                self._tokens = _to_llguidance_tokenizer(self._vocabulary, self._vocab_size, self._eos_token_ids)
            tokens = self._tokens
        matcher = LLMatcher(tokens, to_llguidance(grammar.kind, grammar.text), log_level=0, limits=limits())
        if matcher.is_error():
            raise _refusal(grammar, matcher.get_error())
        matcher.compute_bitmask()  # the first is the slowest; copies have it from here
        return GrammarMatcher(matcher, self._vocab_size, tokens.vocab_size)


def _refusal(grammar: Grammar, why: str) -> RequestError:
    what = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "grammar", "json_object": "JSON mode"}
    return RequestError(f"The {what[grammar.kind]} cannot be followed: {why[:500]}.", param="response_format")


def _start_trial() -> subprocess.Popen[str]:
    # -P: the script's folder stays off its path, where our `text.py` could stand for somebody's module of that name.
    return subprocess.Popen(
        [sys.executable, "-P", str(_TRIAL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


class _Spelled:
    """A vocabulary as llguidance wants to see it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, size: int, eos_token_id: int) -> None:
        self._tokenizer = vocabulary.tokenizer
        self.eos_token_id = eos_token_id
        self.tokens = [vocabulary.bytes_of(token) for token in range(size)]
        self.special_token_ids = sorted({*vocabulary.special_ids, eos_token_id})

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False).ids


def _to_llguidance_tokenizer(vocabulary: Vocabulary, vocab_size: int, eos_token_ids: list[int]) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    size = max(vocab_size, vocabulary.size)
    if not eos_token_ids:
        # llguidance must have a token that ends a text; one behind all others is cut off with the mask's end.
        eos_token_ids, size = [size], size + 1
    return LLTokenizer(TokenizerWrapper(_Spelled(vocabulary, size, eos_token_ids[0])), eos_token=eos_token_ids)
