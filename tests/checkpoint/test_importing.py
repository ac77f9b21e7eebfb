"""What others saved becomes a checkpoint of ours: equal to the bit, runs that go on, and no pickle that runs."""

from __future__ import annotations

import os
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule, Trainer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_llm import Decoder, DecoderConfig, LLMModule, TokenDataModule
from lightning_llm.checkpoint.export import export
from lightning_llm.checkpoint.importing import import_checkpoint
from lightning_llm.checkpoint.inspection import inspect
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.module import sum_cross_entropy
from tests.checkpoint.runs import CONFIG, STEPS, run
from tests.commands import call_forked
from tests.distributed import run_distributed
from tests.strategies.training import Recorder, loader, make_module, make_trainer

TIED = CONFIG.replace(tie_word_embeddings=True)
EXPERTS = CONFIG.replace(
    num_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    scoring_func="sigmoid",
    use_routing_bias=True,
    qk_norm=True,
    model_type="dots1",
)
THREE_D = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}


def job(world_size: int, sizes: dict[str, Any], corpus: Path, options: dict[str, Any]) -> dict[str, Any]:
    return run(world_size, sizes, corpus, **options)


class Planted:
    """Runs a command where it is unpickled, if anybody lets it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


# -- Hugging Face folders --


@pytest.mark.parametrize("config", [CONFIG, TIED, EXPERTS], ids=["llama", "tied", "experts"])
def test_a_hugging_face_folder_there_and_back(tmp_path: Path, config: DecoderConfig) -> None:
    torch.manual_seed(1)
    decoder = Decoder(config).to(torch.bfloat16)
    with torch.no_grad():
        for tensor in (*decoder.parameters(), *decoder.buffers()):
            tensor.normal_()
    decoder.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    done = call_forked("import", tmp_path / "model", tmp_path / "checkpoint", "--ranks", 2)
    assert done.returncode == 0, done.stderr
    assert "weights alone of step 0" in done.stdout and "tensors in 2 files" in done.stdout

    checkpoint = Checkpoint.open(tmp_path / "checkpoint", alone=True)
    assert checkpoint.manifest.weights_only and checkpoint.manifest.source == "model"
    stored = dict(checkpoint.iterate_weights())
    assert stored.keys() == config.parameter_shapes().keys()
    for name, tensor in decoder.state_dict().items():
        if name in stored:
            assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor), name
    assert DecoderConfig.load(tmp_path / "checkpoint").to_dict() == DecoderConfig.load(tmp_path / "model").to_dict()
    assert (tmp_path / "checkpoint" / "tokenizer.json").is_file()


def validate(world_size: int, sizes: dict[str, Any], corpus: Path, path: Path) -> float:
    from lightning_llm import LLM3DStrategy

    trainer = make_trainer(LLM3DStrategy(**sizes), world_size, limit_val_batches=2)
    data = TokenDataModule(corpus, batch_size=8, seq_len=32)
    return trainer.validate(LLMModule(CONFIG, seed=5), datamodule=data, ckpt_path=path, verbose=False)[0]["val_loss"]


def test_an_imported_folder_validates_in_three_dimensions(tmp_path: Path, corpus: Path) -> None:
    torch.manual_seed(1)
    decoder = Decoder(CONFIG)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.05)
    decoder.save_pretrained(tmp_path / "model")
    import_checkpoint(tmp_path / "model", tmp_path / "checkpoint")
    data = TokenDataModule(corpus, batch_size=8, seq_len=32)
    batches = [batch for batch, _ in zip(data.val_dataloader(), range(2), strict=False)]
    with torch.no_grad():
        losses = [sum_cross_entropy(decoder(b["input_ids"]), b["labels"]).item() / b["labels"].numel() for b in batches]
    found = run_distributed(validate, 4, 4, THREE_D, corpus, tmp_path / "checkpoint")
    assert found == pytest.approx([sum(losses) / 2] * 4, abs=1e-5)


def test_pickled_weights_are_not_imported(tmp_path: Path) -> None:
    CONFIG.save(tmp_path / "model")
    torch.save({"x": Planted(tmp_path / "ran")}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match=r"pytorch_model\.bin, but pickled weights are never loaded"):
        import_checkpoint(tmp_path / "model", tmp_path / "checkpoint")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "checkpoint").exists()


# -- Lightning's files --


def plain_run(corpus: Path, path: Path, config: DecoderConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """Lightning's own strategy for one device, which saves a `.ckpt` file at step 3 and goes on to the end."""
    recorder = Recorder()

    class SaveAt(Recorder):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(path)

    trainer = make_trainer("auto", 1, callbacks=[recorder, SaveAt()], max_steps=STEPS, limit_val_batches=0)
    module = LLMModule(config, learning_rate=3e-3, warmup_steps=2, **arguments)
    trainer.fit(module, datamodule=TokenDataModule(corpus, batch_size=8, seq_len=32))
    return {"losses": recorder.losses, "weights": {n: p.detach().clone() for n, p in module.named_parameters()}}


