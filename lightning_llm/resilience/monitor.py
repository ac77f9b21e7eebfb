"""The process beside the ranks of a node: it hears their beats, and says and does what there is to say and do.

Started by the `Heartbeat` callback. It imports no torch, holds nothing of the training, and ends when all ranks have
said goodbye or are gone. Under `lightning-llm launch` the launcher is that process, from before the first rank starts
until the last one has ended, over all restarts.

    python -m lightning_llm.resilience.monitor '{"folder": "...", "ranks": 4, ...}'
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass, replace
from http.server import ThreadingHTTPServer
from pathlib import Path

from lightning_llm._processes import die_with
from lightning_llm.errors import ConfigurationError
from lightning_llm.resilience import collectives, stacks
from lightning_llm.resilience.beats import LARGEST, SOCKET, Beat, socket_of
from lightning_llm.resilience.limits import Limits
from lightning_llm.resilience.status import Status, serve
from lightning_llm.resilience.terms import Terms
from lightning_llm.resilience.watch import Verdict, Watch

VERDICTS = "verdicts.jsonl"
ASLEEP = 2.0  # seconds between two looks, more than planned, after which the monitor was suspended itself


@dataclass(frozen=True, kw_only=True)
class Settings(Terms):
    """What a monitor is told.

    Attributes:
        folder: Of its socket, for this run and node.
        ranks: Of this node.
        parent: Process that starts it; the monitor ends with it.
        check_every: Seconds between looks.
    """

    folder: str
    ranks: int
    parent: int
    check_every: float = 0.5


class Monitor:
    """Listens, judges, acts.

    Args:
        settings: See there.
        launched: Whether whoever turns it sees by itself that ranks end.

    Attributes:
        ended: Ranks that were killed for their hanging, and why.
    """

    def __init__(self, settings: Settings, *, launched: bool = False) -> None:
        self.settings = settings
        self.folder = Path(settings.folder)
        self.watch = Watch(Limits(settings.progress_timeout), settings.alive_timeout)
        self.status = Status(self.watch)
        self.ended: dict[int, Verdict] = {}
        self._launched = launched
        self._told: list[Verdict] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.folder / SOCKET))
        self._socket.setblocking(False)
        self._waiting = selectors.DefaultSelector()
        self._waiting.register(self._socket, selectors.EVENT_READ)
        self._looked = time.monotonic()
        self._server: ThreadingHTTPServer | None = None
        self._serve()

    def run(self) -> None:
        """Until the last rank has ended."""
        while not self._over():
            self.turn(self.settings.check_every)

    def turn(self, seconds: float) -> None:
        """Waits for beats, for so long at most, and looks at what is known when it is time."""
        self._waiting.select(seconds)
        self._hear()
        if time.monotonic() >= self._looked + self.settings.check_every:
            self._look()

    def start_over(self, ranks: int) -> None:
        """Forgets the ranks: others will take their places."""
        self._hear()
        self.settings = replace(self.settings, ranks=ranks)
        self.watch.ranks.clear()
        self.ended.clear()
        self._told = self.status.verdicts = []

    def close(self) -> None:
        """Gives up the sockets."""
        self._socket.close()
        if self._server is not None:
            self._server.shutdown()

    def _serve(self) -> None:
        if self._server is None and self.settings.port is not None:
            self._server = serve(self.status, self.settings.port)

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data = self._socket.recv(LARGEST)
                if (beat := Beat.from_bytes(data)) is not None:
                    self.watch.take(beat, time.monotonic())
                    self.status.take(beat, time.monotonic())
                elif (terms := Terms.from_bytes(data)) is not None:
                    self._agree(terms)

    def _agree(self, terms: Terms) -> None:
        port = self.settings.port if self.settings.port is not None else terms.port
        self.settings = replace(self.settings, **{**asdict(terms), "port": port})
        self.watch.limits.progress_timeout = terms.progress_timeout
        self.watch.alive_timeout = terms.alive_timeout
        try:
            self._serve()
        except ConfigurationError as error:
            _say(str(error))

    def _look(self) -> None:
        now = time.monotonic()
        if (
            now - self._looked > self.settings.check_every + ASLEEP
        ):  # the whole node was suspended, or a debugger has us
            self.watch.forgive(now - self._looked)
        self._looked = now
        processes = {number: state for number, rank in self.watch.ranks.items() if (state := process_state(rank.pid))}
        verdicts = self.watch.judge(time.monotonic(), processes)
        if self._launched:
            verdicts = [verdict for verdict in verdicts if verdict.cause != "died"]
        self.status.verdicts = verdicts
        fresh = [verdict for verdict in verdicts if not any(_known(verdict, told) for told in self._told)]
        if self._told and not verdicts:
            _say("all ranks get on again")
        self._told = verdicts
        for verdict in fresh:
            self._act(verdict)

    def _act(self, verdict: Verdict) -> None:
        self.status.count(verdict)
        blamed = verdict.ranks
        reports = Path(self.settings.reports)
        lines = [str(verdict)]
        if verdict.cause not in ("died", "stopped"):
            found = self._stacks(verdict)
            odd = stacks.odd_ones(found)
            late = collectives.waited_for({rank: collectives.read(self.folder, rank) for rank in found})
            lines += [f"rank {rank} has not come to {what}" for rank, what in late.items()]
            if verdict.cause == "hung together" and (late or odd):
                blamed = tuple(late or odd)
                lines.append(f"Not where the others stand: rank {', '.join(map(str, blamed))}")
            for rank, text in found.items():
                kept = stacks.file_of(reports, rank)
                kept.write_text(text)
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(collectives.file_of(self.folder, rank), reports)
                where = stacks.place(text)
                lines.append(f"rank {rank} stands at {where[0] if where else '?'} ({kept})")
        entry = {**asdict(verdict), "blamed": blamed, "time": time.time()}
        with (reports / VERDICTS).open("a") as file:
            file.write(json.dumps(entry) + "\n")
        _say("\n  ".join(lines))
        if self.settings.on_hang == "kill" and verdict.cause != "died":
            for rank in blamed:
                _say(f"ending rank {rank}")
                self.ended[rank] = verdict
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.watch.ranks[rank].pid, signal.SIGKILL)

    def _stacks(self, verdict: Verdict) -> dict[int, str]:
        pids = {number: rank.pid for number, rank in self.watch.ranks.items() if not rank.ended}
        held = {rank: pids.pop(rank) for rank in verdict.ranks if verdict.cause == "interpreter held"}
        for rank in pids:
            for file in (stacks.file_of(self.folder, rank), collectives.file_of(self.folder, rank)):
                file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._socket.sendto(b"stacks", str(socket_of(self.folder, rank)))
        return stacks.await_answers(self.folder, pids) | stacks.of_held(held, self.folder)

    def _over(self) -> bool:
        known = self.watch.ranks
        if len(known) < self.settings.ranks:
            return process_state(self.settings.parent) is None
        return all(rank.ended or process_state(rank.pid) is None for rank in known.values())


def process_state(pid: int) -> str | None:
    """A process's state letter, "Z" and no process being None. Where there is no /proc: "S", if it is there."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        if sys.platform.startswith("linux"):
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        return "S"
    return None if letter in "ZX" else letter


def _known(verdict: Verdict, told: Verdict) -> bool:
    """Whether it is what was told, or its end: ranks that hung together get on one after the other."""
    alike = verdict.cause == told.cause or {verdict.cause, told.cause} <= {"behind", "hung together"}
    return alike and set(verdict.ranks) <= set(told.ranks)


def _say(text: str) -> None:
    print(f"heartbeat: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Runs the monitor that argv[1] describes."""
    settings = Settings(**json.loads(sys.argv[1]))
    die_with(settings.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training; this ends with it
    monitor = Monitor(settings)
    try:
        monitor.run()
    finally:
        monitor.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
