"""The process that writes: what is around it must not get into it, and one that does not end is given up."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_llm.checkpoint import worker as worker_module
from lightning_llm.checkpoint.digest import FileRecord
from lightning_llm.checkpoint.folder import FolderStore
from lightning_llm.checkpoint.worker import Worker, WriteError
from tests.checkpoint.stores import manifest_of

CONTENT = bytes(range(256)) * 100


@pytest.fixture
def worker() -> Iterator[Worker]:
    descriptor = os.memfd_create("content")
    os.write(descriptor, CONTENT)
    worker = Worker(descriptor, 30.0)
    yield worker
    worker.stop()
    os.close(descriptor)


def write(worker: Worker, folder: Path) -> FileRecord:
    store = FolderStore(folder / "run")
    location = store.create("step=1.ckpt", "1f3a")
    try:
        return worker.write(store, location, "file", len(CONTENT), "xxh3_128", "full")
    finally:
        store.discard(location)


def test_a_file_of_the_users_own_is_not_run(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts lie beside files named as modules of Python are."""
    for module in ("random", "select", "json"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('this is not the module that was meant')")
    monkeypatch.chdir(tmp_path)
    assert write(worker, tmp_path).size == len(CONTENT)


def test_what_a_library_prints_is_no_answer(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "xxhash.py").write_text(
        "import os, sys\n"
        "print('Welcome to xxhash', flush=True)\n"
        "os.write(1, b'and to its other half\\n')\n"
        "here = sys.path.pop(0)\n"
        "del sys.modules['xxhash']\n"
        "import xxhash\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    expected = manifest_of({"file": CONTENT}, chunk_size=worker_module.CHUNK_SIZE).files["file"]
    assert write(worker, tmp_path) == expected


def test_one_that_was_killed(worker: Worker, tmp_path: Path) -> None:
    write(worker, tmp_path)
    pid = worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    worker._timeout = 0.2
    with pytest.raises(WriteError, match="did not answer"):
        write(worker, tmp_path)
    worker._timeout = 30.0
    assert write(worker, tmp_path).size == len(CONTENT)
    assert worker.pid != pid


def test_one_that_does_not_end_is_given_up(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one does that waits for a server of files which is gone: signals do not reach it."""
    monkeypatch.setattr(worker_module, "FAREWELL", 0.2)
    write(worker, tmp_path)
    process = worker._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    with monkeypatch.context() as there, caplog.at_level(logging.WARNING):
        there.setattr(process, "kill", lambda: None)
        started = time.monotonic()
        worker.stop()
    assert time.monotonic() - started < 20
    assert "does not end" in caplog.text and worker.pid is None
    process.kill()
    process.wait()
    assert write(worker, tmp_path).size == len(CONTENT)
