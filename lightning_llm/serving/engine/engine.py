"""`Engine`: the model, its cache and its books, moved on one step at a time by whoever owns it.

Not for several threads: one calls `add`, `abort` and `step`, be it a server's loop or `LLM.generate`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lightning_llm.models.decoder import Decoder
from lightning_llm.serving.engine.answers import Answers
from lightning_llm.serving.engine.config import EngineConfig
from lightning_llm.serving.engine.costs import PreemptionCosts
from lightning_llm.serving.engine.grammar import GrammarCompiler, GrammarMatcher
from lightning_llm.serving.engine.kv_cache import KVCache
from lightning_llm.serving.engine.outputs import EngineStats, TokenLogprob, Update
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.engine.request import Request, Status
from lightning_llm.serving.engine.runner import Runner
from lightning_llm.serving.engine.sampler import Sampled, Sampler
from lightning_llm.serving.engine.scheduler import Schedule, Scheduler
from lightning_llm.serving.engine.sizing import block_bytes, cache_blocks, longest_sequence, window_of
from lightning_llm.serving.errors import RequestError
from lightning_llm.serving.kernels.batch import Piece

log = logging.getLogger(__name__)

Pooling = Literal["mean", "last"]

_LOGITS_ROWS = 256  # of a prompt at a time: all at once would dwarf the model
_NAP = 0.005  # seconds; who steps the engine has others to listen to while a batch waits to be filled
_LOST_STEPS = 5  # one after another in which the only request failed: it may be the requests, but no longer
_BROKEN = "The model could not compute this request."
_LARGE_STEP = 64  # tokens; a step of so many is bound by computing


class Engine:
    """Answers requests with a model, many at a time.

    Args:
        decoder: The model, on its device and in its element type.
        tokenizer: Its words.
        config: Sizes and policies.
        eos_token_ids: Tokens that end an answer; None: what the model's config says.
        sharing: Engines that share the device and the host, this one included, each of which takes its part.

    Raises:
        ConfigurationError: The sizes do not fit the model or the memory.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        eos_token_ids: Collection[int] | None = None,
        sharing: int = 1,
    ) -> None:
        config = config or EngineConfig()
        model = decoder.config
        weight = next(decoder.parameters())
        num_blocks = cache_blocks(config, model, weight.dtype, weight.device, sharing=sharing)
        self.config = config
        self.max_model_len = longest_sequence(config, model, num_blocks)
        self.vocab_size = model.vocab_size
        self.eos_token_ids = frozenset(model.eos_token_ids if eos_token_ids is None else eos_token_ids)
        self.cache = KVCache(
            model,
            num_blocks,
            block_size=config.block_size,
            dtype=weight.dtype,
            device=weight.device,
            kv_dtype=config.kv_cache_dtype,
            host_blocks=config.swap_blocks,
        )
        self.costs = PreemptionCosts(block_bytes(config, model, weight.dtype), 2 * model.num_active_parameters())
        self.scheduler = Scheduler(
            config,
            num_blocks,
            self.max_model_len,
            sliding_window=window_of(model),
            costs=self.costs,
        )
        self.runner = Runner(decoder, self.cache, kernel=config.attention)
        self._sampler = Sampler()
        self._grammars = GrammarCompiler(tokenizer, model.vocab_size, self.eos_token_ids)
        self._answers = Answers(
            self.scheduler,
            tokenizer,
            vocab_size=model.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self.eos_token_ids,
        )
        self._causes: dict[Request, Exception] = {}  # of what failed in this step, other than by the model's numbers
        self._lost_steps = 0
        self._caught_up = True  # whether the device had nothing left to do when the last step ended
        self._prompt_tokens = self._step_tokens = 0
        self._step_sizes: Counter[int] = Counter()  # by the power of two that is not less

    # -- what callers do --

    def add(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        pooling: Pooling | None = None,
        arrival: float | None = None,
        grammar: GrammarMatcher | None = None,
    ) -> None:
        """Lets a request wait for its turn.

        Args:
            request_id: Its name in `Update`s and for `abort`.
            prompt_ids: The prompt.
            params: How to answer.
            priority: Lower comes first, where the policy says so.
            cache_salt: Only requests with the same one find each other's prefixes: the tenant.
            pooling: Instead of an answer, the prompt's hidden states as one vector of length 1: the "mean" over its
                tokens, or that of the "last".
            arrival: When it came, in seconds of `time.monotonic`; None is now.
            grammar: What `prepare` made of `params`; without it a grammar is compiled here.

        Raises:
            RequestError: It cannot be answered; nothing was added.
        """
        self._check(request_id, prompt_ids, params, pooling)
        grammar = grammar or self.prepare(params)
        request = Request(
            request_id=request_id,
            token_ids=list(prompt_ids),
            params=params,
            priority=priority,
            cache_salt=cache_salt,
            pooling=pooling,
            arrival=time.monotonic() if arrival is None else arrival,
            forks=0 if pooling else params.n - 1,
            max_output=params.max_tokens or self.max_model_len - len(prompt_ids),
        )
        if pooling is None:
            self._answers.begin(request, grammar)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]
        self._answers.live[request_id] = [request]
        self.scheduler.add(request)

    def prepare(self, params: SamplingParams) -> GrammarMatcher | None:
        """Does beforehand what `add` would take long for; the one method that may be called by another thread.

        Raises:
            RequestError: `add` would raise it.
        """
        return None if params.grammar is None else self._grammars.compile(params.grammar)

    def abort(self, request_id: str) -> None:
        """Ends a request, wherever it stands; its blocks are free when this returns. Unknown ones are passed over."""
        self._answers.abort(request_id)

    def close(self) -> None:
        """Ends the process that waits for grammars."""
        self._grammars.close()

    @property
    def has_work(self) -> bool:
        """Whether a `step` would do anything."""
        return self.scheduler.has_work

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Computes one step of all requests that can be moved on, and says what came of it.

        A request that fails does so alone, as an update with `error`.

        Raises:
            RuntimeError: All of several requests failed, or one after another, so it is the engine that does not work.
        """
        plan = self.scheduler.schedule(time.monotonic())
        self._move_blocks(plan)
        if not plan.tokens:
            time.sleep(min(self.scheduler.seconds_to_batch(time.monotonic()), _NAP))
            return []
        began = time.monotonic()
        self._causes = {}
        states, updates = self._forward(plan)
        self._step_tokens += plan.num_tokens
        self._step_sizes[(plan.num_tokens - 1).bit_length()] += 1
        self.scheduler.advance(plan)
        rows: list[Tensor] = []
        asked: list[Request] = []
        for request, hidden in states.items():
            updates += self._alone(request, self._take_prompt, plan.tokens[request], hidden)
            if request.status is Status.FINISHED or request.num_computed < request.num_tokens:
                continue
            if request.pooling is not None:
                updates += self._alone(request, self._answers.finish_pooling)
                continue
            answers = [request]
            for child in self._answers.fork(request):
                updates += self._alone(child, self._answers.begin_fork, request)
                answers += [] if child.status is Status.FINISHED else [child]
            asked += answers
            rows += [hidden[-1]] * len(answers)
        for request, one in zip(asked, self._sample(rows, asked), strict=True):
            updates += self._alone(request, self._answers.accept, one)
        self._measure(plan, time.monotonic() - began, was_read=bool(asked))
        self._judge(plan)
        return updates

    def stats(self) -> EngineStats:
        """How it stands."""
        scheduler = self.scheduler
        return EngineStats(
            num_requests_running=len(scheduler.running),
            num_requests_waiting=len(scheduler.waiting),
            num_requests_swapped=sum(request.host_blocks is not None for request in scheduler.waiting),
            blocks_total=scheduler.pool.total,
            blocks_free=scheduler.pool.num_free,
            blocks_cached=scheduler.pool.num_cached,
            swap_blocks_used=scheduler.host_pool.total - scheduler.host_pool.num_free,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.prefix_queries,
            prefix_cache_hits=scheduler.prefix_hits,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._answers.generation_tokens,
            steps=self._step_sizes.total(),
            requests_finished=dict(self._answers.finished),
            step_tokens=self._step_tokens,
            step_sizes=[self._step_sizes[power] for power in range(max(self._step_sizes, default=-1) + 1)],
        )

    # -- a step --

    def _move_blocks(self, plan: Schedule) -> None:
        began = time.monotonic()
        self.cache.swap_out(plan.swap_out)
        self.cache.swap_in(plan.swap_in)
        moved = len(plan.swap_out) + len(plan.swap_in)
        if moved:
            if self.cache.device.type == "cuda":
                torch.cuda.synchronize(self.cache.device)
            self.costs.saw_copy(moved, time.monotonic() - began)
        self.cache.copy(plan.copies)

    def _forward(self, plan: Schedule) -> tuple[dict[Request, Tensor], list[Update]]:
        """Hidden states [tokens, hidden] of each request, and what to say of those that failed."""
        pieces = {
            request: Piece(
                request.token_ids[request.num_computed : request.num_computed + tokens],
                request.num_computed,
                request.block_table,
            )
            for request, tokens in plan.tokens.items()
        }
        try:
            hidden = self.runner.forward(list(pieces.values()))
        except Exception:
            log.exception("A step of %d requests failed; computing them one by one", len(pieces))
            self._caught_up = False
            return self._forward_one_by_one(pieces)
        return dict(zip(pieces, hidden.split(list(plan.tokens.values())), strict=True)), []

    def _forward_one_by_one(self, pieces: dict[Request, Piece]) -> tuple[dict[Request, Tensor], list[Update]]:
        states: dict[Request, Tensor] = {}
        updates: list[Update] = []
        for request, piece in pieces.items():
            try:
                states[request] = self.runner.forward([piece])
            except Exception as error:
                self._causes[request] = error
                updates += self._answers.fail(request, _BROKEN)
        return states, updates

    def _alone(self, request: Request, work: Callable[..., list[Update]], *arguments: object) -> list[Update]:
        """Does work for one request; what it raises ends that request and no other."""
        try:
            return work(request, *arguments)
        except Exception as error:
            log.exception("Request %s fails", request.request_id)
            self._causes[request] = error
            return self._answers.fail(request, _BROKEN)

    def _sample(self, rows: list[Tensor], asked: list[Request]) -> list[Sampled]:
        """The next tokens, from the hidden states [hidden] of each request's last one."""
        if not asked:
            return []
        states = [request.sampling for request in asked]
        try:
            return self._sampler.sample(self.runner.logits(torch.stack(rows)), states)
        except Exception:
            log.exception("Sampling for %d answers failed; sampling one by one", len(asked))
            self._caught_up = False
        sampled: list[Sampled] = []
        for request, hidden in zip(asked, rows, strict=True):
            request.sampling.rewind()
            try:
                sampled += self._sampler.sample(self.runner.logits(hidden[None]), [request.sampling])
            except Exception as error:
                self._causes[request] = error
                sampled.append(Sampled(-1, error=_BROKEN))
        return sampled

    def _measure(self, plan: Schedule, seconds: float, *, was_read: bool) -> None:
        """Learns how fast the model computes, from large steps that ran alone and at once.

        A GPU has caught up only when something was read from it, so this must hold for the step before, too: else a
        step is charged with the chunks of prompts that were still under way.
        """
        caught_up = was_read or self.cache.device.type == "cpu"
        if caught_up and self._caught_up and plan.num_tokens >= _LARGE_STEP:
            self.costs.saw_forward(plan.num_tokens, seconds)
        self._caught_up = caught_up

    def _judge(self, plan: Schedule) -> None:
        """Tells requests that fail from an engine that does."""
        if any(request not in self._causes for request in plan.tokens):
            self._lost_steps = 0
            return
        self._lost_steps += 1
        if len(plan.tokens) > 1 or self._lost_steps >= _LOST_STEPS:
            raise RuntimeError(
                f"None of {len(plan.tokens)} requests could be computed, in {self._lost_steps} steps one after another"
            ) from next(iter(self._causes.values()))

    def _take_prompt(self, request: Request, tokens: int, hidden: Tensor) -> list[Update]:
        """Keeps what is wanted of the prompt's hidden states [tokens, hidden], which went up to `num_computed`."""
        start = request.num_computed - tokens
        if request.num_computed >= request.num_prompt and not request.prompt_computed:
            request.prompt_computed = True
            self._prompt_tokens += request.num_prompt
        if request.pooling == "mean":
            total = hidden.float().sum(0)
            request.pooled = total if request.pooled is None or start == 0 else request.pooled + total
        elif request.pooling == "last":
            request.pooled = hidden[-1].float()
        wanted = request.params.prompt_logprobs
        if wanted is None or len(request.prompt_logprobs) >= request.num_prompt:
            return []
        first = len(request.prompt_logprobs) - 1 - start  # the state before a token says how likely it was
        last = min(request.num_computed, request.num_prompt - 1) - start
        for at in range(max(first, 0), last, _LOGITS_ROWS):
            end = min(at + _LOGITS_ROWS, last)
            targets = request.token_ids[start + at + 1 : start + end + 1]
            found = self._sampler.logprobs_of(self.runner.logits(hidden[at:end]), targets, wanted)
            request.prompt_logprobs += [TokenLogprob(t, *one) for t, one in zip(targets, found, strict=True)]
        return []

    def _check(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, pooling: Pooling | None
    ) -> None:
        if request_id in self._answers.live:
            raise RequestError(f"There is a request {request_id!r} already.", param="request_id")
        if not prompt_ids:
            raise RequestError("The prompt has no tokens: give at least one.", param="prompt")
        for token in prompt_ids:
            if not 0 <= token < self.vocab_size:
                raise RequestError(f"Token id {token} is not in the vocabulary of {self.vocab_size}.", param="prompt")
        params.check_vocabulary(self.vocab_size)
        wanted = 0 if pooling else 1 if params.max_tokens is None else params.max_tokens
        total = len(prompt_ids) + wanted
        if total > self.max_model_len:
            raise RequestError(
                f"The model's context is {self.max_model_len} tokens: the prompt has {len(prompt_ids)}, and max_tokens "
                f"asks for {wanted}, {total} together. Shorten the one or lower the other.",
                param="prompt",
                code="context_length_exceeded",
            )
        if params.n > self.config.max_num_seqs:
            raise RequestError(f"n is {params.n}; at most {self.config.max_num_seqs} run at a time.", param="n")
