"""State that an engine holds in its own form: filled from checkpoints of the other one, and saved for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_llm import LLM3DStrategy
from lightning_llm.checkpoint.module_state import (
    OptimizerPart,
    collect,
    model_state,
    optimizer_state,
    restore,
    restore_tensors,
)
from lightning_llm.checkpoint.pieces import Pieces
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.checkpoint.saver import CheckpointSaver
from lightning_llm.errors import ConfigurationError
from tests.checkpoint.stories import equal
from tests.distributed import run_distributed
from tests.strategies.training import Recorder, loader, make_module, make_trainer

# -- in exchange with LLM3DStrategy --


def train(sizes: dict[str, Any], steps: int, *, save: Path | None = None, resume: Path | None = None) -> list[float]:
    strategy, recorder = LLM3DStrategy(**sizes), Recorder()
    world = dist.get_world_size()
    trainer = make_trainer(strategy, world, callbacks=[recorder], max_steps=steps, limit_val_batches=0)
    trainer.fit(make_module(), loader(trainer, strategy), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return recorder.losses


def empty_ranges(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor | Pieces]:
    """Room for this rank's flat range of each tensor, all in one float32 buffer; counts are whole on each rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    stored = {n.removeprefix(prefix): s.size for n, s in checkpoint.tensors.items() if n.startswith(prefix)}
    cuts = {n: (size.numel() * rank // world, size.numel() * (rank + 1) // world) for n, size in stored.items()}
    ranges = torch.full((sum(stop - start for start, stop in cuts.values()),), torch.nan)
    views = dict(zip(cuts, ranges.split([stop - start for start, stop in cuts.values()]), strict=True))
    return {
        name: Pieces.of_range(views[name], cuts[name][0], size) if size else torch.tensor(torch.nan)
        for name, size in stored.items()
    }


def pass_through_ranges(source: Path, target: Path) -> None:
    checkpoint = Checkpoint.open(source)
    model = empty_ranges(checkpoint, "model.")
    settings = [name for name in checkpoint.values if name.startswith("optimizer_0.")]
    part = OptimizerPart(
        empty_ranges(checkpoint, "optimizer_0."), dict.fromkeys(n.removeprefix("optimizer_0.") for n in settings)
    )
    restore_tensors(checkpoint, model, [part], {})
    assert part.started == {
        name.removesuffix(".step").removeprefix("state.") for name in part.tensors if ".step" in name
    }
    dumped = {
        **checkpoint.trainer_state(),
        "state_dict": model,
        "optimizer_states": [{**part.tensors, **part.values}],
    }
    state = collect(dumped, mesh=checkpoint.manifest.mesh, rank=checkpoint.rank_state(dist.get_rank()))
    CheckpointSaver().save(state, target)


def there_and_back(folder: Path) -> tuple[list[float], list[float]]:
    train({"tensor_parallel_size": 2}, 2, save=folder / "run")
    pass_through_ranges(folder / "run", folder / "ranges")
    return train({}, 4, resume=folder / "run"), train({}, 4, resume=folder / "ranges")


def test_ranges_are_filled_by_what_was_trained_in_dtensors_and_the_reverse(tmp_path: Path) -> None:
    for direct, through in run_distributed(there_and_back, 2, tmp_path):
        assert direct == through and len(direct) == 2
    first, second = (Checkpoint.open(tmp_path / name, alone=True) for name in ("run", "ranges"))
    assert first.tensors.keys() == second.tensors.keys() and first.values == second.values
    assert any(name.endswith("down_proj.weight.exp_avg_sq") for name in first.tensors)
    for name in first.tensors:
        assert equal(first.read(name), second.read(name)), name


# -- what is there, and what is not --


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.late = nn.Parameter(torch.ones(4))


def trained() -> tuple[Model, AdamW]:
    torch.manual_seed(0)
    model = Model()
    optimizer = AdamW(model.parameters(), lr=0.25)
    for _ in range(3):
        model.linear(torch.ones(3)).sum().backward()
        optimizer.step()
    return model, optimizer


def saved(folder: Path, *, optimizer: bool = True, without: str = "", **changed: Any) -> Checkpoint:
    """A checkpoint of a trained model, in which some entries of the optimizer were exchanged, and one left out."""
    model, adam = trained()
    dumped: dict[str, Any] = {"state_dict": model_state(model, {})}
    if optimizer:
        state = {**optimizer_state(model, adam, {}), **changed}
        state.pop(without, None)
        dumped["optimizer_states"] = [state]
    CheckpointSaver(alone=True).save(collect(dumped), folder / "c")
    return Checkpoint.open(folder / "c", alone=True)


def ranges(value: float) -> tuple[dict[str, Tensor | Pieces], OptimizerPart, Tensor]:
    """The middle of each tensor as an engine has it, and the buffer behind the optimizer's."""
    shapes = {"linear.weight": (2, 3), "linear.bias": (2,), "late": (4,)}
    buffer = torch.full((12,), value)
    model: dict[str, Tensor | Pieces] = {n: Pieces.of_range(torch.zeros(1), 1, shape) for n, shape in shapes.items()}
    tensors: dict[str, Tensor | Pieces] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        for key, place in (("exp_avg", 2 * number), ("exp_avg_sq", 6 + 2 * number)):
            tensors[f"state.{name}.{key}"] = Pieces.of_range(buffer[place : place + 2], 0, shape)
        tensors[f"state.{name}.step"] = torch.tensor(value)
    return model, OptimizerPart(tensors, {f"param_groups.{name}.lr": None for name in shapes}), buffer


def test_a_parameter_that_no_step_had_reached_keeps_its_state(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)
    model, part, buffer = ranges(5.0)
    restore_tensors(checkpoint, model, [part], {})
    assert part.started == {"linear.weight", "linear.bias"}
    expected = checkpoint.read("optimizer_0.state.linear.weight.exp_avg")[0, :2]
    assert torch.equal(buffer[:2], expected) and buffer[:4].ne(5).all()
    assert torch.equal(buffer[4:6], torch.full((2,), 5.0)) and part.tensors["state.late.step"] == 5
    assert part.tensors["state.linear.bias.step"] == 3
    assert part.values == {f"param_groups.{name}.lr": 0.25 for name in ("linear.weight", "linear.bias", "late")}
    assert model["late"].at((1,)) == 1  # type: ignore[union-attr]


def test_steps_are_counted_in_tensors_and_in_numbers(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, **{"state.linear.weight.step": 7})
    model, part, _ = ranges(5.0)
    del part.tensors["state.linear.bias.step"]
    part.values["state.linear.bias.step"] = 0
    restore_tensors(checkpoint, model, [part], {})
    assert part.tensors["state.linear.weight.step"] == 7 and part.values["state.linear.bias.step"] == 3


def test_a_tied_tensor_and_its_copy_are_both_filled(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)
    weight, copy = Pieces.of_range(torch.zeros(4), 1, (2, 3)), torch.zeros(2, 3)
    moment, moment_of_copy = torch.zeros(2, 3), torch.zeros(2, 3)
    part = OptimizerPart({"state.linear.weight.exp_avg": moment, "state.head.weight.exp_avg": moment_of_copy})
    model: dict[str, Tensor | Pieces] = {"linear.weight": weight, "head.weight": copy}
    restore_tensors(checkpoint, model, [part], {"head.weight": "linear.weight"})
    assert torch.equal(copy, checkpoint.read("model.linear.weight")) and torch.equal(weight.at((1, 0))[0], copy[1, :2])
    assert torch.equal(moment, moment_of_copy) and moment.ne(0).all()


def test_another_engines_state_is_taken_by_a_torch_optimizer(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, **{"state.linear.weight.step": 7})
    model = Model()
    optimizer = AdamW(model.parameters())
    restore(checkpoint, model, [optimizer], {})
    state = optimizer.state[model.linear.weight]
    assert state["step"] == 7 and torch.equal(state["exp_avg"], trained()[1].state_dict()["state"][1]["exp_avg"])
    assert model.late not in optimizer.state and optimizer.param_groups[0]["lr"] == 0.25


def test_what_cannot_be_filled_is_refused(tmp_path: Path) -> None:
    model, part, buffer = ranges(5.0)
    with pytest.raises(ConfigurationError, match="holds weights alone"):
        restore_tensors(saved(tmp_path / "1", optimizer=False), model, [part], {})
    with pytest.raises(ConfigurationError, match=r"lacks 1 entries .* optimizer_0\.param_groups\.late\.lr"):
        restore_tensors(saved(tmp_path / "2", without="param_groups.late.lr"), model, [part], {})
    checkpoint = saved(tmp_path / "3", **{"state.linear.weight.exp_avg": 1.0})
    with pytest.raises(ConfigurationError, match=r"exp_avg as 1\.0, where .* has a tensor of \(2, 3\)"):
        restore_tensors(checkpoint, model, [part], {})
    other = {**model, "late": Pieces.of_range(torch.zeros(1), 0, (5,))}
    with pytest.raises(ConfigurationError, match=r"1 tensors of other shapes .*late \(4,\) for \(5,\)"):
        restore_tensors(checkpoint, other, [], {})
    with pytest.raises(ConfigurationError, match=r"lacks 1 tensors of this model, for example \['more'\]"):
        restore_tensors(checkpoint, {**model, "more": torch.zeros(1)}, [], {})
    assert buffer.eq(5).all()
