"""What DeepSpeed's own engine has saved becomes a checkpoint: as DeepSpeed sees it itself, and runs go on from it."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_llm import LLMModule, TokenDataModule
from lightning_llm.checkpoint.deepspeed_folder import read_deepspeed_folder
from lightning_llm.checkpoint.importing import import_checkpoint
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.deepspeed.ops import import_deepspeed, prepare_ops
from tests.checkpoint.runs import CONFIG, STEPS
from tests.checkpoint.test_importing import THREE_D, Planted, job
from tests.commands import call_forked
from tests.distributed import run_distributed
from tests.strategies.training import Recorder, make_trainer

SAVED = 3
ENGINES = [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "bfloat16")]


class Net(nn.Module):
    """Sizes that no number of ranks divides; a buffer, a frozen layer, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.hidden = nn.Linear(5, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.tensor(7.0))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.frozen(self.hidden(self.embedding(tokens))))


# -- in processes that import deepspeed --


def deepspeed_on_cpu(*ops: str) -> Any:
    """The package, with these of its operators."""
    os.environ["LOCAL_SIZE"] = os.environ["WORLD_SIZE"]
    deepspeed = import_deepspeed("cpu")
    prepare_ops(ops)
    return deepspeed


def engine_of(module: nn.Module, optimizer: Any, stage: int, dtype: str) -> Any:
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype == "bfloat16"},
    }
    return deepspeed_on_cpu().initialize(model=module, config=settings, optimizer=optimizer)[0]


