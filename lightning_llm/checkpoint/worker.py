"""The process that writes a rank's file while training goes on, and the end of it that training holds.

It imports no torch, so it starts in a moment and is small; it gets the file's content through shared memory and orders
as lines of JSON. What a library may print goes where errors go, not among the answers. If it dies or hangs, the next
order starts another one: the content is still there.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import random
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from typing_extensions import Buffer

from lightning_llm.checkpoint.digest import ALGORITHMS, CHUNK_SIZE, FileRecord
from lightning_llm.checkpoint.store import CheckpointStore, open_store

Verify = Literal["full", "sample", "none"]
SAMPLE_SIZE = 1 << 20  # bytes of a block that "sample" reads back
MOST_SAMPLES = 32  # such blocks of a file, beside its first
FAREWELL = 10.0  # seconds that a process gets to end once it was killed
_CHOICE = random.SystemRandom()  # a run that saves must draw what it would have drawn without

# The package's face imports torch and Lightning, which this process has no use for: a bare package takes its place.
_START = """
import os, sys, types
answers = os.dup(1)
os.dup2(2, 1)
package = types.ModuleType("lightning_llm")
package.__path__ = [sys.argv[1]]
sys.modules["lightning_llm"] = package
from lightning_llm.checkpoint.worker import serve
serve(int(sys.argv[2]), int(sys.argv[3]), answers)
"""


log = logging.getLogger(__name__)


class WriteError(OSError):
    """A file that could not be written, or does not read back as it was written."""


def write_and_check(
    store: CheckpointStore, location: str, file: str, buffers: Iterable[Buffer], algorithm: str, verify: Verify
) -> FileRecord:
    """Writes a file of a draft and reads back as much of it as asked.

    Args:
        store: Of the draft.
        location: The draft's.
        file: Path within it.
        buffers: The content.
        algorithm: Of the digests.
        verify: "full" reads all back, "sample" a block of each chunk, "none" nothing.

    Raises:
        OSError: It could not be written.
        WriteError: What was read back is not what was written.
    """
    samples = Samples(algorithm)
    record = store.write(location, file, samples.taken_from(buffers) if verify == "sample" else buffers, algorithm)
    parts: list[tuple[tuple[int, int], str]] = []
    if verify == "sample":
        parts = samples.parts()
    elif verify == "full":
        starts = range(0, record.size, CHUNK_SIZE)
        parts = [((start, CHUNK_SIZE), digest) for start, digest in zip(starts, record.chunks, strict=False)]
    ranges = [where for where, _ in parts]
    for ((start, size), digest), content in zip(parts, store.read_back(location, file, ranges), strict=True):
        found = ALGORITHMS[algorithm](content).hexdigest()
        if found != digest:
            raise WriteError(
                f"{file} does not read back as it was written: bytes {start} to {start + size} have the {algorithm} "
                f"digest {found} instead of {digest}"
            )
    return record


class Samples:
    """A block of each chunk of a stream, at a random place, to be compared to what is read back.

    Args:
        algorithm: Of the digests.
    """

    def __init__(self, algorithm: str) -> None:
        self._new = ALGORITHMS[algorithm]
        self._blocks: list[tuple[int, int, Any]] = []  # start, bytes until now, digest

    def taken_from(self, buffers: Iterable[Buffer]) -> Iterator[Buffer]:
        """The same buffers; notes the blocks on the way."""
        position, start = 0, self._next_start(0)
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            end = position + len(view)
            while start < end:
                part = view[max(0, start - position) : start + SAMPLE_SIZE - position]
                if not self._blocks or self._blocks[-1][0] != start:
                    self._blocks.append((start, 0, self._new()))
                _, size, digest = self._blocks[-1]
                digest.update(part)
                self._blocks[-1] = (start, size + len(part), digest)
                if end < start + SAMPLE_SIZE:
                    break
                start = self._next_start(start // CHUNK_SIZE + 1)
            yield view
            position = end

    @staticmethod
    def _next_start(chunk: int) -> int:
        return chunk * CHUNK_SIZE + (_CHOICE.randrange(CHUNK_SIZE - SAMPLE_SIZE + 1) if chunk else 0)

    def parts(self) -> list[tuple[tuple[int, int], str]]:
        """Place, size and digest of some of the blocks: the first, which has the header, and others."""
        some = _CHOICE.sample(self._blocks[1:], min(MOST_SAMPLES, len(self._blocks) - 1)) if self._blocks else []
        return [((start, size), digest.hexdigest()) for start, size, digest in (*self._blocks[:1], *some)]


class Worker:
    """The end that training holds; use it from one thread at a time.

    Args:
        descriptor: Of the shared memory.
        timeout: Seconds for one file.
    """

    def __init__(self, descriptor: int, timeout: float) -> None:
        self._descriptor = descriptor
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, once it was started."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Starts the process if there is none that lives."""
        if self._process is not None and self._process.poll() is None:
            return
        package = Path(__file__).parent.parent
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(package), str(self._descriptor), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._descriptor],
            start_new_session=True,  # Ctrl-C is for the trainer, which may want to finish a save
        )

    def write(
        self, store: CheckpointStore, location: str, file: str, size: int, algorithm: str, verify: Verify
    ) -> FileRecord:
        """Has the first `size` bytes of the shared memory written as a file; see `write_and_check`.

        Raises:
            OSError: It could not be written, the process died or did not answer in time.
        """
        order = {"store": store.url, "location": location, "file": file, "size": size}
        answer = self._ask({**order, "algorithm": algorithm, "verify": verify})
        if "error" in answer:
            raise WriteError(answer.get("errno"), answer["error"])
        return FileRecord(answer["size"], answer["digest"], tuple(answer["chunks"]))

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        self.start()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
            line = self._read_line(process)
        except BrokenPipeError:
            line = b""
        if not line:
            self.stop()
            raise WriteError(f"the process that writes checkpoints died with exit code {process.returncode}")
        return json.loads(line)

    def _read_line(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        deadline = time.monotonic() + self._timeout
        descriptor, line = process.stdout.fileno(), b""
        while not line.endswith(b"\n"):
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.stop()
                raise WriteError(f"the process that writes checkpoints did not answer within {self._timeout:.0f} s")
            part = os.read(descriptor, 1 << 16)
            if not part:
                return b""
            line += part
        return line

    def stop(self) -> None:
        """Ends the process. One that waits for a disk or server that is gone may not end: then it is given up."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        try:
            process.wait(FAREWELL)
        except subprocess.TimeoutExpired:
            log.warning("The process %d, which writes checkpoints, does not end: the storage hangs.", process.pid)
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # an order that was not sent
                stream.close()


def serve(descriptor: int, parent: int, answers: int) -> None:
    """The process's whole life.

    Args:
        descriptor: Of the shared memory.
        parent: Process that orders on standard input.
        answers: Descriptor that it reads the answers from.
    """
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    to_parent = os.fdopen(answers, "wb")
    stores: dict[str, CheckpointStore] = {}
    for line in sys.stdin.buffer:
        order = json.loads(line)
        try:
            store = stores.setdefault(order["store"], open_store(order["store"]))
            content = mmap.mmap(descriptor, order["size"])
            record = write_and_check(
                store, order["location"], order["file"], [content], order["algorithm"], order["verify"]
            )
            answer: dict[str, Any] = {"size": record.size, "digest": record.digest, "chunks": record.chunks}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "errno": getattr(error, "errno", None)}
        try:
            to_parent.write(json.dumps(answer).encode() + b"\n")
            to_parent.flush()
        except BrokenPipeError:  # the parent is gone
            os._exit(1)


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent, in the middle of an order too.

    The kernel could do it, but would do it when the thread ends that started this process.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
