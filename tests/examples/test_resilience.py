"""The example kills ranks of its run, and its curve is that of a run in peace."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

import pytest

from tests.examples.runs import ROOT, call


@pytest.mark.slow
@pytest.mark.alone
def test_as_its_readme_says(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    tokenize, _, kill = re.findall(
        r"^(?:lightning-llm|python) .*$", (ROOT / "examples/resilience/README.md").read_text(), re.M
    )
    text = Path(sysconfig.get_path("stdlib")) / "json"
    assert call(f"{tokenize} --vocab-size 400", tmp_path, TEXT=text).returncode == 0
    done = call(f"{kill} --trainer.max_steps 24", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed by SIGKILL; starting again") == 2
    assert "24 losses, the same to the last bit" in done.stdout