@pytest.mark.parametrize(
    ("config", "arguments", "tolerance"),
    [
        pytest.param(CONFIG, {}, 1e-5, id="AdamW"),
        pytest.param(TIED, {}, 1e-5, id="tied", marks=pytest.mark.slow),
        # Muon multiplies in bfloat16, so layouts differ by more than float32's rounding.
        pytest.param(CONFIG, {"optimizer": "muon"}, 1e-3, id="Muon", marks=pytest.mark.slow),
    ],
)
def test_a_plain_run_goes_on_in_three_dimensions(
    tmp_path: Path, corpus: Path, config: DecoderConfig, arguments: dict[str, Any], tolerance: float
) -> None:
    (plain,) = run_distributed(plain_run_alone, 1, corpus, tmp_path / "plain.ckpt", config, arguments)
    assert len(plain["losses"]) == STEPS
    manifest, remarks = import_checkpoint(tmp_path / "plain.ckpt", tmp_path / "checkpoint", ranks=3)
    assert remarks == [] and manifest.step == 3 and not manifest.weights_only
    options = {"resume": tmp_path / "checkpoint", "config": config, "module_arguments": arguments}
    results = run_distributed(job, 4, 4, THREE_D, corpus, options)
    assert results[0]["losses"] == pytest.approx(plain["losses"][3:], abs=tolerance)
    (alone,) = run_distributed(job, 1, 1, {}, corpus, options)
    assert alone["losses"] == pytest.approx(plain["losses"][3:], abs=tolerance / 10)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(weight, plain["weights"][name], atol=1e-5, rtol=0)


def plain_run_alone(*arguments: Any) -> dict[str, Any]:
    """In a process whose group is ended first: the plain strategy must not see one."""
    dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    result = plain_run(*arguments)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return result


def save_plain(folder: Path, module: LightningModule) -> Path:
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader(trainer, None))
    trainer.save_checkpoint(folder / "plain.ckpt")
    return folder / "plain.ckpt"


def test_tensors_of_a_lightning_file_are_equal_and_export(tmp_path: Path, corpus: Path) -> None:
    path = save_plain(tmp_path, make_module())
    raw = torch.load(path, weights_only=True)
    done = call_forked("import", path, tmp_path / "checkpoint", "--tokenizer", corpus)
    assert done.returncode == 0, done.stderr
    assert "weights and optimizer states of step 2" in done.stdout
    checkpoint = Checkpoint.open(tmp_path / "checkpoint", alone=True)
    for name, tensor in raw["state_dict"].items():
        assert torch.equal(checkpoint.read(f"model.{name}"), tensor), name
    (state,) = raw["optimizer_states"]
    moments = [name for name in checkpoint.tensors if name.endswith(".exp_avg")]
    assert len(moments) == len(state["state"]) == len(raw["state_dict"])
    assert sum(float(checkpoint.read(name).double().sum()) for name in moments) == pytest.approx(
        sum(float(s["exp_avg"].double().sum()) for s in state["state"].values())
    )
    decays = {name: checkpoint.values[f"optimizer_0.param_groups.{name}.weight_decay"] for name in raw["state_dict"]}
    assert {name for name, decay in decays.items() if decay == 0} == {name for name in decays if "norm" in name}
    trainer_state = checkpoint.trainer_state()
    for part in ("loops", "lr_schedulers", "hyper_parameters", "epoch", "global_step"):
        assert trainer_state[part] == raw[part]
    export(tmp_path / "checkpoint", tmp_path / "model")
    ours = Decoder.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(ours[name.removeprefix("model.")], t) for name, t in raw["state_dict"].items())
    assert (tmp_path / "model" / "tokenizer.json").is_file()


