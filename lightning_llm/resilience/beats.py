"""What ranks tell the monitor of their node: datagrams through a unix socket, which never make training wait.

Two kinds: *alive*, from a thread, every second, whatever the training does; and *progress*, from the training itself,
with its step and its phase. A hung collective stops the second, a held interpreter or a stopped process both.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_llm.resilience import stacks

if TYPE_CHECKING:
    from lightning_llm.resilience.terms import Terms

Kind = Literal["alive", "progress", "end"]
Phase = Literal["init", "first step", "train", "validate", "checkpoint", "shutdown"]

LARGEST = 4096  # bytes of a datagram
SOCKET = "beats.sock"


@dataclass(frozen=True, kw_only=True)
class Beat:
    """One message.

    Attributes:
        rank: Global.
        pid: Process.
        kind: "alive"; "progress": something was done; "end": the rank will say no more.
        phase: That the rank is in now.
        step: Optimizer steps done.
        figures: What the training has measured, by the names of `status.FIGURES`; what is not among them is as it was.
    """

    rank: int
    pid: int
    kind: Kind
    phase: Phase
    step: int
    figures: Mapping[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As it is sent."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Beat | None:
        """What was sent; None for what is no beat."""
        try:
            beat = cls(**json.loads(data))
        except (ValueError, TypeError):
            return None
        return beat if isinstance(beat.figures, dict) else None


def socket_of(folder: Path, rank: int) -> Path:
    """Where a rank can be asked for its stacks: any datagram is the question."""
    return folder / f"rank{rank}.sock"


class Sender:
    """A rank's end. What cannot be sent at once is dropped: the next beat says more.

    Args:
        folder: With the monitor's socket.
        rank: Global.
        every: Seconds between signs of life.
    """

    def __init__(self, folder: Path, rank: int, every: float = 1.0) -> None:
        self._folder = folder
        self._path = str(folder / SOCKET)
        self._rank = rank
        self._every = every
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        mine = socket_of(folder, rank)
        mine.unlink(missing_ok=True)  # of this rank's last life
        self._socket.bind(str(mine))
        self._socket.setblocking(False)
        self._phase: Phase = "init"
        self._step = 0
        self._ended = False
        self.on_asked: list[Callable[[], None]] = []  # what is done before the stacks are written
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        self._thread.start()

    def progress(self, phase: Phase, step: int, figures: Mapping[str, float] | None = None) -> None:
        """Says that something was done, what comes now, and what was measured."""
        self._phase, self._step = phase, step
        self._send("progress", figures)

    @property
    def ended(self) -> bool:
        """Whether it has said goodbye."""
        return self._ended

    def agree(self, terms: Terms) -> None:
        """Tells the monitor what the run wants of it."""
        with contextlib.suppress(OSError):
            self._socket.sendto(terms.to_bytes(), self._path)

    def end(self) -> None:
        """Says goodbye."""
        if not self._ended:
            self._ended = True
            self._thread.join(self._every + 1.0)
            self._send("end")
            self._socket.close()

    def _live(self) -> None:
        due = time.monotonic()
        while not self._ended:
            if time.monotonic() >= due:
                self._send("alive")
                due += self._every
            asked, _, _ = select.select([self._socket], [], [], min(self._every, 0.2))
            if asked:
                with contextlib.suppress(OSError):
                    self._socket.recv(LARGEST)
                    for act in self.on_asked:
                        act()
                    stacks.write(self._folder, self._rank)

    def _send(self, kind: Kind, figures: Mapping[str, float] | None = None) -> None:
        beat = Beat(
            rank=self._rank, pid=os.getpid(), kind=kind, phase=self._phase, step=self._step, figures=figures or {}
        )
        with contextlib.suppress(OSError):  # not there yet, gone, or busy
            self._socket.sendto(beat.to_bytes(), self._path)


_senders: dict[str, Sender] = {}


def sender_of_process(folder: Path, rank: int, every: float = 1.0) -> Sender:
    """The one that this process has for a folder: what a launcher has begun is gone on with."""
    sender = _senders.get(str(folder))
    if sender is None or sender.ended:
        sender = _senders[str(folder)] = Sender(folder, rank, every)
    return sender
