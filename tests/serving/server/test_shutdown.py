"""How a server ends, in real processes: nothing is left of it, however it is ended."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.serving.server.serving import Server, eventually, save_tiny_model, serving

pytestmark = pytest.mark.alone

LONG = {"max_tokens": 3900, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def assert_all_end(family: list[psutil.Process]) -> None:
    assert len(family) >= 3  # LitServe's manager, a worker, and what speaks HTTP
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive


def exitcode(server: Server, seconds: float = 30) -> int | None:
    server.process.join(seconds)
    return server.process.exitcode


def test_when_the_main_process_is_killed_nothing_is_left(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "log") as server:
        running = server.start([1] * 40, params=LONG).wait_for_first()
        family = server.family()
        os.kill(server.process.pid, signal.SIGKILL)
        assert_all_end(family)
        running.join()


@pytest.mark.slow
def test_what_does_not_end_in_time_is_told_so(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "log", drain_timeout=0.5) as server:
        running = server.start([1] * 40, params=LONG).wait_for_first()
        family = server.family()
        os.kill(server.process.pid, signal.SIGTERM)
        assert "before the answer did" in running.result()[-1]["died"]
        assert exitcode(server) == 0
        assert_all_end(family)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_drains_as_well(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C in a terminal, and service managers."""
    with serving(model, tmp_path / "log") as server:
        running = server.start([1] * 40, params=LONG | {"max_tokens": 600}).wait_for_first()
        family = server.family()
        os.killpg(server.process.pid, number)
        assert running.result()[-1].get("finish_reason") == "length"
        assert exitcode(server) == 0
        assert_all_end(family)


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "log") as server:
        running = server.start([1] * 40, params=LONG).wait_for_first()
        family = server.family()
        os.kill(server.process.pid, signal.SIGTERM)
        eventually(lambda: server.status() == 503)
        os.kill(server.process.pid, signal.SIGTERM)
        assert exitcode(server) == 128 + signal.SIGTERM
        assert_all_end(family)
        running.join()
        assert not list(server.sockets.glob("lightning-llm-*"))


@pytest.mark.slow
def test_a_signal_while_the_model_is_loaded_ends_it(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "log", wait=False) as server:
        eventually(lambda: len(server.family()) >= 2)
        family = server.family()
        os.kill(server.process.pid, signal.SIGTERM)
        assert exitcode(server) == 128 + signal.SIGTERM
        assert not psutil.wait_procs(family, timeout=15)[1]


@pytest.mark.slow
def test_what_is_wrong_with_a_model_is_said_by_the_main_process(tmp_path: Path) -> None:
    with serving(tmp_path / "nothing", tmp_path / "log", wait=False) as server:
        assert exitcode(server, 60) == 1
        assert "ConfigurationError: There is no" in server.log.read_text()


@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_loads_ends_the_server(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "log", wait=False) as server:

        def spawned() -> list[psutil.Process]:
            return [one for one in server.family() if "--multiprocessing-fork" in one.cmdline()]

        eventually(lambda: bool(spawned()))
        for one in spawned():
            one.kill()
        assert exitcode(server, 60) == 1
        assert "ServerFailedError: A worker was killed (signal 9) before it was ready" in server.log.read_text()


@pytest.mark.slow
def test_checkpoints_that_cannot_be_believed_are_told_by_the_exit_code(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    with serving(tmp_path / "run", tmp_path / "log", wait=False) as server:
        assert exitcode(server, 60) == 77


@pytest.mark.slow
def test_several_http_processes_share_the_workers(model: Path, tmp_path: Path) -> None:
    """Answers find the process that asked; if one of these dies, so does the server."""
    with serving(model, tmp_path / "log", workers=2, frontends=2) as server:
        asked: set[int] = set()

        def all_asked() -> bool:
            asked.add(server.ask()["pid"])
            updates = server.generate([1, 2, 3], params=LONG | {"max_tokens": 3})
            assert [len(update["token_ids"]) for update in updates] == [1, 1, 1]
            return len(asked) == 2

        eventually(all_asked)
        family = server.family()
        os.kill(asked.pop(), signal.SIGKILL)
        assert exitcode(server) == 1
        assert "speaks HTTP has ended with -9" in server.log.read_text()
        assert_all_end(family)


@pytest.mark.slow
def test_litserves_own_server_serves_it(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "log", stock=True) as server:
        assert server.generate([1, 2, 3], params=LONG | {"max_tokens": 3})[-1]["finish_reason"] == "length"
        with server.stream([1] * 40, params=LONG) as updates:
            next(updates)
        eventually(lambda: all(one["blocks_free"] == one["blocks_total"] for one in server.ask()["stats"]), 5)
        running = server.start([2] * 40, params=LONG).wait_for_first()
        (worker,) = server.ask()["workers"]
        began = time.monotonic()
        os.kill(worker["pid"], signal.SIGKILL)
        assert "died" in running.result()[-1]
        assert running.ended_at - began < 2
        family = server.family()
        assert exitcode(server, 60) is not None  # its way: one worker's death is the server's end
        assert_all_end(family)
        assert not list(server.sockets.glob("lightning-llm-*"))
