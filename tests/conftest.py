"""What must hold before torch is imported: distributed tests fork, and a forked child must not meet OpenMP threads."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("KMP_INIT_AT_FORK", "FALSE")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton decides on import: its kernels run on CPUs, or not at all

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.object_storage import ObjectStorage, serve

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message=".*does not have many workers.*")


@pytest.fixture(autouse=True)
def no_process_group_stays() -> Iterator[None]:
    """A group in the test process would be inherited by every rank that a later test forks: such tests run in ranks."""
    yield
    assert not dist.is_initialized(), (
        "this test connected its own process: run it with tests.distributed.run_distributed"
    )
    assert "LOCAL_RANK" not in os.environ, "this test told its own process that it is a rank"


@pytest.fixture(scope="session")
def object_storage() -> Iterator[ObjectStorage]:
    """A SeaweedFS server that speaks S3, started by the first test that asks for it."""
    with serve() as storage:
        yield storage
