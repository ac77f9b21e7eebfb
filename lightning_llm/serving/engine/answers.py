"""`Answers`: from sampled tokens to what is said of a request, from its beginning to its end.

The engine computes and calls this with what came of it. It touches no model and no cache.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection

from tokenizers import Tokenizer
from torch.nn.functional import normalize

from lightning_llm.serving.engine.grammar import GrammarMatcher
from lightning_llm.serving.engine.outputs import FinishReason, TokenLogprob, Update, Usage
from lightning_llm.serving.engine.request import Request
from lightning_llm.serving.engine.sampler import Sampled
from lightning_llm.serving.engine.sampling_state import SamplingState
from lightning_llm.serving.engine.scheduler import Scheduler
from lightning_llm.serving.engine.text import TextStream


class Answers:
    """All answers that have not ended, and a count of those that have.

    Args:
        scheduler: Where answers branch off, and give their blocks back when they end.
        tokenizer: The model's words.
        vocab_size: Columns of the model's logits.
        max_model_len: Most tokens of a sequence.
        eos_token_ids: Tokens that end an answer.

    Attributes:
        live: The answers to each request, by its name.
        finished: Answers that have ended, by reason.
        generation_tokens: Of all answers so far.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: Collection[int],
    ) -> None:
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self.live: dict[str, list[Request]] = {}
        self.finished: Counter[str] = Counter()
        self.generation_tokens = 0

    def begin(self, request: Request, grammar: GrammarMatcher | None) -> None:
        """Gives an answer its generator and its text. Each needs a grammar of its own."""
        prompt = request.token_ids[: request.num_prompt]
        request.sampling = SamplingState(
            request.params,
            prompt,
            vocab_size=self._vocab_size,
            eos_token_ids=self._eos_token_ids,
            grammar=grammar,
            seed_offset=request.index,
        )
        request.text = TextStream(self._tokenizer, request.params, prompt)

    def fork(self, request: Request) -> list[Request]:
        """The other answers to a prompt that has just been computed; they are still to begin."""
        children: list[Request] = []
        while request.forks:
            children.append(self._scheduler.fork(request, request.params.n - request.forks))
            self.live[request.request_id].append(children[-1])
            request.forks -= 1
        return children

    def begin_fork(self, child: Request, parent: Request) -> list[Update]:
        """Begins an answer that `fork` made."""
        grammar = parent.sampling.grammar  # which has accepted nothing yet
        self.begin(child, None if grammar is None else grammar.copy())
        return []

    def finish_pooling(self, request: Request) -> list[Update]:
        """Ends a request for a vector."""
        if request.pooled is None or not bool(request.pooled.isfinite().all()):
            return self.fail(request, "The model's hidden states are not finite (NaN or infinity).")
        return [self._finish(request, Update(request.request_id), "stop")]

    def accept(self, request: Request, sampled: Sampled) -> list[Update]:
        """Takes a new token into an answer."""
        if sampled.error is not None:
            return self.fail(request, sampled.error)
        now = time.monotonic()
        token = sampled.token_id
        update = Update(request.request_id, request.index, [token])
        if request.params.logprobs is not None and sampled.logprob is not None:
            update.logprobs = [TokenLogprob(token, sampled.logprob, sampled.top)]
        if request.first_token is None:
            request.first_token = now
            if request.params.prompt_logprobs is not None and request.index == 0:
                update.prompt_logprobs = request.prompt_logprobs
        request.last_token = now
        request.token_ids.append(token)
        request.sampling.append(token)
        self.generation_tokens += 1
        reason = self._end_by_token(request, token, update)
        if reason is None or request.params.include_stop_str_in_output:
            update.text = request.text.push([token])
        if reason is None:
            update.stop_reason = request.text.stop_reason
            grammar = request.sampling.grammar
            complete = grammar is not None and grammar.is_finished
            reason = "stop" if update.stop_reason is not None or complete else None
        if reason is None and (request.num_output >= request.max_output or request.num_tokens >= self._max_model_len):
            reason = "length"
        return [update if reason is None else self._finish(request, update, reason)]

    def _end_by_token(self, request: Request, token: int, update: Update) -> FinishReason | None:
        if token in request.params.stop_token_ids:
            update.stop_reason = token
            return "stop"
        return "stop" if token in self._eos_token_ids and not request.params.ignore_eos else None

    def fail(self, request: Request, error: str) -> list[Update]:
        """Ends an answer, and those that were to branch off from it."""
        others = [
            Update(request.request_id, index, error=error)
            for index in range(request.params.n - request.forks, request.params.n)
        ]
        self.finished["error"] += request.forks
        failed = self._finish(request, Update(request.request_id, request.index, error=error), "error")
        for other in others:
            other.finish_reason, other.usage = failed.finish_reason, failed.usage
        return [failed, *others]

    def abort(self, request_id: str) -> None:
        """Ends all answers to a request; unknown ones are passed over."""
        for request in self.live.pop(request_id, ()):
            self.finished["abort"] += 1 + request.forks
            self._scheduler.finish(request)

    def _finish(self, request: Request, update: Update, reason: FinishReason) -> Update:
        """Ends an answer, and gives its blocks back."""
        if reason != "error":  # what led to that may be what does not work here
            if request.text is not None and request.text.stop_reason is None:
                update.text += request.text.finish()
            if request.pooled is not None:
                update.embedding = normalize(request.pooled, dim=0).tolist()
        self._scheduler.finish(request)
        siblings = self.live[request.request_id]
        siblings.remove(request)
        if not siblings:
            del self.live[request.request_id]
        self.finished[reason] += 1
        update.finish_reason = reason
        update.usage = usage_of(request)
        return update


def usage_of(request: Request) -> Usage:
    """Tokens and times of an answer that has ended."""
    now = time.monotonic()
    scheduled = request.first_scheduled or now
    first = request.first_token or now
    return Usage(
        prompt_tokens=request.num_prompt,
        completion_tokens=request.num_output,
        cached_tokens=request.num_cached,
        preemptions=request.num_preemptions,
        queued=scheduled - request.arrival,
        prefill=first - scheduled,
        decode=(request.last_token or first) - first,
    )
