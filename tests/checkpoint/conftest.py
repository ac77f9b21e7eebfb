"""A real corpus, small: the source of a few packages of the standard library."""

import sysconfig
from pathlib import Path

import pytest

from lightning_llm.data.tokenize import tokenize


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stdlib = Path(sysconfig.get_path("stdlib"))
    output = tmp_path_factory.mktemp("corpus") / "tokens"
    tokenize(
        [stdlib / "json", stdlib / "asyncio"], output, vocab_size=512, val_fraction=0.1, num_workers=1, progress=False
    )
    return output
