"""Linear layers in float8: torchao's dynamic scaling, put into a model before its strategy cuts it.

A callback for any Lightning strategy. Lightning calls `Callback.setup`, then `configure_model`, then `Strategy.setup`,
which is where "llm3d" splits stages, tensors and shards; so the layers are exchanged at the end of `configure_model`.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.plan import ParallelPlan, plan_of
from lightning_llm.strategies.processes import ProcessGrid
from lightning_llm.strategies.tensor import matches

Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]

MULTIPLE = 16  # of the inner and the last dim of a float8 product: what torch._scaled_mm asks for
_ROUTER_NAMES = frozenset({"gate", "router"})
_HEAD_NAME = "lm_head"
_IN_PLACE_OF = "_fp8_in_place_of"


class FP8Precision(Callback):
    """Trains linear layers in float8: the products of forward and backward, with scales computed anew for each.

    Parameters stay what they are under the Trainer's `precision` ("bf16-mixed", "bf16-true" or "32-true") and keep
    their names, so checkpoints are the same with and without this callback. What is converted is
    `LightningModule.model`, or the module itself where it has none. These layers stay in high precision: the output
    layer, MoE routers, layers whose dims (each rank's share of them, under tensor parallelism) are no multiples of 16,
    and `exclude`. One line at the start says which they are. A module that was converted stays so.

    Args:
        recipe: How values are scaled into float8's range. "tensorwise": one scale per tensor, the fastest. "rowwise":
            one scale per row, a power of two, so that an outlier spoils its own row only. "rowwise_with_gw_hp":
            rowwise, with the gradients of the weights in high precision; the most accurate.
        exclude: Patterns of module names to leave out, as `model.named_modules()` gives them; `*` stands for any
            characters: `("model.layers.0.*",)`.
        emulate: Round to float8 but multiply in float32, which is slower than no float8 at all: for trying out a run
            where the device has no float8 units. "auto" emulates exactly there.
        float8_all_gather: Gather sharded weights in float8, a quarter of float32's bytes. For "tensorwise", under
            "llm3d" with weights sharded over data ranks.

    Raises:
        ConfigurationError: torchao is not installed; `emulate=False` on a device that cannot; a pattern that matches
            nothing; no layer is left to convert; settings that exclude each other.

    Source: https://arxiv.org/abs/2209.05433 and https://github.com/pytorch/ao/tree/main/torchao/float8.
    """

    def __init__(
        self,
        recipe: Recipe = "rowwise",
        exclude: Sequence[str] = (),
        emulate: bool | Literal["auto"] = "auto",
        float8_all_gather: bool = False,
    ) -> None:
        if recipe not in get_args(Recipe):
            raise ConfigurationError(f"FP8Precision(recipe={recipe!r}): use one of {', '.join(get_args(Recipe))}.")
        if isinstance(exclude, str):
            raise ConfigurationError(f"FP8Precision(exclude={exclude!r}): give a list of patterns, [{exclude!r}].")
        if emulate not in (True, False, "auto"):
            raise ConfigurationError(f"FP8Precision(emulate={emulate!r}): use true, false or 'auto'.")
        if float8_all_gather and recipe != "tensorwise":
            raise ConfigurationError(
                f"FP8Precision(recipe={recipe!r}, float8_all_gather=True): the forward scales a weight by rows, the "
                "backward otherwise, so one gathered float8 weight cannot serve both. Use recipe='tensorwise', or "
                "leave float8_all_gather out."
            )
        import_torchao()
        self.recipe: Recipe = recipe
        self.exclude = tuple(exclude)
        self.emulate = emulate
        self.float8_all_gather = float8_all_gather

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.teardown(trainer, pl_module, stage)  # a run that failed had none
        device = trainer.strategy.root_device
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        emulate = emulates(self.recipe, self.emulate, device.type, capability, rocm=torch.version.hip is not None)
        # torchao's rowwise tensors cannot be reshaped in inference mode; no_grad does as well.
        for loop in (
            trainer.fit_loop.epoch_loop.val_loop,
            trainer.validate_loop,
            trainer.test_loop,
            trainer.predict_loop,
        ):
            loop.inference_mode = False
        build = pl_module.configure_model

        def configure_model() -> None:
            build()
            self._convert(trainer, pl_module, emulate)

        # Set on the object it counts as overridden: Lightning calls it for modules that build in __init__, too.
        setattr(configure_model, _IN_PLACE_OF, vars(pl_module).get("configure_model"))
        pl_module.configure_model = configure_model  # type: ignore[method-assign]

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        current = vars(pl_module).get("configure_model")
        if hasattr(current, _IN_PLACE_OF):
            del pl_module.configure_model
            before = getattr(current, _IN_PLACE_OF)
            if before is not None:
                pl_module.configure_model = before  # type: ignore[method-assign]

    def _convert(self, trainer: Trainer, pl_module: LightningModule, emulate: bool) -> None:
        model = getattr(pl_module, "model", None)
        target = model if isinstance(model, nn.Module) else pl_module
        if converted_layers(target):  # by an earlier run of this module
            return
        if any(isinstance(parameter, DTensor) for parameter in target.parameters()):
            raise ConfigurationError(
                f"{type(pl_module).__name__}.configure_model() shards the model itself, and layers must be converted "
                "to float8 before that. Call torchao's convert_to_float8_training there, and leave FP8Precision out."
            )
        dims = trainer.strategy.dims if isinstance(trainer.strategy, ProcessGrid) else None
        if self.float8_all_gather and (dims is None or dims.shard_size == 1):
            sizes = f"with {dims.arithmetic()}" if dims is not None else f"under {type(trainer.strategy).__name__}"
            raise ConfigurationError(
                f"FP8Precision(float8_all_gather=True) {sizes}: no weights are gathered there. It is for 'llm3d' with "
                "weights sharded over two data ranks or more. Leave float8_all_gather out."
            )
        plan = plan_of(target)
        reasons = reasons_to_skip(
            target,
            plan,
            tensor_parallel_size=dims.tensor_parallel_size if dims is not None else 1,
            exclude=self.exclude,
        )
        chosen = {name for name, reason in reasons.items() if reason is None}
        if not chosen:
            raise ConfigurationError(
                f"FP8Precision has no layer to convert in {type(target).__name__}: {_told(reasons)}."
            )
        ao = import_torchao()
        config = replace(
            ao.Float8LinearConfig.from_recipe_name(self.recipe),
            emulate=emulate,
            enable_fsdp_float8_all_gather=self.float8_all_gather,
        )
        converted = ao.convert_to_float8_training(
            target, config=config, module_filter_fn=lambda module, name: name in chosen
        )
        if target is model:
            pl_module.model = converted  # another object where the model is one linear layer
        layers = converted_layers(converted)
        for layer in layers:
            if trainer.strategy.root_device.type == "cpu":
                layer.register_forward_pre_hook(_autocast_input)
            if self.float8_all_gather:
                layer.register_state_dict_post_hook(_without_gathering_subclass)
        if not emulate and self.recipe != "rowwise_with_gw_hp":
            layers[0].register_forward_pre_hook(_check_tokens)
        how = f"{self.recipe}, emulated" if emulate else self.recipe
        rank_zero_info(f"FP8 ({how}): {_told(reasons)}")

    # Weights change in optimizer steps, and where a checkpoint is loaded, which is before each of these hooks.

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scale_for_gathering(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._scale_for_gathering(pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scale_for_gathering(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scale_for_gathering(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scale_for_gathering(pl_module)

    def _scale_for_gathering(self, pl_module: LightningModule) -> None:
        """One all-reduce for the scales of all weights, instead of one for each weight whenever it is gathered."""
        if self.float8_all_gather:
            import_torchao().precompute_float8_dynamic_scale_for_fsdp(pl_module)


def import_torchao() -> ModuleType:
    """`torchao.float8`, imported without what it logs about compiled extensions that float8 training does not use.

    Raises:
        ConfigurationError: It is not installed.
    """
    try:
        with _quiet("torchao", "Failed to load .*_C"), _quiet("torch.utils._pytree", "register_constant"):
            import torchao.float8
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "torchao":
            raise
        raise ConfigurationError(
            'FP8Precision needs torchao 0.18 or later: pip install "lightning-llm[fp8]", or take it out of the '
            "callbacks."
        ) from error
    return torchao.float8


@contextmanager
def _quiet(logger_name: str, pattern: str) -> Generator[None]:
    """Drops records of a logger whose message has `pattern`; everything else is logged as always."""
    logger = logging.getLogger(logger_name)

    def keep(record: logging.LogRecord) -> bool:
        return re.search(pattern, record.getMessage()) is None

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def emulates(
    recipe: Recipe,
    emulate: bool | Literal["auto"],
    device_type: str,
    capability: tuple[int, int] | None,
    *,
    rocm: bool = False,
) -> bool:
    """Whether a run on this device emulates float8.

    torch multiplies float8 matrices from compute capability 8.9 on with one scale per tensor, from 9.0 on with one per
    row; on AMD from gfx942 (MI300) on, which torch calls 9.4. On a CPU torch._scaled_mm exists, as a reference: it is
    exact but no faster, so "auto" emulates there too.

    Args:
        recipe: As `FP8Precision` takes it.
        emulate: As `FP8Precision` takes it.
        device_type: "cpu", "cuda", ...
        capability: As `torch.cuda.get_device_capability` gives it; None for other devices.
        rocm: Whether "cuda" is a ROCm device.

    Raises:
        ConfigurationError: `emulate=False`, and the device cannot.
    """
    needed = (9, 4) if rocm else (8, 9) if recipe == "tensorwise" else (9, 0)
    if device_type == "cpu":
        return emulate is not False
    if capability is not None and capability >= needed:
        return emulate is True
    has = f"compute capability {capability[0]}.{capability[1]}" if capability is not None else "no float8 units"
    lacking = (
        f"recipe={recipe!r} needs compute capability {needed[0]}.{needed[1]} or more, and this {device_type} device "
        f"has {has}"
    )
    if emulate is False:
        raise ConfigurationError(
            f"FP8Precision(emulate=False): {lacking}. Use emulate='auto' to try a run out, or leave FP8Precision out."
        )
    if emulate == "auto":
        rank_zero_warn(f"FP8Precision emulates float8, slower than bfloat16: {lacking}.")
    return True


def converted_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers of `model` that compute in float8."""
    from torchao.float8.float8_linear import Float8Linear

    return [module for module in model.modules() if isinstance(module, Float8Linear)]


def reasons_to_skip(
    model: nn.Module, plan: ParallelPlan | None, *, tensor_parallel_size: int = 1, exclude: Sequence[str] = ()
) -> dict[str, str | None]:
    """Each linear layer of `model` by name, with why it stays in high precision; None: it is converted.

    Args:
        model: Whole, before any strategy has cut it.
        plan: The model's, where it has one: tells the output layer, and how tensor parallelism cuts each layer.
        tensor_parallel_size: Ranks that share a layer.
        exclude: Patterns of names to leave out.

    Raises:
        ConfigurationError: A pattern of `exclude` matches no linear layer.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unused = [pattern for pattern in exclude if not any(fnmatchcase(name, pattern) for name in linears)]
    if unused:
        raise ConfigurationError(
            f"FP8Precision(exclude={unused}) matches none of the {len(linears)} linear layers of "
            f"{type(model).__name__}, whose names are like {sorted(linears)[:3]}. `*` stands for any characters."
        )
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    styles = plan.tensor_parallel if plan is not None else {}

    def reason(name: str, layer: nn.Linear) -> str | None:
        style = next((style for pattern, style in styles.items() if matches(name, pattern)), None)
        parts = name.split(".")
        if style == "vocabulary" or parts[-1] == _HEAD_NAME:
            return "the output layer"
        if not _ROUTER_NAMES.isdisjoint(parts):
            return "a router"
        if any(fnmatchcase(name, pattern) for pattern in exclude):
            return "excluded"
        if type(layer) is not nn.Linear:
            return f"a {type(layer).__name__}, not a plain nn.Linear"
        if uses[id(layer.weight)] > 1:
            return "its weight is shared with another layer"
        inputs, outputs = whole = layer.in_features, layer.out_features
        if style == "row":
            inputs //= tensor_parallel_size
        if style == "column":
            outputs //= tensor_parallel_size
        if inputs % MULTIPLE or outputs % MULTIPLE:
            share = f" on each of {tensor_parallel_size} tensor ranks" if (inputs, outputs) != whole else ""
            return f"{inputs} -> {outputs}{share} is not divisible by {MULTIPLE}"
        return None

    return {name: reason(name, layer) for name, layer in linears.items()}


def _told(reasons: dict[str, str | None]) -> str:
    """`28 linear layers in float8; not: lm_head (the output layer)`, with the blocks' numbers taken together."""
    groups: dict[tuple[str, str], int] = defaultdict(int)
    for name, reason in reasons.items():
        if reason is not None:
            groups[re.sub(r"(?<=\.)\d+(?=\.)", "*", name), reason] += 1
    skipped = [f"{name}{f' x{count}' if count > 1 else ''} ({reason})" for (name, reason), count in groups.items()]
    converted = sum(reason is None for reason in reasons.values())
    return f"{converted} linear layers in float8" + (f"; not: {', '.join(skipped)}" if skipped else "")


def _autocast_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """What torchao's layer does with its input under CUDA's autocast, and under no other."""
    if not torch.is_autocast_enabled("cpu"):
        return None
    return (inputs[0].to(torch.get_autocast_dtype("cpu")), *inputs[1:])


def _check_tokens(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Before a layer's forward: can the gradient of its weight, a product over tokens, be computed in float8?"""
    tokens = inputs[0].numel() // inputs[0].shape[-1]
    if torch.is_grad_enabled() and tokens % MULTIPLE:
        raise ConfigurationError(
            f"FP8Precision: a (micro)batch of {tuple(inputs[0].shape[:-1])} = {tokens} tokens is not divisible by "
            f"{MULTIPLE}, which float8 products of gradients need. Change sequence length or batch size, or use "
            "recipe='rowwise_with_gw_hp'."
        )


def _without_gathering_subclass(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Puts the plain weight into a state dict: same storage, without torchao's class that gathers it in float8."""
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    weight = state[f"{prefix}weight"]
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    if not isinstance(local, WeightWithDynamicFloat8CastTensor):
        return
    plain = local._tensor
    if isinstance(weight, DTensor):
        plain = DTensor.from_local(
            plain, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )
    state[f"{prefix}weight"] = plain
