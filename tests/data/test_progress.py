"""Progress: a bar on a terminal, lines elsewhere, nothing when it is not wanted; never on stdout."""

from __future__ import annotations

import contextlib
import os
import pty
import sys

import pytest

from lightning_llm.data import progress
from lightning_llm.data.progress import Progress, human


def run(shown: bool) -> None:
    reporter = Progress(shown)
    reporter.note("hello")
    with reporter.bar("reading", 4_000_000) as advance:
        for _ in range(4):
            advance(1_000_000)


def test_lines_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    run(True)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "tokenize: hello"
    assert err.splitlines()[1] == "tokenize: reading: 1.0 MB of 4.0 MB (25%)"
    assert len(err.splitlines()) == 5


def test_a_short_job_needs_no_lines(capfd: pytest.CaptureFixture[str]) -> None:
    run(True)
    assert capfd.readouterr().err == "tokenize: hello\n"


def test_silence(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    run(False)
    assert capfd.readouterr() == ("", "")


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        run(True)
    shown = ""
    with contextlib.suppress(OSError):  # how Linux says that nobody holds the other end any more
        while data := os.read(ours, 1 << 16):
            shown += data.decode()
    os.close(ours)
    assert "reading" in shown and "4.0/4.0 MB" in shown


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (12_300_000, "12.3 MB"), (5e9, "5.0 GB"), (2e15, "2000.0 TB")],
)
def test_human(count: float, text: str) -> None:
    assert human(count) == text
