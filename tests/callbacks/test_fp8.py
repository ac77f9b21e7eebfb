"""Float8 layers: which they are, that they compute in float8, the same in every layout, and leave checkpoints alone."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchao.float8 import Float8TrainingTensor
from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

from lightning_llm import Decoder, DecoderConfig, LLM3DStrategy, LLMModule, TokenDataModule
from lightning_llm.callbacks import FP8Precision
from lightning_llm.callbacks.fp8 import _quiet, converted_layers, emulates, reasons_to_skip
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.data.tokenize import tokenize
from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.plan import plan_of
from tests.callbacks.tiny import Bigram, batches, trainer
from tests.distributed import full, run_distributed
from tests.strategies.training import BATCH_SIZE, VOCAB, Recorder, loader, make_module, make_trainer

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
# Every dim is a multiple of 16 on each of two tensor ranks, too.
CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}


class Wide(Bigram):
    """A bigram model with two linear layers, made in __init__ and without a plan."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(self.table(batch["input_ids"]))
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


class Network(nn.Module):
    """One layer for each reason to leave it alone, and one without any."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(48, 32)
        self.attention = nn.MultiheadAttention(32, 2)
        self.gate = nn.Linear(32, 16)
        self.gate_proj = nn.Linear(32, 64)
        self.odd = nn.Linear(32, 40)
        self.unembedding = nn.Linear(32, 48, bias=False)
        self.unembedding.weight = self.embedding.weight
        self.lm_head = nn.Linear(32, 48)


# -- which layers --


def test_layers_that_float8_would_harm_or_cannot_take_are_left() -> None:
    assert reasons_to_skip(Network(), None) == {
        "attention.out_proj": "a NonDynamicallyQuantizableLinear, not a plain nn.Linear",
        "gate": "a router",
        "gate_proj": None,
        "odd": "32 -> 40 is not divisible by 16",
        "unembedding": "its weight is shared with another layer",
        "lm_head": "the output layer",
    }


def test_the_plan_says_what_each_tensor_rank_holds() -> None:
    with torch.device("meta"):
        decoder = Decoder(CONFIG.replace(intermediate_size=144))
    plan = plan_of(decoder)
    alone = reasons_to_skip(decoder, plan)
    assert {name for name, reason in alone.items() if reason is not None} == {"lm_head"}
    shared = reasons_to_skip(decoder, plan, tensor_parallel_size=2)
    mlp = "model.layers.1.mlp"
    assert shared[f"{mlp}.up_proj"] == "64 -> 72 on each of 2 tensor ranks is not divisible by 16"
    assert shared[f"{mlp}.down_proj"] == "72 -> 64 on each of 2 tensor ranks is not divisible by 16"
    assert shared["model.layers.1.self_attn.k_proj"] is None  # 32 -> 16 on each


def test_patterns_exclude_and_a_pattern_without_effect_is_refused() -> None:
    with torch.device("meta"):
        decoder = Decoder(CONFIG)
    reasons = reasons_to_skip(decoder, plan_of(decoder), exclude=["model.layers.0.*"])
    excluded = {name for name, reason in reasons.items() if reason == "excluded"}
    assert len(excluded) == 7 and all(name.startswith("model.layers.0.") for name in excluded)
    with pytest.raises(ConfigurationError, match=r"\['layers\.7\.\*'\].*matches none of the 15 linear layers.*lm_head"):
        reasons_to_skip(decoder, None, exclude=["model.layers.0.*", "layers.7.*"])


def test_nothing_left_to_convert_is_an_error(tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[FP8Precision(exclude=["*"])], max_steps=1)
    with pytest.raises(ConfigurationError, match=r"no layer to convert in Sequential: 0 linear.*0 \(excluded\)"):
        run.fit(Wide(), batches(1))


# -- where it is emulated --


@pytest.mark.parametrize(
    ("recipe", "emulate", "device", "capability", "expected"),
    [
        ("tensorwise", "auto", "cuda", (8, 9), False),
        ("tensorwise", "auto", "cuda", (8, 6), True),
        ("rowwise", "auto", "cuda", (8, 9), True),
        ("rowwise", "auto", "cuda", (9, 0), False),
        ("rowwise_with_gw_hp", "auto", "cuda", (8, 9), True),
        ("rowwise", "auto", "cuda", (12, 0), False),
        ("rowwise", True, "cuda", (9, 0), True),
        ("rowwise", False, "cuda", (9, 0), False),
        ("rowwise", "auto", "cpu", None, True),
        ("rowwise", True, "cpu", None, True),
        ("rowwise", False, "cpu", None, False),
        ("rowwise", "auto", "mps", None, True),
    ],
)
def test_a_device_without_float8_units_emulates(
    recipe: Any, emulate: Any, device: str, capability: tuple[int, int] | None, expected: bool
) -> None:
    assert emulates(recipe, emulate, device, capability) is expected


def test_amd_counts_capabilities_in_its_own_way() -> None:
    assert emulates("tensorwise", "auto", "cuda", (9, 0), rocm=True) is True  # MI200
    assert emulates("rowwise", "auto", "cuda", (9, 4), rocm=True) is False  # MI300


def test_the_missing_capability_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"'rowwise' needs compute capability 9\.0.* has .*8\.9"):
        emulates("rowwise", False, "cuda", (8, 9))
    with pytest.raises(ConfigurationError, match=r"'tensorwise' needs .*8\.9 .*mps device has no float8 units"):
        emulates("tensorwise", False, "mps", None)
    with pytest.warns(UserWarning, match=r"emulates float8.*needs compute capability 8\.9.* has .*8\.0"):
        emulates("tensorwise", "auto", "cuda", (8, 0))


# -- the callback in a Trainer --


def test_a_model_made_in_init_is_converted_once_and_the_hook_is_given_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, callback = Wide(), FP8Precision("rowwise")
    plain = {name: parameter.dtype for name, parameter in module.state_dict().items()}
    parameters = set(module.parameters())
    run = trainer(tmp_path, callbacks=[callback], max_steps=3)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        run.fit(module, batches(3))
        run.validate(module, batches(1), verbose=False)
    told = [record.getMessage() for record in caplog.records if "FP8" in record.getMessage()]
    assert told == ["FP8 (rowwise, emulated): 2 linear layers in float8"]
    assert len(converted_layers(module)) == 2
    assert {name: parameter.dtype for name, parameter in module.state_dict().items()} == plain
    assert set(module.parameters()) == parameters
    assert "configure_model" not in vars(module)


def test_a_hook_that_was_set_on_the_object_is_called_and_given_back(tmp_path: Path) -> None:
    module, calls = Wide(), []
    module.configure_model = own = lambda: calls.append("own")  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="stop"):  # a run that fails has no teardown
        trainer(tmp_path, callbacks=[FP8Precision(), Stop()], max_steps=1).fit(module, batches(1))
    assert module.configure_model is not own
    trainer(tmp_path, callbacks=[FP8Precision()], max_steps=1).fit(module, batches(1))
    assert calls == ["own", "own"] and module.configure_model is own


class Stop(Recorder):
    def on_train_batch_start(self, *_: Any) -> None:
        raise RuntimeError("stop")


def test_emulation_is_the_arithmetic_of_float8(tmp_path: Path) -> None:
    """One layer by hand: values rounded to float8 with one scale each, multiplied in float32."""
    module = Wide()
    weight, x = module.model[0].weight.detach().clone(), torch.randn(4, 16, 32)
    module.model[0].bias.data.zero_()
    trainer(tmp_path, callbacks=[FP8Precision("tensorwise")], limit_val_batches=1).validate(
        module, batches(1), verbose=False
    )

    def rounded(tensor: Tensor) -> Tensor:
        scale = torch.finfo(torch.float8_e4m3fn).max / tensor.abs().max()
        return (tensor * scale).to(torch.float8_e4m3fn).float() / scale

    expected = rounded(x) @ rounded(weight).T
    assert torch.allclose(module.model[0](x), expected, atol=1e-6)
    assert (x @ weight.T - expected).norm() > 1e-2 * expected.norm()


def test_real_float8_products_of_the_cpu_are_those_that_are_emulated(tmp_path: Path) -> None:
    """torch._scaled_mm on a CPU, in bfloat16: its rowwise products come in bfloat16 anyway."""
    losses = []
    for emulate in (True, False):
        torch.manual_seed(0)
        recorder = Recorder()
        callbacks = [FP8Precision("rowwise", emulate=emulate), recorder]
        trainer(tmp_path, callbacks=callbacks, max_steps=3, precision="bf16-true").fit(Wide(), batches(3))
        losses.append(recorder.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_tokens_that_float8_gradients_cannot_take_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[FP8Precision("rowwise", emulate=False)], max_steps=1)
    with pytest.raises(ConfigurationError, match=r"\(2, 12\) = 24 tokens is not divisible by 16"):
        run.fit(Wide(), batches(1, batch_size=2, seq_len=12))
    high = FP8Precision("rowwise_with_gw_hp", emulate=False)
    run = trainer(tmp_path, callbacks=[high], max_steps=1, precision="bf16-true")
    run.fit(Wide(), batches(1, batch_size=2, seq_len=12))


def test_a_model_that_is_sharded_already_is_refused() -> None:
    run_distributed(convert_what_is_sharded, 1)


def convert_what_is_sharded() -> None:
    mesh = torch.distributed.init_device_mesh("cpu", (1,))

    class Sharded(Wide):
        def configure_model(self) -> None:
            torch.distributed.fsdp.fully_shard(self.model, mesh=mesh)

    with pytest.raises(ConfigurationError, match="shards the model itself"):
        trainer(None, callbacks=[FP8Precision()], max_steps=1).fit(Sharded(), batches(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "blockwise"}, "use one of tensorwise, rowwise"),
        ({"exclude": "model.*"}, "give a list"),
        ({"emulate": "yes"}, "true, false or 'auto'"),
        ({"float8_all_gather": True}, "cannot serve both.*recipe='tensorwise'"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FP8Precision(**arguments)


def test_without_torchao_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchao", "torchao.float8"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigurationError, match=r'pip install "lightning-llm\[fp8\]"'):
        FP8Precision()


def test_importing_torchao_is_silent() -> None:
    code = "from lightning_llm.callbacks import FP8Precision; FP8Precision(); import torchao"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (seen.returncode, seen.stdout, seen.stderr) == (0, "", "")


def test_only_the_noise_is_silenced(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torchao")
    with _quiet("torchao", "Failed to load .*_C"):
        logger.warning("Failed to load %s", "torchao/_C_mxfp8.so")
        logger.warning("something that matters")
    logger.warning("Failed to load %s", "torchao/_C_mxfp8.so")
    assert [record.getMessage() for record in caplog.records] == [
        "something that matters",
        "Failed to load torchao/_C_mxfp8.so",
    ]


# -- the same in every layout --


class FirstStep(Recorder):
    """Whole gradients of the first step, before they are clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if not self.gradients:
            self.gradients = {name: full(p.grad).clone() for name, p in module.named_parameters()}


