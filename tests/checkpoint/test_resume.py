"""What can be resumed from and what cannot, and what a folder holds after a save."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.errors import ConfigurationError, NoGoodCheckpointError
from tests.checkpoint.runs import run
from tests.distributed import run_distributed

PP2 = {"pipeline_parallel_size": 2}


def job(world_size: int, sizes: dict[str, Any], corpus: Path, options: dict[str, Any]) -> dict[str, Any]:
    return run(world_size, sizes, corpus, **options)


def test_another_optimizer_is_refused_and_another_type_of_state_is_not(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-3"
    whole = run_distributed(job, 1, 1, {}, corpus, {"save_at": {3: path}})[0]
    narrower = {"module_arguments": {"optimizer_state_dtype": "bfloat16"}}
    kept = tmp_path / "kept"
    resumed = run_distributed(job, 1, 1, {}, corpus, {"resume": path, "save_at": {4: kept}, **narrower})[0]
    assert resumed["losses"] == pytest.approx(whole["losses"][3:], abs=1e-2)
    for folder, dtype in ((path, torch.float32), (kept, torch.bfloat16)):
        stored = Checkpoint.open(folder, alone=True).tensors
        moments = [found for name, found in stored.items() if ".exp_avg" in name]
        assert moments and all(found.properties.dtype == dtype for found in moments)
    message = run_distributed(resume_and_report, 1, corpus, path, {"optimizer": "muon"})[0]
    assert "it was saved with another optimizer" in message and "momentum_buffer" in message


def resume_and_report(corpus: Path, path: Path, module_arguments: dict[str, Any] | None = None) -> str:
    try:
        run(1, {}, corpus, resume=path, module_arguments=module_arguments)
    except (ConfigurationError, NoGoodCheckpointError) as error:
        return str(error)
    return ""


def test_what_is_no_checkpoint_is_named(corpus: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    run_distributed(job, 1, 1, {}, corpus, {"save_at": {1: broken}, "steps": 1})
    (broken / "manifest.json").unlink()
    assert "manifest.json: it is missing" in run_distributed(resume_and_report, 1, corpus, broken)[0]
    assert (
        f"no checkpoint at {tmp_path / 'none'}" in run_distributed(resume_and_report, 1, corpus, tmp_path / "none")[0]
    )


def test_saving_again_replaces_the_folder_as_a_whole(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "same"
    run_distributed(job, 2, 2, PP2, corpus, {"save_at": {2: path}, "steps": 2})
    (path / "left-over").touch()
    run_distributed(job, 1, 1, {}, corpus, {"save_at": {2: path}, "steps": 2})
    assert sorted(p.name for p in path.iterdir()) == [
        "config.json",
        "index.json",
        "manifest.json",
        "rank_00000.safetensors",
        "tokenizer.json",
        "trainer.json",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["same"]