def seen_by_deepspeed(engine: Any) -> dict[str, Tensor]:
    """Weights and moments, put together from all ranks by the engine's own functions."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() < 3:  # which it has done too early: before all groups had made their first step
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with deepspeed_on_cpu().zero.GatheredParameters(parameter):
                found[name] = parameter.detach().clone()
        else:
            found[name] = safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name}.{key}"] = safe_get_full_optimizer_state(parameter, key).clone()
    return found


def convert(folder: Path) -> None:
    """By DeepSpeed's script, into its Universal form."""
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        argparse.Namespace(
            input_folder=str(folder / f"global_step{SAVED}"),
            output_folder=str(folder / "universal"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def save_nets(
    folder: Path, engines: list[tuple[int, str]], own_adam: bool = False
) -> dict[tuple[int, str], dict[str, Tensor]]:
    """Trains and saves under each of the engines; returns what DeepSpeed has, of ZeRO 0 what the module has."""
    deepspeed = deepspeed_on_cpu(*(["cpu_adam"] if own_adam else []))
    adam = deepspeed.ops.adam.DeepSpeedCPUAdam if own_adam else torch.optim.AdamW
    found = {}
    for stage, dtype in engines:
        torch.manual_seed(0)
        net = Net()
        groups = [
            {"params": [net.hidden.weight, net.embedding.weight], "weight_decay": 0.1},
            {"params": [net.hidden.bias], "weight_decay": 0.0},
        ]
        engine = engine_of(net, adam(groups, lr=0.25), stage, dtype)
        generator = torch.Generator().manual_seed(dist.get_rank())
        for _ in range(SAVED):
            tokens = torch.randint(0, 11, (4,), generator=generator)
            engine.backward(F.cross_entropy(engine(tokens).float(), tokens))
            engine.step()
        place = folder / f"{stage} {dtype}"
        engine.save_checkpoint(str(place))
        seen = seen_by_deepspeed(engine) if stage else dict(net.state_dict())
        found[stage, dtype] = {name: tensor.detach().clone() for name, tensor in seen.items()}
        if dist.get_rank() == 0 and stage > 1:
            with contextlib.redirect_stdout(None):
                convert(place)
        dist.barrier()
    return found


def save_as_lightning_does(folder: Path, stage: int, batches: list[dict[str, Tensor]], rates: list[float]) -> None:
    """DeepSpeed makes the steps of a Lightning run, whose plain state goes with it, as DeepSpeedStrategy does it."""
    module = LLMModule(CONFIG, learning_rate=3e-3, warmup_steps=2)
    module.model = module.build_model()
    module.load_state_dict(torch.load(folder / "start.pt", weights_only=True))
    optimizer = module.optimizer_settings.build(module)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # notes where it began, as every schedule does
    engine = engine_of(module, optimizer, stage, "float32")
    for batch, rate in zip(batches, rates, strict=False):
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        own = {name: tensor.chunk(dist.get_world_size())[dist.get_rank()] for name, tensor in batch.items()}
        engine.backward(F.cross_entropy(engine(own["input_ids"]).flatten(0, 1), own["labels"].flatten()))
        engine.step()
    for group in engine.optimizer.param_groups:
        group["lr"] = rates[SAVED]
    dumped = torch.load(folder / "plain.ckpt", weights_only=True)
    plain = {name: value for name, value in dumped.items() if name not in ("state_dict", "optimizer_states")}
    engine.save_checkpoint(str(folder / "run.ckpt"), client_state=plain, tag="checkpoint")


# -- what is in it --


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[int, str], dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("nets")
    return folder, run_distributed(save_nets, 2, folder, ENGINES)[0]


CASES = [*[(*engine, "") for engine in ENGINES[1:]], *[(*engine, "universal") for engine in ENGINES[2:]]]


@pytest.mark.parametrize(("stage", "dtype", "tag"), CASES)
def test_tensors_are_those_that_deepspeed_has(nets: Any, tmp_path: Path, stage: int, dtype: str, tag: str) -> None:
    folder, seen = nets
    assert_is_imported(folder / f"{stage} {dtype}" / tag, seen[stage, dtype], tmp_path)


@pytest.mark.slow  # it may have to be compiled
@pytest.mark.parametrize("tag", ["", "universal"])
def test_steps_and_settings_of_deepspeeds_own_adam(tmp_path: Path, tag: str) -> None:
    seen = run_distributed(save_nets, 2, tmp_path, ENGINES[2:3], True, timeout=400)[0]
    assert_is_imported(tmp_path / "2 float32" / tag, seen[2, "float32"], tmp_path)


def assert_is_imported(source: Path, seen: dict[str, Tensor], tmp_path: Path) -> None:
    manifest, remarks = import_checkpoint(source, tmp_path / "c", ranks=2)
    assert manifest.step == SAVED and not manifest.weights_only
    assert len(remarks) == 1 and remarks[0].startswith("it does not say where in its data the run was")
    checkpoint = Checkpoint.open(tmp_path / "c", alone=True)
    torch.manual_seed(0)
    untouched = Net()
    trained = {"embedding.weight", "hidden.weight", "hidden.bias"}
    assert checkpoint.weights().keys() == untouched.state_dict().keys()
    for name in trained:
        value = seen[name]
        stored = checkpoint.read(f"model.model.{name}")
        assert stored.dtype == torch.float32 and torch.equal(stored, value)
        assert not torch.equal(value, untouched.get_parameter(name)), "it was trained"
        for key in ("exp_avg", "exp_avg_sq"):
            moment = checkpoint.read(f"optimizer_0.state.model.{name}.{key}")
            assert torch.equal(moment, seen[f"{name}.{key}"]) and moment.shape == value.shape
        assert checkpoint.read(f"optimizer_0.state.model.{name}.step") == SAVED
        decay = checkpoint.values[f"optimizer_0.param_groups.model.{name}.weight_decay"]
        assert decay == (0.0 if name == "hidden.bias" else 0.1)
    settings = {name.rpartition(".")[2] for name in checkpoint.values}
    assert settings == {*torch.optim.AdamW(untouched.parameters()).param_groups[0], "initial_lr"} - {"params"}
    assert torch.equal(checkpoint.read("model.model.head.weight"), checkpoint.read("model.model.embedding.weight"))
    assert checkpoint.read("model.model.count") == 7
    for name in ("frozen.weight", "frozen.bias"):
        assert torch.equal(checkpoint.read(f"model.model.{name}"), seen[name])
        torch.testing.assert_close(seen[name].float(), untouched.get_parameter(name), atol=2e-3, rtol=0)


def test_of_zero_0_the_modules_weights_are_taken_and_it_is_said(nets: Any, tmp_path: Path) -> None:
    folder, seen = nets
    manifest, remarks = import_checkpoint(folder / "0 float32", tmp_path / "c")
    assert manifest.weights_only and manifest.step == SAVED
    assert remarks[0].startswith("its optimizer states are left out") and "not saved by an LLMModule" in remarks[0]
    checkpoint = Checkpoint.open(tmp_path / "c", alone=True)
    for name, value in seen[0, "float32"].items():
        assert torch.equal(checkpoint.read(f"model.model.{name}"), value)


def test_from_the_command_line_with_a_prefix(nets: Any, tmp_path: Path) -> None:
    folder = nets[0] / "2 float32"
    done = call_forked("import", folder, tmp_path / "c", "--prefix", "hidden.")
    assert done.returncode == 0, done.stderr
    assert "weights alone of step 3" in done.stdout
    assert "note: its optimizer states are left out" in done.stdout and "none of the weights" in done.stdout
    checkpoint = Checkpoint.open(tmp_path / "c", alone=True)
    assert checkpoint.weights().keys() == {"weight", "bias"}
    done = call_forked("import", folder, tmp_path / "d", "--model", "tiny")
    assert done.returncode == 2 and "does not hold this model under ''" in done.stderr


def test_who_tries_to_load_it_is_told_of_the_import(nets: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"a folder of DeepSpeed, no checkpoint of .*`lightning-llm import`"):
        Checkpoint.open(nets[0] / "2 float32", alone=True)


# -- what is refused --


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            lambda step: (step / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(),
            r"optimizer states of 1 ranks, where they were cut for \[2\]",
        ),
        (lambda step: (step / "layer_03-model_00-model_states.pt").touch(), "saved by a PipelineModule"),
        (lambda step: (step / "layer_0_expert_1_mp_rank_00_model_states.pt").touch(), "holds experts"),
        (lambda step: (step / "mp_rank_01_model_states.pt").touch(), r"2 slices of each weight .* ds_to_universal"),
        (
            lambda step: torch.save({"param_shapes": []}, step / "mp_rank_00_model_states.pt"),
            "damaged, or not what DeepSpeed writes: KeyError",
        ),
        (lambda step: torch.save([], step / "mp_rank_00_model_states.pt"), "is not what DeepSpeed writes"),
    ],
)
def test_what_is_not_understood_is_refused(nets: Any, tmp_path: Path, change: Any, error: str) -> None:
    shutil.copytree(nets[0] / "2 float32", tmp_path / "copy")
    change(tmp_path / "copy" / f"global_step{SAVED}")
    with pytest.raises(ConfigurationError, match=error):
        import_checkpoint(tmp_path / "copy", tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("rows", "error"),
    [(13, r"\d+ of 65 elements of embedding\.weight are there"), (8, "80 elements in group 0, of which")],
)
def test_ranges_that_do_not_fit_the_parameters_are_refused(nets: Any, tmp_path: Path, rows: int, error: str) -> None:
    shutil.copytree(nets[0] / "2 float32", tmp_path / "copy")
    file = tmp_path / "copy" / f"global_step{SAVED}" / "mp_rank_00_model_states.pt"
    stored = torch.load(file, weights_only=True)
    stored["param_shapes"][0]["embedding.weight"] = torch.Size([rows, 5])
    torch.save(stored, file)
    with pytest.raises(ConfigurationError, match=error):
        import_checkpoint(tmp_path / "copy", tmp_path / "c")


