"""What benchmarks/resilience.py makes of steps and failures, and that it finds a rank that it has killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from resilience import Failure, Step, summarize

ROOT = Path(__file__).parents[2]


def test_the_share_that_trains_is_what_the_steps_would_have_taken_alone() -> None:
    before = [Step(0, step, 100.0 + step) for step in range(1, 11)]  # a step a second; the last one at 110
    after = [Step(1, step, 120.0 + step - 7) for step in range(7, 21)]  # from step 7 on, at 120
    found = summarize([*before, *after], [Failure("kill", done=110.5, found=111.0)])
    assert found["step_time"] == 1.0
    assert found["wall"] == 133.0 - 101.0 and found["useful"] == 19.0
    assert found["ettr"] == pytest.approx(19 / 32)
    assert found["cost_of_a_failure"] == pytest.approx(13.0)
    assert found["ettr_at_one_in_30_minutes"] == pytest.approx(1800 / 1813)
    assert found["failures"] == [{"kind": "kill", "found": 0.5, "again": 9.5, "lost_steps": 4}]


@pytest.mark.slow
@pytest.mark.alone
def test_a_rank_is_killed_and_the_run_goes_on(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    command = [sys.executable, ROOT / "benchmarks" / "resilience.py", "--quick", "--ranks", "2", "--json", results]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    (failure,) = json.loads(results.read_text())["failures"]
    assert failure["kind"] == "kill" and failure["again"] > failure["found"] > 0
    assert "at one in 30 minutes" in done.stdout
