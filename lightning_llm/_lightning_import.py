"""Our strategies are registered when Lightning is imported, be it before or after this package.

Importing Lightning takes seconds, for which neither a server nor `--help` nor a process that writes checkpoints should
have to wait. So this package does not import it by itself.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

LIGHTNING = "lightning.pytorch"


def register_with_lightning() -> None:
    """Registers the strategies now if Lightning is here, else as soon as it is."""
    if LIGHTNING in sys.modules:
        _register()
    elif not any(isinstance(finder, _LightningFinder) for finder in sys.meta_path):
        _settle_environment_for_lightning()
        sys.meta_path.insert(0, _LightningFinder())


class _LightningFinder(MetaPathFinder):
    """Sees Lightning being imported, steps aside, and has the strategies registered afterwards."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != LIGHTNING:
            return None
        sys.meta_path.remove(self)
        _check_environment()
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    from lightning_llm.strategies.presets import register_presets

    register_presets(StrategyRegistry)


def _settle_environment_for_lightning() -> None:
    # Lightning 2.6 asks torch's pytree in a way that torch has deprecated; every rank would print it.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)


def _check_environment() -> None:
    try:
        import torchmetrics  # noqa: F401
    except RuntimeError as error:
        if "torchvision" not in str(error):
            raise
        raise ImportError(
            "The torchvision that is installed does not fit this build of torch, and torchmetrics imports it. "
            "Nothing here needs it: pip uninstall torchvision"
        ) from error
