import itertools

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.engine.config import EngineConfig
from lightning_llm.serving.engine.costs import PreemptionCosts
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.engine.request import Request, Status
from lightning_llm.serving.engine.scheduler import Scheduler
from tests.serving.engine.cache_model import CacheModel

names = (f"request-{number}" for number in itertools.count())


def make(blocks=20, length=64, window=None, costs=None, **settings) -> CacheModel:
    sizes = {"block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16} | settings
    config = EngineConfig(**sizes)
    return CacheModel(Scheduler(config, blocks + 1, length, sliding_window=window, costs=costs), window)


def ask(model: CacheModel, prompt, answer=3, arrival=None, **fields) -> Request:
    params = SamplingParams(max_tokens=answer, **{k: fields.pop(k) for k in ("n", "prompt_logprobs") if k in fields})
    tokens = list(range(prompt)) if isinstance(prompt, int) else list(prompt)
    request = Request(
        request_id=next(names),
        token_ids=tokens,
        params=params,
        forks=params.n - 1,
        max_output=answer,
        arrival=model.now if arrival is None else arrival,
        **fields,
    )
    model.submitted += 1
    model.scheduler.add(request)
    return request


def test_a_long_prompt_comes_in_chunks_beside_the_answers_of_others():
    model = make()
    first = ask(model, 3, answer=10)
    model.step()
    second = ask(model, range(100, 140), answer=2)
    assert model.step().tokens == {first: 1, second: 15}
    assert model.step().tokens == {first: 1, second: 15}
    assert model.step().tokens == {first: 1, second: 10}
    assert model.step().tokens == {first: 1, second: 1}
    model.drain()


def test_nobody_is_let_in_whose_prompt_does_not_fit():
    model = make(blocks=5)
    first = ask(model, 12, answer=4)
    second = ask(model, range(50, 66), answer=1)
    assert list(model.step().tokens) == [first]
    model.drain()
    assert second.status is Status.FINISHED


def test_equal_beginnings_are_computed_once_and_the_last_token_always():
    model = make()
    ask(model, 16, answer=1)
    model.step()
    again = ask(model, 16, answer=1)
    assert model.step().tokens == {again: 4}
    assert again.num_cached == 12
    longer = ask(model, [*range(16), 77, 78], answer=1)
    assert model.step().tokens == {longer: 2}
    assert (model.scheduler.prefix_queries, model.scheduler.prefix_hits) == (50, 28)
    model.drain()


def test_tenants_do_not_find_each_others_prompts():
    model = make()
    ask(model, 16, answer=1, cache_salt="a")
    model.step()
    other = ask(model, 16, answer=1, cache_salt="b")
    assert model.step().tokens == {other: 16}
    assert other.num_cached == 0


@pytest.mark.parametrize("how", [{"pooling": "mean"}, {"prompt_logprobs": 0}], ids=str)
def test_who_wants_every_state_of_the_prompt_gets_nothing_from_the_cache(how):
    model = make()
    ask(model, 16, answer=1)
    model.step()
    other = ask(model, 16, answer=1, **how)
    assert model.step().tokens == {other: 16}


def test_answers_to_one_prompt_share_its_blocks_and_copy_what_they_write_to():
    model = make()
    ask(model, 10, answer=4, n=3)
    model.step()
    pool = model.scheduler.pool
    assert len(model.scheduler.running) == 3
    assert pool.total - pool.num_free == 3  # 10 tokens in blocks of 4, all three shared
    plan = model.step()
    assert len(plan.copies) == 2  # the last holder writes in place
    assert pool.total - pool.num_free == 5
    model.drain()


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_who_makes_room_comes_back_and_goes_on(preemption):
    model = make(blocks=7, swap_blocks=20, preemption=preemption, enable_prefix_caching=False)
    requests = [ask(model, range(100 * i, 100 * i + 8), answer=12) for i in range(3)]
    model.drain()
    assert model.scheduler.num_preemptions > 0
    assert all(request.num_output == 12 for request in requests)
    assert requests[0].num_preemptions == 0  # the last to come makes room first


def test_without_a_place_on_the_host_it_is_computed_again():
    model = make(blocks=7, swap_blocks=1, preemption="swap")
    [ask(model, range(100 * i, 100 * i + 8), answer=12) for i in range(3)]
    model.drain()
    assert model.scheduler.num_preemptions > 0


def test_the_cheaper_way_follows_the_sizes():
    costs = PreemptionCosts(bytes_per_block=1 << 20, flops_per_token=10**6)
    assert not costs.swap_is_cheaper(blocks=10, tokens=100)
    costs = PreemptionCosts(bytes_per_block=1 << 10, flops_per_token=10**9)
    assert costs.swap_is_cheaper(blocks=10, tokens=100)
    for _ in range(200):
        costs.saw_forward(1000, 1e-6)
    assert costs.flop_rate == pytest.approx(1e18, rel=1e-3)
    assert not costs.swap_is_cheaper(blocks=10, tokens=100)


def test_a_swapped_block_that_is_still_on_the_device_is_not_copied_back():
    model = make(blocks=8, swap_blocks=20, preemption="swap")
    first = ask(model, range(8), answer=14)
    second = ask(model, range(100, 112), answer=10)
    plans = [model.step() for _ in range(40)]
    assert first.status is second.status is Status.FINISHED
    moved_out = sum(len(plan.swap_out) for plan in plans)
    moved_in = sum(len(plan.swap_in) for plan in plans)
    assert 0 < moved_in < moved_out


def test_blocks_that_a_sliding_window_has_passed_are_given_back():
    model = make(blocks=20, window=6)
    request = ask(model, 30, answer=8)
    held = []
    while request.status is not Status.FINISHED:
        model.step()
        held.append(model.scheduler.pool.total - model.scheduler.pool.num_free)
    assert max(held[3:-1]) <= 3
    model.drain()


def test_priorities_age():
    config = {"scheduling_policy": "priority", "priority_ageing": 10.0, "max_num_seqs": 1}
    model = make(**config)
    ask(model, 4, answer=1, arrival=0.0)
    model.step()
    patient = ask(model, range(10, 14), answer=1, priority=2, arrival=0.0)  # stands as if it had come at 20
    urgent = [ask(model, range(100 * i, 100 * i + 4), answer=1, arrival=float(i)) for i in (15, 19, 21, 22)]
    order = []
    while model.scheduler.has_work:
        order += model.step().tokens
    assert order == [*urgent[:2], patient, *urgent[2:]]


def test_without_the_policy_priorities_do_not_count():
    model = make(max_num_seqs=1)
    first = ask(model, 4, answer=1, priority=5, arrival=0.0)
    ask(model, range(9, 13), answer=1, priority=0, arrival=1.0)
    assert list(model.step().tokens) == [first]


def test_a_static_batch_runs_to_its_end_before_the_next():
    model = make(batching="static", blocks=40)
    first = [ask(model, range(10 * i, 10 * i + 3), answer=i + 1) for i in range(4)]
    late = ask(model, range(90, 93), answer=1)
    assert set(model.step().tokens) == set(first)
    while any(request.status is not Status.FINISHED for request in first):
        assert late not in model.step().tokens
    assert late in model.step().tokens


def test_a_dynamic_batch_waits_to_be_filled():
    model = make(batching="dynamic", batch_timeout=3.0)
    first = ask(model, 3, arrival=0.0)
    assert not model.step().tokens  # at 1 s
    assert model.scheduler.seconds_to_batch(model.now) == 2.0
    second = ask(model, range(9, 12))
    assert not model.step().tokens
    assert set(model.step().tokens) == {first, second}  # at 3 s
    model.drain()
    full = [ask(model, range(10 * i, 10 * i + 3)) for i in range(4)]
    assert set(model.step().tokens) == set(full)


def test_without_chunks_a_prompt_is_computed_at_once():
    model = make(batching="continuous")
    first = ask(model, 40, answer=5)  # more than the budget of a step, so it comes alone
    second = ask(model, range(100, 110), answer=2)
    assert model.step().tokens == {first: 40}
    assert model.step().tokens == {first: 1, second: 10}
    model.drain()


def test_a_static_cache_sets_the_whole_length_aside():
    model = make(kv="static", length=32, blocks=20)
    ask(model, 4, answer=2)
    ask(model, 4, answer=2)
    ask(model, 4, answer=2)
    model.step()
    assert [len(request.block_table) for request in model.scheduler.running] == [8, 8]
    model.drain()


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigurationError, match="max_num_seqs 9 > max_num_batched_tokens 8"):
        EngineConfig(max_num_seqs=9, max_num_batched_tokens=8)
    with pytest.raises(ConfigurationError, match="needs swap_blocks above 0"):
        EngineConfig(preemption="swap")
    with pytest.raises(ConfigurationError, match="block_size must be a positive integer, not 0"):
        EngineConfig(block_size=0)


