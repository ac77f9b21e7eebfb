"""What the ranks of a layout must send each other in one training step, at the least: the formulas, with their sources.

Bytes per rank, as the mean over all ranks, and for the algorithm that the strategy follows: ring attention's minimum is
a ring's. Collectives count as in `traffic.Sent`. layout_traffic.py measures the other side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_llm.models.config import DecoderConfig
from lightning_llm.strategies.layout import Layout
from lightning_llm.strategies.mesh import ParallelDims


@dataclass(frozen=True)
class Term:
    """One reason to send.

    Attributes:
        axis: Mesh axis: `pp`, `dp_replicate`, `fsdp`, `tp`, `cp`, `ep` or `efsdp`.
        kind: As in `traffic.Sent`.
        sent: Bytes per rank and step.
        reason: What is sent.
        source: Where the number is from.
    """

    axis: str
    kind: str
    sent: float
    reason: str
    source: str


ZERO = "ZeRO, https://arxiv.org/abs/1910.02054, section 7"
MEGATRON = "Megatron-LM, https://arxiv.org/abs/1909.08053, section 3"
SEQUENCE = "Megatron-LM's sequence parallelism, https://arxiv.org/abs/2205.05198, section 4.2.2"
PIPELINE = "Megatron-LM's pipeline, https://arxiv.org/abs/2104.04473, section 3.2"
LLAMA3 = "Llama 3, https://arxiv.org/abs/2407.21783, section 3.3.2"
ULYSSES = "DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509, section 3.2"
RING = "Ring attention, https://arxiv.org/abs/2310.01889"
GSHARD = "GShard, https://arxiv.org/abs/2006.16668, section 3.2"


@dataclass(frozen=True, kw_only=True)
class Work:
    """A step of training.

    Attributes:
        config: The model: no tied embeddings, and experts in all layers or in none.
        dims: Ranks of each axis.
        layout: The strategy's other settings.
        batch_size: Sequences over all data ranks.
        seq_len: Tokens of each.
        element_size: Bytes of a parameter, a gradient or an activation.
    """

    config: DecoderConfig
    dims: ParallelDims
    layout: Layout
    batch_size: int
    seq_len: int
    element_size: int = 4

    @property
    def tokens(self) -> int:
        """Of one data rank's part of one context rank's share of the sequences."""
        return self.batch_size // self.dims.data_parallel_size * (self.seq_len // self.dims.context_parallel_size)

    @property
    def activation(self) -> int:
        """Bytes of the hidden states [batch, seq, hidden] of those tokens."""
        return self.tokens * self.config.hidden_size * self.element_size

    @property
    def layers(self) -> float:
        """Layers of one pipeline rank, on average."""
        return self.config.num_hidden_layers / self.dims.pipeline_parallel_size

    @property
    def ends(self) -> float:
        """Embeddings, or heads, of one pipeline rank, on average."""
        return 1 / self.dims.pipeline_parallel_size


def least_traffic(work: Work) -> list[Term]:
    """Every reason that the layout has to send something."""
    terms = [*_data(work), *_tensor(work), *_pipeline(work), *_context(work), *_experts(work)]
    return [term for term in terms if term.sent]


def _parameters(work: Work) -> tuple[float, float, float]:
    """Bytes of one rank's share of the model without sharding over data ranks: embedding, norm and head; blocks;
    experts."""
    dims = work.dims
    ends = blocks = experts = 0.0
    for name, shape in work.config.parameter_shapes().items():
        size = math.prod(shape) * work.element_size / dims.pipeline_parallel_size
        if ".experts." in name:
            experts += size / dims.expert_parallel_size
        else:  # vectors and routers are whole on every tensor rank
            whole = len(shape) == 1 or name.endswith(".gate.weight")
            local = size if whole else size / dims.tensor_parallel_size
            if name.startswith("model.layers."):
                blocks += local
            else:
                ends += local
    return ends, blocks, experts


def _data(work: Work) -> list[Term]:
    """P bytes of parameters over n ranks: stage 3 gathers blocks for the forward and again for the backward, but what
    is at both ends of the forward (embedding, norm, head) once, for the backward begins there. Stages 1 and 2 (and any
    stage in a pipeline) gather once. Gradients are reduced to the rank that needs them. Replicas all-reduce them.

    Stage 3: 3 (n - 1) / n * P for blocks, 2 (n - 1) / n * P for the ends, as for all in stages 1 and 2; replicas: 2 (n
    - 1) / n * P.
    """
    dims = work.dims
    ranks = dims.data_parallel_size * dims.context_parallel_size
    ends, blocks, experts = _parameters(work)
    gathers = 2 if work.layout.zero_stage == 3 and dims.pipeline_parallel_size == 1 else 1
    terms = []
    of_experts = ranks * dims.tensor_parallel_size // dims.expert_parallel_size
    for what, size, axis, n, times in (
        ("embedding, norm and head", ends, "fsdp", ranks, 1),
        ("blocks", blocks, "fsdp", ranks, gathers),
        ("experts", experts, "efsdp", of_experts, gathers),
    ):
        replicas = n if work.layout.replicates_all else dims.replicate_size
        shards = n // replicas
        others = (shards - 1) / shards
        terms += [
            Term(axis, "all_gather", times * others * size, f"{what}, {times} times", ZERO),
            Term(axis, "reduce_scatter", others * size, f"gradients of {what}", ZERO),
            Term(
                "dp_replicate",
                "all_reduce",
                2 * (replicas - 1) / replicas * size / shards,
                f"gradients of {what}",
                ZERO,
            ),
        ]
    return terms


def _tensor(work: Work) -> list[Term]:
    """A block's attention and MLP each begin with the whole hidden states A and end with a sum over the ranks: two
    all-reduces in the forward and two in the backward, or with sequence parallelism an all-gather and a reduce-scatter
    in place of each. The embedding ends with such a sum, the head begins with the whole. Cross entropy over a split
    vocabulary needs three numbers for each token: maximum, sum of exponentials, the label's logit. With sequence
    parallelism norms see a part of the tokens on each rank, so that their gradients are summed.
    """
    n = work.dims.tensor_parallel_size
    others = (n - 1) / n
    sums = others * work.activation * (4 * work.layers + 2 * work.ends)  # in the forward and in the backward
    loss = 3 * 2 * others * work.tokens * work.element_size * work.ends
    loss_term = Term("tp", "all_reduce", loss, "three numbers of each token for the loss", MEGATRON)
    if not work.layout.sequence_parallel:
        return [Term("tp", "all_reduce", 2 * sums, "activations and their gradients", MEGATRON), loss_term]
    per_layer = sum(
        math.prod(shape) for name, shape in work.config.parameter_shapes().items() if len(shape) == 1 and ".0." in name
    )
    norms = (per_layer * work.layers + work.config.hidden_size * work.ends) * work.element_size
    return [
        Term("tp", "all_gather", sums, "activations and their gradients", SEQUENCE),
        Term("tp", "reduce_scatter", sums, "activations and their gradients", SEQUENCE),
        loss_term,
        Term("tp", "all_reduce", 2 * others * norms, "gradients of norms", SEQUENCE),
    ]


def _pipeline(work: Work) -> list[Term]:
    """Between two neighbouring stages the hidden states of all microbatches go forward, their gradients come back."""
    ranks = work.dims.pipeline_parallel_size
    if ranks == 1:
        return []
    schedule = work.layout.schedule
    stages = ranks * work.layout.stages_per_rank
    crossed = sum(schedule.rank_of(i, ranks) != schedule.rank_of(i + 1, ranks) for i in range(stages - 1))
    shared = work.dims.tensor_parallel_size if work.layout.sequence_parallel else 1
    sent = 2 * crossed * work.activation / shared / ranks
    return [Term("pp", "send", sent, "activations and their gradients", PIPELINE)]


def _context(work: Work) -> list[Term]:
    """Keys and values KV of this rank's tokens, queries Q, per layer over n ranks.

    allgather: KV to the n - 1 others, and as much back for their gradients. ulysses: (n - 1) / n of Q, KV and the
    output (as large as Q), and of their gradients. ring: KV n - 1 times around in the forward and in the backward, and
    n - 1 times its gradients, which can start at the first rank that adds to them and end at home.
    """
    config, n = work.config, work.dims.context_parallel_size
    head = config.head_dim * work.tokens * work.element_size / work.dims.tensor_parallel_size
    queries, kv = config.num_attention_heads * head, 2 * config.num_key_value_heads * head
    if work.layout.context_parallel_method == "allgather":
        sent = (n - 1) * kv * work.layers
        return [
            Term("cp", "all_gather", sent, "keys and values", LLAMA3),
            Term("cp", "reduce_scatter", sent, "gradients of keys and values", LLAMA3),
        ]
    if work.layout.context_parallel_method == "ulysses":
        # Every rank needs a key-value head of its own.
        kv *= max(1, n * work.dims.tensor_parallel_size // config.num_key_value_heads)
        sent = 2 * (n - 1) / n * (2 * queries + kv) * work.layers
        return [Term("cp", "all_to_all", sent, "queries, keys, values, outputs and their gradients", ULYSSES)]
    return [Term("cp", "send", 3 * (n - 1) * kv * work.layers, "keys and values twice, their gradients once", RING)]


def _experts(work: Work) -> list[Term]:
    """Each token goes to its top_k experts and comes back, and so do the gradients; routing is balanced."""
    config, n = work.config, work.dims.expert_parallel_size
    if config.num_moe_layers == 0:
        return []
    shared = work.dims.tensor_parallel_size if work.layout.sequence_parallel else 1
    copies = work.activation / shared * config.num_experts_per_tok
    layers = config.num_moe_layers / work.dims.pipeline_parallel_size
    return [Term("ep", "all_to_all", 4 * (n - 1) / n * copies * layers, "tokens, results and their gradients", GSHARD)]
