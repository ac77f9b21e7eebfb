"""`RunSummary` after real runs."""

from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_llm import LLMModule
from lightning_llm.callbacks import RunSummary, Throughput
from tests.strategies.training import SMALL, TokenRows


def test_it_tells_losses_speed_and_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=4,
        val_check_interval=4,
        logger=CSVLogger(tmp_path, name="logs"),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RunSummary(), Throughput(), ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)],
    )
    rows = DataLoader(TokenRows(), batch_size=8)
    trainer.fit(LLMModule(SMALL), rows, rows)
    printed = capsys.readouterr().out
    assert "steps       4, 512 tokens, " in printed and "tokens/s" in printed
    assert f"val_loss    {float(trainer.callback_metrics['val_loss']):.4f} nats per token" in printed
    assert "blind guess (ln 96 = 4.56)" in printed
    assert f"checkpoint  {tmp_path / 'checkpoints' / 'last.ckpt'}" in printed
    assert f"logs        {tmp_path / 'logs' / 'version_0'}" in printed


def test_it_prints_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RunSummary()],
    )
    trainer.fit(LLMModule(SMALL, schedule="constant"), DataLoader(TokenRows(), batch_size=8))
    printed = capsys.readouterr().out
    assert "steps       1" in printed and "train_loss" in printed
    assert "val_loss" not in printed and "checkpoint" not in printed and "logs" not in printed
