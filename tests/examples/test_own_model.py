"""The example of a user's own model: same run in every layout, and the commands of its README."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from examples.own_model.gpt import GPTModule
from lightning_llm import ConfigurationError, TokenDataModule
from tests.examples.runs import LAYOUTS, assert_same_run, call, commands
from tests.strategies.training import SEQ_LEN, VOCAB
from tests.test_cli import STDLIB


def make() -> GPTModule:
    return GPTModule(VOCAB, hidden_size=32, num_layers=3, num_heads=4, max_seq_len=SEQ_LEN, learning_rate=1e-2)


@pytest.mark.parametrize(("world_size", "sizes"), [*LAYOUTS, pytest.param(2, {"context_parallel_size": 2}, id="cp2")])
def test_every_layout_gives_the_same_run(world_size: int, sizes: dict[str, Any]) -> None:
    assert_same_run(make, world_size, sizes)


TINY = "--max-steps 2 --batch-size 8 --seq-len 32"
TINY_YAML = "--trainer.max_steps 2 --trainer.val_check_interval 2 --data.batch_size 8 --data.seq_len 32"


@pytest.mark.slow
def test_the_script_trains_on_two_processes(root: Path, data: Path) -> None:
    options = f"--data {data} --devices 2 --tensor-parallel-size 2 {TINY}"
    done = call(f"python examples/own_model/train.py {options}", root)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^val_loss [78]\.\d+; checkpoint in runs/own_model/checkpoint$", done.stdout, re.MULTILINE)
    assert (root / "runs/own_model/checkpoint/manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)  # twice eight processes
def test_the_commands_of_the_readme_run(root: Path) -> None:
    tokenize, script, cli = commands("own_model")
    for command in (tokenize, f"{script} {TINY}", f"{cli} {TINY_YAML}"):
        done = call(command, root, PATH=STDLIB / "asyncio")
        assert done.returncode == 0, done.stderr
    assert (root / "runs/own_model/checkpoints/last.ckpt/.metadata").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--devices 8 --tensor-parallel-size 8", "tensor_parallel_size(8) does not divide num_heads(4). Sizes that"),
        ("--devices 5 --pipeline-parallel-size 5", "pipeline_parallel_size(5) is more than the 4 layers of the model."),
    ],
)
def test_a_size_that_does_not_fit_ends_with_one_sentence(root: Path, data: Path, options: str, message: str) -> None:
    done = call(f"python examples/own_model/train.py --data {data} {options}", root)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"train.py: error: {message}"), done.stderr
    assert "Traceback" not in done.stderr


def test_data_that_the_model_is_too_small_for_is_refused(data: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"vocab_size\(4095\) is less than the data's vocab_size\(4096\)"):
        GPTModule(4095).check(TokenDataModule(data))
    with pytest.raises(ConfigurationError, match=r"max_seq_len\(512\) is less than the data's seq_len\(513\)"):
        GPTModule().check(TokenDataModule(data, seq_len=513))


@pytest.mark.slow
def test_help_shows_the_options(root: Path) -> None:
    done = call("python examples/own_model/train.py --help", root)
    assert done.returncode == 0 and "--pipeline-parallel-size" in done.stdout
