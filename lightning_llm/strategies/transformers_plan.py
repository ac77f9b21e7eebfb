"""The plan of a transformers model, derived from the plans that it brings along (`tp_plan`, `pp_plan`).

`plan_of` asks `known_plan` about models without a plan of their own. transformers is imported only when a model of it
runs. Read against transformers 5.23.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.plan import ParallelPlan, TensorStyle

# Model types whose whole forward is what `forward_part` does. Others scale embeddings or logits, route tokens or share
# layers, and would train wrongly without any error.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")

_STYLES: dict[str, TensorStyle] = {
    "embedding_rowwise": "embedding",
    "colwise": "column",
    "rowwise": "row",
    "replicated_with_grad_allreduce": "head_norm",
    "colwise_gather_output": "vocabulary",
}


def known_plan(model: nn.Module) -> ParallelPlan | None:
    """The plan of a model that is transformers' and of a family with a plan, else None.

    A class is known by the names of its ancestors: an `isinstance`, or registering with `plan_of`, would take an import
    of transformers, which costs seconds and which users of other models may not even have.
    """
    ancestors = {(ancestor.__module__, ancestor.__name__) for ancestor in type(model).mro()}
    if ("transformers.modeling_utils", "PreTrainedModel") in ancestors and _is_known(model):
        return plan_from_transformers(model)
    return None


def plan_from_transformers(model: Any) -> ParallelPlan:
    """The plan of a causal language model of transformers: tensor, pipeline and sharded data parallelism.

    transformers says which projections are split and how. What it leaves unsaid is added: blocks that hold split
    projections see the whole sequence, and modules that it does not name work on each position by itself.

    Args:
        model: `LlamaForCausalLM`, `Qwen3ForCausalLM`, ... (see `FAMILIES`), whole.

    Raises:
        ConfigurationError: The model is of another family, or has no output layer.
    """
    config = model.config
    if not _is_known(model):
        raise ConfigurationError(
            f"{type(model).__name__} (model_type {config.model_type!r}) has no plan: causal language models of the "
            f"families {list(FAMILIES)} do. Give a subclass of it a method `parallel_plan()`, or train with data "
            "parallelism alone."
        )
    styles: dict[str, TensorStyle] = {}
    for name, style in model.tp_plan.items():
        styles[name] = _STYLES[style]
        if styles[name] == "column":
            styles[name.rpartition(".")[0]] = "gather"
    for name, module in model.named_modules():
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        if any(True for _ in module.parameters(recurse=False)):
            styles.setdefault(pattern, "norm")
    parts = [name for name, _ in model.named_modules() if name in model.pp_plan]  # in the order of the model
    first = tuple(name for name in parts if model.pp_plan[name][0] == ["input_ids"])
    (units,) = (name for name in parts if isinstance(model.get_submodule(name), nn.ModuleList))
    return ParallelPlan(
        tensor_parallel=styles,
        tensor_divides={
            name: getattr(config, name)
            for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
        },
        pipeline_first=first,
        pipeline_units=units,
        pipeline_last=tuple(name for name in parts if name not in (units, *first)),
        tied=tuple((owner, copy) for copy, owner in model.all_tied_weights_keys.items()),
        forward=forward_part,
    )


def _is_known(model: Any) -> bool:
    return model.config.model_type in FAMILIES and hasattr(model, "lm_head")


def forward_part(
    part: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    sequence_ranks: int = 1,
    **others: Any,
) -> Any:
    """What a model of `FAMILIES` or a pipeline stage of one computes; stands in for its forward once it is cut.

    transformers' own forward cannot go without the embedding or the norm, and takes the length of the sequence and the
    numbers of the layers from what it sees, which on a rank is a part of them.

    Args:
        part: The model, with None in place of what other stages have; its layers keep their numbers.
        input_ids: Token ids `[batch, seq]`, or after the first stage hidden states
            `[batch, seq / sequence_ranks, hidden]`.
        attention_mask: See transformers; `[batch, seq]`, False for padding.
        position_ids: `[batch, seq]` (or `[1, seq]`). Where they start again, another document starts.
        sequence_ranks: Among how many ranks hidden states are split along the sequence.

    Returns:
        Of the whole model what its own forward returns, with logits alone; of a stage hidden states or logits.

    Raises:
        ConfigurationError: It was called with what transformers' forward takes and this one does not.
    """
    from transformers.masking_utils import create_masks_for_generate
    from transformers.modeling_outputs import CausalLMOutputWithPast

    unknown = sorted(name for name, value in others.items() if value is not None and value is not False)
    if unknown:
        raise ConfigurationError(
            f"A {type(part).__name__.removeprefix('FSDP')} that is cut over ranks takes input_ids, attention_mask and "
            f"position_ids, not {unknown}. Compute the loss from the logits in your module's loss()."
        )
    trunk, config = part.model, part.config
    is_first = trunk.embed_tokens is not None
    batch, seq = input_ids.shape[0], input_ids.shape[1] * (1 if is_first else sequence_ranks)
    x = trunk.embed_tokens(input_ids) if is_first else input_ids
    masks = create_masks_for_generate(config, x.new_empty(batch, seq, 0), attention_mask, None, position_ids)
    if position_ids is None:
        position_ids = torch.arange(seq, device=x.device)[None]
    rotary = trunk.rotary_emb(x, position_ids)
    for number, layer in trunk.layers.named_children():
        mask = masks[config.layer_types[int(number)]] if isinstance(masks, dict) else masks
        x = layer(x, attention_mask=mask, position_ids=position_ids, position_embeddings=rotary)
    if trunk.norm is not None:
        x = trunk.norm(x)
    if part.lm_head is None:
        return x
    logits = part.lm_head(x)
    return CausalLMOutputWithPast(logits=logits) if is_first else logits
