"""Models by their name on the Hugging Face hub, through `huggingface_hub` and its own cache. `sources.py` calls it."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_llm.errors import ConfigurationError

WANTED = ("*.safetensors", "*.json", "*.jinja")  # nothing pickled, no code
UNWANTED = ("consolidated*", "original/*", "onnx/*", "*/*.safetensors")  # other copies of the same weights
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(text: str) -> bool:
    """Whether a text has the form "organisation/model"."""
    return _NAME.fullmatch(text) is not None


def fetch_from_hub(name: str, revision: str | None = None) -> Path:
    """The local folder of a model, fetched as far as it is not there yet.

    Args:
        name: "organisation/model".
        revision: Commit, tag or branch; None: what "main" is now. A commit is the same for ever.

    Raises:
        ConfigurationError: There is no such model or revision, no access to it, or no network.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise ConfigurationError(
            f"{name} is fetched with huggingface_hub, which is not installed ({error}): pip install huggingface_hub"
        ) from None
    at = f" at revision {revision!r}" if revision else ""
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED))
    except GatedRepoError as error:
        raise ConfigurationError(
            f"{name} is given only to those who have agreed to its terms: do so on its page, and set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigurationError(f"{name} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise ConfigurationError(
            f"There is no folder {name} here, and no model of that name on the hub that may be read without a token: "
            "correct the name, or set HF_TOKEN."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ConfigurationError(
            f"There is no folder {name} here, and the model of that name{at} could not be fetched from the hub, nor "
            f"was it before ({reason}): check the network, HF_HUB_OFFLINE and HF_ENDPOINT, or give a folder."
        ) from error
    return Path(folder)
