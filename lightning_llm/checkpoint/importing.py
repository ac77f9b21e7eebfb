"""Checkpoints of other formats become ours. `lightning-llm import`.

A Hugging Face folder, a Lightning `.ckpt` file, a folder of torch.distributed.checkpoint or of DeepSpeed. All but the
first contain pickles; of these only what is plain data is unpickled, and anything else is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lightning_llm._version import lightning_version
from lightning_llm.checkpoint.dcp_folder import METADATA, OURS, read_dcp_folder
from lightning_llm.checkpoint.deepspeed_folder import read_deepspeed_folder, step_folder
from lightning_llm.checkpoint.lazy import Box, LazyTensor, whole
from lightning_llm.checkpoint.lightning_file import read_lightning_file
from lightning_llm.checkpoint.manifest import MANIFEST, Manifest
from lightning_llm.checkpoint.writing import Content, write_checkpoint
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.expert_weights import PretrainedWeights
from lightning_llm.models.module import resolve_config

CONFIG, TOKENIZER = "config.json", "tokenizer.json"


def import_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    tokenizer: str | Path | None = None,
    prefix: str | None = None,
    ranks: int = 1,
    weights_only: bool = False,
) -> tuple[Manifest, list[str]]:
    """Makes a checkpoint of what was saved by something else.

    Args:
        source: A Hugging Face folder, a Lightning checkpoint file, or a folder of torch.distributed.checkpoint, of
            DeepSpeed or of Lightning's DeepSpeedStrategy.
        output: Folder or URL of the checkpoint.
        model: A preset or a Hugging Face folder, where the source does not say what model it holds.
        tokenizer: A tokenizer.json, or a folder with one, where the source has none.
        prefix: Of the weights' names in a folder of torch.distributed.checkpoint or DeepSpeed; found by itself in the
            usual ones.
        ranks: How many files.
        weights_only: Leave out optimizers.

    Returns:
        The manifest, and what could not be taken over.

    Raises:
        ConfigurationError: It is none of these, is damaged, or contains more than data; says what.
    """
    place = Path(source).expanduser()
    of_deepspeed = step_folder(place) is not None
    if prefix is not None and not of_deepspeed and not (place / METADATA).is_file():
        raise ConfigurationError(
            f"--prefix is for folders of torch.distributed.checkpoint or DeepSpeed, and {place} is none."
        )
    named = resolve_config(model) if model is not None else None
    remarks: list[str] = []
    if place.is_file():
        content, config, remarks = read_lightning_file(place, named)
    elif (place / MANIFEST).is_file():
        raise ConfigurationError(
            f"{place} is a checkpoint of lightning_llm already; `lightning-llm reshard` copies it."
        )
    elif (place / METADATA).is_file():
        content, config, remarks = read_dcp_folder(place, named, prefix)
    elif of_deepspeed:
        content, config, remarks = read_deepspeed_folder(place, named, prefix)
    elif (place / CONFIG).is_file():
        config = DecoderConfig.load(place)
        content = _read_hugging_face_folder(place, config)
    elif not place.exists():
        raise ConfigurationError(f"There is no {place}.")
    else:
        raise ConfigurationError(
            f"{place} has neither {CONFIG} (a Hugging Face folder) nor {METADATA} (torch.distributed.checkpoint) nor "
            "DeepSpeed's *_model_states.pt, and is no Lightning checkpoint file: there is nothing to import."
        )
    folders = (tokenizer, model, place)
    content = replace(content, assets=_assets(config, folders), source=place.name)
    if weights_only and not content.weights_only:
        content = content.without_optimizers()
    return write_checkpoint(output, content, ranks=ranks), remarks


def _assets(config: DecoderConfig | None, folders: tuple[str | Path | None, ...]) -> Mapping[str, bytes]:
    """What makes the weights usable on their own; the tokenizer from the first folder that has one."""
    assets = {} if config is None else {CONFIG: (json.dumps(config.to_dict(), indent=2) + "\n").encode()}
    for folder in folders:
        file = Path(folder or "")
        file = file if file.name == TOKENIZER else file / TOKENIZER
        if folder is not None and file.is_file():
            return {**assets, TOKENIZER: file.read_bytes()}
    if folders[0] is not None:
        raise ConfigurationError(f"There is no {TOKENIZER} at {folders[0]}.")
    return assets


def _read_hugging_face_folder(folder: Path, config: DecoderConfig) -> Content:
    weights = PretrainedWeights(folder, config)  # which keeps the files mapped as long as it is asked

    def lazy(name: str, shape: tuple[int, ...]) -> LazyTensor:
        def read(box: Box) -> Tensor:
            return weights.read(name, box.within(whole(shape)), shape)

        first = weights.read(name, tuple(slice(0, 1) for _ in shape), shape)
        return LazyTensor(first.dtype, shape, read)

    shapes = config.parameter_shapes()
    return Content(
        step=0,
        tensors={OURS + name: lazy(name, shape) for name, shape in shapes.items()},
        trainer={"epoch": 0, "global_step": 0, "pytorch-lightning_version": lightning_version()},
        weights_only=True,
    )
