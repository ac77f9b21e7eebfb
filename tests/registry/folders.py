"""Folders to register, and processes that register them."""

from __future__ import annotations

import itertools
import os
import random
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from lightning_llm.registry import ModelRegistry, open_registry


def write(folder: Path, seed: int, size: int = 300) -> Path:
    """A folder as `export` writes one, its bytes decided by the seed."""
    bits = random.Random(seed)
    for path in (
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "extra/notes é.md",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(bits.randbytes(size))
    (folder / "empty").touch()
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fork(work: Callable[[], object]) -> int:
    """Starts `work` in a process of its own; returns its pid. It exits with 0, or with 1 after an exception."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Waits; returns the exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_while_registering(url: str, sources: list[Path], bits: random.Random) -> None:
    """kill -9 of a process that registers one version after the other, within about three of them."""
    reader, writer = os.pipe()

    def work() -> None:
        registry, started = open_registry(url), time.monotonic()
        for number in itertools.count():
            registry.register("demo", sources[number % len(sources)], metrics={"number": number, "pid": os.getpid()})
            if number == 0:
                os.write(writer, struct.pack("d", time.monotonic() - started))

    pid = fork(work)
    (duration,) = struct.unpack("d", os.read(reader, 8))
    time.sleep(bits.uniform(0.0, 3.0) * duration)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    os.close(reader)
    os.close(writer)


def check(registry: ModelRegistry, scratch: Path) -> int:
    """What always holds: numbers without gaps, aliases that point to one version each, files that verify."""
    versions = registry.versions()
    by_name: dict[str, list[int | None]] = {}
    for version in versions:
        by_name.setdefault(version.name, []).append(version.version)
    for numbers in by_name.values():
        assert numbers == list(range(1, len(numbers) + 1))
    aliases = [(version.name, alias) for version in versions for alias in version.aliases]
    assert len(aliases) == len(set(aliases))
    for version, target in zip(versions, _fresh(scratch), strict=False):
        registry.pull(version.name, str(version.version), target)
    return len(versions)


def _fresh(scratch: Path) -> Iterator[Path]:
    taken = len(list(scratch.glob("pull-*"))) if scratch.exists() else 0
    while True:
        yield scratch / f"pull-{taken}"
        taken += 1
