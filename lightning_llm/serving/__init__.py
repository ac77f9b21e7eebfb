"""How a model answers: an engine with a paged KV cache and continuous batching, and the LitServe server around it.

`LLM` is the engine in your own process; `LLMServeAPI` is a `litserve.LitAPI`; `lightning-llm serve` is both with an
OpenAI-compatible endpoint.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_llm.serving.engine.config import EngineConfig
    from lightning_llm.serving.engine.params import Grammar, SamplingParams
    from lightning_llm.serving.llm import LLM
    from lightning_llm.serving.server.api import LLMServeAPI
    from lightning_llm.serving.server.server import EngineServer

_HOMES = {
    "EngineConfig": "engine.config",
    "EngineServer": "server.server",
    "Grammar": "engine.params",
    "LLM": "llm",
    "LLMServeAPI": "server.api",
    "SamplingParams": "engine.params",
}
__all__ = ["LLM", "EngineConfig", "EngineServer", "Grammar", "LLMServeAPI", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Public names, fetched when they are asked for: the server's main process needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
