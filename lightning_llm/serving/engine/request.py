"""`Request`: everything that the engine knows of one sequence, passed along by all its parts."""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lightning_llm.serving.engine.outputs import TokenLogprob
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.engine.sampling_state import SamplingState
from lightning_llm.serving.engine.text import TextStream


class Status(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"
    """In the queue, without blocks on the device."""
    RUNNING = "running"
    """Has blocks; each step may compute some of its tokens."""
    FINISHED = "finished"


@dataclass(eq=False, kw_only=True)
class Request:
    """One sequence: a prompt, and one answer as far as it has come.

    The rule of the engine: `num_computed` catches up with `num_tokens`. Prefill, decoding, chunks, hits in the prefix
    cache and coming back after a preemption are all that.

    Attributes:
        request_id: The caller's name for it.
        index: Which of the `params.n` answers this is.
        token_ids: Prompt and answer so far.
        num_prompt: How many of them are the prompt.
        params: How tokens are chosen.
        priority: Lower comes first, where the policy says so.
        cache_salt: Only requests with the same one find each other's blocks.
        pooling: What is wanted instead of an answer: hidden states of the prompt, as one vector; None for an answer.
        arrival: When it came, in seconds of the monotonic clock.
        forks: Answers that are to branch off when the prompt is computed.
        max_output: Most tokens of the answer.
        num_computed: Tokens whose keys and values are in the cache.
        block_table: The blocks that have them, in order.
        host_blocks: Where they are while it is swapped out; None in the place of a block that can be forgotten.
        hashes: Hash chain of its full blocks, as far as it was needed.
        num_registered: Full blocks that were made findable.
        num_left: Blocks at the beginning that a sliding window has left behind.
        num_cached: Tokens of the prompt that were found in the cache.
        num_preemptions: How often it had to make room.
        prompt_computed: Whether the whole prompt ever was.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    index: int = 0
    num_prompt: int = 0
    priority: int = 0
    cache_salt: str = ""
    pooling: Literal["mean", "last"] | None = None
    arrival: float = field(default_factory=time.monotonic)
    order: int = 0
    status: Status = Status.WAITING
    forks: int = 0
    max_output: int = 0
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    host_blocks: list[int | None] | None = None
    hashes: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    num_left: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    prompt_computed: bool = False
    # How its tokens are chosen and become text; a request for a vector has neither.
    sampling: SamplingState = None  # type: ignore[assignment]
    text: TextStream = None  # type: ignore[assignment]
    pooled: Tensor | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    # Times of the monotonic clock, in seconds.
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    def __post_init__(self) -> None:
        self.num_prompt = self.num_prompt or len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that are known: prompt and answer."""
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        """Tokens of the answer."""
        return len(self.token_ids) - self.num_prompt

    @property
    def output_ids(self) -> Sequence[int]:
        """The answer."""
        return self.token_ids[self.num_prompt :]

    @property
    def needs_all_states(self) -> bool:
        """Whether every token of the prompt must be computed, even if its keys and values could be found."""
        return self.pooling is not None or self.params.prompt_logprobs is not None

    def fork(self, index: int) -> Request:
        """Another answer to the same prompt, from here on. Its blocks are still to be shared."""
        return Request(
            request_id=self.request_id,
            token_ids=list(self.token_ids),
            params=self.params,
            index=index,
            num_prompt=self.num_prompt,
            priority=self.priority,
            cache_salt=self.cache_salt,
            arrival=self.arrival,
            status=self.status,
            max_output=self.max_output,
            num_computed=self.num_computed,
            block_table=list(self.block_table),
            hashes=list(self.hashes),
            num_registered=self.num_registered,
            num_left=self.num_left,
            num_cached=self.num_cached,
            prompt_computed=self.prompt_computed,
            first_scheduled=self.first_scheduled,
        )
