"""The rules of restarting: each by itself, and that no history can make a run go on for ever."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.errors import ConfigurationError
from lightning_llm.resilience.restarts import (
    DO_NOT_RESTART,
    FINAL_CODES,
    LONGEST_DELAY,
    STALLED_RESTARTS,
    Attempt,
    Failure,
    RestartPolicy,
    root_cause,
)

KILLED = Failure(kind="signal", code=-9, who="rank 0", text="killed by SIGKILL")
RAISED = Failure(kind="exit", code=1, who="rank 1", text="ValueError", place="ValueError\ntrain.py:7", step=5)
LOST = Failure(
    kind="exit", code=1, who="rank 0", text="Connection reset", place="RuntimeError\nc10d.py", consequence=True
)
POLICY = RestartPolicy(jitter=lambda: 0.5)


def history(*attempts: tuple[Failure, int, float]) -> list[Attempt]:
    return [Attempt(failure=failure, progress=progress, ended=ended) for failure, progress, ended in attempts]


def test_the_first_failure_is_followed_by_a_restart_at_once() -> None:
    decision = POLICY.decide(history((KILLED, 0, 0.0)))
    assert decision.restart and decision.delay == 0.0


@pytest.mark.parametrize("code", FINAL_CODES)
def test_codes_that_say_what_to_do_are_obeyed(code: int) -> None:
    decision = POLICY.decide(history((replace(RAISED, code=code, text="diverged"), 0, 0.0)))
    assert (decision.restart, decision.code, decision.reason) == (False, code, "diverged")


def test_the_same_exception_in_the_same_step_is_not_tried_a_third_time() -> None:
    twice = history((RAISED, 4, 0.0), (RAISED, 4, 9.0))
    assert POLICY.decide(twice).code == DO_NOT_RESTART
    later = history((RAISED, 4, 0.0), (replace(RAISED, step=6), 4, 9.0))
    assert POLICY.decide(later).restart
    assert POLICY.decide(history((KILLED, 4, 0.0), (KILLED, 4, 9.0))).restart, "a signal says nothing of its cause"


def test_restarts_that_get_no_further_are_given_up() -> None:
    attempts = history(*[(KILLED, 8, float(time)) for time in range(STALLED_RESTARTS + 1)])
    assert POLICY.decide(attempts[:-1]).restart
    decision = POLICY.decide(attempts)
    assert decision.code == DO_NOT_RESTART and "no further than step 8" in decision.reason
    gained = [*attempts[:-1], replace(attempts[-1], progress=9)]
    assert POLICY.decide(gained).restart


def test_delays_double_while_nothing_is_gained_and_there_is_none_after_progress() -> None:
    policy = RestartPolicy(max_restarts=100, jitter=lambda: 0.5)
    stalled = history((KILLED, 8, 0.0), (KILLED, 8, 1.0), (KILLED, 8, 2.0))
    assert [policy.decide(stalled[:count]).delay for count in (1, 2, 3)] == [0.0, 1.0, 2.0]
    assert policy.decide([*stalled, *history((KILLED, 12, 3.0))]).delay == 0.0


def test_the_budget_counts_what_is_within_the_window() -> None:
    policy = RestartPolicy(max_restarts=2, window=60.0)
    spread = history((KILLED, 1, 0.0), (KILLED, 2, 50.0), (KILLED, 3, 100.0), (KILLED, 4, 150.0))
    assert policy.decide(spread).restart
    crowded = history((KILLED, 1, 0.0), (KILLED, 2, 10.0), (KILLED, 3, 20.0))
    decision = policy.decide(crowded)
    assert (decision.restart, decision.code) == (False, 128 + 9) and "2 restarts within 60 s" in decision.reason
    assert not RestartPolicy(max_restarts=0).decide(history((RAISED, 1, 0.0))).restart


def test_the_cause_is_told_from_what_follows_from_it() -> None:
    assert root_cause([LOST, RAISED]) == RAISED
    assert root_cause([LOST, KILLED, RAISED]) == KILLED, "among equals the first one"
    assert root_cause([LOST]) == LOST
    assert root_cause([KILLED, replace(RAISED, code=76)]).code == 76


@given(
    st.lists(st.tuples(st.sampled_from([KILLED, RAISED, LOST]), st.integers(0, 3), st.floats(0, 100)), min_size=30),
    st.integers(0, 5),
)
def test_no_history_of_a_run_that_gains_little_goes_on_for_ever(
    attempts: list[tuple[Failure, int, float]], max_restarts: int
) -> None:
    policy = RestartPolicy(max_restarts=max_restarts, window=1.0)
    made = history(*sorted(attempts, key=lambda attempt: attempt[2]))
    decisions = [policy.decide(made[: count + 1]) for count in range(len(made))]
    assert not all(decision.restart for decision in decisions), "steps 0 to 3 can be gained three times only"
    assert all(0.0 <= decision.delay <= 1.5 * LONGEST_DELAY for decision in decisions)


@pytest.mark.parametrize("wrong", [{"max_restarts": -1}, {"window": 0.0}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="--max-restarts"):
        RestartPolicy(**wrong)  # type: ignore[arg-type]
