"""A checkpoint of a run -> a Hugging Face folder, tensor by tensor, so that no machine has to hold the whole model.

`lightning-llm export` calls it; the folder loads in `Decoder.from_pretrained` and in transformers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.expert_weights import to_files
from lightning_llm.models.weights import DEFAULT_SHARD_SIZE, save_weights, torch_dtype

TOKENIZER = "tokenizer.json"


def export(
    checkpoint: str | Path | Checkpoint,
    output: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
) -> Path:
    """Writes the weights of a checkpoint as a Hugging Face folder: safetensors, config.json, tokenizer.

    Args:
        checkpoint: A folder that the strategy saved, or one that is open and verified.
        output: The folder to write; files of an earlier export are replaced.
        dtype: Element type, for example "bfloat16"; None keeps what was trained.
        max_shard_size: Largest safetensors file, for example "5GB".

    Returns:
        `output`.

    Raises:
        ConfigurationError: The checkpoint is missing, incomplete, or not of a decoder; what is missing is named.
    """
    target = Path(output)
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint, alone=True)
    source = opened.local(*opened.manifest.files)
    stored = opened.weights()
    if not (source / "config.json").is_file():
        raise ConfigurationError(
            f"{source} has no config.json: it was not saved by an LLMModule, so it cannot be exported."
        )
    config = DecoderConfig.load(source)
    expected = config.parameter_shapes()
    wrong = [name for name, shape in expected.items() if name not in stored or stored[name].size != torch.Size(shape)]
    if wrong:
        raise ConfigurationError(
            f"{source} does not hold the model of its config.json: {len(wrong)} of {len(expected)} tensors are missing "
            f"or of another shape, for example {wrong[:3]}."
        )
    element = torch_dtype(dtype) if dtype is not None else stored[next(iter(expected))].properties.dtype
    tensors = ((name, tensor) for name, tensor in opened.iterate_weights() if name in expected)
    save_weights(to_files(tensors, config, element), target, max_shard_size=max_shard_size)
    config.replace(dtype=str(element).removeprefix("torch.")).save(target)
    if (source / TOKENIZER).is_file():
        shutil.copyfile(source / TOKENIZER, target / TOKENIZER)
        _write_tokenizer_config(target, config)
    return target


def _write_tokenizer_config(folder: Path, config: DecoderConfig) -> None:
    """What transformers' AutoTokenizer needs beside tokenizer.json."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if isinstance(config.eos_token_id, int):
        settings["eos_token"] = Tokenizer.from_file(str(folder / TOKENIZER)).id_to_token(config.eos_token_id)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
