"""What tests of both examples share: a module trained in a layout, and an example's script run as its README says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_llm import LLM3DStrategy
from tests.distributed import full, run_distributed
from tests.strategies.training import Recorder, loader, make_trainer

ROOT = Path(__file__).parents[2]

LAYOUTS: list[Any] = [
    pytest.param(4, {"tensor_parallel_size": 2}, id="dp2 x tp2"),
    pytest.param(2, {"pipeline_parallel_size": 2}, id="pp2"),
    pytest.param(
        8,
        {"pipeline_parallel_size": 2, "tensor_parallel_size": 2},
        marks=pytest.mark.slow,
        id="pp2 x dp2 x tp2",
    ),
]


def train(make: Callable[[], pl.LightningModule], world_size: int, sizes: dict[str, Any]) -> dict[str, Any]:
    """A run of 8 steps and its validation, in float64 so that rounding cannot hide or feign a difference."""
    torch.manual_seed(torch.distributed.get_rank())  # different on each rank: all must start with the first one's
    strategy, recorder = LLM3DStrategy(**sizes), Recorder()
    trainer = make_trainer(strategy, world_size, callbacks=[recorder], max_steps=8, precision="64-true")
    module = make()
    trainer.fit(module, loader(trainer, strategy, ignore=False), loader(trainer, strategy, ignore=False, rows=16))
    return {
        "losses": recorder.losses,
        "val_loss": float(trainer.callback_metrics["val_loss"]),
        "weights": {name: full(p).detach().clone() for name, p in module.named_parameters()},
    }


def assert_same_run(make: Callable[[], pl.LightningModule], world_size: int, sizes: dict[str, Any]) -> None:
    """Losses, validation and weights of every rank are those of one process."""
    one = run_distributed(train, 1, make, 1, {})[0]
    assert one["losses"][-1] < one["losses"][0] - 0.1
    compared: set[str] = set()
    for seen in run_distributed(train, world_size, make, world_size, sizes, timeout=240):
        assert seen["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert seen["val_loss"] == pytest.approx(one["val_loss"], abs=1e-5)
        for name, weight in seen["weights"].items():
            owner = name if name in one["weights"] else one_of_tied(name, one["weights"])
            torch.testing.assert_close(weight, one["weights"][owner], atol=1e-5, rtol=0)
        compared |= seen["weights"].keys()
    assert one["weights"].keys() <= compared


def one_of_tied(copy: str, weights: dict[str, torch.Tensor]) -> str:
    """The name under which one process has a tied tensor that a pipeline's last stage has a copy of."""
    return {"model.head.weight": "model.tokens.weight", "model.lm_head.weight": "model.model.embed_tokens.weight"}[copy]


def call(command: str, cwd: Path, *, timeout: int = 280, **names: object) -> subprocess.CompletedProcess[str]:
    """Runs a command that a README shows, with this interpreter and this checkout.

    Args:
        command: A line of a README, and options that make it small.
        cwd: Looks like the root of the repository.
        timeout: Seconds.
        names: What stands for the words in capitals.
    """
    words = [str(names.get(word, word)) for word in shlex.split(command)]
    program = {"python": [sys.executable], "lightning-llm": [sys.executable, "-m", "lightning_llm.cli"]}[words[0]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*program, *words[1:]], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def commands(example: str) -> list[str]:
    """The commands that an example's README shows, in their order."""
    text = (ROOT / "examples" / example / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^(?:python|lightning-llm) .*$", text, re.MULTILINE)
