"""How often to save: the estimates against a simulation and published figures."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.planner.plan import Plan, plan
from lightning_llm.planner.saving import best_interval, lost_share, mtbf


def expected_time(interval: float, cost: float, between: float) -> float:
    """Time per second of work with exponential failures, exactly: Daly's equation (5) without restart cost."""
    return between * (math.exp((interval + cost) / between) - 1) / interval


@given(cost=st.floats(0.01, 600), ratio=st.floats(20, 1e5))
def test_no_interval_loses_less(cost: float, ratio: float) -> None:
    between = cost * ratio
    best = best_interval(cost, between)
    least = expected_time(best, cost, between)
    for factor in (0.5, 0.8, 1.25, 2.0):
        assert expected_time(best * factor, cost, between) >= least * (1 - 1e-6)


def test_youngs_formula_where_saving_is_cheap() -> None:
    """The example of the specification of many schedulers: 6 s, a failure in 3 h, about 6 minutes."""
    assert best_interval(6, 3 * 3600) == pytest.approx(360, rel=0.02)
    assert lost_share(360, 6, 3 * 3600) == pytest.approx(2 * 6 / 360, rel=0.05), "both parts are equal at the best"


def test_the_next_save_does_not_begin_before_the_last_is_written() -> None:
    assert best_interval(0.01, 3600, write=120) == 120


def test_failures_of_large_clusters() -> None:
    """Meta's clusters: 7.9 hours at 1,024 devices."""
    assert mtbf(1024) / 3600 == pytest.approx(7.9, rel=0.01)


def test_a_plan_says_how_often() -> None:
    made = plan("llama3-70b", 512)
    saving = made.saving
    assert saving.blocked < saving.written < saving.interval < saving.mtbf
    assert saving.bytes_per_device * 512 >= 12 * made.num_parameters, "weights and two moments in float32"
    assert made.steps_between_saves == round(saving.interval / made.estimate.step_seconds)
    assert Plan.from_json(made.to_json()).saving == saving