class Serving(RuleBasedStateMachine):
    """Anything may happen between two steps; `CacheModel` checks the invariants at each."""

    @initialize(
        data=st.fixed_dictionaries(
            {
                "blocks": st.integers(12, 40),
                "block_size": st.sampled_from([1, 2, 4]),
                "max_num_seqs": st.integers(1, 6),
                "max_num_batched_tokens": st.integers(6, 24),
                "swap_blocks": st.sampled_from([0, 3, 30]),
                "enable_prefix_caching": st.booleans(),
                "window": st.sampled_from([None, None, 3, 5]),
                "batching": st.sampled_from(["chunked", "chunked", "continuous", "static", "dynamic"]),
                "kv": st.sampled_from(["paged", "paged", "paged", "static"]),
                "scheduling_policy": st.sampled_from(["fcfs", "priority"]),
                "preemption": st.sampled_from(["auto", "recompute"]),
            }
        )
    )
    def begin(self, data):
        self.length = data["blocks"] * data["block_size"]
        self.model = make(length=self.length, batch_timeout=2.0, **data)
        self.alive: list[Request] = []

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=30),
        answer=st.integers(1, 12),
        n=st.integers(1, 3),
        priority=st.integers(-2, 2),
        salt=st.sampled_from(["", "tenant"]),
        pooling=st.sampled_from([None, None, None, "mean"]),
    )
    def add(self, prompt, answer, n, priority, salt, pooling):
        if len(prompt) + answer > self.length or n > self.model.scheduler.config.max_num_seqs:
            return
        n = 1 if pooling else n
        self.alive.append(ask(self.model, prompt, answer, n=n, priority=priority, cache_salt=salt, pooling=pooling))

    @rule(token=st.integers(0, 1))
    def step(self, token):
        self.model.step(lambda request: (token + request.index) % 2)

    @rule(steps=st.integers(2, 8))
    def steps(self, steps):
        for number in range(steps):
            self.model.step(lambda request, number=number: number % 2)

    @precondition(lambda self: self.everyone())
    @rule(data=st.data())
    def abort(self, data):
        everyone = sorted(self.everyone(), key=lambda request: (request.request_id, request.index))
        self.model.finish(data.draw(st.sampled_from(everyone)))

    def everyone(self):
        return [*self.model.scheduler.running, *self.model.scheduler.waiting] if hasattr(self, "model") else []

    @invariant()
    def books_are_right(self):
        if hasattr(self, "model"):
            self.model.scheduler.check()

    def teardown(self):
        if hasattr(self, "model"):
            self.model.drain()


TestServing = Serving.TestCase
TestServing.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
