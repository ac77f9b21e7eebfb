"""A checkpoint as more or fewer files: the same tensors to the bit, and the same run that goes on."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lightning_llm.checkpoint import writing
from lightning_llm.checkpoint.encoding import encode
from lightning_llm.checkpoint.inspection import inspect
from lightning_llm.checkpoint.manifest import MANIFEST, Manifest
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.checkpoint.reshard import reshard
from lightning_llm.errors import CheckpointError, ConfigurationError, NoGoodCheckpointError
from tests.checkpoint.damage import flip_bit
from tests.checkpoint.runs import CONFIG, STEPS, run
from tests.distributed import run_distributed

SIZES = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
EXPERTS = CONFIG.replace(num_experts=4, num_experts_per_tok=2, model_type="mixtral")


def job(world_size: int, sizes: dict[str, Any], corpus: Path, options: dict[str, Any]) -> dict[str, Any]:
    return run(world_size, sizes, corpus, **options)


def all_of(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(path, alone=True)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Any]:
    """A run of 4 processes with experts and Muon in bfloat16: tensors of two types, plain and stacked."""
    path = tmp_path_factory.mktemp("reshard") / "step-3"
    options = {
        "config": EXPERTS,
        "module_arguments": {"optimizer": "muon", "optimizer_state_dtype": "bfloat16"},
    }
    results = run_distributed(job, 4, 4, SIZES, corpus, {"save_at": {3: path}, **options})
    return {"path": path, "losses": results[0]["losses"], "options": options}


@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_nothing_changes_but_the_files(
    saved: dict[str, Any], corpus: Path, tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "PIECE", 1000)  # so that every matrix comes in pieces
    old = Checkpoint.open(saved["path"], alone=True)
    manifest = reshard(saved["path"], tmp_path / "new", ranks=ranks)
    new = Checkpoint.open(tmp_path / "new", alone=True)
    assert new.manifest == manifest and manifest.world_size == ranks and manifest.step == 3
    assert manifest.source == old.manifest.uuid != manifest.uuid

    before, after = all_of(saved["path"]), all_of(tmp_path / "new")
    assert before.keys() == after.keys() and len({tensor.dtype for tensor in after.values()}) == 2
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    assert new.values == old.values
    assert (tmp_path / "new" / "trainer.json").read_bytes() == (saved["path"] / "trainer.json").read_bytes()
    for rank in range(min(4, ranks)):
        states = [encode(found.rank_state(rank), tensors := {}, "rank") for found in (old, new)]
        assert states[0] == states[1] and tensors, rank
    assert all(new.rank_state(rank) == {} for rank in range(4, ranks))

    sizes = []
    for rank in range(ranks):
        with safe_open(tmp_path / "new" / f"rank_{rank:05d}.safetensors", "pt") as file:
            own = [file.get_tensor(name) for name in file.keys() if not name.startswith("rank.")]  # noqa: SIM118
            sizes.append(sum(tensor.nbytes for tensor in own))
    assert max(sizes) - min(sizes) <= 8, "equal up to an element"


@pytest.mark.parametrize(("world_size", "sizes"), [(4, SIZES), (1, {})], ids=["the same layout", "one process"])
def test_a_run_goes_on_from_it(
    saved: dict[str, Any], corpus: Path, tmp_path: Path, world_size: int, sizes: dict[str, Any]
) -> None:
    reshard(saved["path"], tmp_path / "new", ranks=5)
    options = {"resume": tmp_path / "new", **saved["options"]}
    losses = run_distributed(job, world_size, world_size, sizes, corpus, options)[0]["losses"]
    assert len(saved["losses"]) == STEPS
    tolerance = 0 if world_size == 4 else 2e-3  # Muon's momentum is in bfloat16 here
    assert losses == pytest.approx(saved["losses"][3:], abs=tolerance)


def test_weights_alone(saved: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    manifest = reshard(saved["path"], tmp_path / "new", ranks=2, weights_only=True)
    before, after = all_of(saved["path"]), all_of(tmp_path / "new")
    assert manifest.weights_only
    assert after.keys() == {name for name in before if name.startswith("model.")} != before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    content = json.loads((tmp_path / "new" / "trainer.json").read_bytes())
    assert content["values"] == {} and not {"callbacks", "lr_schedulers"} & content["state"].keys()
    with pytest.raises(AssertionError, match="holds weights alone"):
        run_distributed(job, 1, 1, {}, corpus, {"resume": tmp_path / "new", **saved["options"]})


def test_nothing_is_made_of_what_is_damaged_nor_in_the_place_of_another(saved: dict[str, Any], tmp_path: Path) -> None:
    reshard(saved["path"], tmp_path / "new", ranks=2)
    manifest = (tmp_path / "new" / MANIFEST).read_bytes()
    with pytest.raises(ConfigurationError, match="is a checkpoint already"):
        reshard(saved["path"], tmp_path / "new", ranks=1)
    with pytest.raises(ConfigurationError, match="ranks=0 must be at least 1"):
        reshard(saved["path"], tmp_path / "other", ranks=0)
    assert (tmp_path / "new" / MANIFEST).read_bytes() == manifest
    flip_bit(tmp_path / "new" / "rank_00001.safetensors", 5000)
    with pytest.raises(NoGoodCheckpointError):
        reshard(tmp_path / "new", tmp_path / "other", ranks=1)
    assert not (tmp_path / "other").exists()


def test_a_disk_that_is_full_leaves_nothing_behind(saved: dict[str, Any], tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            reshard(saved["path"], tmp_path / "new", ranks=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_with_a_key_the_copy_is_signed(saved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = shutil.copytree(saved["path"], tmp_path / "old")
    monkeypatch.setenv("LIGHTNING_LLM_CHECKPOINT_KEY", "secret")
    with pytest.raises(NoGoodCheckpointError, match="is not signed"):
        reshard(old, tmp_path / "new", ranks=1)
    assert not (tmp_path / "old.corrupt").exists(), "that is no damage"
    unsigned = Manifest.from_bytes((old / MANIFEST).read_bytes())
    (old / MANIFEST).write_bytes(unsigned.to_bytes(b"secret"))
    assert reshard(old, tmp_path / "new", ranks=1).algorithm == "sha256"
    assert Manifest.from_bytes((tmp_path / "new" / MANIFEST).read_bytes(), b"secret").source == unsigned.uuid
    assert inspect(tmp_path / "new")[0].good
    monkeypatch.setenv("LIGHTNING_LLM_CHECKPOINT_KEY", "another")
    assert inspect(tmp_path / "new")[0].status == "unreadable"
