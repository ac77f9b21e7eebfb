"""Has a C++ extension built by torch, once for all processes of a machine, and never waits for a builder that is gone.

torch marks a build by a file `lock` in the extension's folder. A builder that is killed leaves it there, and later
processes wait for its removal for ever, without a word (torch/utils/file_baton.py, torch 2.13). Here the lock is the
kernel's, which ends with the last process of the build; torch builds in a folder that nobody else uses; and what it
made gets its name by a rename, so that a file of that name is whole. `ops.py` calls this; nothing here knows DeepSpeed.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lightning_llm.errors import ConfigurationError

TIME_LIMIT = 900.0  # seconds for one extension; they take one or two minutes on two cores
_QUIET = 600.0  # seconds without a change in a folder after which no compiler is at work in it
_TAIL_LINES = 30
_FAILED = "The build failed: "

_LIBAIO = "#include <libaio.h>\nint main() { return io_setup(0, nullptr); }\n"
_LIBRARIES = {
    "aio": (
        _LIBAIO,
        "libaio and its header (Debian and Ubuntu: libaio-dev, Fedora: libaio-devel, conda: libaio; without root "
        "unpack it anywhere and name its folders in CPATH, LIBRARY_PATH and LD_LIBRARY_PATH)",
    )
}


def missing_tools(libraries: Sequence[str] = ()) -> tuple[str, ...]:
    """What a build needs and this machine lacks, each with what brings it; takes a tenth of a second.

    Args:
        libraries: That the extension links to, of those that we know how to look for: "aio".
    """
    missing = []
    compiler = shlex.split(os.environ.get("CXX") or "c++")  # torch's choice
    has_compiler = shutil.which(compiler[0]) is not None
    if not has_compiler:
        missing.append(
            f"a C++ compiler, {compiler[0]} (Debian and Ubuntu: g++, Fedora: gcc-c++, conda: gxx; or set CXX)"
        )
    if shutil.which("ninja", path=_search_path()) is None:
        missing.append("ninja (pip install ninja)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("Python's header Python.h (Debian and Ubuntu: python3-dev, Fedora: python3-devel)")
    for library in libraries:
        program, brought_by = _LIBRARIES[library]
        if not has_compiler or not _links(compiler, program, library):
            missing.append(brought_by)
    return tuple(missing)


def build_once(
    target: Path, command: Sequence[str], *, time_limit: float = TIME_LIMIT, tell: Callable[[str], object] = print
) -> None:
    """Has `target` built unless it is there, by one process at a time; returns when it is there.

    Args:
        target: `<folder>/<name>.so`; beside it are kept `<name>.log`, which is the lock too, and scratch folders.
        command: Builds `$TORCH_EXTENSIONS_DIR/<name>/<name>.so`, as torch's JIT does, and ends when its stdin ends.
        time_limit: Seconds that the build may take; another process's build is waited for as long.
        tell: Called with what the user should know when this takes time.

    Raises:
        ConfigurationError: The build failed or took too long, here or in the process that was waited for; another
            process builds for longer than the time limit; or the folder cannot be written.
    """
    name = target.stem
    log = target.with_suffix(".log")
    with _alone(log, time_limit, tell) as (file, waited):
        if target.is_file():
            return
        if waited and (failure := _failure(log)) is not None:
            raise ConfigurationError(failure)  # it would fail again: not once for each process
        for left in target.parent.glob(f".{name}-*"):  # by a builder that was killed
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        try:
            tell(f"Building {name} into {target.parent}, once for this machine; it may take minutes.")
            _run(command, scratch, file, time_limit)
            built = scratch / name / target.name
            if built.is_file():
                built.replace(target)
                return
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        raise ConfigurationError(_failure(log) or f"{command[0]} ended well, but left no {target.name}.")


def stale_locks(root: Path) -> list[Path]:
    """Files that make every process wait for ever which wants one of the extensions that torch keeps under a folder.

    A lock counts as stale when no process of this machine has it open, as its owner does until it removes it, and
    nothing has changed in the folder for ten minutes: an owner on another machine that shares the folder would have.

    Args:
        root: Has one folder for each extension.
    """
    found = []
    for lock in sorted(root.glob("*/lock")):
        try:
            newest = max(path.stat().st_mtime for path in (lock, *lock.parent.iterdir()))
            if time.time() - newest > _QUIET and not _is_open(lock):
                found.append(lock)
        except FileNotFoundError:  # its owner has just removed it
            continue
    return found


def _is_open(path: Path) -> bool:
    """Whether a process of this machine has the file open, as far as we may see."""
    wanted = path.stat()
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.path.samestat(entry.stat(), wanted):
                return True
        except OSError:  # another user's, or just closed
            continue
    return False


def _search_path() -> str:
    """PATH, and where pip puts ninja, which is not on it when this Python was called by its full name."""
    return os.pathsep.join((os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)))


def _links(compiler: Sequence[str], program: str, library: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, "-x", "c++", "-", f"-l{library}", "-o", os.path.join(folder, "program")]
        try:
            return subprocess.run(command, input=program.encode(), capture_output=True, timeout=60).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False


@contextmanager
def _alone(path: Path, time_limit: float, tell: Callable[[str], object]) -> Iterator[tuple[IO[bytes], bool]]:
    """The locked file, open to append, and whether another process had it before. One process at a time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written ({error.strerror}). Have its owner build {path.stem}, or set "
            f"LIGHTNING_LLM_CACHE or TORCH_EXTENSIONS_DIR to a folder of your own."
        ) from None
    with file:
        deadline = time.monotonic() + time_limit
        waited = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited:
                    tell(f"Waiting for another process that builds {path.stem}; its output is in {path}.")
                waited = True
            if time.monotonic() > deadline:
                raise ConfigurationError(
                    f"{_first_line(path)} has been building {path.stem} for longer than {time_limit:.0f} s, and this "
                    f"process waited for it. See what it does in {path}; when it ends, however it ends, others go on."
                )
            time.sleep(0.1)
        yield file, waited


def _run(command: Sequence[str], scratch: Path, file: IO[bytes], time_limit: float) -> None:
    """Runs the build with the locked file as its output, so that the lock lasts as long as its last process."""
    file.truncate(0)
    file.write(f"Process {os.getpid()} on {socket.gethostname()}\n".encode())
    file.flush()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=file,
        stderr=subprocess.STDOUT,
        env={
            **os.environ,
            "PATH": _search_path(),
            "TORCH_EXTENSIONS_DIR": str(scratch),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
        start_new_session=True,  # Ctrl-C reaches us alone, and we end ninja and the compilers too
    )
    assert process.stdin is not None
    outcome = ""
    try:
        if code := process.wait(time_limit):
            outcome = f"exit code {code}"
    except subprocess.TimeoutExpired:
        outcome = f"no end within {time_limit:.0f} s"
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdin.close()
    if outcome:
        file.write(f"\n{_FAILED}{outcome}".encode())
        file.flush()


def _failure(log: Path) -> str | None:
    """What went wrong in the build that wrote the file; None when it says nothing of that."""
    lines = log.read_text(errors="replace").splitlines()
    if not lines or not lines[-1].startswith(_FAILED):
        return None
    outcome, tail = lines[-1].removeprefix(_FAILED), "\n".join(lines[1:-1][-_TAIL_LINES:])
    return f"{log.stem} could not be built ({outcome}). Its output is in {log}, which ends so:\n{tail}"


def _first_line(log: Path) -> str:
    return next(iter(log.read_text(errors="replace").splitlines()), "Another process")
