"""What is shown of a node: to probes, and to Prometheus in a form that its own linter takes."""

from __future__ import annotations

import math
import shutil
import subprocess
import time

import pytest

from lightning_llm.resilience.beats import Beat
from tests.resilience.exposition import EVERYTHING, beat, full_status, names_of, samples_of, told


def test_what_the_training_tells_is_shown() -> None:
    shown = samples_of(full_status().metrics())
    assert shown["lightning_llm_train_loss"] == shown["lightning_llm_mfu_ratio"] == 1.5
    assert shown['lightning_llm_straggler_worst_score{rank="3"}'] == 0.5
    assert shown["lightning_llm_checkpoint_step"] == 40
    assert 5.0 <= shown["lightning_llm_checkpoint_age_seconds"] < 15.0
    assert shown['lightning_llm_restarts_total{cause="hang"}'] == 1
    assert shown['lightning_llm_restarts_total{cause="exit"}'] == 0
    assert shown['lightning_llm_rank_fault{rank="1",cause="stopped"}'] == 1
    assert abs(shown["lightning_llm_monitor_start_time_seconds"] - time.time()) < 60


def test_a_metric_that_nobody_told_is_not_shown() -> None:
    shown = names_of(told(beat()).metrics())
    assert {name.removeprefix("lightning_llm_") for name in shown} == {
        "rank_step",
        "rank_alive_age_seconds",
        "rank_progress_age_seconds",
        "rank_phase",
        "verdicts_total",
        "restarts_total",
        "monitor_start_time_seconds",
    }


def test_beats_without_a_figure_leave_it_as_it_was() -> None:
    status = told(beat(train_loss=2.0, grad_norm=1.0), beat(), beat(kind="alive"), beat(train_loss=1.0))
    shown = samples_of(status.metrics())
    assert (shown["lightning_llm_train_loss"], shown["lightning_llm_grad_norm"]) == (1.0, 1.0)


def test_figures_end_with_their_process_and_checkpoints_do_not() -> None:
    for successor in (beat(pid=200), beat(rank=4, pid=200, train_loss=9.0)):
        shown = samples_of(told(beat(**EVERYTHING), successor).metrics())
        assert shown.get("lightning_llm_train_loss") == successor.figures.get("train_loss")
        assert "lightning_llm_tokens_per_second" not in shown
        assert shown["lightning_llm_checkpoint_step"] == 40
    other_rank = told(beat(**EVERYTHING), beat(rank=1, pid=300))
    assert samples_of(other_rank.metrics())["lightning_llm_train_loss"] == 1.5


@pytest.mark.parametrize(("value", "written"), [(math.nan, "NaN"), (math.inf, "+Inf"), (-math.inf, "-Inf")])
def test_numbers_that_are_none_come_through_a_beat_as_prometheus_writes_them(value: float, written: str) -> None:
    sent = Beat.from_bytes(beat(train_loss=value).to_bytes())
    assert sent is not None
    assert f"lightning_llm_train_loss {written}\n" in told(sent).metrics()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here (Debian: apt-get install prometheus)")
def test_prometheus_own_linter_finds_nothing() -> None:
    linted = subprocess.run(
        ["promtool", "check", "metrics"], input=full_status().metrics(), capture_output=True, text=True, timeout=60
    )
    assert (linted.returncode, linted.stdout + linted.stderr) == (0, "")
