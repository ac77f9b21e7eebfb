"""What benchmarks/engines.py makes of its sides: turns, ratios of a round, and no result where they differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bare_loop import Recipe
from engine_sides import LAYOUTS, SIDES, Layout, Turns
from engines import summarize
from ranks import run_groups
from training_job import Job

from lightning_llm import DecoderConfig

ROOT = Path(__file__).parents[2]
ROUNDS = 3


def job(layout: str, steps: int) -> Job[Layout]:
    return Job(
        layout=LAYOUTS[layout],
        config=DecoderConfig.preset("tiny"),
        seq_len=16,
        steps=steps,
        warmup=1,
        threads=1,
        folder="",
        profile=False,
        recipe=Recipe(),
    )


def ranks(seconds: list[float], losses: list[list[float]]) -> list[dict[str, Any]]:
    """Two ranks; the second is half a second faster in every step."""
    return [
        {
            "seconds": [(second - 0.5 * rank, 2 * second) for second in seconds],
            "losses": losses[rank],
            "norms": [1.0] * len(seconds),
            "memory": 100,
        }
        for rank in range(2)
    ]


def test_ratios_are_those_of_a_round_and_the_slowest_rank_counts() -> None:
    found = {
        "deepspeed": ranks([9.0, 1.0, 2.0, 4.0], [[1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 1.0, 0.0]]),  # each its own batch's
        "ours": ranks([1.0, 3.0, 3.0, 3.0], [[2.0, 2.0, 2.0, 2.0]] * 2),
    }
    ours = summarize(job("zero2", 3), found)["sides"]["ours"]
    assert ours["ratio"] == {"min": 0.75, "median": 1.5, "max": 3.0}
    assert ours["seconds"]["median"] == 3.0 and ours["steps"]["cpu"] == [12.0] * 3 and ours["memory"] == 200


def test_sides_that_compute_something_else_give_no_result() -> None:
    found = {"deepspeed": ranks([1.0, 1.0], [[2.0, 2.0]] * 2), "ours": ranks([1.0, 1.0], [[2.0, 2.001]] * 2)}
    with pytest.raises(RuntimeError, match=r"zero3, step 1: loss 2.001 of ours, 2.0 of deepspeed"):
        summarize(job("zero3", 1), found)
    found["ours"] = ranks([1.0, 1.0], [[2.0, 2.0]] * 2)
    found["ours"][0]["norms"] = [1.0, 1.1]
    with pytest.raises(RuntimeError, match=r"step 1: norm 1.1 of ours"):
        summarize(job("zero3", 1), found)


def test_sides_have_the_layouts_that_they_can_have() -> None:
    assert LAYOUTS["zero2"].sides(SIDES) == list(SIDES)
    assert LAYOUTS["zero2-offload"].sides(SIDES) == ["deepspeed", "ours", "lightning"]
    assert LAYOUTS["pp2"].sides(SIDES) == LAYOUTS["tp2"].sides(SIDES) == ["deepspeed", "ours", "llm3d"]
    assert Layout.parse("tp2:6").batch_size == 6


def test_one_side_works_at_a_time_and_the_order_turns_round(tmp_path: Path) -> None:
    sides = ("a", "b", "c")
    turns = Turns(sides, ROUNDS)
    record = tmp_path / "record"

    def take_turns(side: str) -> None:
        for turn in range(ROUNDS):
            turns.wait(side)
            with record.open("a") as file:
                file.write(side)
            turns.passed(side, turn)

    run_groups({side: lambda side=side: take_turns(side) for side in sides}, 1, timeout=60)
    assert record.read_text() == "abccbaabc"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_quick_run_of_every_layout_computes_the_same_on_every_side(layout: str, tmp_path: Path) -> None:
    output = tmp_path / "engines.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/engines.py", "--quick", "--layouts", layout, "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(output.read_text())["layouts"]
    assert list(row["sides"]) == LAYOUTS[layout].sides(SIDES)
    assert all(side["memory"] > 0 and side["seconds"]["min"] > 0 for side in row["sides"].values())
