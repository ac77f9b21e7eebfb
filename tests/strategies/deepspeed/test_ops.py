"""DeepSpeed gets its operators from us or does without them, and compiles nothing by itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.deepspeed import ops
from lightning_llm.strategies.deepspeed.ops import import_deepspeed, op_states, prepare_ops
from tests.commands import call_forked

NO_TOOLS = "/nonexistent"  # a PATH without a compiler


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def in_fork(function: Callable[[], int], timeout: float = 120) -> str:
    """Calls it where DeepSpeed may be imported and told things; returns what it printed."""
    done = call_forked(run=function, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def is_built(name: str) -> bool:
    return next(state for state in op_states() if state.op.name == name).state in ("built", "installed")


def test_looking_imports_neither_torch_nor_lightning_nor_deepspeed() -> None:
    code = (
        "import sys; from lightning_llm.strategies.deepspeed import ops; ops.op_states(); "
        "print(sorted({'torch', 'lightning', 'deepspeed'} & sys.modules.keys()))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_is_built_elsewhere_is_not_taken_for_another_processor_or_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    adam = op_states()[0]
    assert adam.op.name == "cpu_adam" and adam.path.is_relative_to(tmp_path) and adam.state != "built"
    adam.path.parent.mkdir()
    adam.path.touch()
    assert op_states()[0].state == "built"
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert op_states()[0].state != "built"


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("LIGHTNING_LLM_CACHE", str(tmp_path))
    assert op_states()[0].path.is_relative_to(tmp_path / "torch_extensions")


def test_without_a_compiler_adam_is_left_to_torch_and_nvme_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", NO_TOOLS)
    monkeypatch.delenv("CXX", raising=False)

    def run() -> int:
        with pytest.warns(UserWarning, match=r"cpu_adam .* cannot be built here. Missing: a C\+\+ compiler"):
            assert prepare_ops(["cpu_adam"]) == frozenset()
        with pytest.raises(ConfigurationError, match=r"async_io .* C\+\+ compiler.*libaio-dev"):
            prepare_ops(["async_io"])
        return 0

    in_fork(run)


@pytest.mark.slow
def test_deepspeed_starts_without_a_compiler_and_without_its_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it would wait for ever: torch's JIT has the lock of a builder that is gone."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", NO_TOOLS)
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()

    def run() -> int:
        deepspeed = import_deepspeed("cpu")
        prepare_ops([])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        deepspeed.init_distributed(
            "gloo", init_method=f"file://{tmp_path}/store", auto_mpi_discovery=False, rank=0, world_size=1
        )
        assert deepspeed.comm.comm.cdb.shm_comm_op is None
        value = torch.ones(2)
        deepspeed.comm.all_reduce(value)
        assert value.tolist() == [1.0, 1.0]
        return 0

    printed = in_fork(run)
    assert "WARNING" not in printed and "built" not in printed


@pytest.mark.slow
def test_deepspeeds_adam_is_ours_to_load_and_steps_as_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_built("cpu_adam"):
        pytest.skip("cpu_adam is not built: python -m lightning_llm.strategies.deepspeed.ops cpu_adam")
    monkeypatch.setenv("PATH", NO_TOOLS)

    def run() -> int:
        assert prepare_ops(["cpu_adam"]) == {"cpu_adam"}
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        generator = torch.Generator().manual_seed(0)
        start = torch.randn(1000, generator=generator)
        here, there = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
        optimizers = [
            DeepSpeedCPUAdam([here], lr=0.1, weight_decay=0.1),
            torch.optim.AdamW([there], lr=0.1, weight_decay=0.1),
        ]
        for _ in range(3):
            here.grad = torch.randn(1000, generator=generator)
            there.grad = here.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(here, there)
        return 0

    in_fork(run)


@pytest.mark.slow
def test_deepspeed_writes_and_reads_files_by_our_async_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_built("async_io"):
        pytest.skip("async_io is not built: python -m lightning_llm.strategies.deepspeed.ops async_io")
    monkeypatch.setenv("PATH", NO_TOOLS)

    def run() -> int:
        assert prepare_ops(["async_io"]) == {"async_io"}
        from deepspeed.ops.op_builder import AsyncIOBuilder

        handle = AsyncIOBuilder().load().aio_handle(1 << 17, 8, False, True, 1)
        written = torch.arange(1 << 18, dtype=torch.float32)
        handle.sync_pwrite(written, str(tmp_path / "file"), 0)
        read = torch.empty_like(written)
        handle.sync_pread(read, str(tmp_path / "file"), 0)
        assert torch.equal(read, written)
        return 0

    in_fork(run)


def test_what_is_built_and_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = op_states()[0].path
    path.parent.mkdir()
    path.write_text("not a library")

    def run() -> int:
        with pytest.warns(UserWarning, match=f"cannot be loaded: .*remove {re.escape(str(path))}"):
            assert prepare_ops(["cpu_adam"]) == frozenset()
        return 0

    in_fork(run)


def test_a_process_that_set_deepspeed_up_for_other_devices_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> int:
        with pytest.raises(
            ConfigurationError, match="run is on cuda, but .* set up for cpu .* Set DS_ACCELERATOR=cuda"
        ):
            import_deepspeed("cuda")
        return 0

    in_fork(run)


def test_the_command_lists_builds_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", NO_TOOLS)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "argv", ["ops"])
    assert ops.main() == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["cpu_adam:", "missing"],
        ["async_io:", "missing"],
    ]
    monkeypatch.setattr(sys, "argv", ["ops", "cpu_adam"])
    assert ops.main() == 1
    assert "C++ compiler" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["ops", "cpu_atom"])
    with pytest.raises(SystemExit, match="2"):
        ops.main()


@pytest.mark.slow
def test_two_ranks_that_want_adam_compile_it_once_beside_the_lock_of_a_dead_builder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    command = [sys.executable, "-m", "lightning_llm.strategies.deepspeed.ops", "cpu_adam"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ranks = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    printed = [rank.communicate(timeout=280)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    assert sorted(text.split()[0] for text in printed) == ["Building", "Waiting"]
    assert is_built("cpu_adam")
