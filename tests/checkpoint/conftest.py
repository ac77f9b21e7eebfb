"""A real corpus, small: the source of a few packages of the standard library. And a store of each kind."""

import sysconfig
import uuid
from pathlib import Path

import pytest

from lightning_llm.checkpoint.bucket import BucketStore
from lightning_llm.checkpoint.folder import FolderStore
from lightning_llm.data.tokenize import tokenize
from tests.data.corpora import prose
from tests.object_storage import ObjectStorage

PAGE = 1200  # words


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stdlib = Path(sysconfig.get_path("stdlib"))
    output = tmp_path_factory.mktemp("corpus") / "tokens"
    tokenize(
        [stdlib / "json", stdlib / "asyncio"], output, vocab_size=512, val_fraction=0.1, num_workers=1, progress=False
    )
    return output


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus so short that an epoch has six steps of 8 sequences of 32 tokens."""
    folder = tmp_path_factory.mktemp("pages")
    for number in range(2):
        (folder / f"{number}.txt").write_text(prose(number, PAGE))
    tokenize([folder], folder / "tokens", vocab_size=512, val_fraction=0.4, num_workers=1, progress=False)
    return folder / "tokens"


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FolderStore | BucketStore:
    """A new and empty store of each kind; the bucket is in a real SeaweedFS."""
    if request.param == "folder":
        return FolderStore(tmp_path / "run")
    return request.getfixturevalue("bucket_store")


@pytest.fixture
def bucket_store(bucket: str) -> BucketStore:
    """A prefix of its own in the bucket."""
    return BucketStore(f"s3://{bucket}/team/{uuid.uuid4().hex[:8]}")


@pytest.fixture(scope="session")
def bucket(object_storage: ObjectStorage) -> str:
    return object_storage.bucket("checkpoints")
