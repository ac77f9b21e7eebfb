"""Train large language models in every parallel dimension with PyTorch Lightning.

Importing this package registers the strategy `"llm3d"` and its presets with Lightning.
"""

from lightning_llm import _environment  # noqa: F401, I001  it explains what would break the imports below

from lightning.pytorch.strategies import StrategyRegistry

from lightning_llm._version import __version__
from lightning_llm.data.module import TokenDataModule
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.models.module import LLMModule
from lightning_llm.strategies.llm3d import LLM3DStrategy
from lightning_llm.strategies.presets import register_presets

__all__ = [
    "ConfigurationError",
    "Decoder",
    "DecoderConfig",
    "LLM3DStrategy",
    "LLMModule",
    "TokenDataModule",
    "__version__",
]

register_presets(StrategyRegistry)
