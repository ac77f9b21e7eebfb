"""What is registered of a checkpoint: a decoder as a Hugging Face folder, anything else as it was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_llm.callbacks.registration import register_checkpoint
from lightning_llm.checkpoint.cache import CACHE_VARIABLE
from lightning_llm.checkpoint.plugin import VerifiedCheckpointIO, collect_whole
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.checkpoint.saver import CheckpointSaver
from lightning_llm.errors import ConfigurationError
from lightning_llm.registry import Lineage, open_registry, register
from tests.object_storage import ObjectStorage


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_a_checkpoint_of_another_module(
    place: str, tmp_path: Path, object_storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = str(tmp_path / "run") if place == "folder" else f"s3://{object_storage.bucket('registration')}/run"
    path = f"{folder}/step=3.ckpt"
    VerifiedCheckpointIO().save_checkpoint({"global_step": 3, "state_dict": {"a": torch.arange(4.0)}}, path)
    if place == "folder":
        (Path(path) / "notes.txt").write_text("not the checkpoint's")
    version = register_checkpoint(path, "model", str(tmp_path / "registry"), {"loss": 1.0})
    saved = Checkpoint.open(path, alone=True).manifest
    assert version.lineage == Lineage(checkpoint=path, checkpoint_uuid=saved.uuid, step=3)
    registry = open_registry(str(tmp_path / "registry"))
    assert {file.path for file in registry.files(version)} == {*saved.files, "manifest.json"}
    pulled = registry.pull("model", "best", tmp_path / "pulled")
    again = Checkpoint.open(pulled, alone=True)
    assert again.manifest == saved and torch.equal(again.read("model.a"), torch.arange(4.0))


def test_a_whole_state_with_what_belongs_to_it(tmp_path: Path) -> None:
    state = collect_whole(
        {"global_step": 1, "state_dict": {"a": torch.zeros(1)}},
        write_assets=lambda folder: (folder / "config.json").write_text("{}"),
        rank={"random": {"torch": torch.arange(3)}},
    )
    CheckpointSaver(alone=True).save(state, tmp_path / "x")
    saved = Checkpoint.open(tmp_path / "x", alone=True)
    assert (saved.local("config.json") / "config.json").read_text() == "{}"
    assert torch.equal(saved.rank_state(0)["random"]["torch"], torch.arange(3))


def test_lineage_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="lineage"):
        register(tmp_path, "model", registry=tmp_path / "r", checkpoint="here", lineage=Lineage(step=1))
