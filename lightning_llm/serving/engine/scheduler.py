"""`Scheduler`: who gets how many tokens of the next step, and which blocks they go to.

There is no prefill phase and no decode phase. Every request has `num_computed` and `num_tokens`, and a step hands out a
budget of tokens so that the first catches up with the second (vLLM v1's rule).
"""

from __future__ import annotations

import bisect
import sys
from dataclasses import dataclass, field

from lightning_llm.serving.engine.blocks import BlockPool, chain_hash, chain_root
from lightning_llm.serving.engine.config import EngineConfig
from lightning_llm.serving.engine.costs import PreemptionCosts
from lightning_llm.serving.engine.request import Request, Status
from lightning_llm.serving.engine.waiting import WaitingQueue
from lightning_llm.serving.kernels.batch import NULL_BLOCK

_WATERMARK = 0.01  # share of the blocks that a newcomer must leave free, so that it does not push others out at once


@dataclass
class Schedule:
    """One step: how many tokens of which request, and the copies that must be made before, in this order."""

    tokens: dict[Request, int] = field(default_factory=dict)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    """From blocks of the device to blocks of the host."""
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    """From blocks of the host to blocks of the device."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Copy-on-write: from a shared block to one that may be written to."""
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Of the whole step."""
        return sum(self.tokens.values())


class Scheduler:
    """The books of the engine: queue, running sequences and blocks. It touches no tensors.

    Args:
        config: Sizes and policies.
        num_blocks: Of the KV cache, the null block included.
        max_model_len: Most tokens of a sequence.
        sliding_window: Tokens that a token sees in every layer, itself included; None if any layer sees all.
        costs: Of swapping and recomputing.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        max_model_len: int,
        *,
        sliding_window: int | None = None,
        costs: PreemptionCosts | None = None,
    ) -> None:
        self.config = config
        self.max_model_len = max_model_len
        self.pool = BlockPool(num_blocks)
        self.host_pool = BlockPool(config.swap_blocks, first=0)
        self.waiting = WaitingQueue(config)
        self.running: list[Request] = []
        """In the order of the queue: the first to come has the first claim on blocks, the last makes room first."""
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._window = sliding_window
        self._costs = costs
        self._watermark = int(_WATERMARK * self.pool.total)

    # -- what the engine calls --

    def add(self, request: Request) -> None:
        """Lets a request wait for its turn."""
        self.waiting.add(request)

    def fork(self, request: Request, index: int) -> Request:
        """Another answer to a running request's prompt, running too and sharing its blocks."""
        child = request.fork(index)
        for block in child.block_table:
            if block != NULL_BLOCK:
                self.pool.share(block)
        self._start(child)
        return child

    def finish(self, request: Request) -> None:
        """Takes a request out, wherever it stands, and gives its blocks back; a second call does nothing."""
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        elif request.status is Status.RUNNING:
            self.running.remove(request)
        self._drop_blocks(request)
        request.status = Status.FINISHED

    @property
    def has_work(self) -> bool:
        """Whether anybody waits or runs."""
        return bool(self.running) or len(self.waiting) > 0

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self.config.block_size)

    def schedule(self, now: float) -> Schedule:
        """Hands out the next step. Running sequences come first; others are let in only if nobody had to make room.

        Args:
            now: Seconds of the monotonic clock.
        """
        plan = Schedule()
        budget = self.config.max_num_batched_tokens
        # Those that want one token first: a long prompt must not hold up the answers of the others.
        for request in list(self.running):
            if request.status is Status.RUNNING and request.num_tokens - request.num_computed == 1:
                if self._make_writable(request, plan):
                    plan.tokens[request] = 1
                    budget -= 1
        for request in self.running:
            missing = request.num_tokens - request.num_computed
            if missing > 1 and budget > 0:  # it has had blocks for all of them since it was let in
                plan.tokens[request] = min(missing, budget)
                budget -= plan.tokens[request]
        if not plan.preempted:
            self._admit(plan, budget, now)
        return plan

    def advance(self, plan: Schedule) -> None:
        """Books a step that was computed: its full blocks can be found from now on."""
        for request, tokens in plan.tokens.items():
            if request.status is Status.RUNNING:
                request.num_computed += tokens
                self._register(request)
                self._leave_window(request)

    def seconds_to_batch(self, now: float) -> float:
        """How long a dynamic batch still waits to be filled; 0 if nothing waits for that."""
        head = self.waiting.head()
        if self.config.batching != "dynamic" or head is None or self.running:
            return 0.0
        return max(0.0, head.arrival + self.config.batch_timeout - now)

    def check(self) -> None:
        """Says what is wrong with the books.

        Raises:
            RuntimeError: A block leaked or is held by one who should not, or a table does not fit its sequence.
        """
        everyone = [*self.running, *self.waiting]
        self.pool.check(request.block_table for request in everyone)
        self.host_pool.check([b for b in request.host_blocks or () if b is not None] for request in everyone)
        for request in self.waiting:
            if request.block_table:
                raise RuntimeError(f"{request.request_id} waits and holds {len(request.block_table)} blocks")
        for request in self.running:
            least = self.blocks_for(request.num_computed)
            if len(request.block_table) < least or request.host_blocks is not None:
                raise RuntimeError(f"{request.request_id} runs with {len(request.block_table)} of {least} blocks")

    # -- running sequences --

    def _make_writable(self, request: Request, plan: Schedule) -> bool:
        """Gives a request the block that its next token goes to; the last in line makes room if there is none."""
        index = request.num_computed // self.config.block_size
        table = request.block_table
        new = index == len(table)
        if not new and not self.pool.is_shared(table[index]):
            return True
        while self.pool.num_free == 0:
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is request:
                return False
            if not new and not self.pool.is_shared(table[index]):  # the other holder has just gone
                return True
        [block] = self.pool.allocate(1)
        if new:
            table.append(block)
        else:
            plan.copies.append((table[index], block))
            self.pool.release([table[index]])
            table[index] = block
        return True

    def _preempt(self, request: Request, plan: Schedule) -> None:
        """Sends a running request back to the queue, its blocks to the host or to nowhere."""
        self.running.remove(request)
        if plan.tokens.pop(request, None) is not None:
            raise RuntimeError(f"{request.request_id} was given tokens and preempted in one step")
        used = request.block_table[: self.blocks_for(request.num_computed)]
        held = [block for block in used if block != NULL_BLOCK]
        hosted: list[int | None] | None = None
        if self._swaps(request, len(held)):
            places = iter(self.host_pool.allocate(len(held)))
            hosted = [None if block == NULL_BLOCK else next(places) for block in used]
            plan.swap_out += [(block, place) for block, place in zip(used, hosted, strict=True) if place is not None]
        else:
            request.num_computed = request.num_left = 0
        self._drop_blocks(request)
        request.host_blocks = hosted
        request.num_preemptions += 1
        request.status = Status.WAITING
        self.num_preemptions += 1
        self.waiting.add(request)
        plan.preempted.append(request)

    def _swaps(self, request: Request, blocks: int) -> bool:
        if self.config.preemption == "recompute" or blocks > self.host_pool.num_free or not blocks:
            return False
        if self.config.preemption == "swap" or self._costs is None:
            return True
        return self._costs.swap_is_cheaper(blocks, request.num_computed)

    # -- letting requests in --

    def _admit(self, plan: Schedule, budget: int, now: float) -> None:
        in_batches = self.config.batching in ("static", "dynamic")
        open_to_all = not in_batches or self._batch_is_due(now)
        seats = self.config.max_num_seqs - sum(1 + request.forks for request in self.running)
        if in_batches:
            budget = sys.maxsize
        while (request := self.waiting.head()) is not None:
            # While a batch runs to its end, only those of it come back that had to make room.
            if seats < 1 + request.forks or not (open_to_all or request.num_preemptions):
                return
            known = self._known_blocks(request)
            missing = request.num_tokens - self._computed_by(request, known)
            whole = self.config.batching == "continuous"
            if (
                budget <= 0
                or (whole and missing > budget and plan.tokens)
                or not self._give_blocks(request, known, plan)
            ):
                return
            self._start(request)
            if request.first_scheduled is None:
                request.first_scheduled = now
            plan.tokens[request] = missing if whole else min(missing, budget)
            budget -= plan.tokens[request]
            seats -= 1 + request.forks

    def _batch_is_due(self, now: float) -> bool:
        head = self.waiting.head()
        if self.running or head is None:
            return False
        full = len(self.waiting) >= self.config.max_num_seqs
        return self.config.batching == "static" or full or now - head.arrival >= self.config.batch_timeout

    def _known_blocks(self, request: Request) -> list[int | None]:
        """The blocks of a request that are on the device; None for those that are on the host."""
        if request.host_blocks is None:
            return list(self._find_prefix(request))
        full = request.num_computed // self.config.block_size if self.config.caches_prefixes else 0
        hashes = self._hashes(request, full)
        found = [self.pool.find(content) for content in hashes[:full]]
        found += [None] * (len(request.host_blocks) - full)
        return [
            NULL_BLOCK if hosted is None else block for hosted, block in zip(request.host_blocks, found, strict=True)
        ]

    def _find_prefix(self, request: Request) -> list[int]:
        found: list[int] = []
        if not self.config.caches_prefixes or request.needs_all_states:
            return found
        # The last token is always computed: its logits are what comes next.
        for content in self._hashes(request, (request.num_tokens - 1) // self.config.block_size):
            block = self.pool.find(content)
            if block is None:
                break
            found.append(block)
        return found

    def _computed_by(self, request: Request, known: list[int | None]) -> int:
        return request.num_computed if request.host_blocks is not None else len(known) * self.config.block_size

    def _give_blocks(self, request: Request, known: list[int | None], plan: Schedule) -> bool:
        """Gives a waiting request blocks for all its tokens, or none at all."""
        total = self.max_model_len if self.config.kv == "static" else request.num_tokens
        table = known + [None] * (self.blocks_for(total) - len(known))
        revived = sum(block is not None and block != NULL_BLOCK and not self.pool.is_held(block) for block in table)
        watermark = self._watermark if self.running else 0
        if self.pool.num_free - revived - watermark < table.count(None):
            return False
        computed = self._computed_by(request, known)
        for block in table:
            if block is not None and block != NULL_BLOCK:
                self.pool.share(block)
        fresh = iter(self.pool.allocate(table.count(None)))
        request.block_table = [next(fresh) if block is None else block for block in table]
        if request.host_blocks is not None:
            plan.swap_in += [
                (hosted, block)
                for hosted, block, on_device in zip(request.host_blocks, request.block_table, known, strict=False)
                if hosted is not None and on_device is None
            ]
            self._drop_host_blocks(request)
        elif not request.num_preemptions and not request.needs_all_states:
            self.prefix_queries += request.num_tokens
            self.prefix_hits += computed
            request.num_cached = computed
        request.num_computed = computed
        return True

    def _start(self, request: Request) -> None:
        if request in self.waiting:
            self.waiting.remove(request)
        request.status = Status.RUNNING
        bisect.insort(self.running, request, key=self.waiting.place)

    # -- blocks --

    def _hashes(self, request: Request, count: int) -> list[bytes]:
        """The first `count` hashes of a request's chain."""
        size = self.config.block_size
        for index in range(len(request.hashes), count):
            before = request.hashes[-1] if request.hashes else chain_root(request.cache_salt)
            request.hashes.append(chain_hash(before, request.token_ids[index * size : (index + 1) * size]))
        return request.hashes[:count]

    def _register(self, request: Request) -> None:
        if not self.config.caches_prefixes:
            return
        full = request.num_computed // self.config.block_size
        if full > request.num_registered:
            hashes = self._hashes(request, full)
            for index in range(request.num_registered, full):
                if request.block_table[index] != NULL_BLOCK:
                    self.pool.register(request.block_table[index], hashes[index])
            request.num_registered = full

    def _leave_window(self, request: Request) -> None:
        if self._window is None or self.config.kv == "static":
            return
        left = max(0, request.num_computed + 1 - self._window) // self.config.block_size
        if left > request.num_left:
            self.pool.release(request.block_table[request.num_left : left])
            request.block_table[request.num_left : left] = [NULL_BLOCK] * (left - request.num_left)
            request.num_left = left

    def _drop_blocks(self, request: Request) -> None:
        self.pool.release(request.block_table)
        request.block_table = []
        request.num_registered = 0
        self._drop_host_blocks(request)

    def _drop_host_blocks(self, request: Request) -> None:
        self.host_pool.release([block for block in request.host_blocks or () if block is not None])
        request.host_blocks = None
