"""What all ranks decide together about checkpoints, and what a run may do to one while somebody looks at it."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_llm.checkpoint.folder import FolderStore
from lightning_llm.checkpoint.inspection import inspect, survey
from lightning_llm.checkpoint.manifest import KEY_VARIABLE, Manifest
from lightning_llm.checkpoint.plugin import VerifiedCheckpointIO
from lightning_llm.checkpoint.saver import CheckpointSaver, RunState
from lightning_llm.checkpoint.selection import select
from lightning_llm.errors import ConfigurationError, NoGoodCheckpointError
from tests.checkpoint.stores import Store, damage, manifest_of, save
from tests.distributed import run_distributed

OLD, NEW = {"a": b"old" * 1000, "b": b"1"}, {"a": b"new!" * 1000, "b": b"2"}


def select_with_keys(path: Path, keys: list[str]) -> str:
    os.environ[KEY_VARIABLE] = keys[dist.get_rank()]
    try:
        found = f"step {select(path).manifest.step}"
    except NoGoodCheckpointError as error:
        found = str(error)
    total = torch.ones(1)
    dist.all_reduce(total)  # all are at the same collective
    assert total == 2
    return found


def test_ranks_with_different_keys_decide_alike(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "run")
    save(store, "step=7.ckpt", OLD, manifest_of(OLD, step=7).to_bytes(b"right"))
    for path in (store.root, store.root / "step=7.ckpt"):
        right = run_distributed(select_with_keys, 2, path, ["right", "wrong"], timeout=60)
        assert right == ["step 7"] * 2
        wrong = run_distributed(select_with_keys, 2, path, ["wrong", "right"], timeout=60)
        assert wrong[0] == wrong[1] and "its signature" in wrong[0]


class StrangeError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("strange")


def select_beside_an_error(path: Path, on_rank: int) -> str:
    if dist.get_rank() == on_rank:

        def fail(*_: Any) -> Iterator[bytes]:
            raise StrangeError(1, 2)

        FolderStore.read = fail  # type: ignore[method-assign, assignment]  in this process alone
    try:
        select(path)
    except OSError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("on_rank", [0, 1])
def test_an_error_on_one_rank_is_raised_on_all(tmp_path: Path, on_rank: int) -> None:
    save(FolderStore(tmp_path), "step=1.ckpt", OLD)
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(StrangeError(1, 2)))
    assert run_distributed(select_beside_an_error, 2, tmp_path, on_rank, timeout=60) == ["StrangeError: strange"] * 2


class Busy:
    """A store in which a run does something at the moment when somebody begins to read a file."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self._acts: list[Callable[[], Any]] = []
        read = type(store).read

        def acting(this: Any, location: str, file: str, chunk_size: int) -> Any:
            with suppress(IndexError):  # files are read by several threads
                act = self._acts.pop()
                act()
            return read(this, location, file, chunk_size)

        monkeypatch.setattr(type(store), "read", acting)

    def then(self, act: Callable[[], Any]) -> None:
        self._acts.append(act)


def test_what_is_replaced_while_it_is_read_is_not_damaged(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Busy(store, monkeypatch)
    save(store, "last.ckpt", OLD)
    for look, contents in ((inspect, NEW), (lambda url: survey(url).checkpoints, OLD)):
        busy.then(lambda contents=contents: save(store, "last.ckpt", contents))
        (found,) = look(store.url)
        assert found.good and found.manifest.uuid == Manifest.from_bytes(store.manifest("last.ckpt")).uuid
    busy.then(lambda: save(store, "last.ckpt", NEW))
    assert select(store.url, alone=True).manifest == Manifest.from_bytes(store.manifest("last.ckpt"))
    assert store.marked("last.ckpt") is None


def test_what_is_removed_while_it_is_read_is_not_damaged(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Busy(store, monkeypatch)
    save(store, "old.ckpt", OLD, manifest_of(OLD, step=1).to_bytes())
    for look in (inspect, lambda url: survey(url).checkpoints, lambda url: [select(url, alone=True)]):
        save(store, "new.ckpt", NEW, manifest_of(NEW, step=2).to_bytes())
        busy.then(lambda: store.remove("new.ckpt"))
        assert [found.name for found in look(store.url)] == ["old.ckpt"]
        assert store.marked("new.ckpt") is None
    for look in (inspect, lambda url: select(url, alone=True)):
        save(store, "new.ckpt", NEW)
        busy.then(lambda: store.remove("new.ckpt"))
        with pytest.raises(ConfigurationError, match="no checkpoint"):
            look(f"{store.url}/new.ckpt")


def test_what_is_damaged_is_still_damaged(store: Store) -> None:
    save(store, "step=1.ckpt", OLD)
    damage(store, "step=1.ckpt", "a", None)
    (found,) = inspect(store.url)
    assert found.status == "damaged"
    assert store.marked("step=1.ckpt") is not None


def test_a_whole_bucket_is_a_folder_of_checkpoints(object_storage: Any) -> None:
    from lightning_llm.checkpoint.store import open_store

    url = f"s3://{object_storage.bucket('selection')}"
    with pytest.raises(ConfigurationError, match="no checkpoint"):
        select(url, alone=True)
    save(open_store(url), "step=1.ckpt", OLD)
    assert select(url, alone=True).name == "step=1.ckpt"
    assert [found.name for found in inspect(url)] == ["step=1.ckpt"]


def test_a_type_that_no_file_can_hold_is_named(tmp_path: Path) -> None:
    tensors = {"model.phase": torch.zeros(2, dtype=torch.complex128)}
    with pytest.raises(ConfigurationError, match=r"model\.phase is torch\.complex128"):
        CheckpointSaver().save(RunState(step=1, tensors=tensors), tmp_path / "x")


def test_a_resumed_run_says_from_where(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    VerifiedCheckpointIO().save_checkpoint({"global_step": 12, "state_dict": {}}, tmp_path / "step=12.ckpt")
    with caplog.at_level(logging.INFO):
        VerifiedCheckpointIO().load_checkpoint(tmp_path)
    assert f"Going on from {tmp_path}/step=12.ckpt, step 12" in caplog.messages