def test_slices_that_deepspeed_does_not_put_together_are_refused(nets: Any, tmp_path: Path) -> None:
    shutil.copytree(nets[0] / "2 float32" / "universal", tmp_path / "copy")
    (tmp_path / "copy" / "mp_rank_01_model_states.pt").touch()
    with pytest.raises(ConfigurationError, match=r"Of frozen\.bias, which was not trained, .* slices alone"):
        import_checkpoint(tmp_path / "copy", tmp_path / "c")


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_nothing_that_was_planted_runs(nets: Any, tmp_path: Path, file: str) -> None:
    shutil.copytree(nets[0] / "2 float32", tmp_path / "copy")
    torch.save({"module": Planted(tmp_path / "ran")}, tmp_path / "copy" / f"global_step{SAVED}" / file)
    with pytest.raises(ConfigurationError, match=r"refers to posix\.system, which is not plain data"):
        import_checkpoint(tmp_path / "copy", tmp_path / "c")
    assert not (tmp_path / "ran").exists()


def of_deepspeed() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]


def modules_of_import(folder: Path) -> list[str]:
    for name in of_deepspeed():
        del sys.modules[name]
    read_deepspeed_folder(folder)
    return of_deepspeed()


def test_nothing_of_deepspeed_is_needed(nets: Any) -> None:
    assert run_distributed(modules_of_import, 1, nets[0] / "1 bfloat16") == [[]]


