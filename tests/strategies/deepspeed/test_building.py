"""Extensions are built once, whoever else wants them and whoever was killed; what is missing is named."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.deepspeed.building import build_once, missing_tools, stale_locks
from tests.waiting import until

SOURCE = """
#include <Python.h>
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "tiny", nullptr, -1, methods};
PyMODINIT_FUNC PyInit_tiny() { return PyModule_Create(&module); }
"""
# What torch's JIT is asked to do, in a process of its own
JIT = "import sys; from torch.utils.cpp_extension import load; load(name='tiny', sources=[sys.argv[1]])"


BUILD = "mkdir $TORCH_EXTENSIONS_DIR/tiny; echo x > $TORCH_EXTENSIONS_DIR/tiny/tiny.so"


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


def in_process(function: Callable[[], object]) -> int:
    """Calls it in a forked process, which exits with 3 after a ConfigurationError."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function()
        code = 0
    except ConfigurationError:
        code = 3
    finally:
        os._exit(code)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.cpp"
    path.write_text(SOURCE)
    return path


def test_what_torch_builds_gets_its_name_and_is_not_built_again(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "built" / "tiny.so"
    told: list[str] = []
    build_once(target, [sys.executable, "-c", JIT, str(source)], tell=told.append)
    spec = importlib.util.spec_from_file_location("tiny", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.answer() == 42
    assert sorted(path.name for path in target.parent.iterdir()) == ["tiny.log", "tiny.so"]
    assert len(told) == 1 and "Building tiny" in told[0]
    build_once(target, ["false"], tell=told.append)
    assert len(told) == 1


def test_one_process_builds_while_another_waits_and_says_so(tmp_path: Path) -> None:
    target, gate, builds, told = (tmp_path / name for name in ("tiny.so", "gate", "builds", "told"))
    os.mkfifo(gate)
    command = shell(f"echo build >> {builds}; read line < {gate}; {BUILD}")
    first = in_process(lambda: build_once(target, command, tell=len))
    until(builds.exists)
    second = in_process(lambda: build_once(target, command, tell=told.write_text))
    until(lambda: told.exists() and told.read_text())
    assert "Waiting for another process" in told.read_text() and str(target.with_suffix(".log")) in told.read_text()
    gate.write_text("on\n")
    assert [exit_code(first), exit_code(second)] == [0, 0]
    assert builds.read_text() == "build\n"
    assert target.read_text() == "x\n"


def test_a_builder_that_is_killed_holds_nobody_up(tmp_path: Path) -> None:
    target, started = tmp_path / "tiny.so", tmp_path / "started"
    hangs = shell(f"touch {started}; exec cat")  # as long as who waits for it lives
    builder = in_process(lambda: build_once(target, hangs, tell=len))
    until(started.exists)
    assert list(tmp_path.glob(".tiny-*"))
    os.kill(builder, signal.SIGKILL)
    os.waitpid(builder, 0)
    build_once(target, shell(BUILD), tell=len)
    assert target.read_text() == "x\n" and not list(tmp_path.glob(".tiny-*"))


def test_the_compilers_words_are_kept_and_reach_those_who_waited(source: Path, tmp_path: Path) -> None:
    source.write_text(SOURCE.replace("42", "no_such_number"))
    target, gate, builds, told = (tmp_path / name for name in ("tiny.so", "gate", "builds", "told"))
    os.mkfifo(gate)
    command = shell(
        f"echo build >> {builds}; read line < {gate}; c++ -fsyntax-only $(python3-config --includes) {source}"
    )
    first = in_process(lambda: build_once(target, command, tell=len))
    until(builds.exists)

    def waits() -> None:
        try:
            build_once(target, command, tell=told.write_text)
        except ConfigurationError as error:
            told.write_text(str(error))
            raise

    second = in_process(waits)
    until(lambda: told.exists() and told.read_text())
    gate.write_text("on\n")
    assert [exit_code(first), exit_code(second)] == [3, 3]
    assert builds.read_text() == "build\n"
    assert "tiny could not be built (exit code 1)" in told.read_text()
    assert "no_such_number" in told.read_text() and str(tmp_path / "tiny.log") in told.read_text()
    # a later run tries again
    with pytest.raises(ConfigurationError, match="exit code 5"):
        build_once(target, shell("exit 5"), tell=len)


def test_a_build_without_an_end_is_ended(tmp_path: Path) -> None:
    child = tmp_path / "child"
    command = shell(f"tail -f /dev/null & echo $! > {child}; wait")
    with pytest.raises(ConfigurationError, match="no end within 1 s"):
        build_once(tmp_path / "tiny.so", command, time_limit=1.0, tell=len)
    status = Path(f"/proc/{int(child.read_text())}/stat")
    until(lambda: not status.exists() or status.read_text().split()[2] == "Z")


def test_waiting_has_an_end_and_names_whom_it_waited_for(tmp_path: Path) -> None:
    target, started = tmp_path / "tiny.so", tmp_path / "started"
    builder = in_process(lambda: build_once(target, shell(f"touch {started}; exec cat"), tell=len))
    try:
        until(started.exists)
        with pytest.raises(ConfigurationError, match=f"Process {builder} on .* has been building tiny"):
            build_once(target, ["false"], time_limit=0.2, tell=len)
    finally:
        os.kill(builder, signal.SIGKILL)
        os.waitpid(builder, 0)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be written.*LIGHTNING_LLM_CACHE or TORCH_EXTENSIONS_DIR"):
        build_once(tmp_path / "file" / "tiny.so", ["true"], tell=len)


def test_the_lock_of_a_killed_jit_builder_is_found_and_that_of_a_living_one_is_not(
    source: Path, tmp_path: Path
) -> None:
    root = tmp_path / "extensions"
    lock = root / "tiny" / "lock"
    builder = subprocess.Popen(
        [sys.executable, "-c", JIT, str(source)],
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(root)},
        start_new_session=True,
    )
    try:
        until(lock.exists)
        os.kill(builder.pid, signal.SIGSTOP)  # alive, and with the lock until it is killed
        grow_old(lock.parent)
        assert stale_locks(root) == []
    finally:
        os.killpg(builder.pid, signal.SIGKILL)
        builder.wait()
    assert lock.exists(), "the builder was too fast"
    lock.touch()
    assert stale_locks(root) == [], "another machine that shares the folder may be building"
    grow_old(lock.parent)
    assert stale_locks(root) == [lock]


def grow_old(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600, time.time() - 3600))


def test_without_a_compiler_and_ninja_both_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert [text.partition(" (")[0] for text in missing_tools()] == ["a C++ compiler, c++"]  # ninja: beside our Python
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    compiler, ninja, libaio = missing_tools(["aio"])
    assert "g++" in compiler and ninja == "ninja (pip install ninja)" and "libaio-dev" in libaio


def test_libaio_is_found_where_it_was_unpacked_without_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = os.environ.get("CXX") or "c++"
    monkeypatch.setenv("CXX", f"{compiler} -nostdinc")  # hides a libaio.h of the system
    assert ["libaio-dev" in text for text in missing_tools(["aio"])] == [True]
    (tmp_path / "libaio.h").write_text('extern "C" int io_setup(int, void*);\n')
    (tmp_path / "aio.cpp").write_text('extern "C" int io_setup(int, void*) { return 0; }\n')
    library = [*shlex.split(compiler), "-shared", "-fPIC", "aio.cpp", "-o", "libaio.so"]
    subprocess.run(library, cwd=tmp_path, check=True)
    monkeypatch.setenv("CPATH", str(tmp_path))
    monkeypatch.setenv("LIBRARY_PATH", str(tmp_path))
    assert missing_tools(["aio"]) == ()
