"""AsyncDistributedCheckpoint: a ModelCheckpoint to its user."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_llm import Decoder
from lightning_llm.callbacks import AsyncDistributedCheckpoint
from lightning_llm.checkpoint.export import export
from lightning_llm.checkpoint.folder import FolderStore
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.checkpoint.saver import CheckpointSaver, RunState
from lightning_llm.checkpoint.store import open_store
from lightning_llm.checkpoint.verify import verify
from lightning_llm.errors import ConfigurationError, NoGoodCheckpointError
from lightning_llm.registry import open_registry
from tests.callbacks.checkpointing import ONE_BATCH, fit, names
from tests.checkpoint.damage import flip_bit
from tests.distributed import run_distributed, run_on_gpu
from tests.object_storage import ObjectStorage

# -- what a user of ModelCheckpoint sees --

slow = pytest.mark.slow


def compare(folder: Path, options: dict[str, Any]) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """What Lightning's callback and ours leave behind, each after a run of its own."""
    left, attributes = {}, {}
    for kind in (ModelCheckpoint, AsyncDistributedCheckpoint):
        place = folder / kind.__name__
        known = {key: value for key, value in options.items() if kind is not ModelCheckpoint or key != "background"}
        callback = kind(place, **known)
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
        pytest.param({"every_n_train_steps": 3, "save_top_k": -1}, marks=slow),
        {"every_n_train_steps": 2, "save_top_k": 2, "monitor": "val_loss", "save_last": True},
        pytest.param({"monitor": "val_loss", "save_top_k": 2, "filename": "{step}-{val_loss:.3f}"}, marks=slow),
        {"monitor": "val_loss", "mode": "max", "every_n_train_steps": 2, "save_last": "link"},
        pytest.param({"every_n_train_steps": 4, "save_top_k": 0, "save_last": True}, marks=slow),
        {"train_time_interval": timedelta(0), "save_top_k": -1},
        pytest.param({"every_n_epochs": 1}, marks=slow),
        {"every_n_train_steps": 4, "save_top_k": 0, "save_last": "link"},
        {"every_n_train_steps": 100, "save_last": "link"},
        {"every_n_train_steps": 2, "save_last": True, "background": False},
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


def resume_last(folder: Path, world_size: int, snapshot: str = "copy", **arguments: Any) -> list[list[float]]:
    options: dict[str, Any] = {"every_n_train_steps": 3, "save_last": True, "snapshot": snapshot}
    common: dict[str, Any] = {"world_size": world_size, **ONE_BATCH, **arguments}
    whole = fit(ModelCheckpoint(folder / "reference"), max_steps=10, **common)[1]
    fit(AsyncDistributedCheckpoint(folder / "run", **options), max_steps=7, **common)
    resumed = fit(AsyncDistributedCheckpoint(folder / "run", **options), max_steps=10, ckpt_path="last", **common)
    return [whole[6:], resumed[1], names(folder / "run")]


