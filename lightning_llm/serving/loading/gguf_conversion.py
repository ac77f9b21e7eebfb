"""A `.gguf` file -> a Hugging Face folder, tensor by tensor. `sources.py` keeps the folder in the cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lightning_llm.models.expert_weights import to_files
from lightning_llm.models.weights import save_weights, torch_dtype
from lightning_llm.serving.loading.gguf_file import GGUFFile
from lightning_llm.serving.loading.gguf_tokenizer import end_token_ids, read_tokenizer, special_token

SHARD_SIZE = "1GB"  # as much is in memory at once


def convert_gguf(path: str | os.PathLike[str], folder: str | os.PathLike[str], dtype: str = "auto") -> Path:
    """Writes a folder that `Decoder.from_pretrained`, `load_model` and transformers load.

    Args:
        path: Of the file.
        folder: To write.
        dtype: Element type of the weights; "auto": see `GGUFFile.dtype`.

    Raises:
        ConfigurationError: The file is damaged, or describes something that is not implemented; it says what.
    """
    file, target = GGUFFile(path), Path(folder)
    element = file.dtype if dtype == "auto" else str(torch_dtype(dtype)).removeprefix("torch.")
    config = file.config(element)
    target.mkdir(parents=True, exist_ok=True)
    read_tokenizer(file).save(str(target / "tokenizer.json"))
    _write_json(target / "tokenizer_config.json", _tokenizer_config(file, config.max_position_embeddings))
    ends = end_token_ids(file)
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends or None,
        "pad_token_id": config.pad_token_id,
    }
    _write_json(
        target / "generation_config.json", {name: value for name, value in generation.items() if value is not None}
    )
    save_weights(to_files(file.weights(config, torch_dtype(element)), config), target, max_shard_size=SHARD_SIZE)
    config.save(target)
    return target


def _tokenizer_config(file: GGUFFile, length: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
    }
    for name, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = special_token(file, theirs)
        if token is not None:
            settings[f"{name}_token"] = token
    default = file.value("tokenizer.chat_template")
    named = {name: file.value(f"tokenizer.chat_template.{name}") for name in file.value("tokenizer.chat_templates", [])}
    if default is not None and named:
        templates = {"default": default, **{name: text for name, text in named.items() if text}}
        settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    elif default is not None:
        settings["chat_template"] = default
    return settings


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
