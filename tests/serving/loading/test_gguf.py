"""`.gguf` files -> the model that they were made of: configs, weights, logits equal to those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.loading import gguf_file, load_folder
from lightning_llm.serving.loading.gguf_conversion import convert_gguf
from lightning_llm.serving.loading.gguf_file import GGUFFile
from tests.serving.loading.ggufs import write_gguf
from tests.serving.smollm2 import smollm2_folder, smollm2_gguf

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def build(family: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():  # norms of one hide what is missing, and so do biases of zero
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


def llama3_factors(head_dim: int = 16) -> np.ndarray:
    """What llama.cpp writes as rope_freqs.weight, by the formula of Meta's `apply_scaling`."""
    factors = []
    for exponent in range(0, head_dim, 2):
        wavelength = 2 * np.pi * 500000.0 ** (exponent / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    return np.array(factors, dtype=np.float32)


MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", "llama", {}, {}),
    "tied": ("Llama", "llama", {"tie_word_embeddings": True}, {}),
    "biases": ("Llama", "llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama3": ("Llama", "llama", {"rope_parameters": LLAMA3}, {"extra": {"rope_freqs.weight": llama3_factors()}}),
    "wide heads": ("Mistral", "llama", {"head_dim": 32, "sliding_window": None}, {}),
    "window": ("Mistral", "llama", {"sliding_window": 5}, {"values": {"attention.sliding_window": 5}}),
    "qwen2": ("Qwen2", "qwen2", {}, {}),
    "qwen3": ("Qwen3", "qwen3", {"head_dim": 32, "tie_word_embeddings": True}, {}),
    "yarn": (
        "Qwen3",
        "qwen3",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        {
            "values": {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
            }
        },
    ),
    "mixtral": ("Mixtral", "llama", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}, {}),
    "old mixtral": (
        "Mixtral",
        "llama",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        {"stacked": False},
    ),
    "qwen3moe": (
        "Qwen3Moe",
        "qwen3moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "head_dim": 16,
        },
        {},
    ),
    "olmoe": ("Olmoe", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model_that_was_written(tmp_path: Path, name: str) -> None:
    family, architecture, settings, options = MODELS[name]
    theirs = build(family, **settings)
    path = write_gguf(tmp_path / "model.gguf", theirs, architecture, **options)
    ours = load_folder(convert_gguf(path, tmp_path / "folder"))
    assert next(ours.decoder.parameters()).dtype == torch.float32, "the file is all float32"
    ids = torch.arange(40)[None] * 7 % SIZES["vocab_size"]
    with torch.no_grad():
        torch.testing.assert_close(ours.decoder(ids), theirs(ids).logits, atol=2e-5, rtol=1e-5)
    with torch.no_grad():  # and transformers takes the folder for the same model
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "MXFP4"])
def test_quantised_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(gguf_file, "_CHUNK", 64 * 7)  # a few rows at a time, and a rest
    model = build("Qwen2")
    quantization = gguf.GGMLQuantizationType[kind]
    file = GGUFFile(write_gguf(tmp_path / "model.gguf", model, "qwen2", quantization=quantization))
    assert file.dtype == {"F16": "float16"}.get(kind, "bfloat16")
    for name, tensor in file.weights(file.config(), torch.float32):
        original = model.state_dict()[name].numpy()
        if original.ndim > 1:
            original = gguf.quants.dequantize(gguf.quants.quantize(original, quantization), quantization)
        np.testing.assert_array_equal(tensor.numpy(), original)


def test_what_decoder_does_not_have_is_refused(tmp_path: Path) -> None:
    model = build("Llama")

    def refused(match: str, architecture: str = "llama", **options: Any) -> None:
        path = write_gguf(tmp_path / "model.gguf", model, architecture, **options)
        with pytest.raises(ConfigurationError, match=match):
            file = GGUFFile(path)
            list(file.weights(file.config(), torch.float32))

    refused("'gpt2' model, which is not supported", "gpt2")
    refused("rope.dimension_count is 8, but heads are 16 wide", values={"rope.dimension_count": 8})
    refused("merge them", values={}, extra={}, tokenizer=lambda writer: writer.add_uint16("split.count", 3))
    refused("blk.0.attn_norm_2.weight", extra={"blk.0.attn_norm_2.weight": np.ones(64, np.float32)})
    refused("not Llama 3's scaling", extra={"rope_freqs.weight": np.arange(8, dtype=np.float32)})


def test_a_truncated_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", build("Llama"), "llama")
    content = path.read_bytes()
    for size in (0, 3, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ConfigurationError, match=r"model.gguf cannot be read as GGUF .* truncated or damaged"):
            GGUFFile(path)
    path.write_bytes(content)
    GGUFFile(path)
    with pytest.raises(ConfigurationError, match="There is no file"):
        GGUFFile(tmp_path / "other.gguf")


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads() -> None:
    """Both dequantise with the library gguf; everything else of the way is a different one."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    ours = load_folder(smollm2_folder("float32"))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(ours.folder))
    read = load_gguf_checkpoint(str(smollm2_gguf()), return_tensors=True, model_to_load=model)["tensors"]
    theirs = transformers.LlamaForCausalLM(model.config).eval()
    assert set(theirs.load_state_dict(read, strict=False).missing_keys) <= {"lm_head.weight"}
    theirs.tie_weights()
    ids = torch.tensor([ours.tokenizer.encode("In 1984 the capital of France was")])
    with torch.no_grad():
        torch.testing.assert_close(ours.decoder(ids), theirs(ids).logits, atol=1e-4, rtol=0)
        answer = theirs.generate(ids, max_new_tokens=16, do_sample=False)
        for _ in range(16):
            ids = torch.cat([ids, ours.decoder(ids)[:, -1:].argmax(-1)], 1)
    assert ids.tolist() == answer.tolist()
    assert "Paris" in ours.tokenizer.decode(ids[0].tolist())
