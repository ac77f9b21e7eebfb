"""The engine's books played through without a model: what would be in the KV cache, token by token.

A key and value is stood for by all tokens up to its own, so that a block with anything else in it is noticed.
"""

from __future__ import annotations

import itertools

from lightning_llm.serving.engine.request import Request, Status
from lightning_llm.serving.engine.scheduler import Schedule, Scheduler
from lightning_llm.serving.kernels.batch import NULL_BLOCK

Entry = tuple[str, tuple[int, ...]]


class CacheModel:
    """Runs the steps of a scheduler on pretended memory, and checks every invariant on the way."""

    def __init__(self, scheduler: Scheduler, window: int | None = None) -> None:
        self.scheduler = scheduler
        self.window = window
        self.size = scheduler.config.block_size
        self.device: dict[int, dict[int, Entry]] = {}
        self.host: dict[int, dict[int, Entry]] = {}
        self.tokens = itertools.count(1000)
        self.submitted = self.finished = 0
        self.now = 0.0

    def step(self, next_token=None) -> Schedule:
        """One step; every request whose tokens are all computed gets another."""
        self.now += 1.0
        running_before = list(self.scheduler.running)
        plan = self.scheduler.schedule(self.now)
        self.check_plan(plan, running_before)
        for source, target in plan.swap_out:
            self.host[target] = dict(self.device.get(source, {}))
        for source, target in plan.swap_in:
            self.device[target] = dict(self.host[source])
        before = {source: dict(self.device.get(source, {})) for source, _ in plan.copies}
        for source, target in plan.copies:
            self.device[target] = dict(before[source])
        for request, count in plan.tokens.items():
            self.compute(request, count)
        self.scheduler.advance(plan)
        for request in plan.tokens:
            assert request.num_computed <= request.num_tokens
            if request.num_computed == request.num_tokens and request.status is Status.RUNNING:
                self.answer(request, next_token)
        self.scheduler.check()
        return plan

    def compute(self, request: Request, count: int) -> None:
        table = request.block_table
        for position in range(request.num_computed, request.num_computed + count):
            block = table[position // self.size]
            assert block != NULL_BLOCK
            assert not self.scheduler.pool.is_shared(block), "a block of several is written to"
            self.device.setdefault(block, {})[position % self.size] = self.entry(request, position)
            first = 0 if self.window is None else max(0, position + 1 - self.window)
            for seen in range(first, position + 1):
                found = self.device[table[seen // self.size]].get(seen % self.size)
                assert found == self.entry(request, seen), f"token {position} would see a wrong {seen}"

    def entry(self, request: Request, position: int) -> Entry:
        return request.cache_salt, tuple(request.token_ids[: position + 1])

    def answer(self, request: Request, next_token) -> None:
        answers = [request]
        answers += [self.scheduler.fork(request, index + 1) for index in range(request.forks)]
        self.submitted += request.forks
        request.forks = 0
        for one in answers:
            one.token_ids.append(next(self.tokens) if next_token is None else next_token(one))
            if one.num_output >= one.max_output:
                self.finish(one)

    def finish(self, request: Request) -> None:
        if request.status is not Status.FINISHED:
            self.finished += 1
        self.scheduler.finish(request)

    def check_plan(self, plan: Schedule, running_before: list[Request]) -> None:
        config, scheduler = self.scheduler.config, self.scheduler
        if config.batching == "chunked":
            assert plan.num_tokens <= config.max_num_batched_tokens
        assert len(scheduler.running) + sum(r.forks for r in scheduler.running) <= config.max_num_seqs
        assert not plan.preempted or set(scheduler.running) <= set(running_before), "let in while others made room"
        assert not set(plan.preempted) & set(plan.tokens)
        assert not (plan.swap_in and plan.swap_out)
        for request, count in plan.tokens.items():
            assert count > 0
            assert request.status is Status.RUNNING
            assert len(request.block_table) >= scheduler.blocks_for(request.num_computed + count)
        assert plan.tokens or not scheduler.has_work or config.batching == "dynamic", "there is work and nothing moves"
        assert len(scheduler.running) + len(scheduler.waiting) + self.finished == self.submitted

    def drain(self, limit: int = 10_000) -> None:
        """Steps until nothing is left; every block must be free then."""
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "not everybody was served"
        assert self.scheduler.pool.num_free == self.scheduler.pool.total
        assert self.scheduler.host_pool.num_free == self.scheduler.host_pool.total
