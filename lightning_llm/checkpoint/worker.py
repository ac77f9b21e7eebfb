"""The process that writes a rank's file while training goes on, and the end of it that training holds.

It imports no torch, so it starts in a moment and is small; it gets the file's content through shared memory and orders
as lines of JSON. If it dies or hangs, the next order starts another one: the content is still there.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from typing_extensions import Buffer

from lightning_llm.checkpoint.digest import ALGORITHMS, CHUNK_SIZE, FileRecord
from lightning_llm.checkpoint.store import CheckpointStore, open_store

Verify = Literal["full", "sample", "none"]
SAMPLED = 2  # chunks of each file that "sample" reads back

# The package's face imports torch and Lightning, which this process has no use for: a bare package takes its place.
_START = """
import sys, types
package = types.ModuleType("lightning_llm")
package.__path__ = [sys.argv[1]]
sys.modules["lightning_llm"] = package
from lightning_llm.checkpoint.worker import serve
serve(int(sys.argv[2]), int(sys.argv[3]))
"""


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
        verify: "full" reads all back, "sample" a few chunks, "none" nothing.

    Raises:
        OSError: It could not be written.
        WriteError: What was read back is not what was written.
    """
    record = store.write(location, file, buffers, algorithm)
    chunks = range(len(record.chunks))
    if verify == "none" or not record.size:
        return record
    # Of its own generator: a run that saves must draw what it would have drawn without.
    sample = random.SystemRandom().sample(chunks, min(SAMPLED, len(chunks)))
    chosen = chunks if verify == "full" else sorted(sample)
    for chunk, content in zip(chosen, store.read_back(location, file, CHUNK_SIZE, chosen), strict=True):
        digest = ALGORITHMS[algorithm](content).hexdigest()
        if digest != record.chunks[chunk]:
            raise WriteError(
                f"{file} does not read back as it was written: chunk {chunk} has the {algorithm} digest {digest} "
                f"instead of {record.chunks[chunk]}"
            )
    return record


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
            [sys.executable, "-c", _START, str(package), str(self._descriptor), str(os.getpid())],
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
            code = process.wait()
            raise WriteError(f"the process that writes checkpoints died with exit code {code}")
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
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process = None


def serve(descriptor: int, parent: int) -> None:
    """The process's whole life: takes orders from standard input, answers on standard output."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            return
    stores: dict[str, CheckpointStore] = {}
    for line in sys.stdin.buffer:
        order = json.loads(line)
        try:
            store = stores.setdefault(order["store"], open_store(order["store"]))
            with mmap.mmap(descriptor, order["size"]) as content, memoryview(content) as view:
                record = write_and_check(
                    store, order["location"], order["file"], [view], order["algorithm"], order["verify"]
                )
            answer: dict[str, Any] = {"size": record.size, "digest": record.digest, "chunks": record.chunks}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "errno": getattr(error, "errno", None)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