def first_gradients(
    world_size: int,
    sizes: dict[str, Any],
    fp8: dict[str, Any] | None,
    precision: str = "64-true",
) -> dict[str, Tensor]:
    strategy, seen = LLM3DStrategy(**sizes), FirstStep()
    callbacks = [seen, *([FP8Precision(**fp8)] if fp8 is not None else [])]
    run = make_trainer(strategy, world_size, callbacks=callbacks, max_steps=1, precision=precision)
    run.fit(LLMModule(CONFIG, warmup_steps=0), loader(run, strategy, ignore=False))
    if fp8 is not None:
        blocks = len(run.lightning_module.model.model.layers)
        assert len(converted_layers(run.lightning_module)) == 7 * blocks
    return seen.gradients


def gradients_of(world_size: int, *arguments: Any) -> dict[str, Tensor]:
    ranks = run_distributed(first_gradients, world_size, world_size, *arguments)
    return {name: gradient for rank in ranks for name, gradient in rank.items()}


def distance(seen: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|seen - expected| / |expected| over all parameters."""
    assert seen.keys() == expected.keys()
    difference = sum(float((seen[name] - tensor).double().square().sum()) for name, tensor in expected.items())
    return math.sqrt(difference / sum(float(tensor.double().square().sum()) for tensor in expected.values()))


@pytest.fixture(scope="module")
def high_precision() -> dict[str, Tensor]:
    return gradients_of(1, {}, None)


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Tensor]]:
    return {recipe: gradients_of(1, {}, {"recipe": recipe}) for recipe in RECIPES}


# Float8 has 3 bits of mantissa (tensorwise gradients: 2): a value is off by up to 1/16 (1/8), a gradient as a whole by
# about 4% here. Two ways to compute the same differ by rounding of float32, about 1e-7; where that moves a value over
# the border between two float8 numbers, one value in a million, gradients differ by about 1e-4.
SAME = 1e-3
FLOAT8 = 0.1


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_in_float8_and_near_those_of_high_precision(
    single: dict[str, dict[str, Tensor]], high_precision: dict[str, Tensor], recipe: str
) -> None:
    assert 10 * SAME < distance(single[recipe], high_precision) < FLOAT8


@pytest.mark.parametrize(
    ("recipe", "world_size", "sizes"),
    [
        *(pytest.param(recipe, 2, TP2, id=f"{recipe}, tp2") for recipe in RECIPES),
        pytest.param("rowwise", 2, {}, id="rowwise, dp2"),
        pytest.param("rowwise", 2, PP2, id="rowwise, pp2"),
        pytest.param("rowwise", 2, {"context_parallel_size": 2}, id="rowwise, cp2"),
        pytest.param("rowwise_with_gw_hp", 4, PP2, id="rowwise_with_gw_hp, pp2 x dp2", marks=pytest.mark.slow),
        pytest.param(
            "rowwise", 2, {**TP2, "sequence_parallel": False}, id="rowwise, tp2, whole sequence", marks=pytest.mark.slow
        ),
        pytest.param("rowwise", 8, {**TP2, **PP2}, id="rowwise, pp2 x dp2 x tp2", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_one_process(
    single: dict[str, dict[str, Tensor]], recipe: str, world_size: int, sizes: dict[str, Any]
) -> None:
    """Under tensor parallelism a scale is that of the whole tensor; a row's scale does not depend on other rows.

    Rowwise products for the gradients of weights have a scale for each column of a rank's or a microbatch's tokens.
    Being powers of two, other scales round to the same values, unless these are tiny beside their column's maximum.
    """
    assert distance(gradients_of(world_size, sizes, {"recipe": recipe}), single[recipe]) < SAME


@pytest.mark.parametrize("sizes", [pytest.param({}, id="dp2"), pytest.param(PP2, id="pp2", marks=pytest.mark.slow)])
def test_tensorwise_scales_are_those_of_a_ranks_own_tokens(
    single: dict[str, dict[str, Tensor]], high_precision: dict[str, Tensor], sizes: dict[str, Any]
) -> None:
    """One scale for all tokens that a product sees: a batch that is split rounds otherwise, but no worse."""
    gradients = gradients_of(2, sizes, {"recipe": "tensorwise"})
    assert distance(gradients, single["tensorwise"]) > 10 * SAME
    assert distance(gradients, high_precision) < 1.5 * distance(single["tensorwise"], high_precision)


@pytest.mark.parametrize(
    ("recipe", "precision"),
    [
        ("rowwise_with_gw_hp", "bf16-mixed"),
        ("rowwise", "bf16-true"),
        *(pytest.param("rowwise", precision, marks=pytest.mark.slow) for precision in ("bf16-mixed", "32-true")),
        *(pytest.param("rowwise_with_gw_hp", other, marks=pytest.mark.slow) for other in ("bf16-true", "32-true")),
    ],
)
def test_every_precision_of_the_trainer(recipe: str, precision: str) -> None:
    alone = gradients_of(1, {}, {"recipe": recipe}, precision)
    expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {gradient.dtype for gradient in alone.values()} == {expected}
    # bfloat16's own rounding, 1/256, moves many values over float8's borders.
    assert distance(gradients_of(2, TP2, {"recipe": recipe}, precision), alone) < 0.05


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        pytest.param(1, {}, id="single"),
        pytest.param(2, TP2, id="tp2"),
        pytest.param(2, {}, id="dp2", marks=pytest.mark.slow),
    ],
)
def test_recomputed_activations_give_the_same_gradients(world_size: int, sizes: dict[str, Any]) -> None:
    fp8 = {"recipe": "rowwise"}
    kept = gradients_of(world_size, sizes, fp8, "32-true")
    recomputed = gradients_of(world_size, {**sizes, "recompute": "full"}, fp8, "32-true")
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in kept.items())


def train_with_ddp() -> list[float]:
    recorder = Recorder()
    run = make_trainer("ddp", 2, callbacks=[FP8Precision(), recorder], max_steps=3)
    run.fit(make_module(CONFIG), loader(run, None))
    assert len(converted_layers(run.lightning_module)) == 14
    return recorder.losses


def test_lightnings_own_strategy() -> None:
    for losses in run_distributed(train_with_ddp, 2):
        assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)


# -- gathering in float8 --


class Gathered(Recorder):
    """What class of weight the layers compute with, and what rests between the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[type] = set()

    def on_train_start(self, trainer: Any, module: Any) -> None:
        for layer in converted_layers(module):
            local = _local(layer.weight)
            assert isinstance(local, WeightWithDynamicFloat8CastTensor) and local._precomputed_scale is not None
            layer.register_forward_pre_hook(lambda layer, _: self.used.add(type(_local(layer.weight))))


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def train_gathering(world_size: int, sizes: dict[str, Any], float8_all_gather: bool) -> list[float]:
    strategy = LLM3DStrategy(**sizes)
    recorder = Gathered() if float8_all_gather else Recorder()
    callbacks = [FP8Precision("tensorwise", float8_all_gather=float8_all_gather), recorder]
    when = {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 0}
    # In bf16-mixed the two differ by a rounding: gathered as bfloat16, weights are rounded to it before float8.
    run = make_trainer(strategy, world_size, callbacks=callbacks, precision="32-true", **when)
    run.fit(make_module(CONFIG), loader(run, strategy), loader(run, strategy, rows=16))
    if isinstance(recorder, Gathered):
        assert recorder.used == {Float8TrainingTensor}
    return [*recorder.losses, *recorder.grad_norms, float(run.callback_metrics["val_loss"])]


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        pytest.param(2, {}, id="dp2"),
        pytest.param(4, TP2, id="dp2 x tp2", marks=pytest.mark.slow),
        pytest.param(4, PP2, id="pp2 x dp2", marks=pytest.mark.slow),
        pytest.param(4, {"replicate_size": 2, "zero_stage": 2}, id="replicate2 x shard2", marks=pytest.mark.slow),
    ],
)
def test_weights_gathered_in_float8_are_those_that_the_layer_would_make(world_size: int, sizes: dict[str, Any]) -> None:
    whole = run_distributed(train_gathering, world_size, world_size, sizes, False)
    assert run_distributed(train_gathering, world_size, world_size, sizes, True) == whole


