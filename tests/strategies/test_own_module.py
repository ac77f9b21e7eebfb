"""A user's own LightningModule: without a plan it trains data-parallel, with one in three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_llm.strategies.plan import ParallelPlan
from lightning_llm.strategies.sharding import blocks_of
from tests.distributed import full, run_distributed
from tests.strategies.training import VOCAB, Recorder, TokenRows, loader, make_strategy, make_trainer, on_deepspeed

TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
HIDDEN = 16


class Heads(nn.Module):
    """A block with a module list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for head in self.heads:
            x = x + head(x).relu()
        return x


class Gpt(nn.Module):
    """Parts in a module dict, blocks in a list, output weights tied to the embedding, as nanoGPT has them."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, HIDDEN),
                "h": nn.ModuleList([Heads() for _ in range(2)]),
                "ln_f": nn.LayerNorm(HIDDEN),
            }
        )
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        if tied:
            self.transformer["wte"].weight = self.lm_head.weight
        self.register_buffer("scale", torch.rand(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer["wte"](tokens) * self.scale
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class Plain(pl.LightningModule):
    """Knows nothing of this package."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.net = Gpt(tied)
        self.net.transformer["ln_f"].bias.requires_grad_(False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch["input_ids"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        hits = self.net(batch["input_ids"]).argmax(-1) == batch["labels"]
        self.log("accuracy", hits.float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train_plain(world_size: int, sizes: dict[str, Any], make: Callable[[], Plain]) -> dict[str, Any]:
    # Different on each rank: the strategy makes all start with the first one's.
    torch.manual_seed(torch.distributed.get_rank())
    strategy, recorder = make_strategy(sizes), Recorder()
    trainer = make_trainer(strategy, world_size, callbacks=[recorder], max_steps=8)
    module = make()
    rows = loader(trainer, strategy, ignore=False)
    trainer.fit(module, rows, loader(trainer, strategy, ignore=False, rows=16))
    return {
        "losses": recorder.losses,
        "accuracy": float(trainer.callback_metrics["accuracy"]),
        "weights": {name: full(p).detach().clone() for name, p in module.named_parameters()},
        "buffer": module.net.scale,
    }


def test_repeated_blocks_are_the_units_of_sharding() -> None:
    for tied in (False, True):
        model = Gpt(tied)
        assert blocks_of(model) == list(model.transformer["h"])
    model.transformer["h"][0].heads[0].weight = model.transformer["h"][1].heads[0].weight
    assert blocks_of(model) == [], "what is shared is gathered by the root"


class Untied(Plain):
    """With an output of its own."""

    def __init__(self) -> None:
        super().__init__(tied=False)


class Tied(Plain):
    """Its output is the embedding."""

    def __init__(self) -> None:
        super().__init__(tied=True)


class Siblings(Plain):
    """Two submodules that share a parameter."""

    def __init__(self) -> None:
        super().__init__(tied=False)
        self.other = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.other.weight = self.net.lm_head.weight


class OnItself(Plain):
    """A parameter of the LightningModule itself."""

    def __init__(self) -> None:
        super().__init__(tied=False)
        self.temperature = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        pytest.param(Untied, {}, id="untied"),
        pytest.param(Tied, {}, id="tied"),
        pytest.param(Tied, on_deepspeed(1), id="tied, DeepSpeed ZeRO-1", marks=pytest.mark.slow),
        pytest.param(Tied, on_deepspeed(3), id="tied, DeepSpeed ZeRO-3"),
        pytest.param(Siblings, on_deepspeed(2), id="siblings, DeepSpeed ZeRO-2", marks=pytest.mark.slow),
        pytest.param(OnItself, on_deepspeed(3), id="on itself, DeepSpeed ZeRO-3", marks=pytest.mark.slow),
    ],
)
def test_a_module_without_a_plan_trains_data_parallel(make: Callable[[], Plain], sizes: dict[str, Any]) -> None:
    one = run_distributed(train_plain, 1, 1, {} if make in (Untied, Tied) else on_deepspeed(0), make)[0]
    assert one["losses"][-1] < one["losses"][0] - 0.1
    for seen in run_distributed(train_plain, 2, 2, sizes, make):
        assert seen["losses"] == pytest.approx(one["losses"], abs=1e-4)
        assert seen["accuracy"] == pytest.approx(one["accuracy"], abs=1e-2)
        assert torch.equal(seen["buffer"], one["buffer"])
        assert seen["weights"].keys() == one["weights"].keys()
        for name, weight in seen["weights"].items():
            torch.testing.assert_close(weight, one["weights"][name], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "sizes",
    [TP2, PP2, pytest.param(on_deepspeed(0, **TP2), marks=pytest.mark.slow)],
    ids=["tp2", "pp2", "DeepSpeed tp2"],
)
def test_a_module_without_a_plan_is_told_what_more_needs(sizes: dict[str, Any]) -> None:
    message = r"only data parallelism needs no plan, and Untied has none\. Give it a method `parallel_plan\(\)`"
    with pytest.raises(AssertionError, match=message):
        run_distributed(train_plain, 2, 2, sizes, Untied)


class PlanInTheWrongPlace(Plain):
    """A plan on the LightningModule, not on its model."""

    def __init__(self) -> None:
        super().__init__(tied=False)
        self.parallel_plan = ParallelPlan(tensor_parallel={"net.lm_head": "vocabulary"})


def fit(make: Callable[[], pl.LightningModule], sizes: dict[str, Any]) -> None:
    trainer = make_trainer(make_strategy(sizes), 2, max_steps=1, limit_val_batches=0, gradient_clip_val=None)
    trainer.fit(make(), DataLoader(TokenRows(), batch_size=4))


def manual() -> pl.LightningModule:
    module = OwnModule()
    module.automatic_optimization = False
    return module


def without_loss() -> pl.LightningModule:
    module = Plain(tied=False)
    module.model = OwnNet()
    return module


class Block(nn.Module):
    """Mixes along the sequence, so that it needs the whole of it; its inner size is shared out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.mix = Mix()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x))


class Mix(nn.Module):
    """up, a running mean over the sequence, down."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 24)
        self.down = nn.Linear(24, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.up(x)).cumsum(1)
        return self.down(inner / torch.arange(1, inner.shape[1] + 1, device=x.device)[:, None])


class OwnNet(nn.Module):
    """A small model of the user's own, that tells how it can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.embed: nn.Embedding | None = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleDict({name: Block() for name in ("first", "second", "third")})
        self.norm: nn.LayerNorm | None = nn.LayerNorm(HIDDEN)
        self.head: nn.Linear | None = nn.Linear(HIDDEN, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        return x if self.head is None or self.norm is None else self.head(self.norm(x))

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(
            tensor_parallel={
                "embed": "embedding",
                "blocks.*.norm": "norm",
                "blocks.*.mix": "gather",
                "blocks.*.mix.up": "column",
                "blocks.*.mix.down": "row",
                "norm": "norm",
                "head": "vocabulary",
            },
            tensor_divides={"inner size": 24, "vocabulary": VOCAB},
            pipeline_first=("embed",),
            pipeline_units="blocks",
            pipeline_last=("norm", "head"),
        )


class OwnModule(pl.LightningModule):
    """The seams that a pipeline asks for, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.model = OwnNet()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    def loss_denominator(self, labels: Tensor) -> Tensor:
        return torch.tensor(float(labels.numel()))

    def forward_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.loss(self.model(batch["input_ids"]), batch["labels"]) / self.loss_denominator(batch["labels"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        loss = self.forward_loss(batch)
        self.log("train_loss", loss, sync_dist=True)
        return {"loss": loss, "anything": "else"}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = self.forward_loss(batch)
        self.log("val_loss", loss, sync_dist=True)
        self.log("own_val_loss", loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class OwnLoss(OwnModule):
    """Goes around forward_loss()."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return self.loss(self(batch["input_ids"]), batch["labels"])


class ScaledLoss(OwnModule):
    """Changes the loss after its backward."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)["loss"] * 0.1


class WithoutNorms(OwnModule):
    """Its plan forgets the norms of the blocks."""

    def __init__(self) -> None:
        super().__init__()
        plan = self.model.parallel_plan()
        styles = {name: style for name, style in plan.tensor_parallel.items() if name != "blocks.*.norm"}
        self.model.parallel_plan = replace(plan, tensor_parallel=styles)  # type: ignore[assignment]


def train_own(world_size: int, sizes: dict[str, Any], make: Callable[[], OwnModule] = OwnModule) -> dict[str, Any]:
    torch.manual_seed(torch.distributed.get_rank())
    strategy, recorder = make_strategy(sizes), Recorder()
    trainer = make_trainer(strategy, world_size, callbacks=[recorder], max_steps=8)
    module = make()
    trainer.fit(module, loader(trainer, strategy, ignore=False), loader(trainer, strategy, ignore=False, rows=16))
    return {
        "losses": recorder.losses,
        "val_loss": float(trainer.callback_metrics["val_loss"]),
        "weights": {name: full(p).detach().clone() for name, p in module.named_parameters()},
    }


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        pytest.param(4, {**TP2, **PP2}, id="pp2 x tp2"),
        pytest.param(4, TP2, id="dp2 x tp2"),
        pytest.param(2, PP2, id="pp2"),
        pytest.param(4, on_deepspeed(1, **TP2, **PP2), id="DeepSpeed pp2 x tp2", marks=pytest.mark.slow),
        pytest.param(4, on_deepspeed(3, **TP2), id="DeepSpeed dp2 x tp2", marks=pytest.mark.slow),
    ],
)
def test_a_model_with_a_plan_of_its_own_trains_in_every_layout(world_size: int, sizes: dict[str, Any]) -> None:
    one = run_distributed(train_own, 1, 1, {})[0]
    assert one["losses"][-1] < one["losses"][0] - 0.1
    compared: set[str] = set()
    for seen in run_distributed(train_own, world_size, world_size, sizes):
        assert seen["losses"] == pytest.approx(one["losses"], abs=1e-4)
        assert seen["val_loss"] == pytest.approx(one["val_loss"], abs=1e-4)
        for name, weight in seen["weights"].items():
            expected = one["weights"][name]
            if "engine" in sizes and weight.shape != expected.shape:  # AutoTP's shards do not know that they are some
                continue
            torch.testing.assert_close(weight, expected, atol=1e-3, rtol=0)
        compared |= seen["weights"].keys()
    assert compared == one["weights"].keys()


def test_parameters_that_a_plan_leaves_out_do_not_drift_apart() -> None:
    message = r"gives no tensor-parallel style to 6 parameters, for example \['blocks\.first\.norm\.weight', "
    with pytest.raises(AssertionError, match=message):
        run_distributed(train_own, 2, 2, TP2, WithoutNorms)
    # As the message says: without sequence parallelism every rank sees what every other one sees.
    one = run_distributed(train_own, 1, 1, {})[0]
    for sizes in ({**TP2, "sequence_parallel": False}, on_deepspeed(0, **TP2)):
        for seen in run_distributed(train_own, 2, 2, sizes, WithoutNorms):
            assert seen["losses"] == pytest.approx(one["losses"], abs=1e-4)
            for name in (name for name in seen["weights"] if ".norm." in name):
                torch.testing.assert_close(seen["weights"][name], one["weights"][name], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("make", "sizes", "message"),
    [
        pytest.param(Siblings, {}, r"Siblings\.net and \.other share a parameter.* Put both into one", id="siblings"),
        pytest.param(OnItself, {}, r"OnItself holds the parameters \['temperature'\] itself\.", id="on itself"),
        pytest.param(PlanInTheWrongPlace, TP2, r"has a parallel_plan but no `model`", id="plan in the wrong place"),
        pytest.param(manual, PP2, r"OwnModule sets automatic_optimization=False\. A pipeline", id="manual"),
        pytest.param(
            PlanInTheWrongPlace,
            on_deepspeed(0, **TP2),
            r"has a parallel_plan but no `model`",
            id="plan in the wrong place, DeepSpeed",
        ),
        pytest.param(
            OwnLoss,
            on_deepspeed(0, **PP2),
            r"OwnLoss\.training_step\(\) must return the value of forward_loss",
            id="own loss, DeepSpeed",
        ),
        pytest.param(OwnLoss, PP2, r"OwnLoss\.training_step\(\) must return the value of forward_loss", id="own loss"),
        pytest.param(ScaledLoss, PP2, r"ScaledLoss\.training_step\(\) must return the value of", id="scaled loss"),
        pytest.param(without_loss, PP2, r"A pipeline needs Plain\.loss\(\); see", id="no loss"),
    ],
)
def test_what_a_module_lacks_is_said(
    make: Callable[[], pl.LightningModule], sizes: dict[str, Any], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        run_distributed(fit, 2, make, sizes)
