"""Sockets, and what the processes see of each other."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import pytest
from litserve.utils import LitAPIStatus, LoopResponseType

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.errors import ServerFailedError
from lightning_llm.serving.server.board import Board, Phase
from lightning_llm.serving.server.supervisor import Supervisor
from lightning_llm.serving.server.transport import EngineTransport
from lightning_llm.serving.server.wire import unpack


def test_messages_find_their_way_in_litserves_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    transport = EngineTransport(workers=1, consumers=2)
    try:
        assert stat.S_IMODE(transport.directory.stat().st_mode) == 0o700
        message = "*", (["data", 1, None], LitAPIStatus.OK, LoopResponseType.STREAMING, 0)

        async def exchange() -> None:
            transport.send(message, 1)  # before anybody listens
            assert await transport.areceive(1) == message
            inbox, address = transport.open_inbox(0)
            transport.post(address, ["abort", "0.1"])
            assert await asyncio.to_thread(inbox.poll, 10_000)
            assert unpack(inbox.recv()) == ["abort", "0.1"]
            inbox.close()
            transport.forget(address)
            transport.disconnect()

        asyncio.run(exchange())
    finally:
        transport.close()
    assert not transport.directory.exists()


def test_a_folder_that_is_no_address_of_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("deep" * 20)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(ConfigurationError, match="TMPDIR"):
        EngineTransport(1, 1)
    assert not list(deep.iterdir())


def test_what_a_killed_server_left_is_removed_and_what_runs_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tempfile.mkdtemp(prefix="sweep-")  # pytest's have long names
    monkeypatch.setattr(tempfile, "tempdir", folder)
    try:
        killed = multiprocessing.get_context("fork").Process(target=lambda: (EngineTransport(1, 1), os._exit(9)))
        killed.start()
        killed.join()
        (left,) = Path(folder).iterdir()
        other = Path(folder, "lightning-llm-is-another-thing")
        other.mkdir()
        running = EngineTransport(1, 1)
        assert not left.exists()
        after = EngineTransport(1, 1)
        assert running.directory.exists() and after.directory.exists() and other.exists()
        running.close()
        after.close()
        assert list(Path(folder).iterdir()) == [other]
    finally:
        shutil.rmtree(folder)


def _report(board: Board) -> None:
    board.beat(1, busy=True, stepped=True)
    board.in_flight[0] = 7
    sys.exit(int(board.phase))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_board_is_one_for_all_processes(method: str) -> None:
    board = Board(workers=2, consumers=1)
    board.phase = Phase.DRAINING
    process = multiprocessing.get_context(method).Process(target=_report, args=(board,))
    process.start()
    process.join()
    assert process.exitcode == Phase.DRAINING
    assert board.in_flight[0] == 7 and board.workers[1].busy and board.workers[1].steps == 1
    assert 0 <= board.silence(1) < 60 and board.workers[0].beat == 0


def test_workers_that_never_become_ready_are_given_up() -> None:
    """With real processes, which end as a model does that finds no memory."""
    fork = multiprocessing.get_context("fork")
    started: list[int] = []

    def launch(worker: int):
        started.append(worker)
        process = fork.Process(target=os._exit, args=(3,))
        process.start()
        return process

    board = Board(workers=1, consumers=1)
    supervisor = Supervisor(
        board,
        [launch(0)],
        [],
        launch=launch,
        is_shut_down=lambda: False,
        drain_timeout=1,
        hang_timeout=60,
        max_failures=2,
    )
    with pytest.raises(ServerFailedError, match="Worker 0 ended 2 times before it was ready"):
        supervisor.run()
    assert started == [0, 0]