def test_gathering_is_refused_where_nothing_is_gathered(tmp_path: Path) -> None:
    gathering = FP8Precision("tensorwise", float8_all_gather=True)
    with pytest.raises(ConfigurationError, match="under SingleDeviceStrategy: no weights are gathered"):
        trainer(tmp_path, callbacks=[gathering], max_steps=1).fit(Wide(), batches(1))
    run_distributed(gather_on_one_rank, 1)


def gather_on_one_rank() -> None:
    with pytest.raises(ConfigurationError, match=r"data\(1\).*no weights are gathered"):
        train_gathering(1, {}, True)


# -- checkpoints --


class SaveAt2(Recorder):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, module: LightningModule, outputs: Any, batch: Any, index: int) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, index)
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)
            self.weights = {name: full(tensor).clone() for name, tensor in module.model.state_dict().items()}


def save(world_size: int, sizes: dict[str, Any], fp8: dict[str, Any] | None, path: Path) -> dict[str, Any]:
    """Four steps, saved after the second."""
    strategy, saver = LLM3DStrategy(**sizes), SaveAt2(path)
    callbacks = [saver, *([FP8Precision(**fp8)] if fp8 is not None else [])]
    run = make_trainer(strategy, world_size, callbacks=callbacks, max_steps=4)
    run.fit(make_module(CONFIG), loader(run, strategy, rows=BATCH_SIZE))
    return {"losses": saver.losses[2:], "weights": saver.weights}


