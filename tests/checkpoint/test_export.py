"""From a checkpoint of a 3D run to transformers: equal logits, equal greedy text, equal validation loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lightning_llm import Decoder, TokenDataModule
from lightning_llm.checkpoint.export import export
from lightning_llm.errors import ConfigurationError, NoGoodCheckpointError
from lightning_llm.models.generation import generate
from tests.checkpoint.damage import reseal
from tests.checkpoint.runs import CONFIG, run
from tests.distributed import run_distributed

CONFIGS = {
    "llama": CONFIG,
    "tied": CONFIG.replace(tie_word_embeddings=True),
    "qwen3": CONFIG.replace(qk_norm=True, model_type="qwen3"),
}
EXPERTS = {
    "mixtral": CONFIG.replace(num_experts=4, num_experts_per_tok=2, model_type="mixtral"),
    "dots1": CONFIG.replace(
        num_experts=4,
        num_experts_per_tok=2,
        qk_norm=True,
        scoring_func="sigmoid",
        use_routing_bias=True,
        n_shared_experts=1,
        first_k_dense_replace=1,
        model_type="dots1",
    ),
}


def train_and_save(world_size: int, sizes: dict[str, Any], corpus: Path, path: Path, name: str) -> float:
    return run(world_size, sizes, corpus, config={**CONFIGS, **EXPERTS}[name], steps=4, save_at={4: path})["val_loss"]


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_the_export(tmp_path: Path, corpus: Path, name: str) -> None:
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    val_loss = run_distributed(train_and_save, 4, 4, sizes, corpus, tmp_path / "checkpoint", name)[0]
    folder = export(tmp_path / "checkpoint", tmp_path / "model", max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").is_file(), "small shards were asked for"

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = Decoder.from_pretrained(folder)
    data = TokenDataModule(corpus, batch_size=8, seq_len=32)
    losses = []
    with torch.no_grad():
        for batch, _ in zip(data.val_dataloader(), range(2), strict=False):
            logits = theirs(batch["input_ids"]).logits
            torch.testing.assert_close(ours(batch["input_ids"]), logits, atol=1e-5, rtol=0)
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item())
    assert val_loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("def main(")["input_ids"]
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
    eos = ours.config.eos_token_id
    assert isinstance(eos, int) and tokenizer.eos_token_id == eos
    assert list(generate(ours, prompt, max_tokens=24, eos_token_ids=(eos,))) == expected


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_exported_one_by_one(tmp_path: Path, corpus: Path, name: str) -> None:
    run_distributed(train_and_save, 2, 2, {}, corpus, tmp_path / "checkpoint", name)
    folder = export(tmp_path / "checkpoint", tmp_path / "model")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(Decoder.from_pretrained(folder)(ids), theirs(ids).logits, atol=1e-5, rtol=0)


def test_export_in_another_type(tmp_path: Path, corpus: Path) -> None:
    run_distributed(train_and_save, 1, 1, {}, corpus, tmp_path / "checkpoint", "llama")
    folder = export(tmp_path / "checkpoint", tmp_path / "model", dtype="bfloat16")
    assert transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


def test_what_cannot_be_exported_is_named(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ConfigurationError, match="no checkpoint at"):
        export(tmp_path / "none", tmp_path / "model")
    run_distributed(train_and_save, 1, 1, {}, corpus, tmp_path / "checkpoint", "llama")
    CONFIG.replace(hidden_size=64).save(tmp_path / "checkpoint")
    with pytest.raises(NoGoodCheckpointError, match=r"config\.json: it has \d+ bytes instead of \d+"):
        export(tmp_path / "checkpoint", tmp_path / "model")
    reseal(tmp_path / "checkpoint")
    with pytest.raises(ConfigurationError, match="missing or of another shape"):
        export(tmp_path / "checkpoint", tmp_path / "model")
    (tmp_path / "checkpoint" / "config.json").unlink()
    reseal(tmp_path / "checkpoint")
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        export(tmp_path / "checkpoint", tmp_path / "model")
