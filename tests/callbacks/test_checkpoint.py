"""AsyncDistributedCheckpoint: ModelCheckpoint to the user, and nothing is lost when things go wrong."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_llm import Decoder, LLM3DStrategy
from lightning_llm.callbacks import AsyncDistributedCheckpoint
from lightning_llm.checkpoint.folder import FolderStore
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.checkpoint.saver import CheckpointSaver, RunState
from lightning_llm.checkpoint.store import open_store
from lightning_llm.checkpoint.verify import verify
from lightning_llm.errors import CheckpointError, ConfigurationError, NoGoodCheckpointError
from lightning_llm.registry import open_registry
from tests import disks
from tests.checkpoint.damage import flip_bit
from tests.distributed import run_distributed
from tests.object_storage import ObjectStorage
from tests.strategies.training import Recorder, loader, make_module, make_trainer

TP2 = {"tensor_parallel_size": 2}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fit(
    callback: ModelCheckpoint, *others: Callback, world_size: int = 1, strategy: Any = None, **arguments: Any
) -> Any:
    """A run with `callback`; returns the trainer, and its losses by step."""
    ckpt_path, rows = arguments.pop("ckpt_path", None), arguments.pop("rows", 64)
    strategy = LLM3DStrategy(**(TP2 if world_size == 2 else {})) if strategy is None else strategy
    recorder = Recorder()
    defaults = {"max_steps": 8, "val_check_interval": 2, "enable_checkpointing": True}
    trainer = make_trainer(strategy, world_size, callbacks=[recorder, *others, callback], **{**defaults, **arguments})
    llm3d = strategy if isinstance(strategy, LLM3DStrategy) else None
    validation = loader(trainer, llm3d, rows=16) if trainer.val_check_interval else None
    trainer.fit(make_module(schedule="constant"), loader(trainer, llm3d, rows=rows), validation, ckpt_path=ckpt_path)
    return trainer, recorder.losses


# -- what a user of ModelCheckpoint sees --


def compare(folder: Path, options: dict[str, Any]) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """What Lightning's callback and ours leave behind, each after a run of its own."""
    left, attributes = {}, {}
    for kind in (ModelCheckpoint, AsyncDistributedCheckpoint):
        place = folder / kind.__name__
        callback = kind(place, **options)
        fit(callback, world_size=2, max_steps=8)
        dist.barrier()  # ModelCheckpoint removes on rank 0 without telling the others
        left[kind.__name__] = names(place)
        attributes[kind.__name__] = {
            "best": Path(callback.best_model_path).name,
            "best_k": sorted((Path(p).name, float(v)) for p, v in callback.best_k_models.items()),
            "last": Path(callback.last_model_path).name,
            "score": callback.best_model_score,
        }
    return left, attributes