def resume(world_size: int, sizes: dict[str, Any], fp8: dict[str, Any] | None, path: Path) -> list[float]:
    strategy, recorder = LLM3DStrategy(**sizes), Recorder()
    callbacks = [recorder, *([FP8Precision(**fp8)] if fp8 is not None else [])]
    run = make_trainer(strategy, world_size, callbacks=callbacks, max_steps=4)
    run.fit(make_module(CONFIG), loader(run, strategy, rows=BATCH_SIZE), ckpt_path=path)
    return recorder.losses


GATHERING = {"recipe": "tensorwise", "float8_all_gather": True}
ROWWISE = {"recipe": "rowwise"}


@pytest.mark.parametrize(
    ("saved_by", "resumed_by"),
    [
        pytest.param((2, {}, GATHERING), (1, {}, None), id="gathered in float8, then without"),
        pytest.param((2, TP2, ROWWISE), (2, {}, None), id="rowwise, then without", marks=pytest.mark.slow),
        pytest.param((1, {}, None), (4, TP2, GATHERING), id="without, then gathered in float8"),
    ],
)
def test_a_checkpoint_is_the_same_with_and_without_float8(tmp_path: Path, saved_by: Any, resumed_by: Any) -> None:
    saved = run_distributed(save, saved_by[0], *saved_by, tmp_path / "ckpt")[0]
    with torch.device("meta"):
        plain = {name: (tensor.shape, tensor.dtype) for name, tensor in Decoder(CONFIG).state_dict().items()}
    checkpoint = Checkpoint.open(tmp_path / "ckpt", alone=True)
    stored = checkpoint.weights()
    assert {name: (found.size, found.properties.dtype) for name, found in stored.items()} == plain
    for name, tensor in checkpoint.iterate_weights():
        assert type(tensor) is Tensor and torch.equal(tensor, saved["weights"][name]), name
    for file in (tmp_path / "ckpt").iterdir():
        assert b"torchao" not in file.read_bytes(), f"{file.name} can only be read with torchao"
    for losses in run_distributed(resume, resumed_by[0], *resumed_by, tmp_path / "ckpt"):
        assert losses == pytest.approx(saved["losses"], rel=0.01)  # float8's rounding is all that changes