class Foreign(LightningModule):
    """Not an LLMModule: nobody knows the order of its optimizer's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"where": Path("data"), "rates": (0.1, None)})
        self.layers = torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.Linear(4, 4))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.layers(batch["input_ids"].float()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(reversed(list(self.parameters())))


def test_of_another_module_the_weights_are_taken_and_it_is_said(tmp_path: Path) -> None:
    path = save_plain(tmp_path, Foreign())
    done = call_forked("import", path, tmp_path / "checkpoint")
    assert done.returncode == 0, done.stderr
    assert "weights alone of step 2" in done.stdout
    assert "optimizer states are left out, so that no run can go on from it: it was not saved by an LLMM" in done.stdout
    checkpoint = Checkpoint.open(tmp_path / "checkpoint", alone=True)
    weights = torch.load(path, weights_only=False)["state_dict"]
    assert checkpoint.tensors.keys() == {f"model.{name}" for name in weights}
    assert all(torch.equal(checkpoint.read(f"model.{name}"), tensor) for name, tensor in weights.items())
    assert checkpoint.trainer_state()["hyper_parameters"] == {"where": Path("data"), "rates": (0.1, None)}


def test_states_that_do_not_fit_the_module_are_not_guessed(tmp_path: Path) -> None:
    path = save_plain(tmp_path, make_module())
    raw = torch.load(path, weights_only=True)
    moments = raw["optimizer_states"][0]["state"]
    moments[0], moments[1] = moments[1], moments[0]
    torch.save(raw, path)
    manifest, remarks = import_checkpoint(path, tmp_path / "checkpoint")
    assert manifest.weights_only and "does not have the shape of" in remarks[0]


def test_what_a_lightning_file_would_run_is_refused_by_name(tmp_path: Path) -> None:
    path = save_plain(tmp_path, make_module())
    raw = torch.load(path, weights_only=True)
    for place in ("hyper_parameters", "callbacks", "state_dict"):
        torch.save({**raw, place: {**raw[place], "extra": Planted(tmp_path / "ran")}}, path)
        done = call_forked("import", path, tmp_path / "checkpoint")
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert "plain.ckpt refers to posix.system, which is not plain data" in done.stderr
        assert not (tmp_path / "ran").exists() and not (tmp_path / "checkpoint").exists()
    path.write_bytes(pickle.dumps(Planted(tmp_path / "ran")))  # as old files are: no archive
    with pytest.raises(ConfigurationError, match=r"refers to posix\.system|cannot be read"):
        import_checkpoint(path, tmp_path / "checkpoint")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04 no archive", "cannot be read"),
        ({"epoch": 1}, "has no state_dict"),
        ({"state_dict": {"w": torch.ones(2, 2).to_sparse()}}, "holds model.w as a torch.sparse_coo"),
        ({"state_dict": {"w": torch.ones(1).expand(2**40)}}, "an expanded tensor"),
        ({"state_dict": {"w": torch.ones(2)}, "x": torch.strided}, r"holds a torch\.layout at trainer\.x"),
    ],
    ids=["empty", "no archive", "no weights", "sparse", "expanded", "a layout"],
)
def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "file.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ConfigurationError, match=message):
        import_checkpoint(path, tmp_path / "checkpoint")
    assert [p.name for p in tmp_path.iterdir()] == ["file.ckpt"]


# -- folders of torch.distributed.checkpoint --


def torch_loop(corpus: Path, folder: Path, flat: bool) -> list[float]:
    """A loop of one's own on 2 ranks with FSDP2 and AdamW; saves at step 3, goes on to the end."""
    torch.manual_seed(dist.get_rank())
    decoder = Decoder(CONFIG)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    fully_shard(decoder, mesh=init_device_mesh("cpu", (2,)))
    matrices = [p for p in decoder.parameters() if p.ndim >= 2]
    vectors = [p for p in decoder.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # as any scheduler of torch adds
    losses = []
    for step, batch in enumerate(first_batches(corpus)):
        if step == 3:
            states = get_optimizer_state_dict(
                decoder, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat)
            )
            dcp.save({"model": get_model_state_dict(decoder), "optimizer": states}, checkpoint_id=folder)
        rows = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
        labels = batch["labels"][rows]
        loss = sum_cross_entropy(decoder(batch["input_ids"][rows]), labels) / labels.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(float(whole) / 2)
    return losses


