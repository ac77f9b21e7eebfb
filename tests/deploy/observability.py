"""Prometheus' and Alertmanager's own programs, as Debian has them, and what deploy/ gives them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
PACKAGES = {
    "promtool": "prometheus",
    "prometheus": "prometheus",
    "amtool": "prometheus-alertmanager",
    "prometheus-alertmanager": "prometheus-alertmanager",
}


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skips a test where one of the programs is not installed."""
    missing = sorted({PACKAGES[program] for program in programs if shutil.which(program) is None})
    return pytest.mark.skipif(bool(missing), reason=f"not installed here (Debian: apt-get install {' '.join(missing)})")


def checked(*command: object) -> str:
    """What a program that checks something prints, if it finds nothing wrong."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics_in(expression: str) -> set[str]:
    """Ours that a PromQL expression reads."""
    return set(re.findall(r"\blightning_llm_\w+", expression))


def ask(url: str) -> Any:
    """JSON behind a URL; None while nobody answers."""
    with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)
    return None


@contextmanager
def running(*command: object, log: Path) -> Iterator[None]:
    """A server, from here to the end of the block."""
    with log.open("w") as file:
        process = subprocess.Popen([str(part) for part in command], stdout=file, stderr=subprocess.STDOUT)
        try:
            yield
            assert process.poll() is None, log.read_text()
        finally:
            process.terminate()
            process.wait(20)
