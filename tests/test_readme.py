"""What the README shows works as it stands; only sizes and paths are made small."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_llm import Decoder, DecoderConfig
from lightning_llm.cli import COMMANDS, GROUPS, TRAINER_COMMANDS
from tests.serving.engine.models import make_decoder
from tests.serving.test_llm import folder_of
from tests.test_cli import COMMAND, STDLIB, call

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "data"
    assert call("tokenize", "--input", STDLIB / "json", STDLIB / "asyncio", "--output", folder).returncode == 0
    return folder


def test_the_python_block_runs(data: Path, tmp_path: Path) -> None:
    code, _ = blocks("python")
    config = DecoderConfig.preset("tiny").replace(num_hidden_layers=1)
    Decoder(config).save_pretrained(tmp_path / "folder")
    for shown, small in (
        ("devices=8", "devices=2"),
        ("max_steps=200", "max_steps=2, limit_val_batches=1, num_sanity_val_steps=0"),
        ('"data/stdlib"', repr(str(data))),
        ("batch_size=8", "batch_size=8, seq_len=32"),
        ('"a Hugging Face folder"', repr(str(tmp_path / "folder"))),
    ):
        assert shown in code, f"the README no longer shows {shown}"
        code = code.replace(shown, small)
    code = f"import torch\ninput_ids = torch.zeros(1, 4, dtype=torch.long)\n{code}\nprint(tuple(logits.shape))\n"
    (tmp_path / "snippet.py").write_text(code)
    done = subprocess.run([sys.executable, "snippet.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(1, 4, 4096)") == 2, "each of the two processes runs the whole script"
    assert (tmp_path / "run" / "ckpt" / "config.json").is_file()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_serving_block_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, code = blocks("python")
    folder = folder_of(make_decoder("llama", torch.float32), tmp_path)
    assert '"runs/demo/model"' in code
    exec(code.replace('"runs/demo/model"', repr(folder)), {})
    assert "def main(" in (said := capsys.readouterr().out) and "length" in said


def test_the_yaml_block_is_a_valid_run(data: Path, tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(text)
    done = call("fit", "-c", tmp_path / "run.yaml", f"--data.path={data}", "--print_config")
    assert done.returncode == 0, done.stderr
    shown, full = yaml.safe_load(text), yaml.safe_load(done.stdout)
    assert full["trainer"]["strategy"]["init_args"].items() >= shown["trainer"]["strategy"]["init_args"].items()


def test_every_command_that_is_shown_exists() -> None:
    shown = set(re.findall(r"lightning-llm ([a-z]+)", README))
    assert shown and shown <= {*COMMANDS, *TRAINER_COMMANDS, *GROUPS}
    targets = set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_example_trains(data: Path, tmp_path: Path) -> None:
    """The file that `make demo` runs, on 4 processes for two steps."""
    done = subprocess.run(
        [
            *(COMMAND, "fit", "-c", ROOT / "examples/stdlib/train.yaml", f"--data.path={data}"),
            *("--trainer.devices=4", "--trainer.max_steps=2", "--trainer.val_check_interval=2"),
            *("--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=1"),
            *("--data.batch_size=8", "--data.seq_len=32"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^val_loss +\d", done.stdout, re.MULTILINE)
    assert (tmp_path / "runs/demo/checkpoints/last.ckpt/config.json").is_file()
    assert list((tmp_path / "runs/demo").glob("wandb/offline-run-*"))
    metrics = next((tmp_path / "runs/demo/logs").glob("*/metrics.csv")).read_text().splitlines()[0]
    assert {"train_loss", "val_loss", "grad_norm", "tokens_per_second"} <= set(metrics.split(","))
