"""Text as `lightning-llm tokenize` makes it, and a folder that looks like the root of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_llm.data.tokenize import tokenize
from tests.examples.runs import ROOT
from tests.test_cli import STDLIB


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "data"
    tokenize([STDLIB / "json", STDLIB / "asyncio"], folder, vocab_size=4096)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path
