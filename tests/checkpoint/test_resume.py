"""Interrupted and resumed = never interrupted: bitwise in one layout, within rounding across layouts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.errors import ConfigurationError, NoGoodCheckpointError
from tests.checkpoint.runs import CONFIG, EXPERTS, STEPS, TIED, run, weights_of_all
from tests.distributed import run_distributed

TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
EP4 = {"expert_parallel_size": 4}
MUON = {"optimizer": "muon", "optimizer_state_dtype": "bfloat16"}


def job(world_size: int, sizes: dict[str, Any], corpus: Path, options: dict[str, Any]) -> dict[str, Any]:
    return run(world_size, sizes, corpus, **options)


@pytest.mark.parametrize(
    ("world_size", "sizes", "options"),
    [
        pytest.param(1, {}, {"num_workers": 2}, id="one process, data workers"),
        pytest.param(2, {}, {"accumulate_grad_batches": 2}, id="dp2, accumulation"),
        pytest.param(4, {**TP2, **PP2}, {"config": TIED}, id="pp2 x tp2, tied"),
        pytest.param(8, {**TP2, **PP2}, {}, id="pp2 x dp2 x tp2"),
        pytest.param(2, {**PP2, "pipeline_schedule": "ZBVZeroBubble"}, {"config": TIED}, id="both ends on one rank"),
        pytest.param(4, {**TP2, **EP4}, {"config": EXPERTS}, id="dp2 x tp2 x ep4", marks=pytest.mark.slow),
        pytest.param(4, TP2, {"module_arguments": {"optimizer": "muon"}}, id="dp2 x tp2, Muon"),
        pytest.param(4, {"pipeline_parallel_size": 4}, {"module_arguments": MUON}, id="pp4, Muon in bfloat16"),
        pytest.param(2, {}, {"module_arguments": {"optimizer_state_dtype": "bfloat16"}}, id="dp2, AdamW in bfloat16"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, corpus: Path, world_size: int, sizes: dict[str, Any], options: dict[str, Any]
) -> None:
    stop = 3
    whole = run_distributed(
        job, world_size, world_size, sizes, corpus, {"save_at": {stop: tmp_path / "step-3"}, **options}
    )
    resumed = run_distributed(job, world_size, world_size, sizes, corpus, {"resume": tmp_path / "step-3", **options})
    batches_per_step = options.get("accumulate_grad_batches", 1)
    for before, after in zip(whole, resumed, strict=True):
        assert len(before["losses"]) == STEPS * batches_per_step
        assert after["losses"] == before["losses"][stop * batches_per_step :], "the loss curve must be equal bit by bit"
        assert after["val_loss"] == before["val_loss"]
        assert after["learning_rate"] == before["learning_rate"]
        for name, weight in before["weights"].items():
            assert torch.equal(after["weights"][name], weight), name


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def saved_in_3d(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: Path
) -> dict[str, Any]:
    """A run of 8 processes (pp2 x dp2 x tp2), saved at steps 3 and at its end."""
    folder = tmp_path_factory.mktemp("saved")
    config = TIED if request.param else CONFIG
    save_at = {3: folder / "step-3", STEPS: folder / "end"}
    results = run_distributed(job, 8, 8, {**TP2, **PP2}, corpus, {"save_at": save_at, "config": config})
    return {"folder": folder, "results": results, "config": config}


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        pytest.param(1, {}, id="one process"),
        pytest.param(2, TP2, id="tp2"),
        pytest.param(2, PP2, id="pp2"),
        pytest.param(2, {}, id="dp2"),
        pytest.param(2, {"context_parallel_size": 2, "zero_stage": 0}, id="cp2, ZeRO-0"),
        pytest.param(2, {**PP2, "pipeline_schedule": "DualPipeV"}, id="pp2, both ends on one rank"),
    ],
)
def test_another_layout_continues_the_run(
    saved_in_3d: dict[str, Any], corpus: Path, world_size: int, sizes: dict[str, Any]
) -> None:
    options = {"resume": saved_in_3d["folder"] / "step-3", "config": saved_in_3d["config"]}
    results = run_distributed(job, world_size, world_size, sizes, corpus, options)
    assert results[0]["losses"] == pytest.approx(saved_in_3d["results"][0]["losses"][3:], abs=1e-4)
    expected = weights_of_all(saved_in_3d["results"])
    for name, weight in weights_of_all(results).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-4, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        pytest.param(1, {}, id="one process", marks=pytest.mark.slow),
        pytest.param(2, {"expert_parallel_size": 2}, id="dp2 x ep2"),
        pytest.param(4, {**PP2, **TP2}, id="pp2 x tp2", marks=pytest.mark.slow),
    ],
)
def test_experts_continue_in_another_layout(
    corpus: Path, tmp_path: Path, world_size: int, sizes: dict[str, Any]
) -> None:
    """Their router's biases too, which are no parameters."""
    options = {"config": EXPERTS}
    whole = run_distributed(job, 4, 4, {**TP2, **EP4}, corpus, {"save_at": {3: tmp_path / "step-3"}, **options})
    results = run_distributed(job, world_size, world_size, sizes, corpus, {"resume": tmp_path / "step-3", **options})
    assert results[0]["losses"] == pytest.approx(whole[0]["losses"][3:], abs=1e-4)
    biases = {name: bias for result in results for name, bias in result["buffers"].items()}
    assert biases.keys() == whole[0]["buffers"].keys() and len(biases) == 4
    for name, bias in whole[0]["buffers"].items():
        assert bias.abs().max() > 1e-3
        assert torch.equal(biases[name], bias), name


def test_one_process_continues_in_three_dimensions(corpus: Path, tmp_path: Path) -> None:
    options = {"config": TIED}
    whole = run_distributed(job, 1, 1, {}, corpus, {"save_at": {3: tmp_path / "step-3"}, **options})
    results = run_distributed(job, 8, 8, {**TP2, **PP2}, corpus, {"resume": tmp_path / "step-3", **options})
    assert results[0]["losses"] == pytest.approx(whole[0]["losses"][3:], abs=1e-4)


@pytest.mark.parametrize(
    "module_arguments",
    [
        pytest.param({"optimizer": "muon"}, id="Muon"),
        pytest.param({"optimizer_state_dtype": "bfloat16"}, id="AdamW in bfloat16"),
    ],
)
def test_other_optimizers_continue_in_another_layout(
    corpus: Path, tmp_path: Path, module_arguments: dict[str, Any]
) -> None:
    options = {"module_arguments": module_arguments}
    save_at = {3: tmp_path / "step-3"}
    whole = run_distributed(job, 4, 4, {**TP2, **PP2}, corpus, {"save_at": save_at, **options})
    for sizes in ({}, TP2):
        results = run_distributed(job, 2, 2, sizes, corpus, {"resume": tmp_path / "step-3", **options})
        assert results[0]["losses"] == pytest.approx(whole[0]["losses"][3:], abs=1e-4)


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


def test_what_is_no_checkpoint_is_named(saved_in_3d: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(saved_in_3d["folder"] / "end", broken)
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
