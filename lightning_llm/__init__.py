"""Train large language models in every parallel dimension with PyTorch Lightning, and serve the result.

Importing this package registers the strategy `"llm3d"` and its presets with Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_llm._lightning_import import register_with_lightning
from lightning_llm._version import __version__

if TYPE_CHECKING:
    from lightning_llm.data.module import TokenDataModule
    from lightning_llm.errors import ConfigurationError
    from lightning_llm.models.config import DecoderConfig
    from lightning_llm.models.decoder import Decoder
    from lightning_llm.models.module import LLMModule
    from lightning_llm.strategies.deepspeed.strategy import LLM3DDeepSpeedStrategy
    from lightning_llm.strategies.llm3d import LLM3DStrategy

_HOMES = {
    "ConfigurationError": "errors",
    "Decoder": "models.decoder",
    "DecoderConfig": "models.config",
    "LLM3DDeepSpeedStrategy": "strategies.deepspeed.strategy",
    "LLM3DStrategy": "strategies.llm3d",
    "LLMModule": "models.module",
    "TokenDataModule": "data.module",
}

__all__ = [
    "ConfigurationError",
    "Decoder",
    "DecoderConfig",
    "LLM3DDeepSpeedStrategy",
    "LLM3DStrategy",
    "LLMModule",
    "TokenDataModule",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Public names, imported when they are used: torch and Lightning take seconds, and not everybody needs them."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


register_with_lightning()
