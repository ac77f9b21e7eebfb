from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import call_forked
from tests.launch.jobs import Job

STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch") / "data"
    done = call_forked(
        "tokenize", "--input", STDLIB / "json", "--output", folder, "--vocab-size", 400, "--num-workers", 1
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def job(tmp_path: Path, tokens: Path) -> Callable[..., Job]:
    def make(**settings: Any) -> Job:
        return Job(folder=tmp_path / "job", data=tokens, **settings)

    return make


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Callable[..., dict[int, float]]:
    """The curve of a run in which nothing happens, by ranks and sizes; each is run once."""
    known: dict[str, dict[int, float]] = {}

    def curve(ranks: int = 2, **sizes: Any) -> dict[int, float]:
        key = f"{ranks} {sorted(sizes.items())}"
        if key not in known:
            made = Job(folder=tmp_path_factory.mktemp("undisturbed") / "job", data=tokens, ranks=ranks, sizes=sizes)
            assert made.run() == 0, made.said
            known[key] = made.curve()
        return known[key]

    return curve