# -- a run of Lightning's --


class Watch(Recorder):
    """What DeepSpeed needs for doing the same: the beginning, the batches, the learning rates, the plain state."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.batches: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def on_train_start(self, trainer: Any, module: LLMModule) -> None:
        torch.save(module.state_dict(), self.folder / "start.pt")

    def on_train_batch_start(self, trainer: Any, module: LLMModule, batch: dict[str, Tensor], index: int) -> None:
        self.batches.append({name: batch[name].clone() for name in ("input_ids", "labels")})
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        if trainer.global_step == SAVED:
            trainer.save_checkpoint(self.folder / "plain.ckpt")


def watched(folder: Path, corpus: Path) -> tuple[list[float], list[dict[str, Tensor]], list[float]]:
    """A run in a process whose group is ended first: the plain strategy must not see one."""
    dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    watch = Watch(folder)
    trainer = make_trainer("auto", 1, callbacks=[watch], max_steps=STEPS, limit_val_batches=0)
    module = LLMModule(CONFIG, learning_rate=3e-3, warmup_steps=2)
    trainer.fit(module, datamodule=TokenDataModule(corpus, batch_size=8, seq_len=32))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return watch.losses, watch.batches, watch.rates


@pytest.mark.parametrize(
    ("stage", "ranks", "sizes"),
    [
        pytest.param(2, 1, {}, id="ZeRO 2, one process", marks=pytest.mark.slow),
        pytest.param(3, 4, THREE_D, id="ZeRO 3, pp2 x tp2", marks=pytest.mark.slow),
        pytest.param(0, 4, THREE_D, id="ZeRO 0, pp2 x tp2", marks=pytest.mark.slow),
    ],
)
def test_a_lightning_run_under_deepspeed_goes_on_in_other_layouts(
    tmp_path: Path, corpus: Path, stage: int, ranks: int, sizes: dict[str, Any]
) -> None:
    losses, batches, rates = run_distributed(watched, 1, tmp_path, corpus)[0]
    run_distributed(save_as_lightning_does, 2, tmp_path, stage, batches[:SAVED], rates)
    manifest, remarks = import_checkpoint(tmp_path / "run.ckpt", tmp_path / "c", ranks=2)
    assert remarks == [] and manifest.step == SAVED and not manifest.weights_only
    results = run_distributed(job, ranks, ranks, sizes, corpus, {"resume": tmp_path / "c"})
    assert results[0]["losses"] == pytest.approx(losses[SAVED:], abs=1e-5)
    assert len(results[0]["losses"]) == STEPS - SAVED
