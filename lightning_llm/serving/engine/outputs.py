"""What the engine says: `Update` after every step, in types that any wire can carry; `RequestOutput` at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class TokenLogprob:
    """One token and how likely the model thought it, before any setting of the request changed that.

    Attributes:
        token_id: The token.
        logprob: Natural logarithm of its probability.
        top: The likeliest tokens at its place, with theirs.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(slots=True)
class Usage:
    """Tokens and times of one answer.

    Attributes:
        prompt_tokens: Of the prompt.
        completion_tokens: Of the answer.
        cached_tokens: Of the prompt, found in the prefix cache.
        preemptions: How often it had to make room.
        queued: Seconds until it was first scheduled.
        prefill: Seconds from then to its first token.
        decode: Seconds from then to its last token.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    preemptions: int
    queued: float
    prefill: float
    decode: float


@dataclass(slots=True)
class Update:
    """What a step brought for one answer.

    Attributes:
        request_id: The request.
        index: Which of its answers.
        token_ids: New tokens.
        text: New text; a part of a character, or of what may become a stop string, waits for the next.
        logprobs: Of the new tokens, where asked for.
        finish_reason: Why it ended: "stop", "length", "abort" or "error"; None while it goes on.
        stop_reason: The stop string or stop token that it met.
        error: What went wrong.
        usage: With the last one of an answer.
        prompt_logprobs: With the first one, where asked for; the first token of a prompt has none.
        embedding: What was pooled, [hidden].
        worker: Whose engine it was, where there are several.
    """

    request_id: str
    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    usage: Usage | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    embedding: list[float] | None = None
    worker: int = 0


@dataclass
class Completion:
    """One whole answer.

    Attributes:
        index: Which of the `n`.
        text: What was written.
        token_ids: The same in tokens, the one that ended it included.
        finish_reason: "stop", "length", "abort" or "error".
        stop_reason: The stop string or stop token that it met.
        logprobs: Of each token, where asked for.
        error: Why it could not be computed; what came before is there.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None

    def add(self, update: Update) -> None:
        """Takes in what a step brought."""
        self.text += update.text
        self.token_ids += update.token_ids
        if update.logprobs is not None:
            self.logprobs = (self.logprobs or []) + update.logprobs
        self.finish_reason = update.finish_reason or self.finish_reason
        self.stop_reason = self.stop_reason if update.stop_reason is None else update.stop_reason
        self.error = update.error or self.error


@dataclass
class RequestOutput:
    """A prompt and its answers; `text` and the like are those of the first.

    Attributes:
        request_id: The request.
        prompt: As text, if it was given so.
        prompt_token_ids: As tokens.
        outputs: `n` answers.
        prompt_logprobs: Of the prompt's tokens, where asked for.
        num_cached_tokens: Of the prompt, found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        """Of the first answer."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """Of the first answer."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Of the first answer."""
        return self.outputs[0].finish_reason

    @property
    def error(self) -> str | None:
        """Of the first answer that has one."""
        return next((one.error for one in self.outputs if one.error is not None), None)

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Of the first answer."""
        return self.outputs[0].logprobs


@dataclass(frozen=True)
class EngineStats:
    """How the engine stands, and what it has done since it began.

    Attributes:
        num_requests_running, num_requests_waiting, num_requests_swapped: Sequences; swapped ones are waiting too.
        blocks_total, blocks_free, blocks_cached: Of the KV cache; free ones may be cached too.
        swap_blocks_used: Blocks of the host.
        num_preemptions, generation_tokens, steps: Counted from the beginning.
        prompt_tokens: Of prompts that were computed, each once, whatever became of their answers.
        prefix_cache_queries, prefix_cache_hits: Tokens of prompts that were looked for, and found.
        requests_finished: Answers that have ended, by reason; a request for n of them counts n times.
        step_tokens: Computed by all steps together.
        step_sizes: Steps by how many tokens they computed: in place `i` those with more than 2 ** (i - 1) and at most
            2 ** i.
    """

    num_requests_running: int
    num_requests_waiting: int
    num_requests_swapped: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    swap_blocks_used: int
    num_preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    prompt_tokens: int
    generation_tokens: int
    steps: int
    requests_finished: dict[str, int]
    step_tokens: int = 0
    step_sizes: list[int] = field(default_factory=list)

    @property
    def kv_cache_usage(self) -> float:
        """Share of the blocks that sequences hold, 0 to 1."""
        return 1 - self.blocks_free / self.blocks_total
