"""Several launchers, as on several nodes: an attempt ends on all of them together, and nodes come and go."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack

import psutil
import pytest

from tests.launch.jobs import Job, running
from tests.ports import free_port
from tests.waiting import until

pytestmark = [pytest.mark.alone, pytest.mark.slow]


def start(made: Job, stack: ExitStack, nodes: str, *names: str) -> list[subprocess.Popen[bytes]]:
    """A launcher for each name; the first one hosts the store."""
    launchers = []
    for name in names:
        options = [f"--nnodes={nodes}", "--local-addr=localhost", "--last-call=2"]
        launchers.append(stack.enter_context(made.started(*options, name=name)))
        if name == "first":
            until(lambda: made.listening, 60)
    return launchers


@pytest.fixture
def two_nodes(job: Callable[..., Job]) -> Callable[..., Job]:
    def make(**settings: object) -> Job:
        port = free_port()
        return job(ranks=1, options=[f"--rdzv-endpoint=localhost:{port}"], port=port, **settings)

    return make


def family(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]


def close_to(curve: dict[int, float], other: dict[int, float]) -> bool:
    return curve.keys() == other.keys() and all(abs(curve[step] - other[step]) < 1e-4 for step in curve)


def test_a_rank_that_dies_on_one_node_is_replaced_on_all(
    two_nodes: Callable[..., Job], undisturbed: Callable[..., dict[int, float]]
) -> None:
    made = two_nodes(fault={"kind": "kill", "phase": "train", "rank": 1, "step": 6})
    with ExitStack() as stack:
        launchers = start(made, stack, "2", "first", "second")
        assert [launcher.wait(120) for launcher in launchers] == [0, 0], made.said
    assert made.said.count("rank 1 on") == 2, "both launchers name it"
    assert made.curve() == undisturbed()


def test_a_node_that_is_lost_leaves_a_smaller_run(
    two_nodes: Callable[..., Job], undisturbed: Callable[..., dict[int, float]]
) -> None:
    made = two_nodes(fault={"kind": "hang", "phase": "train", "rank": 1, "step": 6})
    with ExitStack() as stack:
        first, second = start(made, stack, "1:2", "first", "second")
        until(lambda: made.events("hang"), 120)
        for process in family(second):
            process.kill()
        assert first.wait(120) == 0, made.said
    assert {event["world"] for event in made.events("step") if event["attempt"] == 0} == {2}
    assert {event["world"] for event in made.events("step") if event["attempt"] == 1} == {1}
    assert close_to(made.curve(), undisturbed())


def test_a_node_that_comes_later_is_taken_in_without_losing_a_step(
    two_nodes: Callable[..., Job], undisturbed: Callable[..., dict[int, float]]
) -> None:
    made = two_nodes(max_steps=200, save_every=1000)
    with ExitStack() as stack:
        (first,) = start(made, stack, "1:2", "first")
        until(lambda: any(event["step"] >= 3 for event in made.events("step")), 120)
        (second,) = start(made, stack, "1:2", "second")
        assert [first.wait(200), second.wait(60)] == [0, 0], made.said
    alone = [event["step"] for event in made.events("step") if event["world"] == 1]
    together = [event["step"] for event in made.events("step") if event["world"] == 2]
    assert min(together) == max(alone) + 1, "it was saved before it was ended"
    assert sorted(made.curve()) == list(range(200))


def test_a_node_that_was_suspended_comes_back_to_find_its_place_taken(two_nodes: Callable[..., Job]) -> None:
    made = two_nodes(max_steps=60)
    with ExitStack() as stack:
        first, second = start(made, stack, "1:2", "first", "second")
        until(lambda: any(event["step"] >= 5 for event in made.events("step")), 120)
        old = family(second)
        for process in old:
            process.suspend()
        until(lambda: any(event["world"] == 1 for event in made.events("step")), 120)
        for process in old:
            process.resume()
        until(lambda: not any(running(process.pid) for process in old if process.pid in ranks_of(made, second)), 30)
        assert first.wait(200) == 0, made.said
        assert second.wait(60) == 0, made.said
    steps = {event["step"] for event in made.events("step")}
    assert steps == set(range(60))


def ranks_of(made: Job, launcher: subprocess.Popen[bytes]) -> set[int]:
    return {event["pid"] for event in made.events("start") if event["attempt"] == 0 and event["rank"] == 1}


def test_where_the_store_is_lost_the_others_end_with_75(two_nodes: Callable[..., Job]) -> None:
    made = two_nodes(max_steps=10_000)
    with ExitStack() as stack:
        first, second = start(made, stack, "2", "first", "second")
        until(lambda: any(event["step"] >= 2 for event in made.events("step")), 120)
        os.kill(first.pid, signal.SIGKILL)
        assert second.wait(60) == 75, made.said
    assert "the job can be queued again" in made.said


def test_a_signal_to_one_launcher_ends_all_of_them_at_the_same_step(two_nodes: Callable[..., Job]) -> None:
    made = two_nodes(max_steps=10_000)
    with ExitStack() as stack:
        first, second = start(made, stack, "2", "first", "second")
        until(lambda: any(event["step"] >= 2 for event in made.events("step")), 120)
        second.terminate()
        assert [first.wait(60), second.wait(60)] == [75, 75], made.said
    last = {rank: max(event["step"] for event in made.events("step") if event["rank"] == rank) for rank in (0, 1)}
    assert last[0] == last[1]
