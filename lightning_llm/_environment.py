"""What must be settled before Lightning is imported. `lightning_llm/__init__.py` imports this first."""

import warnings

# Lightning 2.6 asks torch's pytree in a way that torch has deprecated; every rank would print it.
warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)

try:
    import torchmetrics  # noqa: F401
except RuntimeError as error:
    if "torchvision" not in str(error):
        raise
    raise ImportError(
        "The torchvision that is installed does not fit this build of torch, and torchmetrics imports it. "
        "Nothing here needs it: pip uninstall torchvision"
    ) from error
