"""All that this project asks of litdata, in one place; read in version 0.2.76 and held by tests/data/test_litdata.py.

`packing.py` writes chunks through here, `loader.py` reads sequences. litdata is optional: it is imported on first use.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lightning_llm.data.corpus import INDEX_FILE, Chunk
from lightning_llm.errors import ConfigurationError

# litdata numbers its work by these; under torchrun, or within another litdata job, they would be somebody else's.
_FOREIGN_VARIABLES = ("WORLD_SIZE", "GLOBAL_RANK", "NNODES", "DATA_OPTIMIZER_NUM_NODES", "DATA_OPTIMIZER_NODE_RANK")


def import_litdata() -> Any:
    """The litdata module.

    Raises:
        ConfigurationError: it is not installed; names the commands that install it.
    """
    try:
        return importlib.import_module("litdata")
    except ImportError as error:
        raise ConfigurationError(
            f"Tokenised data needs litdata, which cannot be imported ({error}). Install it with:\n"
            '  pip install "lightning-llm[data]"\n'
            "or, where torch is a CPU build (litdata asks for a torchvision that would not match it):\n"
            "  pip install --no-deps litdata"
        ) from error


def optimize_environment(scratch: Path) -> dict[str, str]:
    """The environment for a process that calls `optimize_tokens`.

    Its caches go under `scratch`: by default litdata deletes and recreates the folders `chunks` and `data` in the
    system's temporary folder, whoever they belong to.
    """
    environment = {key: value for key, value in os.environ.items() if key not in _FOREIGN_VARIABLES}
    return environment | {
        "DATA_OPTIMIZER_CACHE_FOLDER": str(scratch / "chunks"),
        "DATA_OPTIMIZER_DATA_CACHE_FOLDER": str(scratch / "data"),
        "CUDA_VISIBLE_DEVICES": "",  # nothing here computes on a device
    }


def optimize_tokens(
    function: Callable[[int], np.ndarray], items: int, output: Path, *, num_workers: int, start_method: str
) -> list[Chunk]:
    """Write `function(0)`, `function(1)`, ... (one-dimensional arrays of token ids) as one chunk each, in this order.

    The files do not depend on `num_workers`. Changes the process (start method of multiprocessing, handler of SIGINT,
    seeds), so it is only called from a process of its own, under `optimize_environment`.
    """
    litdata = import_litdata()
    litdata.optimize(
        function,
        list(range(items)),
        output_dir=str(output),
        chunk_bytes=1,  # less than any item: each becomes a chunk
        num_workers=min(num_workers, items),
        item_loader=litdata.TokensLoader(),
        keep_data_ordered=True,  # worker k takes the k-th contiguous part of the items ...
        reorder_files=False,
        start_method=start_method,
        verbose=False,
    )
    return _renumber(output, items)


def _renumber(output: Path, items: int) -> list[Chunk]:
    """Name chunks by their place instead of by the worker that wrote them; drop the time of writing from the index."""
    index = json.loads((output / INDEX_FILE).read_text(encoding="utf-8"))
    if len(index["chunks"]) != items:  # ... and the index lists them worker by worker
        raise RuntimeError(f"litdata wrote {len(index['chunks'])} chunks into {output} for {items} shards")
    chunks = []
    for place, entry in enumerate(index["chunks"]):
        # No collision: the chunks of worker 0 come first and have these names already.
        name = f"chunk-0-{place}.bin"
        os.rename(output / entry["filename"], output / name)
        entry["filename"] = name
        chunks.append(Chunk(name, tokens=entry["dim"], bytes=(output / name).stat().st_size))
    index.pop("updated_at", None)
    (output / INDEX_FILE).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return chunks


class TokenBlocks:
    """The packed tokens of a split as blocks of `block_size` tokens; block i of the whole split is `blocks[i]`.

    Reads by memory map, with litdata's `StreamingDataset` by random access, which knows nothing of ranks: unlike
    iterating over it, it gives the same block i in every process. Opens the files on first use, in each process anew,
    so that it can be handed to DataLoader workers however they start.
    """

    def __init__(self, folder: str | Path, block_size: int) -> None:
        self.folder = Path(folder)
        self.block_size = block_size
        self._dataset: Any = None
        self._process = 0

    def __getitem__(self, index: int) -> np.ndarray:
        if self._dataset is None or self._process != os.getpid():
            litdata = import_litdata()
            loader = litdata.TokensLoader(block_size=self.block_size)
            self._dataset, self._process = litdata.StreamingDataset(str(self.folder), item_loader=loader), os.getpid()
        return self._dataset[int(index)]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_dataset": None}
