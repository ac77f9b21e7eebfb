"""What a checkpoint takes and gives back: weights alone, hyperparameters, other models' folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_llm import LLM3DStrategy, LLMModule
from lightning_llm.errors import ConfigurationError
from tests.distributed import full, run_distributed
from tests.strategies.training import SMALL, loader, make_module, make_trainer

TP2 = {"tensor_parallel_size": 2}


def weights_of(module: LLMModule) -> dict[str, torch.Tensor]:
    return {name: full(parameter).detach().clone() for name, parameter in module.named_parameters()}


def keep_weights_alone(world_size: int, sizes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fit with `save_weights_only`, then validate the best one with the same trainer, as everyone does."""
    strategy = LLM3DStrategy(**sizes)
    best = ModelCheckpoint(folder, monitor="val_loss", save_weights_only=True)
    trainer = make_trainer(
        strategy, world_size, callbacks=[best], enable_checkpointing=True, max_steps=4, val_check_interval=2
    )
    module = make_module()
    trainer.fit(module, loader(trainer, strategy), loader(trainer, strategy, rows=16))
    seen = trainer.validate(module, loader(trainer, strategy, rows=16), ckpt_path="best", verbose=False)
    return {"best": best.best_model_path, "score": float(best.best_model_score), "seen": seen[0]["val_loss"]}


def go_on_from(path: Path) -> None:
    strategy = LLM3DStrategy()
    trainer = make_trainer(strategy, 1, max_steps=8, limit_val_batches=0)
    trainer.fit(make_module(), loader(trainer, strategy), ckpt_path=path)


def test_weights_alone_are_enough_to_validate_but_not_to_go_on(tmp_path: Path) -> None:
    for seen in run_distributed(keep_weights_alone, 2, 2, TP2, tmp_path):
        assert seen["seen"] == pytest.approx(seen["score"], abs=1e-6)
    with pytest.raises(AssertionError, match=r"holds weights alone \(it was saved with save_weights_only=True\)"):
        run_distributed(go_on_from, 1, Path(seen["best"]))


def validate_in_between(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A look at an older checkpoint must not change the optimizer of the run."""
    strategy = LLM3DStrategy()
    trainer = make_trainer(strategy, 1, max_steps=2, limit_val_batches=0)
    module = make_module()
    trainer.fit(module, loader(trainer, strategy))
    trainer.save_checkpoint(folder / "old")
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, loader(trainer, strategy))
    (optimizer,) = trainer.optimizers
    before = [state["exp_avg"].clone() for state in optimizer.state.values()]
    weights = weights_of(module)
    trainer.validate(module, loader(trainer, strategy, rows=16), ckpt_path=folder / "old", verbose=False)
    after = [state["exp_avg"] for state in optimizer.state.values()]
    assert all(map(torch.equal, before, after)) and len(before) == len(after) > 0
    return weights, weights_of(module)


def test_validation_of_a_checkpoint_leaves_the_optimizer_alone(tmp_path: Path) -> None:
    before, after = run_distributed(validate_in_between, 1, tmp_path)[0]
    assert not torch.equal(before["model.model.norm.weight"], after["model.model.norm.weight"]), "it was loaded"


class Noted(LLMModule):
    """Keeps a hyperparameter of any kind."""

    def __init__(self, note: Any) -> None:
        super().__init__(SMALL, schedule="constant")
        self.save_hyperparameters({"note": note})


def save_with(note: Any, path: Path) -> Any:
    strategy = LLM3DStrategy()
    trainer = make_trainer(strategy, 1, max_steps=1, limit_val_batches=0)
    trainer.fit(Noted(note), loader(trainer, strategy))
    trainer.save_checkpoint(path)
    again = make_trainer(LLM3DStrategy(), 1, max_steps=2, limit_val_batches=0)
    again.fit(Noted(note), loader(again, strategy), ckpt_path=path)
    assert again.global_step == 2
    from lightning_llm.checkpoint.reading import Checkpoint

    return Checkpoint.open(path, alone=True).trainer_state()["hyper_parameters"]["note"]


@pytest.mark.parametrize(
    "note", [{"rates": [0.1, None], "on": True}, Path("data/mine"), torch.arange(3)], ids=["plain", "path", "tensor"]
)
def test_hyperparameters_come_back(tmp_path: Path, note: Any) -> None:
    back = run_distributed(save_with, 1, note, tmp_path / "checkpoint")[0]
    assert type(back) is type(note)
    assert torch.equal(back, note) if isinstance(note, torch.Tensor) else back == note


def test_what_could_not_be_read_again_is_not_saved(tmp_path: Path) -> None:
    """Better at the first checkpoint than at the attempt to resume."""
    with pytest.raises(
        AssertionError, match=r"holds a lightning_llm\.models\.config\.DecoderConfig at .*note, which no checkpoint"
    ):
        run_distributed(save_with, 1, SMALL, tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == [], "nothing is left that looks like a checkpoint"


def load_into_another(path: Path, change: dict[str, Any]) -> str:
    strategy = LLM3DStrategy()
    trainer = make_trainer(strategy, 1, max_steps=1, limit_val_batches=0)
    if not path.exists():
        trainer.fit(make_module(), loader(trainer, strategy))
        trainer.save_checkpoint(path)
        return "saved"
    try:
        trainer.validate(make_module(SMALL.replace(**change)), loader(trainer, strategy), ckpt_path=path)
    except ConfigurationError as error:
        return str(error)
    return "loaded"


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(tmp_path: Path) -> None:
    def attempt(**change: Any) -> str:
        return run_distributed(load_into_another, 1, tmp_path / "checkpoint", change)[0]

    assert attempt() == "saved" and attempt() == "loaded"
    wider = attempt(intermediate_size=128)
    assert "holds 12 tensors of other shapes" in wider
    assert "model.model.layers.0.mlp.gate_proj.weight (64, 32) for (128, 32)" in wider
    deeper = attempt(num_hidden_layers=5)
    assert "lacks 9 tensors of this model, for example ['model.model.layers.4." in deeper


def save_onto_a_file(path: Path) -> None:
    strategy = LLM3DStrategy()
    trainer = make_trainer(strategy, 1, max_steps=1, limit_val_batches=0)
    trainer.fit(make_module(), loader(trainer, strategy))
    trainer.save_checkpoint(path)


@pytest.mark.parametrize("attempt", [save_onto_a_file, go_on_from])
def test_a_file_is_no_checkpoint_folder(tmp_path: Path, attempt: Callable[[Path], None]) -> None:
    path = tmp_path / "single.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(
        AssertionError, match=r"single\.ckpt is (a file; a checkpoint is a folder|there already and is not)"
    ):
        run_distributed(attempt, 1, path)
    assert path.is_file()