@pytest.mark.parametrize(
    "options",
    [
        {"every_n_train_steps": 2},
        {"every_n_train_steps": 3, "save_top_k": -1},
        {"every_n_train_steps": 2, "save_top_k": 2, "monitor": "val_loss", "save_last": True},
        {"monitor": "val_loss", "save_top_k": 2, "filename": "{step}-{val_loss:.3f}"},
        {"monitor": "val_loss", "mode": "max", "every_n_train_steps": 2, "save_last": "link"},
        {"every_n_train_steps": 4, "save_top_k": 0, "save_last": True},
        {"train_time_interval": timedelta(0), "save_top_k": -1},
        {"every_n_epochs": 1},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_it_keeps_what_model_checkpoint_keeps(tmp_path: Path, options: dict[str, Any]) -> None:
    for left, attributes in run_distributed(compare, 2, tmp_path, options):
        assert left["AsyncDistributedCheckpoint"] == left["ModelCheckpoint"]
        assert attributes["AsyncDistributedCheckpoint"] == attributes["ModelCheckpoint"]
        assert left["ModelCheckpoint"]
    for name in left["AsyncDistributedCheckpoint"]:
        assert verify(FolderStore(tmp_path / "AsyncDistributedCheckpoint"), name) == []


# Every epoch is one and the same batch, so that Lightning, which does not keep a plain loader's place, cannot lose it.
ONE_BATCH = {"rows": 8, "val_check_interval": None}


def resume_last(folder: Path, world_size: int) -> list[list[float]]:
    options: dict[str, Any] = {"every_n_train_steps": 3, "save_last": True}
    common: dict[str, Any] = {"world_size": world_size, **ONE_BATCH}
    whole = fit(ModelCheckpoint(folder / "reference"), max_steps=10, **common)[1]
    fit(AsyncDistributedCheckpoint(folder / "run", **options), max_steps=7, **common)
    resumed = fit(AsyncDistributedCheckpoint(folder / "run", **options), max_steps=10, ckpt_path="last", **common)
    return [whole[6:], resumed[1], names(folder / "run")]


@pytest.mark.parametrize("world_size", [1, 2])
def test_last_goes_on_from_the_newest_and_never_removes_it(tmp_path: Path, world_size: int) -> None:
    whole, resumed, left = run_distributed(resume_last, world_size, tmp_path, world_size)[0]
    assert resumed == whole and len(resumed) == 4
    assert left == ["epoch=5-step=6.ckpt", "epoch=8-step=9.ckpt", "last.ckpt"]


def start_with_nothing(folder: Path) -> int:
    return fit(AsyncDistributedCheckpoint(folder), ckpt_path="last", max_steps=2)[0].global_step


def test_last_without_any_checkpoint_is_a_start(tmp_path: Path) -> None:
    assert run_distributed(start_with_nothing, 1, tmp_path)[0] == 2


def resume_after_damage(folder: Path, damage: Callable[[Path], None]) -> tuple[str, list[str], int]:
    fit(AsyncDistributedCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}"), max_steps=6)
    damage(folder)
    start = Seen()
    try:
        fit(AsyncDistributedCheckpoint(folder), start, max_steps=8, ckpt_path="last")
    except NoGoodCheckpointError as error:
        return str(error), names(folder), error.code
    return "", names(folder), start.step


class Seen(Callback):
    """Notes the step at which training begins."""

    step = -1

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.step = trainer.global_step


def flip_newest(folder: Path) -> None:
    flip_bit(folder / "step=6.ckpt" / "rank_00000.safetensors", 5000)


def spoil_all(folder: Path) -> None:
    flip_newest(folder)
    (folder / "step=4.ckpt" / "manifest.json").unlink()
    os.truncate(folder / "step=2.ckpt" / "trainer.json", 0)


def test_a_damaged_one_is_marked_and_the_one_before_is_taken(tmp_path: Path) -> None:
    message, left, step = run_distributed(resume_after_damage, 1, tmp_path, flip_newest)[0]
    assert message == "" and step == 4
    assert "step=6.ckpt.corrupt" in left and "step=6.ckpt" in left and "step=4.ckpt.corrupt" not in left


def test_all_damaged_ends_with_77_and_a_list(tmp_path: Path) -> None:
    message, left, code = run_distributed(resume_after_damage, 1, tmp_path, spoil_all)[0]
    assert code == 77
    assert "step=6.ckpt: rank_00000.safetensors: chunk 0 (bytes 0 to " in message
    assert "step=4.ckpt: manifest.json: it is missing or empty" in message
    assert "step=2.ckpt: trainer.json: it has 0 bytes instead of " in message
    assert {"step=2.ckpt.corrupt", "step=4.ckpt.corrupt", "step=6.ckpt.corrupt"} <= set(left)


def foreign(folder: Path) -> list[str]:
    (folder / "notes").mkdir()
    (folder / "notes" / "manifest.txt").write_text("mine")
    (folder / "step=2.ckpt").mkdir()
    (folder / "step=2.ckpt" / "thesis.tex").write_text("mine")
    fit(AsyncDistributedCheckpoint(folder, every_n_train_steps=2, filename="{step}"), max_steps=6)
    return names(folder)


def test_what_others_put_there_is_left_alone(tmp_path: Path) -> None:
    assert run_distributed(foreign, 1, tmp_path)[0] == ["notes", "step=2.ckpt", "step=6.ckpt"]
    assert (tmp_path / "step=2.ckpt" / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "notes" / "manifest.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"verify": "some"}, "verify='some'"), ({"when_busy": "go"}, "when_busy"), ({"on_failure": "cry"}, "on_failure")],
)
def test_a_wrong_choice_is_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        AsyncDistributedCheckpoint(tmp_path, **arguments)


def register_best(folder: Path) -> str:
    callback = AsyncDistributedCheckpoint(
        folder / "my-run" / "checkpoints",
        monitor="val_loss",
        register_on_best=True,
        registry=str(folder / "registry"),
    )
    fit(callback, max_steps=6)
    return callback.best_model_path


def test_the_best_is_registered(tmp_path: Path) -> None:
    best = run_distributed(register_best, 1, tmp_path)[0]
    registry = open_registry(str(tmp_path / "registry"))
    version = registry.get("my-run", "best")
    assert version == registry.get("my-run") and version.lineage.checkpoint == best
    assert version.lineage.step == 6 and 0 < version.metrics["val_loss"] < 10
    folder = registry.pull("my-run", "best", tmp_path / "pulled")
    with torch.no_grad():
        stored = dict(Checkpoint.open(best, alone=True).iterate_weights())
        for name, weight in Decoder.from_pretrained(folder).named_parameters():
            assert torch.equal(weight, stored[name]), name


def test_the_best_needs_a_measure(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="needs monitor"):
        AsyncDistributedCheckpoint(tmp_path, register_on_best=True)


# -- the snapshot --


def change_after_save(folder: Path) -> None:
    """Training goes on at once; what is written must not see that."""
    weight = torch.full((1 << 22,), 1.0)
    count = torch.tensor(1.0)
    saver = CheckpointSaver(background=True)
    for step in range(1, 6):
        weight.fill_(step)
        count.fill_(step)
        settings = {"rate": step}
        saver.save(RunState(step, {"weight": weight, "count": count}, trainer={"settings": settings}), folder / "c")
        weight.fill_(-1.0)
        count.fill_(-1.0)
        settings["rate"] = -1
        saver.wait()
        outcome = saver.finished()
        assert outcome is not None and outcome.error is None
        found = Checkpoint.open(folder / "c", alone=True)
        assert torch.equal(found.read("weight"), torch.full((1 << 22,), float(step)))
        assert float(found.read("count")) == step and found.trainer_state()["settings"]["rate"] == step
    saver.close()


def test_a_checkpoint_has_the_values_of_its_step(tmp_path: Path) -> None:
    run_distributed(change_after_save, 1, tmp_path)


# -- what goes wrong --


class AtStep(Callback):
    """Does something after a step."""

    def __init__(self, actions: dict[int, Callable[[], None]]) -> None:
        self.actions = actions

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.actions.get(trainer.global_step, lambda: None)()


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def worker_of(callback: AsyncDistributedCheckpoint) -> int:
    assert callback._saver is not None
    wait_until(lambda: callback._saver is not None and callback._saver.worker_pid is not None)
    pid = callback._saver.worker_pid
    assert pid is not None
    return pid


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


# -- object storage --


def save_to_bucket(url: str) -> list[list[float]]:
    options: dict[str, Any] = {"every_n_train_steps": 3, "save_last": True, "filename": "{step}"}
    common: dict[str, Any] = {"world_size": 2, **ONE_BATCH}
    whole = fit(ModelCheckpoint(Path(os.environ["PLACE"]) / "reference"), max_steps=9, **common)[1]
    fit(AsyncDistributedCheckpoint(url, **options), max_steps=7, **common)
    resumed = fit(AsyncDistributedCheckpoint(url, **options), max_steps=9, ckpt_path="last", **common)[1]
    return [whole[6:], resumed]


def test_a_bucket_is_as_good_as_a_folder(
    object_storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv("LIGHTNING_LLM_CACHE", str(tmp_path / "cache"))
    url = f"s3://{object_storage.bucket('callback')}/team/run"
    whole, resumed = run_distributed(save_to_bucket, 2, url)[0]
    assert resumed == whole and len(whole) == 3
    store = open_store(url)
    assert sorted(store.names()) == ["step=6.ckpt", "step=9.ckpt"]
    assert all(verify(store, name) == [] for name in ("step=6.ckpt", "step=9.ckpt", "last.ckpt"))


# -- other strategies --


def other_strategy(folder: Path, strategy: str) -> tuple[list[float], list[float], list[str]]:
    options: dict[str, Any] = {"every_n_train_steps": 3, "filename": "{step}"}
    common: dict[str, Any] = {"world_size": 2 if strategy == "ddp" else 1, "strategy": strategy, **ONE_BATCH}
    whole = fit(AsyncDistributedCheckpoint(folder / "reference"), max_steps=6, **common)[1]
    fit(AsyncDistributedCheckpoint(folder / "run", **options), max_steps=4, **common)
    resumed = fit(AsyncDistributedCheckpoint(folder / "run", **options), max_steps=6, ckpt_path="last", **common)[1]
    return whole[3:], resumed, names(folder / "run")


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_lightnings_own_strategies_save_the_same_way(tmp_path: Path, strategy: str) -> None:
    world_size = 2 if strategy == "ddp" else 1
    whole, resumed, left = run_distributed(other_strategy, world_size, tmp_path, strategy)[0]
    assert resumed == whole and len(whole) == 3
    assert left == ["step=3.ckpt", "step=6.ckpt"], "the one that it was resumed from stays"
    assert verify(FolderStore(tmp_path / "run"), "step=6.ckpt") == []
