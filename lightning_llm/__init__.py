"""Train large language models in every parallel dimension with PyTorch Lightning.

Importing this package registers the strategy `"llm3d"` and its presets with Lightning.
"""

import warnings

# Lightning 2.6 asks torch's pytree in a way that torch has deprecated; every rank would print it.
warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)

try:
    from lightning.pytorch.strategies import StrategyRegistry
except RuntimeError as error:
    if "torchvision" not in str(error):
        raise
    raise ImportError(
        "The torchvision that is installed does not fit this build of torch, and Lightning's torchmetrics imports it. "
        "Nothing here needs it: pip uninstall torchvision"
    ) from error

from lightning_llm.data.module import TokenDataModule
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.models.module import LLMModule
from lightning_llm.strategies.llm3d import LLM3DStrategy
from lightning_llm.strategies.presets import register_presets

__version__ = "0.1.0"
__all__ = ["ConfigurationError", "Decoder", "DecoderConfig", "LLM3DStrategy", "LLMModule", "TokenDataModule"]

register_presets(StrategyRegistry)
