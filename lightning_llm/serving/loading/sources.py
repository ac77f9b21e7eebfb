"""`load_model`: what a model's name means. Whatever it is becomes a Hugging Face folder, which `folder.py` loads."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch

from lightning_llm.checkpoint.export import export
from lightning_llm.checkpoint.manifest import MANIFEST, ManifestError
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.checkpoint.selection import newest_first, one_at
from lightning_llm.checkpoint.store import open_store, split_url
from lightning_llm.checkpoint.verify import read_manifest
from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.loading.bucket_folder import BucketFolder
from lightning_llm.serving.loading.cache import ModelCache
from lightning_llm.serving.loading.folder import PICKLED, LoadedModel, load_folder
from lightning_llm.serving.loading.gguf_conversion import SHARD_SIZE, convert_gguf
from lightning_llm.serving.loading.hub import fetch_from_hub, is_hub_name

_CONVERSION = 1  # to be raised when the same source is to become another folder
_KINDS = (
    "a Hugging Face folder, a checkpoint or a folder of checkpoints, a .gguf file, s3://bucket/prefix of one of these, "
    "or organisation/model on the hub"
)


def load_model(
    source: str | Path,
    *,
    name: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    chat_template: str | Path | None = None,
    cache: ModelCache | None = None,
) -> LoadedModel:
    """Loads a model for inference.

    What is not a folder of safetensors on this machine is made one in the cache first, by one process of the node while
    the others wait. On a CPU all of them then share the memory of its weights.

    Args:
        source: A Hugging Face folder; a checkpoint of a training run or a folder of such, the newest good one of which
            is taken; a `.gguf` file; `s3://bucket/prefix` of one of these; or "organisation/model" on the hub.
        name: What to call it; None: what the source is called.
        dtype: Of the weights; "auto": as they are, where a quantised file counts as bfloat16.
        device: Where to.
        revision: Of a model on the hub; a commit pins it.
        tokenizer: A folder with a tokenizer, or its `tokenizer.json`, to use instead of the model's.
        chat_template: A file to use instead of the model's template.
        cache: None: the one that `LIGHTNING_LLM_CACHE` names. What is loaded from it stays there as long as the decoder
            is alive.

    Raises:
        ConfigurationError: It is none of these, is damaged, or could only be loaded by running code that came with it.
        NoGoodCheckpointError: None of the checkpoints can be believed.
    """
    kept = cache or ModelCache()
    with local_folder(source, dtype=dtype, revision=revision, cache=kept) as folder:
        called = name or _name_of(source)
        loaded = load_folder(
            folder, name=called, dtype=dtype, device=device, tokenizer=tokenizer, chat_template=chat_template
        )
        kept.hold(folder, loaded.decoder)
        return loaded


def local_folder(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    cache: ModelCache | None = None,
) -> AbstractContextManager[Path]:
    """The Hugging Face folder of a model, to be read while the `with` lasts; for the arguments see `load_model`."""
    element, kept = str(dtype).removeprefix("torch."), cache or ModelCache()
    if str(source).startswith("s3://"):
        return _in_bucket(str(source), element, kept)
    place = _path(source)
    if place.is_dir():
        return _in_folder(place, element, kept)
    if place.is_file():
        return _of_file(place, element, kept)
    check_source(source)
    return nullcontext(fetch_from_hub(str(source), revision))


def check_source(source: str | Path) -> None:
    """Looks for a model on this machine only, and quickly.

    Raises:
        ConfigurationError: It would have to be here, and is not.
    """
    if not (str(source).startswith("s3://") or _path(source).exists() or is_hub_name(str(source))):
        raise ConfigurationError(f"There is no {source}: a model is {_KINDS}.")


def _path(source: str | Path) -> Path:
    parts = urlsplit(str(source))
    return Path(unquote(parts.path)) if parts.scheme == "file" else Path(source).expanduser()


def _name_of(source: str | Path) -> str:
    text = str(source).rstrip("/")
    if text.startswith("s3://"):
        return text.rpartition("/")[2].removesuffix(".gguf")
    place = _path(source)
    return place.resolve().name.removesuffix(".gguf") if place.exists() else text


def _in_folder(place: Path, dtype: str, cache: ModelCache) -> AbstractContextManager[Path]:
    is_checkpoint = (place / MANIFEST).is_file()
    if not is_checkpoint and (place / "config.json").is_file():
        return nullcontext(place)
    if is_checkpoint or open_store(place).names():
        return _of_checkpoint(str(place), dtype, cache)
    return nullcontext(place)  # which `load_folder` says what it lacks of


def _of_file(path: Path, dtype: str, cache: ModelCache) -> AbstractContextManager[Path]:
    if path.suffix == ".gguf":
        state = path.stat()
        identity = {"gguf": str(path.resolve()), "size": state.st_size, "time": state.st_mtime_ns}
        return cache.entry(_key(identity, dtype), lambda folder: convert_gguf(path, folder, dtype))
    if path.suffix == ".safetensors":
        raise ConfigurationError(f"{path} is one file of a model: give the folder that it is in, with its config.json.")
    if any(path.match(pattern) for pattern in PICKLED):
        raise ConfigurationError(
            f"{path} is a pickled file: loading it could run whatever its author liked, so it is never done. Use the "
            "model's safetensors; `lightning-llm import` makes a checkpoint of a Lightning .ckpt file that you trust."
        )
    raise ConfigurationError(f"{path} is no model: that is {_KINDS}.")


def _in_bucket(url: str, dtype: str, cache: ModelCache) -> AbstractContextManager[Path]:
    found = BucketFolder(url)
    if url.endswith(".gguf"):
        if not found.is_file:
            raise ConfigurationError(f"There is no {url}: a model is {_KINDS}.")

        def convert(folder: Path) -> None:
            with tempfile.TemporaryDirectory(prefix=".fetched-", dir=folder) as fetched:
                found.fetch(Path(fetched))
                convert_gguf(next(Path(fetched).iterdir()), folder, dtype)

        return cache.entry(_key(found.identity(), dtype), convert)
    if "config.json" in found.names:
        pickled = [name for name in found.names if any(fnmatch(name, pattern) for pattern in PICKLED)]
        if pickled and not any(name.endswith(".safetensors") for name in found.names):
            raise ConfigurationError(
                f"{url} has its weights in {pickled[0]}, which is pickled and so is never loaded: upload safetensors."
            )
        return cache.entry(_key(found.identity(), "auto"), found.fetch)
    return _of_checkpoint(url, dtype, cache)


def _of_checkpoint(url: str, dtype: str, cache: ModelCache) -> AbstractContextManager[Path]:
    """A checkpoint is verified when it is exported to the cache; that this very one was, its manifest tells."""
    known = _newest(url)
    if known is not None and cache.has(_key({"checkpoint": known}, dtype)):
        return cache.entry(_key({"checkpoint": known}, dtype), lambda folder: _export(url, folder, dtype))
    opened = Checkpoint.open(url, alone=True)
    identity = {"checkpoint": opened.manifest.uuid}
    return cache.entry(_key(identity, dtype), lambda folder: _export(opened, folder, dtype))


def _newest(url: str) -> str | None:
    """The uuid in the manifest of the checkpoint at `url`, or of the newest in that folder; None if that is not to be
    believed. Reads no tensor."""
    name = one_at(url)
    store = open_store(url if name is None else split_url(url)[0])
    names = [name] if name is not None else newest_first(store)
    try:
        return read_manifest(store, names[0]).uuid if names else None
    except (ManifestError, OSError):
        return None


def _export(checkpoint: str | Checkpoint, folder: Path, dtype: str) -> None:
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint, alone=True)
    export(opened, folder, dtype=None if dtype == "auto" else dtype, max_shard_size=SHARD_SIZE)


def _key(identity: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {**identity, "dtype": dtype, "conversion": _CONVERSION}
