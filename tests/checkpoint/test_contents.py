"""Everything that a run is made of is in its checkpoint, and comes back: an item a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import lightning_llm
from lightning_llm import LLM3DStrategy, LLMModule, TokenDataModule
from lightning_llm.callbacks import FP8Precision, Throughput
from lightning_llm.checkpoint.encoding import encode
from lightning_llm.checkpoint.module_state import collect
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.strategies.precision import LLMPrecision
from tests.checkpoint.runs import CONFIG
from tests.checkpoint.stories import equal
from tests.commands import call_forked
from tests.distributed import full, run_distributed
from tests.strategies.training import make_trainer

TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
SAVED, LAST = 3, 6


class See(Callback):
    """Keeps the losses, saves after some step."""

    def __init__(self, save: Path | None) -> None:
        self.save = save
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        if self.save is not None and trainer.global_step == SAVED:
            trainer.save_checkpoint(self.save)
            self.save = None


class Average(Callback):
    """A moving average of all weights, kept by parts like these, and something small beside it."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self.norms = torch.zeros(LAST)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        restored, self.average = self.average, {}  # whole, and of all stages
        for name, parameter in module.named_parameters():
            average = restored.get(name, parameter.detach().clone())
            if isinstance(parameter, DTensor) and not isinstance(average, DTensor):
                average = distribute_tensor(average, parameter.device_mesh, parameter.placements)
            self.average[name] = average

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        for name, parameter in module.named_parameters():
            self.average[name].lerp_(parameter.detach(), 0.1)
        self.norms[trainer.global_step - 1] = trainer.callback_metrics["grad_norm"]

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "norms": self.norms, "decay": 0.9}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["decay"] == 0.9
        self.average, self.norms = dict(state["average"]), state["norms"]


def fit(
    corpus: Path,
    world_size: int,
    sizes: dict[str, Any],
    callbacks: list[Callback],
    *,
    save: Path | None = None,
    resume: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    see = See(save)
    trainer = make_trainer(
        LLM3DStrategy(**sizes),
        world_size,
        callbacks=[*callbacks, see],
        max_steps=LAST,
        limit_val_batches=0,
        **options,
    )
    module = LLMModule(CONFIG, learning_rate=3e-3, warmup_steps=2)
    scaler = trainer.precision_plugin.scaler
    data = TokenDataModule(corpus, batch_size=8, seq_len=32)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return {
        "losses": see.losses,
        "trainer": trainer,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "weights": {name: full(p).detach().clone() for name, p in module.named_parameters()},
    }


def trainer_state(folder: Path) -> dict[str, Any]:
    return Checkpoint.open(folder, alone=True).trainer_state()


def averaged(corpus: Path, world_size: int, sizes: dict[str, Any], save: Path | None, resume: Path | None) -> Any:
    average = Average()
    fit(corpus, world_size, sizes, [average], save=save, resume=resume)
    return {name: full(value).clone() for name, value in average.average.items()}, average.norms


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        pytest.param(2, {}, id="dp2", marks=pytest.mark.slow),
        pytest.param(2, PP2, id="pp2"),
        pytest.param(4, TP2 | PP2, id="pp2 x tp2", marks=pytest.mark.slow),
    ],
)
def test_tensors_of_callbacks(pages: Path, tmp_path: Path, world_size: int, sizes: dict[str, Any]) -> None:
    """Whole and in parts, also those that only one pipeline stage has; bitwise in the same layout, and in another."""
    whole = run_distributed(averaged, world_size, pages, world_size, sizes, tmp_path / "saved", None)
    resumed = run_distributed(averaged, world_size, pages, world_size, sizes, None, tmp_path / "saved")
    assert equal(resumed, whole)
    averages = {name: value for rank in whole for name, value in rank[0].items()}
    stored = trainer_state(tmp_path / "saved")["callbacks"]["Average"]
    assert stored["average"].keys() == averages.keys() and stored["norms"][SAVED - 1] > 0 == stored["norms"][SAVED]

    for other, other_sizes in ((1, {}), (2, TP2)):
        ranks = run_distributed(averaged, other, pages, other, other_sizes, None, tmp_path / "saved")
        assert ranks[0][0].keys() == averages.keys()
        for name, value in ranks[0][0].items():
            torch.testing.assert_close(value, averages[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def encode_a_part_in_a_list() -> None:
    part = distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)), [Shard(0)])
    state = collect({"state_dict": {}, "callbacks": {"Loose": {"kept": [part]}}})
    encode(state.trainer, {}, "trainer")


def test_a_part_that_could_not_be_found_again_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"DTensor at trainer\.callbacks\.Loose\.kept\.0"):
        run_distributed(encode_a_part_in_a_list, 1)


def scaled(corpus: Path, world_size: int, save: Path | None, resume: Path | None) -> Any:
    plugin = LLMPrecision("16-mixed")  # of the name alone Lightning makes "bf16-mixed" on a CPU
    assert plugin.scaler is not None
    plugin.scaler.scale = 2.0**30 if resume is None else 1.0
    seen = fit(corpus, world_size, {}, [], save=save, resume=resume, plugins=[plugin])
    return seen["losses"], seen["scaler"], seen["weights"]


