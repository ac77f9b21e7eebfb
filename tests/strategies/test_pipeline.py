"""Every schedule: whatever shape a batch has and whatever is asked of it, the values are those of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_llm import Decoder, DecoderConfig
from lightning_llm.errors import ConfigurationError
from lightning_llm.planner.schedules import SCHEDULES, schedule_kind
from lightning_llm.strategies.mesh import Meshes, ParallelDims
from lightning_llm.strategies.optimization import align_gradients
from lightning_llm.strategies.pipeline import MAX_SCHEDULES, Pipeline
from lightning_llm.strategies.plan import ParallelPlan, plan_of
from lightning_llm.strategies.sharding import Sharding, apply_sharding
from lightning_llm.strategies.stages import keep_stages, split_units
from lightning_llm.strategies.tensor import apply_tensor_parallel, logits_context
from lightning_llm.strategies.tied import add_tied_gradients, ends_group
from tests.distributed import full, run_distributed
from tests.strategies.training import SMALL, VOCAB

NAMES = [kind.name for kind in SCHEDULES]
MULTI_STAGE = [kind.name for kind in SCHEDULES if kind.multi_stage]
ZERO_BUBBLE = [kind.name for kind in SCHEDULES if kind.splits_backward]
PP2, PP4 = {"pipeline_parallel_size": 2}, {"pipeline_parallel_size": 4}
TP2 = {"tensor_parallel_size": 2}
CPU = torch.device("cpu")
IGNORED = -100
EIGHT = SMALL.replace(num_hidden_layers=8)
TIED = SMALL.replace(tie_word_embeddings=True)

Call = tuple[str, int, int]  # kind, sequences of each data rank, length
CALLS: list[Call] = [
    ("eval", 6, 8),  # Lightning's sanity check comes before training
    ("train", 8, 16),
    ("train", 8, 16),
    ("eval", 8, 16),
    ("train", 8, 12),  # another length
    ("train", 4, 16),  # another batch size
    ("forward", 8, 16),
    ("forward", 6, 8),
    ("eval", 1, 8),  # fewer sequences than stages, as a loader's last batch may have
    ("train", 1, 16),
    ("train", 7, 16),
    ("forward", 1, 8),
    ("train with positions", 7, 16),
    ("forward with positions", 7, 16),
    ("train", 8, 16),
]

ESSENTIAL: list[Call] = [("eval", 6, 8), ("train", 8, 16), ("forward", 6, 8), ("train with positions", 7, 16)]


def sum_loss(logits: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss.to_local() if hasattr(loss, "to_local") else loss


class Run:
    """A decoder cut as a layout says, beside the same one whole."""

    def __init__(
        self,
        schedule: str,
        sizes: dict[str, int],
        config: DecoderConfig = SMALL,
        microbatches: int | str = "auto",
        prepare: Callable[[nn.Module], None] | None = None,
    ) -> None:
        torch.set_default_dtype(torch.float64)
        self.dims = ParallelDims.resolve(dist.get_world_size(), **sizes)
        self.meshes: Meshes = self.dims.build("cpu")
        self.whole, self.model = self._decoder(config), self._decoder(config)
        plan = plan_of(self.model)
        assert plan is not None
        self.plan: ParallelPlan = plan
        kind, ranks = schedule_kind(schedule), self.dims.pipeline_parallel_size
        stages_per_rank = kind.resolve_stages_per_rank()
        cut = split_units(plan, self.model, ranks * stages_per_rank)
        stages = keep_stages(self.model, plan, kind.stage_ids(self.meshes.pipeline_rank, ranks, stages_per_rank), cut)
        for module in stages.values():
            if self.dims.tensor_parallel_size > 1:
                apply_tensor_parallel(module, self.meshes.tensor, plan, sequence_parallel=True)
            for unit in plan.units(module) if prepare is not None else ():
                prepare(unit)
            if self.dims.data_parallel_size > 1:
                sharding = Sharding(mesh=self.meshes.sharding, reshard_after_forward=False)
                apply_sharding(module, plan.units(module), sharding)
        self.ends = ends_group(self.meshes.dense, kind)
        self.pipeline = Pipeline(
            stages, self.meshes.pipeline, CPU, schedule=schedule.lower(), microbatches=microbatches
        )

    @staticmethod
    def _decoder(config: DecoderConfig) -> Decoder:
        model = Decoder(config).double()
        model.reset_parameters(seed=3)
        return model

    def call(self, kind: str, batch_size: int, seq_len: int) -> float:
        """Asks both models the same; returns the largest relative error."""
        ranks, rank = self.dims.data_parallel_size, self.dims.data_rank(dist.get_rank())
        generator = torch.Generator().manual_seed(seq_len)
        tokens = torch.randint(0, VOCAB, (batch_size * ranks, seq_len + 1), generator=generator)
        tokens, labels = tokens[:, :-1], tokens[:, 1:].clone()
        labels[0, :3] = IGNORED
        keywords = {}
        if kind.endswith("with positions"):
            keywords["positions"] = torch.arange(seq_len) + torch.arange(batch_size * ranks)[:, None]
        mine = slice(rank * batch_size, (rank + 1) * batch_size)
        own = {name: tensor[mine] for name, tensor in keywords.items()}
        if kind.startswith("forward"):
            expected, seen = (
                [self.whole(tokens, **keywords)[mine].detach()],
                [self.pipeline.forward(tokens[mine], **own)],
            )
        else:
            with torch.set_grad_enabled(kind.startswith("train")), logits_context():
                loss = self.pipeline.run(tokens[mine], labels[mine], sum_loss, **own)
            with torch.set_grad_enabled(kind.startswith("train")):
                whole = sum_loss(self.whole(tokens, **keywords), labels)
            assert not loss.requires_grad
            if ranks > 1:
                dist.all_reduce(loss, group=self.meshes.sharding.get_group())
            expected, seen = [whole.detach()], [loss]
            if kind.startswith("train"):
                whole.backward()
                align_gradients(self.model.parameters())
                if self.plan.tied:
                    add_tied_gradients(self.model, self.plan, self.ends)
                of_whole, of_stages = self.gradients()
                expected += of_whole
                seen += of_stages
                self.zero_grad()
            assert all(parameter.grad is None for parameter in self.model.parameters())
        for want, got in zip(expected, seen, strict=True):
            assert want.shape == got.shape and got.dtype == torch.float64
        return max(float((want - got).norm() / want.norm()) for want, got in zip(expected, seen, strict=True))

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of the parameters that are here: in the whole model, and here. Data ranks average, the whole model sums."""
        owner_of = {copy: owner for owner, copy in self.plan.tied}
        of_whole = {name: parameter.grad for name, parameter in self.whole.named_parameters()}
        pairs = [(of_whole[owner_of.get(name, name)], p.grad) for name, p in self.model.named_parameters()]
        assert all(want is not None and got is not None for want, got in pairs)
        here = [full(got) * self.dims.data_parallel_size for _, got in pairs]
        return [want.clone() for want, _ in pairs], here  # type: ignore[union-attr]

    def zero_grad(self) -> None:
        self.whole.zero_grad()
        self.model.zero_grad()


