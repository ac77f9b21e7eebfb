"""The progress bar counts steps of the whole run, and where there is no terminal it writes plain lines."""

import os
import pty
import re
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_llm.callbacks import StepProgressBar, Throughput
from lightning_llm.callbacks.progress import _format
from lightning_llm.errors import ConfigurationError
from tests.callbacks.tiny import Bigram, batches, trainer
from tests.strategies.training import loader, make_module


def fit(folder: Path, bar: StepProgressBar, steps: int, **arguments: Any) -> None:
    arguments = {"max_steps": 6, **arguments}
    run = trainer(folder, callbacks=[Throughput(), bar], enable_progress_bar=True, **arguments)
    run.fit(Bigram(), batches(steps), batches(1))


def test_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, StepProgressBar(line_interval=3600), steps=6)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "\r" not in out and "\x1b" not in out
    assert [line.split(" | ")[0] for line in lines] == ["step 1/6", "step 6/6", "step 6/6"]
    assert re.search(r"\| loss \d+\.\d{4} \|", lines[0]) and lines[0].endswith("left")
    assert re.search(r"\| tokens/s [\d,.]+ \|", lines[1])
    assert re.search(r"\| val_loss \d+\.\d{4} \|", lines[2]), "a validation has a line of its own"


def test_every_step_has_a_line_when_asked_and_accumulated_batches_are_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, StepProgressBar(line_interval=0), steps=12, accumulate_grad_batches=2, limit_val_batches=0)
    steps = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()]
    assert steps == [f"step {i}/6" for i in range(1, 7)]


def test_total_is_what_the_epochs_come_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, StepProgressBar(line_interval=0), steps=3, max_steps=-1, max_epochs=2, limit_val_batches=0)
    assert "step 6/6" in capsys.readouterr().out


def test_a_refresh_rate_of_zero_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, StepProgressBar(refresh_rate=0), steps=6)
    assert capsys.readouterr().out == ""


def test_trainer_print_reaches_a_log_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Talks(Bigram):
        def on_train_end(self) -> None:
            self.print("good", "bye", sep="-")

    run = trainer(tmp_path, max_steps=1, callbacks=[StepProgressBar()], enable_progress_bar=True)
    run.fit(Talks(), batches(1))
    assert capsys.readouterr().out.splitlines()[-1] == "good-bye"


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 120) -> Iterator[Callable[[], str]]:
    """Makes stdout a real terminal (a pty); gives a function that tells what a person has seen so far.

    Not a fixture: pytest puts its own stdout back between a fixture and its test.
    """
    outer, inner = pty.openpty()
    os.set_blocking(outer, False)
    termios.tcsetwinsize(inner, (24, columns))
    shown = b""

    def seen() -> str:
        nonlocal shown
        stdout.flush()
        with suppress(BlockingIOError):  # everything has been read
            while True:
                shown += os.read(outer, 65536)
        return shown.decode(errors="replace")

    with os.fdopen(inner, "w", encoding="utf-8") as stdout, monkeypatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stdout", stdout)
        yield seen
    os.close(outer)


def test_a_bar_over_the_whole_run_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as seen:
        fit(tmp_path, StepProgressBar(), steps=3, max_steps=-1, max_epochs=2)
        shown = seen()
    assert "\r" in shown
    assert re.search(r"Epoch 1:.* 6/6 \[.*loss=\d+\.\d{4}.*tokens/s=", shown)
    assert "step 1/6" not in shown


def test_the_bar_is_closed_before_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(Bigram):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ArithmeticError("broken on purpose")

    bar = StepProgressBar()
    run = trainer(tmp_path, max_steps=3, callbacks=[bar], enable_progress_bar=True)
    with terminal(monkeypatch) as seen:
        with pytest.raises(ArithmeticError, match="on purpose"):
            run.fit(Breaks(), batches(3))
        shown = seen()
    assert bar.train_progress_bar.disable, "tqdm marks a closed bar as disabled"
    assert "Epoch 0" in shown and shown.endswith("\n")


def test_a_terminal_without_a_width_gets_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, columns=0) as seen:
        fit(tmp_path, StepProgressBar(), steps=6, limit_val_batches=0)
        assert seen().startswith("step 1/6 | ")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(torch.tensor(4.25), "4.2500"), (12345.6, "12,346"), (3e-4, "3.00e-04"), (0.0, "0.0000"), (7, "7"), ("x", "x")],
)
def test_figures_are_readable(value: Any, shown: str) -> None:
    assert _format(value) == shown


def test_a_loss_that_is_not_a_number_is_shown_as_such() -> None:
    assert _format(torch.tensor(float("nan"))) == "nan"


def test_negative_intervals_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="line_interval=-1"):
        StepProgressBar(line_interval=-1)


@pytest.mark.parametrize(("bar", "told"), [(StepProgressBar(), False), (TQDMProgressBar(), True)])
def test_a_bar_that_looks_at_the_loss_is_not_told_it(tmp_path: Path, bar: Callback, told: bool) -> None:
    """What a bar is told is read off the device at every step."""
    run = trainer(tmp_path, max_steps=1, callbacks=[bar], enable_progress_bar=True)
    run.fit(make_module(), loader(run, None))
    assert ("train_loss" in run.progress_bar_metrics) is told
    assert "train_loss" in run.callback_metrics
