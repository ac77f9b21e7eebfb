"""The example of a transformers model: same run in every layout, and the commands of its README."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.transformers_model.causal_lm import CausalLMModule
from lightning_llm import ConfigurationError, TokenDataModule
from tests.examples.runs import LAYOUTS, assert_same_run, call, commands
from tests.strategies.training import VOCAB
from tests.test_cli import STDLIB

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
TIED = {"tie_word_embeddings": True}
WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def make(model: str, **config: Any) -> CausalLMModule:
    return CausalLMModule(model, config={**SMALL, **config}, learning_rate=1e-2)


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("world_size", "sizes"), LAYOUTS)
def test_every_layout_gives_the_same_run(family: str, world_size: int, sizes: dict[str, Any]) -> None:
    assert_same_run(partial(make, family, **(TIED if family == "qwen3" else {})), world_size, sizes)


@pytest.mark.parametrize(
    ("family", "config", "world_size", "sizes"),
    [
        pytest.param(
            *("llama", {}, 4),
            {"tensor_parallel_size": 2, "sequence_parallel": False, "recompute": "full"},
            id="whole sequences, recomputed",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, 2),
            {"tensor_parallel_size": 2, "recompute": "selective"},
            id="windows over a split sequence",
        ),
        pytest.param(
            *("llama", {"num_hidden_layers": 4, **TIED}, 2),
            {"pipeline_parallel_size": 2, "pipeline_schedule": "Interleaved1F1B"},
            id="two stages on each rank",
        ),
        pytest.param("gpt2", {**TIED, **WITHOUT_DROPOUT}, 2, {}, id="a family without a plan, data-parallel"),
    ],
)
def test_variants_give_the_same_run(
    family: str, config: dict[str, Any], world_size: int, sizes: dict[str, Any]
) -> None:
    assert_same_run(partial(make, family, **config), world_size, sizes)


def test_a_folder_gives_its_weights(tmp_path: Path) -> None:
    model = make("qwen3").build_model()
    model.save_pretrained(tmp_path)
    module = CausalLMModule(str(tmp_path))
    module.configure_model()
    assert module.model is not None and module.model.training
    for name, weight in module.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


def test_what_cannot_work_is_said(data: Path) -> None:
    with pytest.raises(ConfigurationError, match="model='lama' is neither a folder nor a model type of transformers"):
        CausalLMModule("lama")
    with pytest.raises(ConfigurationError, match=r"tokenizer has 4096 tokens, but the model's vocab_size is 96\."):
        make("llama").check(TokenDataModule(data))


TRAIN = "python examples/transformers_model/train.py fit -c examples/transformers_model/train.yaml"
TINY = "--trainer.max_steps 2 --trainer.val_check_interval 2 --data.batch_size 8 --data.seq_len 32"


FEWER = "--trainer.devices 2 --trainer.strategy.init_args.tensor_parallel_size 1"


@pytest.mark.slow
@pytest.mark.timeout(900)  # eight processes, each of which imports transformers
def test_the_commands_of_the_readme_run(root: Path) -> None:
    tokenize, train, other, export, tokenize_again, from_folder = commands("transformers_model")
    assert train == TRAIN
    model = root / "runs/transformers_model/model"
    for command in (tokenize, f"{train} {TINY}", f"{other} {TINY} --trainer.devices 2", export):
        done = call(command, root, PATH=STDLIB / "asyncio")
        assert done.returncode == 0, done.stderr
    logits = AutoModelForCausalLM.from_pretrained(model)(torch.arange(8)[None]).logits
    assert logits.shape == (1, 8, 4096)
    for command in (tokenize_again, f"{from_folder} {TINY} {FEWER}"):
        done = call(command.replace("FOLDER", str(model)), root, PATH=STDLIB / "asyncio")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--trainer.strategy.init_args.tensor_parallel_size 4",
            "tensor_parallel_size(4) does not divide num_key_value_heads(2). Sizes that this model allows: [1, 2].",
        ),
        pytest.param(
            "--model.model gpt2",
            "only data parallelism needs no plan, and GPT2LMHeadModel has none.",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_size_that_does_not_fit_ends_with_one_sentence(root: Path, data: Path, options: str, message: str) -> None:
    done = call(f"{TRAIN} --data.path {data} {options}", root)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("train.py: ") and message in last, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_help_shows_the_fields(root: Path) -> None:
    done = call("python examples/transformers_model/train.py fit --help", root)
    assert done.returncode == 0 and "--model.config" in done.stdout
