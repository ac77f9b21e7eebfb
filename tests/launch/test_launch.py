"""Ranks that are killed, suspended or hang in every phase of a run, and the run that comes out of it all the same."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch.clock import COMPILER, Clock
from tests.launch.jobs import STEPS, Job, running
from tests.waiting import until

pytestmark = pytest.mark.alone

GONE, AGAIN = 5.0, 15.0  # seconds from a kill until its peers have ended, and until the next step
PHASES = [("init", 0), ("first step", 0), ("train", 5), ("validate", 6), ("checkpoint", 8), ("shutdown", 0)]


def test_a_killed_rank_is_replaced_and_the_curve_is_that_of_a_run_in_which_nothing_happened(
    job: Callable[..., Job], undisturbed: Callable[..., dict[int, float]]
) -> None:
    # In the foreground, so that the checkpoint of step 4 is there for certain.
    made = job(fault={"kind": "kill", "phase": "train", "rank": 1, "step": 6}, saving={"background": False})
    assert made.run() == 0, made.said
    assert "rank 1 on" in made.said and "killed by SIGKILL; starting again" in made.said
    assert {event["attempt"] for event in made.events("start")} == {0, 1}
    assert min(event["step"] for event in made.events("step") if event["attempt"] == 1) == 4, "the newest checkpoint"
    assert made.curve() == undisturbed()


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize(("phase", "step"), PHASES)
def test_every_rank_may_die_in_every_phase(
    job: Callable[..., Job], undisturbed: Callable[..., dict[int, float]], rank: int, phase: str, step: int
) -> None:
    sizes = {"tensor_parallel_size": 2}
    expected = undisturbed(4, **sizes)
    made = job(ranks=4, sizes=sizes, fault={"kind": "kill", "phase": phase, "rank": rank, "step": step})
    with made.started() as launcher:
        (death,) = until(lambda: made.events("kill"))
        pids = {event["pid"] for event in made.events("start")}
        until(lambda: not any(map(running, pids)))
        assert time.monotonic() - death["time"] < GONE
        assert launcher.wait(90) == 0, made.said
    steps = [event["time"] for event in made.events("step") if event["attempt"] == 1]
    if phase != "shutdown":  # where nothing may be left to do
        assert min(steps) - death["time"] < AGAIN
    assert made.curve() == expected


@pytest.mark.slow
def test_a_suspended_rank_is_ended_and_replaced(
    job: Callable[..., Job], undisturbed: Callable[..., dict[int, float]]
) -> None:
    made = job(fault={"kind": "stop", "phase": "train", "rank": 0, "step": 6})
    with made.started() as launcher:
        (stop,) = until(lambda: made.events("stop"))
        assert launcher.wait(60) == 0, made.said
    again = min(event["time"] for event in made.events("start") if event["attempt"] == 1)
    assert again - stop["time"] < 2.0 + 5.0, "the limit and five seconds"
    assert "rank 0: suspended" in made.said
    assert not running(stop["pid"]), "nothing can wake it"
    assert made.curve() == undisturbed()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "kind", "finding"),
    [
        (2, "gil", "something holds the interpreter's lock"),
        (2, "hang", "rank 1 has not come to gloo:"),
        (4, "barrier", "Not where the others stand: rank 1"),
    ],
)
def test_a_rank_that_hangs_is_named_ended_and_replaced(
    job: Callable[..., Job], undisturbed: Callable[..., dict[int, float]], ranks: int, kind: str, finding: str
) -> None:
    fault = {"kind": kind, "phase": "train", "rank": 1, "step": 6}
    made = job(ranks=ranks, fault=fault, heartbeat={"progress_timeout": 3.0, "alive_timeout": 2.0})
    assert made.run() == 0, made.said
    assert finding in made.said and "ending rank 1" in made.said and "ending rank 0" not in made.said
    assert made.curve() == undisturbed(ranks)


def test_the_same_error_twice_ends_the_run_with_93(job: Callable[..., Job]) -> None:
    made = job(fault={"kind": "raise", "phase": "train", "rank": 1, "step": 5, "again": True})
    assert made.run() == 93, made.said
    assert "rank 1 on" in made.said
    assert "ArithmeticError: this batch cannot be learnt" in made.said
    assert "not started again: the same error twice in step 5" in made.said
    assert {event["attempt"] for event in made.events("start")} == {0, 1}


@pytest.mark.slow
def test_restarts_that_get_no_further_end_the_run(job: Callable[..., Job]) -> None:
    fault = {"kind": "kill", "phase": "train", "rank": 0, "step": 6, "again": True}
    made = job(fault=fault, saving={"background": False})
    assert made.run() == 93, made.said
    assert "3 restarts have got no further than step 4" in made.said


@pytest.mark.parametrize("to", ["rank", *(pytest.param(to, marks=pytest.mark.slow) for to in ("launcher", "group"))])
def test_a_run_that_is_told_to_stop_saves_and_ends_with_75_and_goes_on_when_it_is_started_again(
    job: Callable[..., Job], undisturbed: Callable[..., dict[int, float]], to: str
) -> None:
    fault: dict[str, Any] = {"kind": "terminate", "phase": "train", "rank": 1, "step": 5} if to == "rank" else {}
    made = job(fault=fault, max_steps=STEPS if to == "rank" else 10_000)
    with made.started() as launcher:
        if to == "launcher":
            until(lambda: any(event["step"] > 5 for event in made.events("step")))
            launcher.terminate()
        elif to == "group":  # as Slurm does where it knows processes by their group
            until(lambda: any(event["step"] > 5 for event in made.events("step")))
            os.killpg(launcher.pid, signal.SIGUSR1)
        assert launcher.wait(60) == 75, made.said
    assert "resource_tracker: process died" not in made.said
    assert len({event["attempt"] for event in made.events("start")}) == 1, "it is not started again here"
    if to == "rank":
        assert made.run() == 0, made.said
        assert made.curve() == undisturbed()


@pytest.mark.slow
def test_a_run_that_was_taken_for_dead_writes_nothing_when_it_wakes(job: Callable[..., Job]) -> None:
    made = job(ranks=1, max_steps=40)
    with made.started(name="first") as first:
        until(lambda: any(event["step"] > 5 for event in made.events("step")))
        family = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
        for process in family:
            process.suspend()
        assert made.run() == 0, made.said
        kept = made.committed()
        for process in reversed(family):
            process.resume()
        assert first.wait(60) == 93, made.said
    assert "has been taken over by another run" in made.log("first").read_text()
    assert made.committed() == kept


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
def test_a_clock_that_is_set_is_no_alarm(
    job: Callable[..., Job], undisturbed: Callable[..., dict[int, float]], tmp_path: Path
) -> None:
    clock = Clock(tmp_path)
    made = job(environment=clock.environment)
    with made.started() as launcher:
        for step, hours in ((3, 1), (6, -1)):
            until(lambda step=step: any(event["step"] >= step for event in made.events("step")))
            clock.set(3600 * hours)
        assert launcher.wait(60) == 0, made.said
    days = [event["date"] for event in made.events("step")]
    assert max(days) - min(days) > 7000, "the clock was put forward and back"
    assert {event["attempt"] for event in made.events("start")} == {0}
    assert "heartbeat:" not in made.said
    assert made.curve() == undisturbed()


def test_nothing_outlives_a_launcher_that_is_killed(job: Callable[..., Job]) -> None:
    made = job(max_steps=10_000)
    with made.started() as launcher:
        until(lambda: len({event["pid"] for event in made.events("step")}) == 2)
        family = psutil.Process(launcher.pid).children(recursive=True)
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
        until(lambda: not any(running(process.pid) for process in family), GONE)


def test_ctrl_c_ends_it_with_130(job: Callable[..., Job]) -> None:
    made = job(max_steps=10_000)
    with made.started() as launcher:
        until(lambda: made.events("step"))
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(30) == 130, made.said
