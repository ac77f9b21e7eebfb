"""AsyncDistributedCheckpoint when things go wrong: nothing is lost, and it is said."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lightning_llm.callbacks import AsyncDistributedCheckpoint
from lightning_llm.callbacks.housekeeping import PendingSave
from lightning_llm.checkpoint.folder import FolderStore
from lightning_llm.checkpoint.saver import CheckpointSaver, RunState
from lightning_llm.checkpoint.verify import verify
from lightning_llm.errors import CheckpointError
from tests import disks
from tests.callbacks.checkpointing import AtStep, fit, names, worker_of
from tests.distributed import run_distributed


def kill_writer(folder: Path, world_size: int) -> tuple[Any, list[str]]:
    """The process that writes dies while it has an order; the next attempt has another one."""
    callback = AsyncDistributedCheckpoint(folder, every_n_train_steps=2, backoff=0.05, save_top_k=-1)
    killed: list[int] = []

    def stop() -> None:
        callback._saver.wait()  # type: ignore[union-attr]
        killed.append(worker_of(callback))
        os.kill(killed[0], signal.SIGSTOP)

    with warnings.catch_warnings():
        trainer, _ = fit(
            callback,
            AtStep({3: stop, 5: lambda: os.kill(killed[0], signal.SIGKILL)}),
            world_size=world_size,
            max_steps=6,
        )
    assert not psutil.pid_exists(killed[0])
    return callback.latest, names(folder)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_writer_is_made_anew_when_it_dies(tmp_path: Path, world_size: int) -> None:
    for latest, left in run_distributed(kill_writer, world_size, tmp_path, world_size):
        assert latest.error is None and latest.step == 6
        assert [name for name in left if not name.startswith(".")] == [
            "epoch=0-step=2.ckpt",
            "epoch=0-step=4.ckpt",
            "epoch=0-step=6.ckpt",
        ]
    for name in left:
        assert verify(FolderStore(tmp_path), name) == []


def hang_writer(folder: Path) -> Any:
    """The process that writes stops answering."""
    callback = AsyncDistributedCheckpoint(folder, every_n_train_steps=2, backoff=0.05, timeout=1.0)

    def stop() -> None:
        callback._saver.wait()  # type: ignore[union-attr]
        os.kill(worker_of(callback), signal.SIGSTOP)

    fit(callback, AtStep({3: stop}), max_steps=4)
    return callback.latest


def test_a_writer_that_hangs_is_replaced(tmp_path: Path) -> None:
    latest = run_distributed(hang_writer, 1, tmp_path)[0]
    assert latest.error is None and latest.attempts == 2 and latest.step == 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Room for two checkpoints of this model, not for three."""
    with disks.small_disk(tmp_path / "disk", kilobytes=1536) as folder:
        yield folder


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


def fill_disk(folder: Path, on_failure: str, world_size: int) -> tuple[str, list[str], int, list[str]]:
    callback = AsyncDistributedCheckpoint(
        folder, every_n_train_steps=1, save_top_k=-1, on_failure=on_failure, retries=1, backoff=0.01, filename="{step}"
    )
    said: list[str] = []
    steps = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer, _ = fit(callback, world_size=world_size, max_steps=6)
            steps = trainer.global_step
        except CheckpointError as error:
            said.append(str(error))
    said += [str(w.message) for w in caught if "could not be saved" in str(w.message)]
    return "\n".join(said), sorted(Path(p).name for p in names(folder)), steps, [callback.best_model_path]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_full_disk_costs_no_checkpoint_that_was_there(small_disk: Path, world_size: int) -> None:
    said, left, steps, best = run_distributed(fill_disk, world_size, small_disk, "warn", world_size)[0]
    assert "No space left on device" in said and steps == 6, "training went on"
    kept = [name for name in left if not name.startswith(".")]
    assert "step=1.ckpt" in kept and "step=6.ckpt" not in kept, left
    assert left == kept, "no draft is left to fill the disk"
    for name in kept:
        assert verify(FolderStore(small_disk), name) == []
    assert Path(best[0]).name == kept[-1], "what the callback calls the best is there"


def test_failures_in_a_row_end_the_run(small_disk: Path) -> None:
    said, left, steps, _ = run_distributed(fill_disk, 1, small_disk, "retry", 1)[0]
    assert "It is the 3. in a row" in said and "No space left on device" in said and steps == 0
    assert "step=1.ckpt" in left