def test_the_loss_scale(pages: Path, tmp_path: Path) -> None:
    """It starts where gradients overflow, and goes down with each step until it was saved."""
    whole = run_distributed(scaled, 2, pages, 2, tmp_path / "saved", None)
    resumed = run_distributed(scaled, 2, pages, 2, None, tmp_path / "saved")
    stored = trainer_state(tmp_path / "saved")["LLMPrecision"]
    assert stored == {"scale": 2.0**30 / 2**SAVED, "finite_steps": 0}
    for before, after in zip(whole, resumed, strict=True):
        assert after[0] == before[0][-len(after[0]) :] and after[1] == before[1] and equal(after[2], before[2])


def eighth(corpus: Path, world_size: int, save: Path | None, resume: Path | None) -> Any:
    callback = FP8Precision("rowwise", emulate=True)
    seen = fit(corpus, world_size, {}, [callback], save=save, resume=resume, precision="bf16-mixed")
    return seen["losses"], seen["weights"]


def test_float8(pages: Path, tmp_path: Path) -> None:
    """Scales are computed anew from each tensor, so the weights, in high precision, are all the state there is."""
    pytest.importorskip("torchao")
    ((losses, weights),) = run_distributed(eighth, 1, pages, 1, tmp_path / "saved", None)
    ((after, again),) = run_distributed(eighth, 1, pages, 1, None, tmp_path / "saved")
    assert len(losses) == LAST and after == losses[SAVED:] and equal(again, weights)
    stored = Checkpoint.open(tmp_path / "saved", alone=True).weights()
    assert all(found.properties.dtype == torch.float32 for found in stored.values())


def save_all(corpus: Path, world_size: int, sizes: dict[str, Any], folder: Path) -> None:
    fit(corpus, world_size, sizes, [Throughput()], save=folder, accumulate_grad_batches=2)


@pytest.fixture(scope="module")
def saved(pages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two processes, of two batches a step, saved after its third step."""
    folder = tmp_path_factory.mktemp("contents") / "saved"
    run_distributed(save_all, 2, pages, 2, TP2, folder)
    return folder


def test_loops_and_counters(saved: Path) -> None:
    state = trainer_state(saved)
    assert (state["epoch"], state["global_step"]) == (0, SAVED)
    loop = state["loops"]["fit_loop"]
    batches = loop["epoch_loop.batch_progress"]
    assert batches["current"]["processed"] == 2 * SAVED and not batches["is_last_batch"]
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    assert steps["total"] == {"ready": SAVED, "completed": SAVED}
    assert loop["epoch_progress"]["current"]["started"] == 1


def test_the_place_in_the_data(saved: Path) -> None:
    (place,) = trainer_state(saved)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert (place["epoch"], place["consumed"]) == (0, 8 * SAVED)
    assert {"corpus", "seed", "seq_len", "shuffle"} < place.keys()


def test_schedulers(saved: Path) -> None:
    (scheduler,) = trainer_state(saved)["lr_schedulers"]
    assert scheduler["last_epoch"] == SAVED and scheduler["_step_count"] == SAVED + 1


def test_tokens_seen(saved: Path) -> None:
    assert trainer_state(saved)["callbacks"]["Throughput"]["tokens_seen"] == SAVED * 8 * 32


def test_hyperparameters(saved: Path) -> None:
    kept = trainer_state(saved)["hyper_parameters"]
    assert kept["learning_rate"] == 3e-3 and kept["warmup_steps"] == 2


def test_random_generators_of_every_rank(saved: Path) -> None:
    checkpoint = Checkpoint.open(saved, alone=True)
    for rank in range(2):
        assert {"python", "numpy", "torch"} <= checkpoint.rank_state(rank)["random"].keys()


def test_mesh_and_versions(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["step"] == SAVED and manifest["world_size"] == 2
    assert manifest["mesh"]["tensor_parallel_size"] == 2 and manifest["mesh"]["data_parallel_size"] == 1
    assert manifest["versions"] == {
        "lightning_llm": lightning_llm.__version__,
        "lightning": lightning.__version__,
        "torch": torch.__version__,
    }


def test_the_model(saved: Path) -> None:
    assert lightning_llm.DecoderConfig.load(saved).hidden_size == CONFIG.hidden_size
    assert (saved / "tokenizer.json").is_file() and not (saved / "config.yaml").exists()


def test_the_run_file_of_the_command_line(pages: Path, tmp_path: Path) -> None:
    """And it is one: the command takes it."""
    run = tmp_path / "run.yaml"
    run.write_text(
        yaml.safe_dump(
            {
                "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 2, "default_root_dir": str(tmp_path)},
                "model": {"model": "tiny", "vocab_size": 512},
                "data": {"path": str(pages), "batch_size": 8, "seq_len": 32},
            }
        )
    )
    first = call_forked("fit", "-c", run, "--trainer.limit_val_batches=0", "--data.seed=3")
    assert first.returncode == 0, first.stderr
    (folder,) = {manifest.parent.resolve() for manifest in tmp_path.rglob("manifest.json")}
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert kept["data"]["seed"] == 3 and kept["trainer"]["max_steps"] == 2 and kept["model"]["model"] == "tiny"
    second = call_forked("fit", "-c", folder / "config.yaml", "--trainer.max_steps=3", f"--ckpt_path={folder}")
    assert second.returncode == 0, second.stderr
    steps = {json.loads(m.read_text())["step"] for m in tmp_path.rglob("manifest.json")}
    assert steps == {2, 3}
