"""Which worker gets a request."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.serving.server.routing import PrefixRouter

IDLE = {0: 0, 1: 0, 2: 0}


def prompt(*blocks: int) -> list[int]:
    return [token for block in blocks for token in [block] * 16]


def test_without_a_prefix_the_least_busy_one_is_chosen() -> None:
    router = PrefixRouter()
    assert router.choose(prompt(1), "", {0: 3, 1: 1, 2: 2}) == 1
    assert router.choose([1, 2, 3], "", {0: 0, 2: 0}) == 0  # too short to be told apart


def test_a_prefix_draws_a_prompt_to_the_worker_that_has_most_of_it() -> None:
    router = PrefixRouter()
    router.choose(prompt(1, 2), "", {0: 1, 1: 0, 2: 1})
    router.choose(prompt(1, 2, 3, 4), "", {2: 0})
    assert router.choose(prompt(1, 2, 9), "", {0: 0, 1: 2, 2: 3}) == 1
    assert router.choose(prompt(1, 2, 3, 9), "", {0: 0, 1: 2, 2: 3}) == 2
    assert router.choose(prompt(2, 1), "", {0: 0, 1: 1, 2: 1}) == 0  # the same blocks, but no beginning


def test_tenants_do_not_share_prefixes() -> None:
    router = PrefixRouter()
    router.choose(prompt(1), "one", {1: 0})
    assert router.choose(prompt(1), "one", IDLE) == 1
    assert router.choose(prompt(1), "other", IDLE) == 0
    assert router.choose(prompt(1), "\ud800", IDLE) == 0  # what a client may send as a salt


def test_the_worker_with_the_prefix_is_passed_over_when_it_is_far_busier() -> None:
    router = PrefixRouter(margin=4)
    router.choose(prompt(1), "", {1: 0})
    assert router.choose(prompt(1), "", {0: 0, 1: 4}) == 1
    assert router.choose(prompt(1), "", {0: 0, 1: 5}) == 0
    assert router.choose(prompt(1), "", {0: 0, 1: 1}) == 0  # both have it now
    assert router.choose(prompt(1), "", {0: 20, 1: 30}) == 0
    fresh = PrefixRouter(margin=4)
    fresh.choose(prompt(1), "", {1: 0})
    assert fresh.choose(prompt(1), "", {0: 20, 1: 30}) == 1  # half as much again is not far busier


def test_prefixes_are_forgotten_after_a_time_and_with_their_worker() -> None:
    router = PrefixRouter(time_to_live=120)
    router.choose(prompt(1), "", {1: 0}, now=0)
    assert router.choose(prompt(1), "", {0: 0, 1: 1}, now=120) == 1
    assert router.choose(prompt(1), "", {0: 0, 1: 1}, now=241) == 0
    router = PrefixRouter()
    router.choose(prompt(1), "", {1: 0})
    router.forget(1)
    assert router.choose(prompt(1), "", {0: 0, 1: 0}) == 0


def test_a_worker_that_takes_no_requests_is_not_chosen_for_its_prefix() -> None:
    router = PrefixRouter()
    router.choose(prompt(1), "", {1: 0})
    assert router.choose(prompt(1), "", {0: 9, 2: 7}) == 2


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=30), st.integers(1, 20))
def test_what_is_remembered_is_bounded_and_the_choice_is_one_of_those_offered(
    prompts: list[list[int]], capacity: int
) -> None:
    router = PrefixRouter(block_size=1, capacity=capacity, longest=5)
    loads = dict.fromkeys(range(3), 0)
    for ids in prompts:
        loads[router.choose(ids, "", loads)] += 1
        assert len(router._served) <= capacity
    assert sum(loads.values()) == len(prompts)
