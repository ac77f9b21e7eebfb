"""A Hugging Face folder -> a decoder that shares its memory with the files, a tokenizer, and how to sample by default.

Everything that can be served is such a folder in the end; `sources.py` makes one of what is not. No code that lies in a
folder is ever run, and nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.models.expert_weights import PretrainedWeights
from lightning_llm.models.weights import INDEX_FILE, SINGLE_FILE, torch_dtype, whole
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.errors import RequestError
from lightning_llm.serving.tokenizer import CONFIG_FILE, ModelTokenizer, read_json

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
GENERATION_FILE = "generation_config.json"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class LoadedModel:
    """A model that can answer.

    Attributes:
        name: What it is called by those who use it.
        decoder: In evaluation, without gradients. On a CPU its weights may be views of the mapped files, which all
            processes share that serve the same folder.
        tokenizer: Of it.
        folder: That it was loaded from.
        generation_defaults: What its makers say of sampling, in the words of `SamplingParams`: temperature, top_p, ...
    """

    name: str
    decoder: Decoder
    tokenizer: ModelTokenizer
    folder: Path
    generation_defaults: dict[str, Any] = field(default_factory=dict)


def load_folder(
    folder: str | Path,
    *,
    name: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    tokenizer: str | Path | None = None,
    chat_template: str | Path | None = None,
) -> LoadedModel:
    """Loads a Hugging Face folder; see `load_model`."""
    place = Path(folder)
    check_folder(place)
    config = DecoderConfig.load(place)
    generation = read_json(place / GENERATION_FILE)
    defaults = _sampling(generation, place / GENERATION_FILE)
    ends = _ids(generation.get("eos_token_id"), place / GENERATION_FILE) | set(config.eos_token_ids)
    words = ModelTokenizer.load(tokenizer or place, eos_token_ids=ends, chat_template=chat_template)
    if words.vocab_size > config.vocab_size:
        raise ConfigurationError(
            f"{place}: the tokenizer has {words.vocab_size} tokens and the model's embedding {config.vocab_size} "
            f"rows, {words.vocab_size - config.vocab_size} too few: they are not of the same model."
        )
    decoder = load_decoder(place, config, dtype=dtype, device=device)
    return LoadedModel(name or place.resolve().name, decoder, words, place, defaults)


def check_folder(folder: Path) -> None:
    """Refuses what is no folder of weights that can be loaded without running what lies in it.

    Raises:
        ConfigurationError: It says what is in the way, and what to do.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"There is no folder {folder}: give a model folder, a .gguf file or a model's name.")
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if not files:
        raise ConfigurationError(f"{folder} is empty: a model has config.json, *.safetensors and tokenizer.json.")
    for name in ("config.json", CONFIG_FILE):
        auto_map = read_json(folder / name).get("auto_map")
        if auto_map:
            raise ConfigurationError(
                f"{folder / name} has auto_map ({_code_in(auto_map)}): the model comes with code of its own "
                "(trust_remote_code), and code from a model's folder is never run. If it is one of the architectures "
                "that Decoder has, remove auto_map and set model_type; otherwise it cannot be served here."
            )
    if not {SINGLE_FILE, INDEX_FILE} & set(files):
        pickled = sorted({path.name for pattern in PICKLED for path in folder.glob(pattern)})
        if pickled:
            raise ConfigurationError(
                f"{folder} has its weights in {pickled[0]}, which is pickled: loading it could run whatever its author "
                "liked, so it is never done. Fetch the model's safetensors, or have transformers write them, on a "
                "machine where that is no harm: `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`."
            )
        gguf = [name for name in files if name.endswith(".gguf")]
        if gguf and "config.json" not in files:
            raise ConfigurationError(f"{folder} has .gguf files: name one, such as {folder / gguf[0]}.")


def _code_in(auto_map: Any) -> str:
    return ", ".join(map(str, auto_map.values())) if isinstance(auto_map, dict) else str(auto_map)


def _sampling(generation: Mapping[str, Any], origin: Path) -> dict[str, Any]:
    """What a `generation_config.json` says of sampling. Without `do_sample`, nothing is drawn; penalties stay."""
    defaults = {key: generation[key] for key in _SAMPLING if generation.get(key) is not None}
    if generation.get("do_sample") is False:
        penalty = {key: value for key, value in defaults.items() if key == "repetition_penalty"}
        defaults = {"temperature": 0.0} | penalty
    try:
        SamplingParams(**defaults)
    except RequestError as error:
        raise ConfigurationError(f"{origin}: {error} Correct it, or take it out.") from None
    return defaults


def _ids(value: Any, origin: Path) -> set[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ConfigurationError(f"{origin}: eos_token_id is {value!r}, not a token id or a list of them.")
    return set(ids)


@torch.no_grad()
def load_decoder(
    folder: str | Path,
    config: DecoderConfig,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> Decoder:
    """The decoder of a folder, for inference: what is on the disk as it is wanted is not copied.

    On a CPU, a tensor whose type on the disk is `dtype` becomes a view of the mapped file, which is in memory once for
    all processes that map it, and is read when it is first used. (Stacked experts are copied: a folder has one tensor
    for each.) The files may be replaced meanwhile, but not written into.

    Args:
        folder: With safetensors.
        config: Of it.
        dtype: "auto": as the config says.
        device: Where to.

    Raises:
        ConfigurationError: A file is missing or damaged, or tensors are missing, extra or of another shape.
    """
    element = torch_dtype(config.dtype if dtype == "auto" else dtype)
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to(element)
    state: dict[str, Tensor] = {}
    with PretrainedWeights(folder, config) as source:
        for name, tensor in decoder.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            _, box, shape = whole(tensor)
            part = source.read(name, box, shape)
            if not part.is_floating_point():
                raise ConfigurationError(
                    f"{folder}: {name} holds {part.dtype} values: quantised weights cannot be loaded as they are."
                )
            state[name] = part.to(device, tensor.dtype)
    decoder.load_state_dict(state, strict=False, assign=True)
    decoder.tie_weights()
    return decoder.requires_grad_(False).eval()
