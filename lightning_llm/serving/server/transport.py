"""`EngineTransport`: LitServe's transport over ZMQ and unix sockets in a folder that only this user may enter.

LitServe carries it to the workers and receives from it; a message is LitServe's `(uid, (data, status, type, worker))`.
Workers send one message per step to each HTTP process. The other way, LitServe has one queue for all workers; here each
worker has an inbox of its own, whose address it tells in its first message. (In LitServe 0.2.19 a message takes 305 us
from end to end through its queues and 2 us to be sent through ZMQ; its own ZMQ transport unpickles what it receives.)
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
from litserve.transport.base import MessageTransport
from litserve.utils import LoopResponseType

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.server.board import Board
from lightning_llm.serving.server.wire import pack, unpack

_PREFIX = "lightning-llm-"
_LOCK = "lock"  # a file that the main process has locked as long as it lives
_LONGEST_PATH = 100  # bytes; a unix socket's address has 108, with the 0 at its end
_LINGER = 1000  # milliseconds that a process which ends waits for its last messages to leave


class EngineTransport(MessageTransport):
    """Sockets of one server; each process opens those that it needs.

    Args:
        workers: How many.
        consumers: Processes that speak HTTP.

    Attributes:
        board: What all processes see.
        main_pid: Of the process that made this one, the parent of all others.
    """

    def __init__(self, workers: int, consumers: int) -> None:
        sweep(Path(tempfile.gettempdir()))
        self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX))  # for this user alone (0700)
        if len(os.fsencode(self.directory)) + len("/worker-000-0000000") > _LONGEST_PATH:
            self.directory.rmdir()
            raise ConfigurationError(
                f"{self.directory} is too long for the address of a unix socket: set TMPDIR to a shorter path."
            )
        self._lock: int | None = _lock(self.directory)
        self.consumers = consumers
        self.board = Board(workers, consumers)
        self.main_pid = os.getpid()
        self._context: zmq.asyncio.Context | None = None
        self._outgoing: dict[str, zmq.Socket[bytes]] = {}
        self._incoming: zmq.asyncio.Socket | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_context": None, "_outgoing": {}, "_incoming": None, "_lock": None}

    # -- LitServe's side --

    def send(self, item: Any, consumer_id: int) -> None:
        """To an HTTP process; never waits."""
        uid, (data, status, kind, worker) = item
        self.post(self._consumer_address(consumer_id), [uid, data, status, kind.value, worker])

    async def areceive(self, consumer_id: int | None = None, timeout: int | None = None) -> Any:  # type: ignore[override]
        """The next message to this HTTP process. LitServe hands over `consumer_id` by its place, whatever its base
        class says."""
        if self._incoming is None:
            assert consumer_id is not None
            self._incoming = self._shared_context().socket(zmq.PULL)
            self._incoming.set_hwm(0)
            self._incoming.bind(self._consumer_address(consumer_id))
        uid, data, status, kind, worker = unpack(await self._incoming.recv())
        return uid, (data, status, LoopResponseType(kind), worker)

    def close(self, send_sentinel: bool = False) -> None:
        """In the main process, when LitServe begins to end the others. An `EngineServer` removes the folder itself,
        when it has ended them."""
        if not self.board.supervised:
            self.remove()

    # -- ours --

    def remove(self) -> None:
        """Removes the folder, in the main process."""
        if os.getpid() == self.main_pid:
            shutil.rmtree(self.directory, ignore_errors=True)
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def open_inbox(self, worker: int) -> tuple[zmq.Socket[bytes], str]:
        """In a worker: where its requests arrive, and the address, which its successor will not have."""
        address = f"ipc://{self.directory}/worker-{worker}-{os.getpid()}"
        inbox: zmq.Socket[bytes] = zmq.Context.shadow(self._shared_context()).socket(zmq.PULL)
        inbox.set_hwm(0)
        inbox.bind(address)
        return inbox, address

    def post(self, address: str, message: Any) -> None:
        """Sends to a socket that is bound, or will be; never waits. For one thread."""
        if address not in self._outgoing:
            socket: zmq.Socket[bytes] = zmq.Context.shadow(self._shared_context()).socket(zmq.PUSH)
            socket.set_hwm(0)  # bounded by the requests that are admitted; a full pipe would stop all of them
            socket.linger = _LINGER
            socket.connect(address)
            self._outgoing[address] = socket
        self._outgoing[address].send(pack(message), zmq.NOBLOCK)

    def forget(self, address: str) -> None:
        """What was to be sent to a socket that is gone is not kept."""
        if (socket := self._outgoing.pop(address, None)) is not None:
            socket.close(linger=0)

    def disconnect(self) -> None:
        """Closes the sockets of this process, when what was sent has left."""
        for socket in self._outgoing.values():
            socket.close()
        if self._incoming is not None:
            self._incoming.close(linger=0)
        self._outgoing, self._incoming = {}, None
        if self._context is not None:
            self._context.term()
            self._context = None

    def complaint(self, worker: int) -> Path:
        """Where a worker writes what the user should know of why it could not begin."""
        return self.directory / f"complaint-{worker}"

    def _consumer_address(self, consumer: int) -> str:
        return f"ipc://{self.directory}/http-{consumer}"

    def _shared_context(self) -> zmq.asyncio.Context:
        if self._context is None:
            self._context = zmq.asyncio.Context()
        return self._context


def sweep(parent: Path) -> None:
    """Removes what servers of this user left that were killed. Locks tell, since pids do not: containers may share the
    folder for temporary files, and each has pids of its own."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(folder / _LOCK, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:  # not ours, or just made
            continue
        try:
            if os.fstat(lock).st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its server runs
        finally:
            os.close(lock)


def _lock(folder: Path) -> int:
    """Kept by this process and those that it forks, who end with it."""
    unlocked = folder / f".{_LOCK}"
    lock = os.open(unlocked, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    unlocked.rename(folder / _LOCK)  # nobody finds it before it is locked
    return lock