class OnWarning(logging.Handler):
    """Does something at a first warning."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__(logging.WARNING)
        self.act: Callable[[], None] | None = act

    def emit(self, record: logging.LogRecord) -> None:
        act, self.act = self.act, None
        if act is not None:
            act()


def read_only_for_a_moment(folder: Path) -> Any:
    """A save is due while nothing can be written; after its first attempt all is well again."""
    callback = AsyncDistributedCheckpoint(folder, every_n_train_steps=2, backoff=0.01, filename="{step}")
    remount(folder, "ro")
    logging.getLogger("lightning_llm.checkpoint.saver").addHandler(OnWarning(lambda: remount(folder, "rw")))
    fit(callback, max_steps=2)
    return callback.latest


def test_it_tries_again(small_disk: Path) -> None:
    latest = run_distributed(read_only_for_a_moment, 1, small_disk)[0]
    assert latest.error is None and latest.attempts == 2
    assert names(small_disk) == ["step=2.ckpt"]


def busy(folder: Path, when_busy: str) -> tuple[int, list[str]]:
    """The writer stands still over the second save."""
    callback = AsyncDistributedCheckpoint(
        folder, every_n_train_steps=2, when_busy=when_busy, save_top_k=-1, filename="{step}"
    )
    stopped: list[int] = []

    def stop() -> None:
        callback._saver.wait()  # type: ignore[union-attr]
        stopped.append(worker_of(callback))
        os.kill(stopped[0], signal.SIGSTOP)
        if when_busy == "wait":
            threading.Timer(1.0, os.kill, (stopped[0], signal.SIGCONT)).start()

    fit(callback, AtStep({3: stop, 7: lambda: os.kill(stopped[0], signal.SIGCONT)}), max_steps=8)
    return callback.skipped, names(folder)


def test_a_save_that_is_due_too_soon_waits(tmp_path: Path) -> None:
    assert run_distributed(busy, 1, tmp_path, "wait")[0] == (0, [f"step={n}.ckpt" for n in (2, 4, 6, 8)])


def test_a_save_that_is_due_too_soon_can_be_skipped(tmp_path: Path) -> None:
    skipped, left = run_distributed(busy, 1, tmp_path, "skip")[0]
    assert skipped >= 1 and "step=6.ckpt" not in left and {"step=2.ckpt", "step=4.ckpt"} <= set(left)


def fail_in_the_foreground(folder: Path) -> tuple[str, int]:
    callback = AsyncDistributedCheckpoint(folder, every_n_train_steps=1, background=False, on_failure="raise")
    remount(folder, "ro")
    try:
        fit(callback, max_steps=2)
    except CheckpointError as error:
        return str(error), callback.failures
    return "", callback.failures


def test_a_failure_in_the_foreground_counts(small_disk: Path) -> None:
    message, failures = run_distributed(fail_in_the_foreground, 1, small_disk)[0]
    assert "Read-only file system" in message and failures == 1


def storage_fails_at_the_commit(folder: Path) -> tuple[Any, list[str]]:
    """The storage is away when rank 0 wants to commit, and when it wants to clean up."""
    commit, discard = FolderStore.commit, FolderStore.discard
    failed: list[str] = []

    def once(method: Callable[..., None]) -> Callable[..., None]:
        def wrapped(store: FolderStore, *arguments: Any) -> None:
            if method.__name__ not in failed:
                failed.append(method.__name__)
                raise ConnectionError("the storage is away")
            method(store, *arguments)

        return wrapped

    FolderStore.commit, FolderStore.discard = once(commit), once(discard)  # type: ignore[method-assign]
    callback = AsyncDistributedCheckpoint(folder, every_n_train_steps=2, backoff=0.01, filename="{step}")
    fit(callback, world_size=2, max_steps=2)
    return callback.latest, failed


def test_all_ranks_try_again_together(tmp_path: Path) -> None:
    (first, failed), (second, _) = run_distributed(storage_fails_at_the_commit, 2, tmp_path)
    assert failed == ["commit", "discard"]
    assert first.error is None and second.error is None and first.attempts == second.attempts == 2
    assert verify(FolderStore(tmp_path), "step=2.ckpt") == []


class TroubleError(Exception):
    pass


def raise_trouble() -> None:
    raise TroubleError


def fail_while_saving(folder: Path) -> tuple[list[str], str, list[int]]:
    """The run ends with an exception right after a save was begun."""
    callback = AsyncDistributedCheckpoint(folder, every_n_train_steps=2, save_last=True, filename="{step}")
    with pytest.raises(TroubleError):
        fit(callback, AtStep({5: raise_trouble}), max_steps=8)
    children = [child.pid for child in psutil.Process().children(recursive=True)]
    return names(folder), os.readlink(folder / "last.ckpt"), children


def test_a_save_comes_to_its_end_when_the_run_fails(tmp_path: Path) -> None:
    left, last, children = run_distributed(fail_while_saving, 1, tmp_path)[0]
    assert left == ["last.ckpt", "step=4.ckpt"] and last == "step=4.ckpt"
    assert children == []


def test_a_removal_is_meant_for_one_checkpoint(tmp_path: Path) -> None:
    """Not for another that has its name by the time it is carried out."""

    def save(name: str) -> None:
        CheckpointSaver(alone=True).save(RunState(1, {"weight": torch.ones(3)}), tmp_path / name)

    save("old")
    save("new")
    pending = PendingSave(str(tmp_path / "new"), {}, {})
    pending.remove(str(tmp_path / "old"))
    save("old")
    pending.tidy()
    assert names(tmp_path) == ["new", "old"]
    pending.removals.clear()
    pending.remove(str(tmp_path / "old"))
    pending.tidy()
    assert names(tmp_path) == ["new"]
