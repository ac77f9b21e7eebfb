"""What the sampler needs to know of one sequence, kept from step to step and across preemption.

The engine makes one for each answer of a request, hands them to `Sampler.sample` beside the logits, and calls `append`
with each token that it takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_llm.serving.engine.params import SamplingParams

if TYPE_CHECKING:
    from lightning_llm.serving.engine.grammar import GrammarMatcher


class SamplingState:
    """One sequence's generator, counts and grammar.

    Args:
        params: How its tokens are chosen.
        prompt_ids: The prompt, which the repetition penalty looks at too.
        vocab_size: Columns of the logits.
        eos_token_ids: The model's end-of-text tokens: `min_tokens` keeps them away.
        grammar: What the answer must look like; the state advances it. Each sequence needs its own.
        seed_offset: Which of the n answers this is; with a seed, each differs from the others and can be repeated.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        grammar: GrammarMatcher | None = None,
        seed_offset: int = 0,
    ) -> None:
        self.params = params
        self.grammar = grammar
        self.num_outputs = 0
        self._seed_offset = seed_offset
        self._generator: np.random.Generator | None = None
        self._drawn: list[float] = []  # for the token that is next
        self._num_used = 0  # of these
        ends = {*eos_token_ids, *params.stop_token_ids}
        self._end_ids = np.array(sorted(token for token in ends if token < vocab_size), dtype=np.int64)
        self.bias_ids = np.fromiter(params.logit_bias.keys(), dtype=np.int64, count=len(params.logit_bias))
        self.bias_values = np.fromiter(params.logit_bias.values(), dtype=np.float32, count=len(params.logit_bias))
        self.counts: TokenCounts | None = None
        if params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
            self.counts = TokenCounts(prompt_ids if params.repetition_penalty != 1.0 else ())
        self._always_changes = bool(params.logit_bias) or grammar is not None or self.counts is not None

    def append(self, token_id: int) -> None:
        """Takes note of a token that the answer now has."""
        self.num_outputs += 1
        self._drawn.clear()
        self._num_used = 0
        if self.counts is not None:
            self.counts.add(token_id)
        if self.grammar is not None:
            self.grammar.accept(token_id)

    @property
    def changes_logits(self) -> bool:
        """Whether the next token is not simply chosen from the model's own logits."""
        return self._always_changes or self.num_outputs < self.params.min_tokens

    @property
    def masked_ids(self) -> np.ndarray:
        """The ids that `min_tokens` forbids for the next token.

        A grammar that has come to its end allows nothing but an end, so it is allowed then, however early.
        """
        if self.num_outputs >= self.params.min_tokens or (self.grammar is not None and self.grammar.is_finished):
            return self._end_ids[:0]
        return self._end_ids

    def uniform(self) -> float:
        """The sequence's next random number, in [0, 1) with 53 bits: the same ones whatever else the engine runs.

        numpy's Philox4x64, keyed by a hash of the seed's 64 bits and the answer's index; without a seed, of 128 bits of
        the system's entropy.
        """
        if self._generator is None:
            seed, index = self.params.seed, self._seed_offset
            source = np.random.SeedSequence(None if seed is None else seed % 2**64, spawn_key=(index,))
            self._generator = np.random.Generator(np.random.Philox(source))
        if self._num_used == len(self._drawn):
            self._drawn.append(self._generator.random())
        self._num_used += 1
        return self._drawn[self._num_used - 1]

    def rewind(self) -> None:
        """Lets `uniform` give out again what it gave for a token that nobody took."""
        self._num_used = 0


class TokenCounts:
    """The distinct tokens of a sequence and how often its answer has each, as arrays that grow by one at a time.

    Args:
        prompt_ids: Tokens that are there, but not in the answer: they count 0.
    """

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        distinct = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self._size = len(distinct)
        self._ids = np.concatenate([distinct, np.zeros(64, dtype=np.int64)])
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._slots = {token: slot for slot, token in enumerate(distinct.tolist())}

    def add(self, token_id: int) -> None:
        """Counts a token of the answer."""
        slot = self._slots.get(token_id)
        if slot is None:
            slot = self._slots[token_id] = self._size
            if slot == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[slot] = token_id
            self._size += 1
        self._counts[slot] += 1

    @property
    def ids(self) -> np.ndarray:
        """The distinct tokens, int64, in order of appearance."""
        return self._ids[: self._size]

    @property
    def counts(self) -> np.ndarray:
        """How often the answer has each of `ids`, float32."""
        return self._counts[: self._size]
