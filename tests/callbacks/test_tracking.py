"""W&B works without a login: offline runs really are written, and credentials decide what "auto" means."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import Logger

from lightning_llm.callbacks import Throughput, WandbLogger
from lightning_llm.errors import ConfigurationError
from tests.callbacks.tiny import Bigram, batches, trainer


@pytest.fixture(autouse=True)
def nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # WANDB_MODE is set and then removed, so that monkeypatch also takes back what Lightning writes into it.
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    if wandb.run is not None:
        wandb.finish()


def test_an_offline_run_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        logger = WandbLogger(save_dir=tmp_path / "run", project="tests")
    assert caplog.text.count("not logged in") == 1
    run = trainer(tmp_path, max_steps=3, logger=logger, callbacks=[Throughput()])
    run.fit(Bigram(), batches(3))
    summary = dict(logger.experiment.summary)
    wandb.finish()
    assert summary["train_loss"] > 0
    assert summary["tokens_seen"] == 3 * 16
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert written.stat().st_size > 0


def test_a_key_or_a_login_means_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert WandbLogger(save_dir=tmp_path)._offline
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert not WandbLogger(save_dir=tmp_path)._offline
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "k" * 40 + "\n")
    assert not WandbLogger(save_dir=tmp_path)._offline
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert WandbLogger(save_dir=tmp_path)._offline, "the login is for another host"


def test_wandb_mode_decides_over_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert WandbLogger(save_dir=tmp_path)._offline
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert not WandbLogger(save_dir=tmp_path)._offline


def test_said_outright_nothing_is_guessed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert WandbLogger(save_dir=tmp_path, offline=True)._offline
        assert not WandbLogger(save_dir=tmp_path, offline=False)._offline
    assert "W&B" not in caplog.text


def test_a_netrc_that_cannot_be_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "netrc").write_text("nonsense here\n")
    with caplog.at_level(logging.INFO):
        assert WandbLogger(save_dir=tmp_path)._offline
    assert str(tmp_path / "netrc") in caplog.text


def test_uploading_checkpoints_offline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"log_model='all'.*wandb login"):
        WandbLogger(save_dir=tmp_path, log_model="all")


def test_without_wandb_the_way_to_get_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigurationError, match=r"lightning-llm\[tracking\]"):
        WandbLogger(save_dir=tmp_path)


def test_yaml_takes_it_by_class_path_with_the_arguments_of_lightnings(tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--logger", type=Logger)
    config = parser.parse_string(
        f"""
        logger:
          class_path: lightning_llm.callbacks.WandbLogger
          init_args: {{offline: auto, save_dir: {tmp_path}, project: from-yaml}}
        """
    )
    logger = parser.instantiate(config).logger
    assert isinstance(logger, WandbLogger)
    assert logger._project == "from-yaml"


def test_importing_the_callbacks_does_not_import_wandb() -> None:
    code = "import sys, lightning_llm.callbacks; sys.exit('wandb' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