def first_batches(corpus: Path, count: int = STEPS) -> list[dict[str, torch.Tensor]]:
    data = TokenDataModule(corpus, batch_size=8, seq_len=32)
    return [batch for batch, _ in zip(data.val_dataloader(), range(count), strict=False)]


def go_on_by_trainer(world_size: int, sizes: dict[str, Any], corpus: Path, checkpoint: Path) -> list[float]:
    """Steps 3 to the end, by the Trainer, from an imported checkpoint."""
    from lightning_llm import LLM3DStrategy

    strategy, recorder = LLM3DStrategy(**sizes), Recorder()
    trainer = make_trainer(
        strategy,
        world_size,
        callbacks=[recorder],
        max_steps=STEPS - 3,
        limit_val_batches=0,
        use_distributed_sampler=False,  # which would shuffle
    )
    module = LLMModule(CONFIG, learning_rate=3e-3, schedule="constant", warmup_steps=0)
    rows = [
        {name: tensor[index] for name, tensor in batch.items() if name in ("input_ids", "labels")}
        for batch in first_batches(corpus)[3:]
        for index in range(8)
    ]
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=8, shuffle=False), ckpt_path=checkpoint)
    return recorder.losses


@pytest.mark.parametrize("flat", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["flat", "groups"])
def test_a_loop_of_ones_own_goes_on_in_three_dimensions(tmp_path: Path, corpus: Path, flat: bool) -> None:
    losses = run_distributed(torch_loop, 2, corpus, tmp_path / "dcp", flat)[0]
    CONFIG.save(tmp_path / "model")
    done = call_forked("import", tmp_path / "dcp", tmp_path / "checkpoint", "--model", tmp_path / "model", "--ranks", 3)
    assert done.returncode == 0, done.stderr
    assert "weights and optimizer states of step 3" in done.stdout and "counts from step 0" in done.stdout
    results = run_distributed(go_on_by_trainer, 4, 4, THREE_D, corpus, tmp_path / "checkpoint")
    assert len(results[0]) == STEPS - 3
    assert results[0] == pytest.approx(losses[3:], abs=1e-5)