def walk(calls: list[Call], schedule: str, sizes: dict[str, int], config: DecoderConfig, **arguments: Any) -> float:
    """Runs the calls in a row on one pipeline; returns the largest relative error against the whole model."""
    run = Run(schedule, sizes, config, **arguments)
    errors = [(run.call(*call), call) for call in calls]
    assert max(errors)[0] < 1e-12, errors
    return max(errors)[0]


def cases(
    names: list[str], world_size: int, sizes: dict[str, int], label: str, config: DecoderConfig = SMALL, slow: Any = ()
) -> list[Any]:
    return [
        pytest.param(
            name, world_size, sizes, config, id=f"{label}, {name}", marks=pytest.mark.slow if name in slow else ()
        )
        for name in names
    ]


@pytest.mark.parametrize(
    ("schedule", "world_size", "sizes", "config"),
    [
        *cases(NAMES, 2, PP2, "pp2"),
        *cases(NAMES, 2, PP2, "pp2, tied", TIED, slow=("GPipe", "LoopedBFS", "InterleavedZeroBubble")),
        *cases(NAMES, 4, PP4, "pp4", EIGHT, slow=("GPipe", "1F1B", "LoopedBFS", "InterleavedZeroBubble")),
        *cases(MULTI_STAGE, 4, PP2, "pp2 x dp2, tied", TIED, slow=("LoopedBFS", "DualPipeV")),
        *cases(NAMES, 4, {**PP2, **TP2}, "pp2 x tp2, tied", TIED, slow={*NAMES} - {"Interleaved1F1B", "ZBVZeroBubble"}),
        *cases(MULTI_STAGE, 8, {**PP2, **TP2}, "pp2 x dp2 x tp2, tied", TIED, slow=NAMES),
    ],
)
def test_all_is_as_in_the_whole_model(
    schedule: str, world_size: int, sizes: dict[str, int], config: DecoderConfig
) -> None:
    calls = [call for call in CALLS if call in ESSENTIAL] if "tensor_parallel_size" in sizes else CALLS
    run_distributed(walk, world_size, calls, schedule, sizes, config)


