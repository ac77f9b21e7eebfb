"""A run that was saved by ModelCheckpoint and resumed is the uninterrupted one, bit by bit: all that it logs, its
weights and its random numbers."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.runs import EXPERTS, TIED
from tests.checkpoint.stories import Saves, Story, equal, story
from tests.distributed import run_distributed

TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP4 = {"expert_parallel_size": 4}
PP4 = {"pipeline_parallel_size": 4}
DEEPSPEED = {"engine": "deepspeed", "zero_stage": 2}
MUON = {"optimizer": "muon", "optimizer_state_dtype": "bfloat16"}
slow = pytest.mark.slow


def drawn_steps(name: str, per_epoch: int, last: int) -> list[int]:
    """A step in the middle of the first epoch, one around its end, one in the middle of the second."""
    draw = random.Random(name)
    return [
        draw.randrange(1, per_epoch - 1),
        draw.choice([per_epoch - 1, per_epoch, per_epoch + 1]),
        draw.randrange(per_epoch + 2, last),
    ]


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        pytest.param(1, Story(), id="one process"),
        pytest.param(2, Story(trainer={"accumulate_grad_batches": 2}), id="dp2, accumulation", marks=slow),
        pytest.param(2, Story(sizes=CP2), id="cp2", marks=slow),
        pytest.param(2, Story(sizes=DEEPSPEED), id="DeepSpeed ZeRO-2"),
        pytest.param(2, Story(sizes=DEEPSPEED | PP2 | {"zero_stage": 1}), id="DeepSpeed pp2", marks=slow),
        pytest.param(2, Story(sizes=DEEPSPEED | {"zero_stage": 3}), id="DeepSpeed ZeRO-3", marks=slow),
        pytest.param(4, Story(sizes=TP2 | PP2, config=TIED), id="pp2 x tp2, tied", marks=slow),
        pytest.param(4, Story(sizes=TP2 | EP4, config=EXPERTS), id="dp2 x tp2 x ep4", marks=slow),
    ],
)
def test_resumed_is_uninterrupted(
    request: pytest.FixtureRequest, tmp_path: Path, pages: Path, world_size: int, options: Story
) -> None:
    """With data workers, from three random steps, validation between steps and at the epochs' ends."""
    per_epoch, last = 6, 15
    options = dataclasses.replace(options, num_workers=2)
    steps = drawn_steps(request.node.name, per_epoch, last)
    for rank in run_distributed(story, world_size, tmp_path, pages, world_size, options, steps, last, timeout=280):
        whole = rank["whole"]
        assert whole["steps_per_epoch"] == per_epoch and whole["global_step"] == last
        assert sum("val_loss" in metrics for _, metrics in whole["logged"]) == 7, "every other batch, twice over"
        for step in steps:
            assert_continues(whole, rank[step], step)


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        pytest.param(8, Story(sizes=TP2 | PP2), id="pp2 x dp2 x tp2", marks=slow),
        pytest.param(2, Story(sizes=PP2 | {"pipeline_schedule": "ZBVZeroBubble"}, config=TIED), id="both ends on one"),
        pytest.param(4, Story(sizes=TP2, module={"optimizer": "muon"}), id="dp2 x tp2, Muon", marks=slow),
        pytest.param(4, Story(sizes=PP4, module=MUON), id="pp4, Muon in bfloat16", marks=slow),
        pytest.param(2, Story(module={"optimizer_state_dtype": "bfloat16"}), id="dp2, AdamW in bfloat16"),
    ],
)
def test_other_schedules_and_optimizers(tmp_path: Path, pages: Path, world_size: int, options: Story) -> None:
    for rank in run_distributed(story, world_size, tmp_path, pages, world_size, options, [3], 6, timeout=250):
        assert_continues(rank["whole"], rank[3], 3)


def assert_continues(whole: dict[str, Any], resumed: dict[str, Any], step: int, validated: bool = False) -> None:
    """`resumed` is what came in `whole` after the save at `step`; `validated`: it was saved after the validation."""
    saved = max(i for i, (at, metrics) in enumerate(whole["logged"]) if at == step - 1 and "train_loss" in metrics)
    rest = whole["logged"][saved + 1 :]
    if validated:
        assert "val_loss" in rest[0][1]
        rest = rest[1:]
    assert [(at, sorted(metrics)) for at, metrics in resumed["logged"]] == [(at, sorted(m)) for at, m in rest]
    assert resumed["logged"] == rest, "loss, gradient norm, learning rate, tokens, validation loss and draws"
    assert resumed["samples"] == whole["samples"][-len(resumed["samples"]) :]
    assert resumed["batches"] == whole["batches"]
    assert resumed["global_step"] == whole["global_step"]
    assert resumed["weights"].keys() == whole["weights"].keys()
    for name, weight in whole["weights"].items():
        assert equal(resumed["weights"][name], weight), name
    assert equal(resumed["random_state"], whole["random_state"])
    assert equal(resumed["optimizer"], whole["optimizer"])


@pytest.mark.parametrize(
    ("steps", "options", "validated"),
    [
        pytest.param([2, 6, 7], Story(trainer={"limit_val_batches": 0}), False, id="no validation"),
        pytest.param([6, 12], Story(trainer={"val_check_interval": 1.0}), False, id="at the ends of epochs"),
        pytest.param(
            [6, 12],
            Story(trainer={"val_check_interval": 1.0}, save=Saves(every_n_epochs=1)),
            True,
            id="saved after the validation",
        ),
        pytest.param(
            [6, 12],
            Story(trainer={"val_check_interval": 1.0}, save=Saves(every_n_epochs=1, save_on_train_epoch_end=True)),
            True,
            id="saved at the end of an epoch",
        ),
        pytest.param([2], Story(save=Saves(every_n_train_steps=2, monitor="val_loss")), True, id="deferred"),
        pytest.param(
            [4, 5, 9],
            Story(trainer={"check_val_every_n_epoch": None, "val_check_interval": 5}),
            False,
            id="over epochs",
        ),
        pytest.param(
            [3, 4, 8], Story(trainer={"limit_train_batches": 4, "val_check_interval": 0.5}), False, id="short epochs"
        ),
        pytest.param([3, 5], Story(trainer={"max_epochs": 2, "max_steps": -1}), False, id="max_epochs"),
    ],
)
def test_what_followed_the_save_follows_the_resume(
    tmp_path: Path, pages: Path, steps: list[int], options: Story, validated: bool
) -> None:
    (rank,) = run_distributed(story, 1, tmp_path, pages, 1, options, steps, 13, timeout=200)
    for step in steps:
        assert_continues(rank["whole"], rank[step], step, validated)


def test_saving_does_not_change_a_run(tmp_path: Path, pages: Path) -> None:
    """Not its random numbers either."""
    (often,) = run_distributed(story, 1, tmp_path / "often", pages, 1, Story(), [], 4)
    (never,) = run_distributed(story, 1, tmp_path / "never", pages, 1, Story(save=Saves(every_n_train_steps=99)), [], 4)
    assert list((tmp_path / "often").iterdir()) and not (tmp_path / "never").exists()
    assert often["whole"]["logged"] == never["whole"]["logged"]
    assert equal(often["whole"]["random_state"], never["whole"]["random_state"])
