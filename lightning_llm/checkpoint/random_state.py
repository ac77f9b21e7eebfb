"""Where a process's random generators stand: Python's, NumPy's, torch's on the host and on this process's devices."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Of this process, as plain values, arrays and tensors."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Makes this process draw what it would have drawn when `random_state` was called."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def derived_state(state: dict[str, Any], number: int) -> dict[str, Any]:
    """A state that no generator had before, the same for the same `state` and `number`."""
    digest = hashlib.sha256(state["torch"].numpy().tobytes() + number.to_bytes(8, "little")).digest()
    seed = int.from_bytes(digest[:4], "little")  # 32 bits: as many as NumPy takes
    derived: dict[str, Any] = {
        "python": random.Random(seed).getstate(),
        "numpy": np.random.RandomState(seed).get_state(legacy=True),
        "torch": torch.Generator().manual_seed(seed).get_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        derived["cuda"] = torch.Generator("cuda").manual_seed(seed).get_state()
    return derived
