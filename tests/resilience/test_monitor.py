"""A real monitor beside real processes that are suspended, killed, held or late."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lightning_llm.resilience.monitor import VERDICTS, Settings
from tests.ports import free_port
from tests.waiting import until

RANKS = 3
WORKER = """
import ctypes, sys, time
from pathlib import Path
from lightning_llm.resilience import stacks
from lightning_llm.resilience.beats import Sender
folder, rank, orders = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
file = stacks.register(folder, rank)
sender = Sender(folder, rank, every=0.1)

def stand_still(seconds):
    time.sleep(seconds)

def wait_for_the_others(seconds):
    time.sleep(seconds)

sender.progress("train", 1)
while True:
    order = orders.read_text().split() if orders.exists() else []
    if order == ["end"]:
        sender.end()
        sys.exit()
    if order and order[0] == "gil" and int(order[1]) == rank:
        ctypes.PyDLL(None).sleep(60)  # PyDLL does not give up the interpreter's lock
    elif order and order[0] == "hang":
        (stand_still if int(order[1]) == rank else wait_for_the_others)(60)
    elif order and order[0] == "late":
        if int(order[1]) == rank:
            stand_still(60)
        time.sleep(0.2)
        sender.progress("train", 2)
        wait_for_the_others(60)
    sender.progress("train", 1)
    time.sleep(0.05)
"""


class Node:
    """A monitor and the ranks of a node."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder, self.orders = folder, folder / "orders"
        settings = replace(
            Settings(
                folder=str(folder),
                reports=str(folder),
                ranks=RANKS,
                parent=os.getpid(),
                progress_timeout=1.5,
                alive_timeout=1.0,
                check_every=0.1,
            ),
            **changes,
        )
        monitor = [sys.executable, "-m", "lightning_llm.resilience.monitor", json.dumps(asdict(settings))]
        self.monitor = subprocess.Popen(monitor, stderr=subprocess.PIPE, text=True)
        self.ranks = [
            subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(rank), str(self.orders)])
            for rank in range(RANKS)
        ]

    def verdicts(self) -> list[dict[str, Any]]:
        path = self.folder / VERDICTS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, condition: Callable[[], Any], limit: float = 20.0) -> Any:
        return until(condition, limit, f"verdicts: {self.verdicts()}")

    def close(self) -> str:
        for process in (*self.ranks, self.monitor):
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
        self.orders.write_text("end")
        for process in self.ranks:
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        try:
            return self.monitor.communicate(timeout=10)[1]
        finally:
            self.monitor.kill()


@contextmanager
def node(folder: Path, **changes: Any) -> Iterator[Node]:
    made = Node(folder, **changes)
    try:
        made.until(lambda: all((folder / f"rank{rank}.sock").exists() for rank in range(RANKS)))
        time.sleep(0.5)
        yield made
    finally:
        made.close()


def test_a_suspended_rank_is_named_and_one_that_wakes_in_time_is_not(tmp_path: Path) -> None:
    with node(tmp_path) as made:
        os.kill(made.ranks[1].pid, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(made.ranks[1].pid, signal.SIGCONT)
        time.sleep(1.5)
        assert made.verdicts() == []
        began = time.monotonic()
        os.kill(made.ranks[1].pid, signal.SIGSTOP)
        (verdict,) = made.until(made.verdicts)
        assert time.monotonic() - began < 1.0 + 5.0, "the limit and five seconds"
        assert verdict["cause"] == "stopped" and verdict["ranks"] == [1]
        os.kill(made.ranks[1].pid, signal.SIGCONT)
        time.sleep(0.5)
        assert "all ranks get on again" in made.close()
        assert made.monitor.returncode == 0


def test_a_node_that_was_suspended_as_a_whole_is_no_alarm(tmp_path: Path) -> None:
    with node(tmp_path) as made:
        everybody = [made.monitor, *made.ranks]
        for process in everybody:
            os.kill(process.pid, signal.SIGSTOP)
        time.sleep(4.0)
        for process in everybody:  # the monitor first: it finds its ranks still suspended
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.1)
        time.sleep(1.5)
        assert made.verdicts() == []


def test_a_held_interpreter_is_told_from_a_hang_with_where_it_stands(tmp_path: Path) -> None:
    with node(tmp_path) as made:
        made.orders.write_text("gil 2")
        verdict = made.until(made.verdicts)[0]
        assert verdict["cause"] == "interpreter held" and verdict["ranks"] == [2]
        assert "<string>" in (tmp_path / "stacks-rank2.txt").read_text()


@pytest.mark.parametrize(("order", "cause"), [("late 0", "behind"), ("hang 2", "hung together")])
def test_the_rank_that_others_wait_for_is_blamed_and_ended(tmp_path: Path, order: str, cause: str) -> None:
    with node(tmp_path, on_hang="kill") as made:
        guilty = int(order[-1])
        made.orders.write_text(order)
        verdict = made.until(made.verdicts)[0]
        assert verdict["cause"] == cause and verdict["blamed"] == [guilty]
        made.until(lambda: made.ranks[guilty].poll() == -signal.SIGKILL)
        assert all(process.poll() is None for rank, process in enumerate(made.ranks) if rank != guilty)


def test_a_rank_that_is_killed_is_told_and_shown_to_probes_and_prometheus(tmp_path: Path) -> None:
    port = free_port()
    with node(tmp_path, port=port) as made:
        assert ask(port, "healthz") == (200, "ok\n")
        status, metrics = ask(port, "metrics")
        assert status == 200 and 'lightning_llm_rank_phase{rank="1",phase="train"} 1' in metrics
        made.ranks[0].kill()
        made.ranks[0].wait()
        (verdict,) = made.until(made.verdicts)
        assert verdict["cause"] == "died" and verdict["ranks"] == [0]
        assert ask(port, "livez") == (200, "ok\n"), "the monitor lives, whatever it has found"
        status, text = ask(port, "healthz")
        assert status == 503 and text.startswith("rank 0: ended without a word")
        assert 'lightning_llm_verdicts_total{cause="died"} 1' in ask(port, "metrics")[1]
        assert ask(port, "else")[0] == 404


def ask(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_it_imports_no_torch() -> None:
    code = "import sys, lightning_llm.resilience.monitor; assert not {'torch', 'lightning'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