@pytest.mark.parametrize("world_size", [1, 2])
def test_last_goes_on_from_the_newest_and_never_removes_it(tmp_path: Path, world_size: int) -> None:
    whole, resumed, left = run_distributed(resume_last, world_size, tmp_path, world_size)[0]
    assert resumed == whole and len(resumed) == 4
    assert left == ["epoch=5-step=6.ckpt", "epoch=8-step=9.ckpt", "last.ckpt"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("snapshot", ["copy", "overlapped"])
def test_a_gpu_goes_on_bit_by_bit_and_a_cpu_from_there(tmp_path: Path, snapshot: str, precision: str) -> None:
    run = functools.partial(resume_last, accelerator="cuda", deterministic=True, precision=precision)
    whole, resumed, left = run_on_gpu(run, tmp_path, 1, snapshot)
    assert resumed == whole and len(resumed) == 4
    assert all(verify(FolderStore(tmp_path / "run"), name) == [] for name in left)
    on_cpu = run_distributed(resumed_losses, 1, tmp_path / "run" / left[0], precision)[0]
    assert on_cpu == pytest.approx(whole, abs=1e-4 if precision == "32-true" else 0.02)


def resumed_losses(checkpoint: Path, precision: str) -> list[float]:
    callback = AsyncDistributedCheckpoint(checkpoint.parent)
    return fit(callback, max_steps=10, ckpt_path=str(checkpoint), precision=precision, **ONE_BATCH)[1]


def resume_from_alias(folder: Path) -> list[list[str]]:
    """Three more runs, each resumed from the last one's `last.ckpt`."""
    left = []
    for steps in (3, 6, 9, 12):
        last = folder / "last.ckpt"
        callback = AsyncDistributedCheckpoint(folder, every_n_train_steps=1, save_last=True, filename="{step}")
        fit(callback, max_steps=steps, ckpt_path=str(last) if last.exists() else None, **ONE_BATCH)
        left.append(names(folder))
    return left


def test_what_a_run_was_resumed_from_stays_until_the_next_run(tmp_path: Path) -> None:
    left = run_distributed(resume_from_alias, 1, tmp_path)[0]
    assert left == [
        ["last.ckpt", "step=3.ckpt"],
        ["last.ckpt", "step=3.ckpt", "step=6.ckpt"],
        ["last.ckpt", "step=6.ckpt", "step=9.ckpt"],
        ["last.ckpt", "step=12.ckpt", "step=9.ckpt"],
    ]


def two_callbacks(folder: Path, kind: type[ModelCheckpoint]) -> tuple[list[str], int]:
    """Both save to one folder, at the same steps, and one of them keeps all."""
    folder.mkdir()
    all_of_them = kind(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    newest = kind(folder, every_n_train_steps=1, save_top_k=1, filename="{step}")
    trainer, _ = fit(newest, all_of_them, max_steps=6)
    return names(folder), len(trainer.checkpoint_callbacks)


def test_two_callbacks_do_not_touch_each_others(tmp_path: Path) -> None:
    stock = run_distributed(two_callbacks, 1, tmp_path / "stock", ModelCheckpoint)[0]
    ours = run_distributed(two_callbacks, 1, tmp_path / "ours", AsyncDistributedCheckpoint)[0]
    assert ours == stock and ours[1] == 2
    for name in ours[0]:
        assert verify(FolderStore(tmp_path / "ours"), name) == []


def twice(folder: Path) -> tuple[list[str], list[str]]:
    """A second run into the folder of a first one that it does not go on from, beside things of other people."""
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "last.ckpt").mkdir()
    (folder / "mine" / "last.ckpt" / "thesis.tex").write_text("mine")
    for place in ("mine", "twice", "twice"):
        fit(AsyncDistributedCheckpoint(folder / place, every_n_train_steps=2, save_last=True), max_steps=2)
    return names(folder / "mine"), names(folder / "twice")


def test_last_takes_a_name_that_is_free(tmp_path: Path) -> None:
    mine, second = run_distributed(twice, 1, tmp_path)[0]
    assert mine == ["epoch=0-step=2.ckpt", "last-v1.ckpt", "last.ckpt"]
    assert (tmp_path / "mine" / "last.ckpt" / "thesis.tex").read_text() == "mine"
    assert second == ["epoch=0-step=2-v1.ckpt", "epoch=0-step=2.ckpt", "last-v1.ckpt", "last.ckpt"]
    assert (tmp_path / "twice" / "last.ckpt").resolve().name == "epoch=0-step=2.ckpt"


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
    [
        ({"verify": "some"}, "verify='some'"),
        ({"when_busy": "go"}, "when_busy"),
        ({"on_failure": "cry"}, "on_failure"),
        ({"max_failures": 0}, "max_failures=0"),
        ({"retries": -1}, "retries=-1"),
        ({"backoff": -1}, "backoff=-1"),
        ({"timeout": 0}, "timeout=0"),
    ],
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


def shard_otherwise(folder: Path) -> str:
    try:
        fit(AsyncDistributedCheckpoint(folder), strategy=ModelParallelStrategy(), world_size=1)
    except ConfigurationError as error:
        return str(error)
    return ""


def test_a_strategy_that_shards_otherwise_is_refused(tmp_path: Path) -> None:
    assert "does not know how ModelParallelStrategy shards" in run_distributed(shard_otherwise, 1, tmp_path)[0]


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
    assert export(tmp_path / "run" / "step=6.ckpt", tmp_path / "model").is_dir()
