"""Plans of transformers' models: what they say, and that a cut model computes what transformers' own forward does."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lightning_llm import ConfigurationError
from lightning_llm.strategies.mesh import ParallelDims
from lightning_llm.strategies.plan import plan_of
from lightning_llm.strategies.stages import keep_stages, split_units
from lightning_llm.strategies.transformers_plan import FAMILIES, forward_part, plan_from_transformers

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
SEQ_LEN = 12
# Sliding windows shorter than the sequence, where a family has them; all kinds of layers in both stages.
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
}


def make(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **changes})).double()


def inputs(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 96, (2, SEQ_LEN), generator=generator)
    if kind == "padding":
        mask = torch.ones_like(tokens)
        mask[1, -4:] = 0
        return {"input_ids": tokens, "attention_mask": mask}
    if kind == "packed documents":
        return {"input_ids": tokens, "position_ids": torch.cat([torch.arange(7), torch.arange(5)]).expand(2, -1)}
    return {"input_ids": tokens}


@pytest.mark.parametrize("kind", ["plain", "padding", "packed documents"])
@pytest.mark.parametrize("window", [False, True], ids=["whole", "window"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_compute_what_the_whole_model_does(family: str, window: bool, kind: str) -> None:
    if window and family not in WINDOWS:
        pytest.skip(f"{family} has no sliding window")
    changes = WINDOWS[family] if window else {}
    batch = inputs(kind)
    with torch.no_grad():
        expected = make(family, **changes)(**batch, use_cache=False).logits  # with a cache it misses packing
        x, keywords = batch["input_ids"], {name: value for name, value in batch.items() if name != "input_ids"}
        torch.testing.assert_close(forward_part(make(family, **changes), x, **keywords).logits, expected)
        for stage in range(3):
            model = make(family, **changes)
            plan = plan_from_transformers(model)
            keep_stages(model, plan, [stage], split_units(plan, model, 3))
            x = forward_part(model, x, **keywords)
    torch.testing.assert_close(x, expected)


def test_a_plan_names_every_parameter_and_what_is_tied() -> None:
    model = make("qwen3", tie_word_embeddings=True)
    plan = plan_of(model)
    assert plan is not None
    assert plan.tensor_parallel["model.layers.*.self_attn.q_norm"] == "head_norm"
    assert plan.pipeline_first == ("model.embed_tokens",)
    assert plan.pipeline_last == ("model.norm", "lm_head")
    assert plan.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert plan_from_transformers(make("qwen3")).tied == ()
    parents = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    assert {name.replace(".0.", ".*.") for name in parents if ".0." in name or "layers" not in name} <= set(
        plan.tensor_parallel
    )


def test_a_plan_of_ones_own_comes_first() -> None:
    model = make("llama")
    own = replace(plan_from_transformers(model), tensor_divides={"anything": 7})
    model.parallel_plan = own
    assert plan_of(model) is own


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(partial(make, "gpt2", n_embd=32, n_head=2), id="another family"),
        pytest.param(lambda: AutoModel.from_config(AutoConfig.for_model("llama", **SMALL)), id="no output layer"),
    ],
)
def test_other_models_have_no_plan(model: Any) -> None:
    made = model()
    assert plan_of(made) is None
    with pytest.raises(ConfigurationError, match=r"has no plan: causal language models of the families \['llama'"):
        plan_from_transformers(made)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor_parallel_size": 4}, r"tensor_parallel_size\(4\) does not divide num_key_value_heads\(2\).*\[1, 2\]"),
        ({"pipeline_parallel_size": 5}, r"pipeline_parallel_size\(5\) is more than the 4 layers"),
        ({"context_parallel_size": 2}, r"names no `attention_heads`"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], message: str) -> None:
    model = make("llama")
    with pytest.raises(ConfigurationError, match=message):
        plan_from_transformers(model).check(model, ParallelDims.resolve(next(iter(sizes.values())), **sizes))


def test_a_cut_model_says_what_it_does_not_take() -> None:
    model, tokens = make("llama"), inputs("plain")["input_ids"]
    with pytest.raises(
        ConfigurationError, match=r"LlamaForCausalLM that is cut .* not \['labels'\]\. Compute the loss"
    ):
        forward_part(model, tokens, labels=tokens, use_cache=False)


def test_transformers_is_not_imported_for_other_models() -> None:
    code = (
        "import sys, torch\n"
        "from lightning_llm.strategies.plan import plan_of\n"
        "assert plan_of(torch.nn.Linear(1, 1)) is None\n"
        "assert 'transformers.modeling_utils' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