def test_a_run_in_float8_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    saved = run_distributed(save, 2, 2, {}, GATHERING, tmp_path / "ckpt")
    resumed = run_distributed(resume, 2, 2, {}, GATHERING, tmp_path / "ckpt")
    assert resumed == [rank["losses"] for rank in saved]


# -- it learns --

TEXT = DecoderConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


@pytest.fixture(scope="module")
def source_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few modules of the standard library as tokens."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "text").mkdir()
    for name in ("argparse", "ast", "datetime", "difflib", "doctest", "inspect", "pickle", "tarfile", "typing"):
        text = (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8")
        (folder / "text" / f"{name}.py").write_text(text, encoding="utf-8")
    tokenize(folder / "text", folder / "tokens", vocab_size=1024, val_fraction=0.1, num_workers=1, progress=False)
    return folder / "tokens"


@cache
def loss_on_text(corpus: Path, recipe: Any, steps: int) -> list[float]:
    """The losses of a run in bf16-mixed, with a learning rate at which bfloat16 and float32 agree, too."""
    recorder = Recorder()
    callbacks = [recorder, *([FP8Precision(recipe)] if recipe is not None else [])]
    run = trainer(corpus.parent, max_steps=steps, precision="bf16-mixed", callbacks=callbacks)
    module = LLMModule(TEXT, learning_rate=1e-3, warmup_steps=10)
    run.fit(module, datamodule=TokenDataModule(corpus, batch_size=8, seq_len=128, num_workers=0))
    return recorder.losses


@pytest.mark.parametrize(
    ("recipe", "steps", "learnt"),
    [
        pytest.param("rowwise", 30, 0.5, id="rowwise, 30 steps"),
        *(pytest.param(recipe, 200, 1.5, id=f"{recipe}, 200 steps", marks=pytest.mark.slow) for recipe in RECIPES),
    ],
)
def test_loss_on_real_text_is_that_of_bfloat16(source_code: Path, recipe: str, steps: int, learnt: float) -> None:
    expected, losses = (loss_on_text(source_code, choice, steps) for choice in (None, recipe))
    last, last_expected = (sum(curve[-10:]) / 10 for curve in (losses, expected))
    assert last_expected < expected[0] - learnt, "the reference must learn"
    assert losses != expected
    assert last == pytest.approx(last_expected, rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs float8 units"
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_device_with_float8_units_computes_what_is_emulated(tmp_path: Path, recipe: Any) -> None:
    losses = []
    for emulate in (True, False):
        torch.manual_seed(0)
        recorder = Recorder()
        callbacks = [FP8Precision(recipe, emulate=emulate), recorder]
        run = trainer(tmp_path, accelerator="cuda", callbacks=callbacks, max_steps=5, precision="bf16-mixed")
        run.fit(make_module(CONFIG), loader(run, None))
        losses.append(recorder.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