@pytest.mark.parametrize("microbatches", [2, 8])
def test_a_number_of_microbatches_may_be_given(microbatches: int) -> None:
    def count() -> int:
        run = Run("1F1B", PP2, SMALL, microbatches)
        calls: list[int] = []
        run.model.register_forward_hook(lambda *_: calls.append(1))
        assert max(run.call(*call) for call in CALLS[1:4]) < 1e-12
        calls.clear()
        run.call("train", 8, 16)
        return len(calls)

    assert run_distributed(count, 2) == [microbatches] * 2


def accumulate(schedule: str) -> float:
    run = Run(schedule, PP2)
    for seq_len in (16, 12, 16):
        tokens = torch.arange(16 * (seq_len + 1)).view(16, -1) % VOCAB
        mine = slice(8 * run.dims.data_rank(dist.get_rank()), None)
        run.pipeline.run(tokens[mine, :-1][:8], tokens[mine, 1:][:8], sum_loss)
        sum_loss(run.whole(tokens[:, :-1]), tokens[:, 1:]).backward()
    return max(float((want - got).norm() / want.norm()) for want, got in zip(*run.gradients(), strict=True))


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_gradients_add_up_over_batches_of_changing_length(schedule: str) -> None:
    """Under FSDP torch drops what has accumulated when it meets a new shape."""
    assert max(run_distributed(accumulate, 4, schedule)) < 1e-12


def load_between_evaluations() -> float:
    run = Run("Interleaved1F1B", PP2)
    assert run.call("eval", 4, 8) < 1e-12
    with torch.no_grad():
        for parameter in (*run.model.parameters(), *run.whole.parameters()):
            parameter.mul_(0.5)
    return run.call("eval", 4, 8)


def test_new_weights_count_at_the_next_evaluation() -> None:
    """Sharded parameters that stay gathered after a forward would hide them."""
    assert max(run_distributed(load_between_evaluations, 4)) < 1e-12


def forget() -> tuple[int, float]:
    run = Run("ZBVZeroBubble", PP2)
    error = max(run.call("train", 4, seq_len) for seq_len in (*range(2, MAX_SCHEDULES + 5), 2))
    return len(run.pipeline._schedules), error


def test_schedules_of_old_shapes_are_forgotten() -> None:
    for kept, error in run_distributed(forget, 2):
        assert kept == MAX_SCHEDULES and error < 1e-12


def freeze(schedule: str) -> float:
    """Fine-tuning of the last layer and the head: no gradient goes to the first stages."""
    run = Run(schedule, PP2)
    for model in (run.whole, run.model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.3." in name or "lm_head" in name)
    tokens = torch.arange(8 * 9).view(8, 9) % VOCAB
    run.pipeline.run(tokens[:, :-1], tokens[:, 1:], sum_loss)
    sum_loss(run.whole(tokens[:, :-1]), tokens[:, 1:]).backward()
    expected = {name: parameter.grad for name, parameter in run.whole.named_parameters()}
    errors = [0.0]
    for name, parameter in run.model.named_parameters():
        want = expected[name]
        assert (parameter.grad is None) == (want is None)
        if parameter.grad is not None and want is not None:
            errors.append(float((want - parameter.grad).norm() / want.norm()))
    return max(errors)


@pytest.mark.parametrize("schedule", ["1F1B", "LoopedBFS", "ZBVZeroBubble", "DualPipeV"])
def test_first_stages_may_be_frozen(schedule: str) -> None:
    assert max(run_distributed(freeze, 2, schedule)) < 1e-12


def recompute(unit: nn.Module) -> None:
    unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)  # type: ignore[method-assign]


def recompute_selectively(unit: nn.Module) -> None:
    def keep_matrices(_: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
        keep = operation == torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, keep_matrices)
    unit.forward = partial(checkpoint, unit.forward, use_reentrant=False, context_fn=contexts)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "schedule", [pytest.param(n, marks=() if n in ("1F1B", "ZBVZeroBubble") else pytest.mark.slow) for n in NAMES]
)
def test_blocks_may_be_recomputed(schedule: str) -> None:
    run_distributed(partial(walk, prepare=recompute), 2, [("train", 8, 16)], schedule, PP2, SMALL)