def save_by_dcp(folder: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def random_decoder(config: DecoderConfig = CONFIG) -> Decoder:
    torch.manual_seed(4)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_()
    return decoder


@pytest.mark.parametrize(
    ("where", "prefix", "with_config"),
    [
        pytest.param("model.", None, True, id="a decoder as model"),
        pytest.param("model.", None, False, id="a decoder as model, unknown"),
        pytest.param("", None, True, id="a decoder"),
        pytest.param("", "", False, id="a decoder, unknown"),  # whose own names begin with "model." too
        pytest.param("state_dict.net.", None, True, id="deeper"),
        pytest.param("state_dict.net.", "state_dict.net.", False, id="deeper, unknown"),
    ],
)
def test_weights_are_found_by_their_prefix(tmp_path: Path, where: str, prefix: str | None, with_config: bool) -> None:
    decoder = random_decoder()
    weights = {f"{where}{name}": tensor for name, tensor in decoder.state_dict().items()}
    folder = save_by_dcp(tmp_path / "dcp", {**weights, "step": 7, "notes": {"path": Path("x"), "numbers": (1, 2.0)}})
    CONFIG.save(tmp_path / "model")
    model = str(tmp_path / "model") if with_config else None
    manifest, remarks = import_checkpoint(folder, tmp_path / "checkpoint", model=model, prefix=prefix)
    assert remarks == [] and manifest.weights_only
    found = dict(Checkpoint.open(tmp_path / "checkpoint", alone=True).iterate_weights())
    assert found.keys() == decoder.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in decoder.state_dict().items())
    assert (tmp_path / "checkpoint" / "config.json").is_file() == with_config


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    decoder = random_decoder()
    optimizer = torch.optim.AdamW(decoder.parameters())
    decoder(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    folder = save_by_dcp(tmp_path / "dcp", {"model": decoder.state_dict(), "optimizer": optimizer.state_dict()})
    manifest, remarks = import_checkpoint(folder, tmp_path / "by-number")
    assert manifest.weights_only and "belongs to no weight by name" in remarks[0]
    CONFIG.replace(hidden_size=64).save(tmp_path / "wider")
    with pytest.raises(ConfigurationError, match=r"does not hold this model under 'model\.'.* of another shape"):
        import_checkpoint(folder, tmp_path / "other", model=str(tmp_path / "wider"))
    with pytest.raises(ConfigurationError, match=r"no tensor whose name begins with 'net\.'.*--prefix"):
        import_checkpoint(folder, tmp_path / "other", prefix="net.")
    with pytest.raises(ConfigurationError, match="--prefix is for folders of torch"):
        import_checkpoint(tmp_path / "wider", tmp_path / "other", prefix="net.")
    with pytest.raises(ConfigurationError, match="is a checkpoint of lightning_llm already"):
        import_checkpoint(tmp_path / "by-number", tmp_path / "other")
    for nothing in ("nowhere", "."):
        with pytest.raises(ConfigurationError, match="There is no|nothing to import"):
            import_checkpoint(tmp_path / nothing, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_a_dcp_folder_would_run_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_by_dcp(tmp_path / "dcp", {"model": random_decoder().state_dict()})
    good = shutil.copytree(folder, tmp_path / "good")
    raw = pickle.loads((folder / ".metadata").read_bytes())
    raw.planner_data = {"x": Planted(tmp_path / "ran")}
    (folder / ".metadata").write_bytes(pickle.dumps(raw))
    done = call_forked("import", folder, tmp_path / "checkpoint")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert ".metadata refers to posix.system, which is not plain data" in done.stderr

    folder = save_by_dcp(
        tmp_path / "values", {"model": random_decoder().state_dict(), "optimizer": {"state": Planted(tmp_path / "ran")}}
    )
    (tmp_path / "ran").unlink(missing_ok=True)  # torch copies what it saves
    with pytest.raises(ConfigurationError, match=r"refers to posix\.system"):
        import_checkpoint(folder, tmp_path / "checkpoint")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "checkpoint").exists()
    import_checkpoint(good, tmp_path / "checkpoint")


@pytest.mark.parametrize("damage", ["cut off", "no pickle", "something else", "outside", "shard cut off", "no shard"])
def test_a_damaged_dcp_folder_is_refused(tmp_path: Path, damage: str) -> None:
    folder = save_by_dcp(tmp_path / "dcp", {"model": random_decoder().state_dict()})
    metadata, (shard,) = folder / ".metadata", folder.glob("*.distcp")
    content = metadata.read_bytes()
    if damage == "cut off":
        metadata.write_bytes(content[: len(content) // 2])
    elif damage == "no pickle":
        metadata.write_bytes(b"{}")
    elif damage == "something else":
        metadata.write_bytes(pickle.dumps(OrderedDict(a=1)))
    elif damage == "outside":
        name = shard.name.encode()
        metadata.write_bytes(content.replace(name, b"../" + name[3:]))
    elif damage == "shard cut off":
        shard.write_bytes(shard.read_bytes()[:5000])
    else:
        shard.unlink()
    with pytest.raises(ConfigurationError, match=r"damaged|not what|cannot be read|points outside|plain data"):
        import_checkpoint(folder, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "no draft is left"


def test_every_import_is_verified(tmp_path: Path) -> None:
    random_decoder().save_pretrained(tmp_path / "model")
    import_checkpoint(tmp_path / "model", tmp_path / "checkpoint")
    (found,) = inspect(tmp_path / "checkpoint")
    assert found.good and found.verified
    with pytest.raises(ConfigurationError, match="is a checkpoint already"):
        import_checkpoint(tmp_path / "model", tmp_path / "checkpoint")
    with pytest.raises(ConfigurationError, match=r"no tokenizer\.json at"):
        import_checkpoint(tmp_path / "model", tmp_path / "other", tokenizer=tmp_path / "model")