@pytest.mark.parametrize("schedule", ["1F1B", *(pytest.param(name, marks=pytest.mark.slow) for name in ZERO_BUBBLE)])
def test_selective_recomputation_needs_a_whole_backward(schedule: str) -> None:
    arguments = (partial(walk, prepare=recompute_selectively), 2, [("train", 8, 16)], schedule, PP2, SMALL)
    if schedule in ZERO_BUBBLE:  # a limit of torch 2.13; strategies refuse the combination because of it
        with pytest.raises(AssertionError, match="Trying to backward an extra time"):
            run_distributed(*arguments)
    else:
        run_distributed(*arguments)


class Pairs(nn.Module):
    """What flows is a tensor and a view of another one; blocks of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed: nn.Embedding | None = nn.Embedding(VOCAB, 8)
        self.blocks = nn.ModuleDict({str(i): nn.Linear(8, 8) for i in range(4)})
        self.head: nn.Linear | None = nn.Linear(8, VOCAB)

    parallel_plan = ParallelPlan(pipeline_first=("embed",), pipeline_units="blocks", pipeline_last=("head",))

    def forward(self, x: Tensor, skipped: Tensor | None = None) -> Any:
        if self.embed is not None:
            x = self.embed(x)
            skipped = x.transpose(1, 2)
        assert skipped is not None
        for block in self.blocks.values():
            x = block(x).tanh() + skipped.transpose(1, 2)
        return (x.transpose(0, 1).transpose(0, 1), skipped * 2) if self.head is None else self.head(x)


def flow_of_pairs(schedule: str) -> float:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    whole, model, mesh = Pairs(), Pairs(), ParallelDims.resolve(2, **PP2).build("cpu")
    model.load_state_dict(whole.state_dict())
    kind, plan = schedule_kind(schedule), Pairs.parallel_plan
    stages_per_rank = kind.resolve_stages_per_rank()
    cut = split_units(plan, model, 2 * stages_per_rank)
    stages = keep_stages(model, plan, kind.stage_ids(mesh.pipeline_rank, 2, stages_per_rank), cut)
    pipeline = Pipeline(stages, mesh.pipeline, CPU, schedule=schedule)
    tokens = torch.arange(8 * 6).view(8, 6) % VOCAB

    # The reference: the same stages of the whole model, one after the other.
    reference = keep_stages(whole, plan, range(len(cut)), cut)
    x: Any = (tokens,)
    for module in reference.values():
        x = module(*x)
    sum_loss(x, tokens).backward()
    loss = pipeline.run(tokens, tokens, sum_loss)
    expected = dict(whole.named_parameters())
    errors = [abs(float(loss / sum_loss(x, tokens) - 1)), float((pipeline.forward(tokens) - x).abs().max())]
    for name, parameter in model.named_parameters():
        errors.append(float((parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()))  # type: ignore[operator, union-attr]
    return max(errors)


@pytest.mark.parametrize("schedule", ["1F1B", "LoopedBFS", "ZBVZeroBubble", "DualPipeV"])
def test_stages_may_hand_on_tuples_and_views(schedule: str) -> None:
    assert max(run_distributed(flow_of_pairs, 2, schedule)) < 1e-12


def refuse(kind: str) -> None:
    run = Run("DualPipeV", PP2)
    tokens = torch.zeros(8, 4, dtype=torch.long)
    if kind == "batch":
        run.call("train", 3, 16)
    elif kind == "targets":
        run.pipeline.run(tokens, tokens.double(), lambda output, _: output.sum())
        run.pipeline.run(tokens[:7], tokens[:7].double(), lambda output, _: output.sum())
    elif kind == "stages":
        Pipeline({0: nn.Identity(), 2: nn.Identity()}, run.meshes.pipeline, CPU, schedule="DualPipeV")
    elif kind == "output":
        for module in run.pipeline.stages.values():
            module.register_forward_hook(lambda *_: "text")
        run.pipeline.forward(tokens)
    elif kind == "loss":

        def broken(output: Tensor, target: Tensor) -> Tensor:
            raise ConfigurationError("the loss does not like this batch")

        run.pipeline.run(tokens, tokens, broken)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("batch", r"Each data rank gets 3 sequences per batch, fewer than the 4 pipeline stages; DualPipeV needs at"),
        ("targets", r"A batch of 7 rows does not divide into 4 microbatches, .* type torch\.float64 .* drop_last=True"),
        ("stages", r"DualPipeV has the stages \((0, 3|1, 2)\) on pipeline rank [01] of 2, not \(0, 2\)"),
        ("output", r"Pipeline stage 0 returns a str; stages can send each other plain tensors"),
        ("loss", r"the loss does not like this batch"),
    ],
)
def test_what_does_not_fit_reaches_the_user(kind: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_distributed(refuse, 2, kind)
