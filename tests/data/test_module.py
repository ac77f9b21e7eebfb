"""`TokenDataModule` under a real Trainer: shapes, layouts, checks; a resumed run sees what it would have seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_llm.data.corpus import Split, TokenizedCorpus
from lightning_llm.data.loader import IGNORED
from lightning_llm.data.module import TokenDataModule
from lightning_llm.errors import ConfigurationError
from tests.distributed import run_distributed

SEQ_LEN = 64
BATCH = 8
Sequence = tuple[int, ...]


class Recorder(LightningModule):
    """A tiny model that remembers the sequences of each optimizer step."""

    def __init__(self, read_stepping_batches: bool = False) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Embedding(300, 4), nn.Linear(4, 300))
        self.steps: dict[int, list[Sequence]] = {}
        self.validated: list[int] = []
        self.read_stepping_batches = read_stepping_batches

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.layer(batch["input_ids"])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        rows = [tuple(row) for row in batch["input_ids"].tolist()]
        self.steps.setdefault(self.global_step, []).extend(rows)
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated.append(int((batch["labels"] != IGNORED).any(dim=1).sum()))
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if (
            self.read_stepping_batches
        ):  # as many modules do for their schedule; it makes Lightning build the loader early
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(corpus: TokenizedCorpus, **options: Any) -> TokenDataModule:
    return TokenDataModule(corpus.path, **({"batch_size": BATCH, "seq_len": SEQ_LEN} | options))


def trainer(folder: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": "callbacks" in options,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "max_epochs": 3,
    }
    return Trainer(**(defaults | options))


def fit(
    corpus: TokenizedCorpus, folder: Path, *, resume: Path | None = None, module: Recorder | None = None, **options: Any
) -> dict[int, list[Sequence]]:
    """Train, and give the sequences of each optimizer step."""
    workers = {"num_workers": options.pop("num_workers", 0)}
    module = module or Recorder()
    trainer(folder, **options).fit(module, datamodule=data(corpus, **workers), ckpt_path=resume)
    return module.steps


@pytest.fixture(scope="module")
def uninterrupted(corpus: TokenizedCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Sequence]]:
    """Three epochs of the corpus."""
    steps = fit(corpus, tmp_path_factory.mktemp("uninterrupted"))
    assert len(steps) == 3 * data(corpus).steps_per_epoch == 51
    return steps


# Lightning goes another way in each: an end set by epochs, by steps, by steps alone.
ENDS = pytest.mark.parametrize(
    "end", [{}, {"max_steps": 51}, {"max_steps": 51, "max_epochs": -1}], ids=["epochs", "steps+epochs", "steps"]
)


def save_at(folder: Path, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **when)


def test_epochs_have_the_same_sequences_in_other_orders(
    corpus: TokenizedCorpus, uninterrupted: dict[int, list[Sequence]]
) -> None:
    per_epoch = data(corpus).steps_per_epoch
    assert per_epoch >= 5
    assert all(len(rows) == BATCH for rows in uninterrupted.values())
    epochs = [
        [row for step in range(k * per_epoch, (k + 1) * per_epoch) for row in uninterrupted[step]] for k in range(3)
    ]
    dropped = sum(corpus.train.sequences_per_chunk(SEQ_LEN)) - per_epoch * BATCH
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(len(set(rows)) == len(rows) for rows in epochs)
    assert len(set(epochs[0]) ^ set(epochs[1])) <= 2 * dropped


@pytest.mark.parametrize(
    ("num_workers", "end"), [(0, {}), (2, {}), (0, {"max_steps": 51}), (0, {"max_steps": 51, "max_epochs": -1})]
)
def test_resumed_within_an_epoch_sees_what_the_whole_run_saw(
    corpus: TokenizedCorpus,
    uninterrupted: dict[int, list[Sequence]],
    tmp_path: Path,
    num_workers: int,
    end: dict[str, int],
) -> None:
    per_epoch = len(uninterrupted) // 3
    fit(corpus, tmp_path, callbacks=[save_at(tmp_path, every_n_train_steps=1)], max_epochs=2, num_workers=num_workers)
    # Within the first and the second epoch, at the end of the first (saved by its last step), and one after.
    for step in (2, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch - 1):
        rest = fit(corpus, tmp_path, resume=tmp_path / f"step={step}.ckpt", num_workers=num_workers, **end)
        assert rest == {step: rows for step, rows in uninterrupted.items() if step >= min(rest)}
        assert min(rest) == step and max(rest) == max(uninterrupted)


@ENDS
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1)])
def test_resumed_from_the_end_of_an_epoch(
    corpus: TokenizedCorpus,
    uninterrupted: dict[int, list[Sequence]],
    tmp_path: Path,
    before: int,
    after: int,
    end: dict[str, int],
) -> None:
    per_epoch = len(uninterrupted) // 3
    callback = save_at(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True)
    first = trainer(tmp_path, callbacks=[callback], max_epochs=1, accumulate_grad_batches=before)
    first.fit(Recorder(), datamodule=data(corpus))
    first.save_checkpoint(tmp_path / "after.ckpt")
    for name in (f"step={per_epoch}.ckpt", "after.ckpt"):
        rest = fit(corpus, tmp_path, resume=tmp_path / name, accumulate_grad_batches=after, **end)
        assert rest == {step: rows for step, rows in uninterrupted.items() if step >= per_epoch}


@ENDS
@pytest.mark.parametrize(("every", "step"), [(2, 4), (1.0, 17)], ids=["within an epoch", "at its end"])
def test_resumed_after_a_validation(
    corpus: TokenizedCorpus,
    uninterrupted: dict[int, list[Sequence]],
    tmp_path: Path,
    every: float,
    step: int,
    end: dict[str, int],
) -> None:
    options: dict[str, Any] = {"limit_val_batches": 1.0, "val_check_interval": every}
    callback = save_at(tmp_path, monitor="val_loss", save_on_train_epoch_end=False)
    fit(corpus, tmp_path, callbacks=[callback], max_epochs=1, **options)
    rest = fit(corpus, tmp_path, resume=tmp_path / f"step={step}.ckpt", **options, **end)
    assert rest == {number: rows for number, rows in uninterrupted.items() if number >= step}


def test_resumed_by_a_module_that_reads_the_number_of_steps(
    corpus: TokenizedCorpus, uninterrupted: dict[int, list[Sequence]], tmp_path: Path
) -> None:
    """Lightning issue 20550: the checkpoint's place in the data would be forgotten."""
    fit(corpus, tmp_path, callbacks=[save_at(tmp_path, every_n_train_steps=3)], max_epochs=1)
    rest = fit(corpus, tmp_path, resume=tmp_path / "step=3.ckpt", module=Recorder(read_stepping_batches=True))
    assert rest == {step: rows for step, rows in uninterrupted.items() if step >= 3}


@ENDS
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (2, 4)])
def test_resumed_with_another_accumulation(
    corpus: TokenizedCorpus,
    uninterrupted: dict[int, list[Sequence]],
    tmp_path: Path,
    before: int,
    after: int,
    end: dict[str, int],
) -> None:
    callback = save_at(tmp_path, every_n_train_steps=1)
    first = fit(corpus, tmp_path, callbacks=[callback], max_epochs=1, accumulate_grad_batches=before)
    assert first == {step: uninterrupted[step] for step in first}  # accumulation does not change a step
    per_epoch = len(first)
    for step in (3, per_epoch):
        rest = fit(corpus, tmp_path, resume=tmp_path / f"step={step}.ckpt", accumulate_grad_batches=after, **end)
        assert rest == {step: rows for step, rows in uninterrupted.items() if step >= min(rest)}
        assert min(rest) == step and max(rest) == max(uninterrupted)


class InterruptedRunError(Exception):
    """Stands for whatever ends a run from outside."""


@pytest.mark.parametrize("place", ["training_step", "on_train_batch_end"])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (4, 1), (2, 4)])
@pytest.mark.parametrize("batch", [1, 6, 7])
def test_resumed_from_within_a_step_does_that_step_again(
    corpus: TokenizedCorpus,
    uninterrupted: dict[int, list[Sequence]],
    tmp_path: Path,
    place: str,
    before: int,
    after: int,
    batch: int,
) -> None:
    """Gradients that were accumulated are not in a checkpoint; so the step that they were for begins anew."""

    class SaveWithinStep(Recorder):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.save_and_end("training_step", batch_idx)
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.save_and_end("on_train_batch_end", batch_idx)

        def save_and_end(self, here: str, batch_idx: int) -> None:
            if (here, batch_idx) == (place, batch):
                self.trainer.save_checkpoint(tmp_path / "within.ckpt")
                raise InterruptedRunError

    module = SaveWithinStep()
    with pytest.raises(InterruptedRunError):
        fit(corpus, tmp_path, module=module, accumulate_grad_batches=before)
    rest = fit(corpus, tmp_path, resume=tmp_path / "within.ckpt", accumulate_grad_batches=after)
    finished = (batch + (place == "on_train_batch_end")) // before
    assert rest == {step: rows for step, rows in uninterrupted.items() if step >= finished}


@ENDS
@pytest.mark.parametrize("read_stepping_batches", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2)])
def test_resumed_after_a_run_that_ended_within_an_epoch(
    corpus: TokenizedCorpus,
    uninterrupted: dict[int, list[Sequence]],
    tmp_path: Path,
    before: int,
    after: int,
    read_stepping_batches: bool,
    end: dict[str, int],
) -> None:
    per_epoch = len(uninterrupted) // 3
    for steps in (2, per_epoch + 2):
        saved = save_at(tmp_path / str(steps), every_n_epochs=1, save_on_train_epoch_end=True)  # also if it ends early
        stopped = trainer(tmp_path, max_steps=steps, max_epochs=-1, accumulate_grad_batches=before, callbacks=[saved])
        stopped.fit(Recorder(), datamodule=data(corpus))
        stopped.save_checkpoint(tmp_path / str(steps) / "after.ckpt")
        for name in (f"step={steps}.ckpt", "after.ckpt"):
            checkpoint, module = tmp_path / str(steps) / name, Recorder(read_stepping_batches)
            rest = fit(corpus, tmp_path, module=module, resume=checkpoint, accumulate_grad_batches=after, **end)
            assert rest == {step: rows for step, rows in uninterrupted.items() if step >= steps}


def test_resumed_after_a_run_that_ended_within_its_last_epoch(
    corpus: TokenizedCorpus, uninterrupted: dict[int, list[Sequence]], tmp_path: Path
) -> None:
    steps = len(uninterrupted) - 3
    stopped = trainer(tmp_path, max_steps=steps)  # and max_epochs=3, which it would count as reached
    stopped.fit(Recorder(), datamodule=data(corpus))
    stopped.save_checkpoint(tmp_path / "after.ckpt")
    rest = fit(corpus, tmp_path, resume=tmp_path / "after.ckpt")
    assert rest == {step: rows for step, rows in uninterrupted.items() if step >= steps}


def test_resumed_with_limited_epochs(corpus: TokenizedCorpus, tmp_path: Path) -> None:
    """An epoch that `limit_train_batches` ends is done, unlike one that was interrupted."""
    whole = fit(corpus, tmp_path, limit_train_batches=3)
    assert len(whole) == 9 and len({tuple(rows) for rows in whole.values()}) == 9
    fit(corpus, tmp_path, limit_train_batches=3, max_epochs=2, callbacks=[save_at(tmp_path, every_n_train_steps=1)])
    for step in (2, 3, 4, 6):
        rest = fit(corpus, tmp_path, resume=tmp_path / f"step={step}.ckpt", limit_train_batches=3)
        assert rest == {number: rows for number, rows in whole.items() if number >= step}


def test_resumed_with_a_batch_size_that_does_not_meet_the_place_is_refused(
    corpus: TokenizedCorpus, tmp_path: Path
) -> None:
    fit(corpus, tmp_path, callbacks=[save_at(tmp_path, every_n_train_steps=3)], max_epochs=1)
    with pytest.raises(ConfigurationError, match=r"24 / 10 sequences per batch leaves 4"):
        trainer(tmp_path).fit(Recorder(), datamodule=data(corpus, batch_size=10), ckpt_path=tmp_path / "step=3.ckpt")


def test_resumed_on_other_data_is_refused(corpus: TokenizedCorpus, tmp_path: Path) -> None:
    fit(corpus, tmp_path, callbacks=[save_at(tmp_path, every_n_train_steps=3)], max_epochs=1)
    with pytest.raises(ConfigurationError, match=r"taken with seed=0, this run has seed=1"):
        trainer(tmp_path).fit(Recorder(), datamodule=data(corpus, seed=1), ckpt_path=tmp_path / "step=3.ckpt")
    with pytest.raises(ConfigurationError, match=r"taken with seq_len=64, this run has seq_len=32"):
        trainer(tmp_path).fit(Recorder(), datamodule=data(corpus, seq_len=32), ckpt_path=tmp_path / "step=3.ckpt")


def train_as_rank(corpus: TokenizedCorpus, folder: Path, accumulate: int) -> tuple[dict[int, list[Sequence]], int]:
    """One of two DDP ranks: train an epoch, save within it and at its end, validate."""
    module = Recorder()
    callbacks = [save_at(folder, every_n_train_steps=5)]
    options = {"devices": 2, "strategy": "ddp", "limit_val_batches": 1.0, "accumulate_grad_batches": accumulate}
    trainer(folder, callbacks=callbacks, max_epochs=1, **options).fit(module, datamodule=data(corpus))
    return module.steps, sum(module.validated)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_share_each_step_and_one_goes_on_from_where_they_were(
    corpus: TokenizedCorpus, uninterrupted: dict[int, list[Sequence]], tmp_path: Path, accumulate: int
) -> None:
    (first, seen), (second, seen_too) = run_distributed(train_as_rank, 2, corpus, tmp_path, accumulate)
    assert len(first) == len(second) == len(uninterrupted) // 3
    for step, rows in first.items():
        share = BATCH // 2 // accumulate
        batches = [part[k : k + share] for k in range(0, BATCH // 2, share) for part in (rows, second[step])]
        assert sum(batches, []) == uninterrupted[step]
    assert seen + seen_too == sum(corpus.val.sequences_per_chunk(SEQ_LEN))
    for step in (5, 15):
        rest = fit(corpus, tmp_path, resume=tmp_path / f"step={step}.ckpt")
        assert rest == {number: rows for number, rows in uninterrupted.items() if number >= step}


def test_validation_sees_every_sequence_once(corpus: TokenizedCorpus, tmp_path: Path) -> None:
    module = Recorder()
    results = trainer(tmp_path, limit_val_batches=1.0).validate(module, datamodule=data(corpus), verbose=False)
    assert sum(module.validated) == sum(corpus.val.sequences_per_chunk(SEQ_LEN))
    assert results[0]["val_loss"] > 0


def test_works_without_a_trainer(corpus: TokenizedCorpus) -> None:
    module = data(corpus)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch["input_ids"].shape == (BATCH, SEQ_LEN)
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    assert module.vocab_size == 300 and module.tokenizer_file.is_file()
    unshuffled = data(corpus, shuffle=False).train_dataloader()
    assert unshuffled.order.slice(7, 0, 5).tolist() == [0, 1, 2, 3, 4]


def test_limits_and_overfitting_work_as_for_any_loader(corpus: TokenizedCorpus, tmp_path: Path) -> None:
    steps = fit(corpus, tmp_path, limit_train_batches=2, max_epochs=2)
    assert sorted(steps) == [0, 1, 2, 3] and steps[0] != steps[2]
    steps = fit(corpus, tmp_path, overfit_batches=2, max_epochs=2)
    assert sorted(steps) == [0, 1, 2, 3] and (steps[0], steps[1]) == (steps[2], steps[3])


def test_a_corpus_without_validation_trains_without(
    copied_corpus: Callable[[], TokenizedCorpus], tmp_path: Path
) -> None:
    copy = dataclasses.replace(copied_corpus(), val=Split())
    copy.save(copy.path)
    module = Recorder()
    trainer(tmp_path, limit_val_batches=1.0, num_sanity_val_steps=2, max_epochs=1).fit(module, datamodule=data(copy))
    assert len(module.steps) == 17 and not module.validated


@pytest.mark.parametrize(
    ("batch_size", "replicas", "accumulate", "message"),
    [
        (8, 3, 1, r"batch_size\(8\) does not divide by data ranks\(3\) \* accumulate_grad_batches\(1\) = 3.*6 or 9"),
        (8, 4, 4, r"= 16\. .*set it to 16\."),
        (10, 2, 2, r"= 4\. .*set it to 8 or 12"),
    ],
)
def test_batch_that_does_not_divide(
    corpus: TokenizedCorpus, batch_size: int, replicas: int, accumulate: int, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        data(corpus, batch_size=batch_size).check(replicas, accumulate)
    data(corpus, batch_size=replicas * accumulate).check(replicas, accumulate)


def test_batch_that_does_not_divide_is_found_before_training(corpus: TokenizedCorpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"accumulate_grad_batches\(3\)"):
        fit(corpus, tmp_path, accumulate_grad_batches=3)


def test_missing_folder_says_how_to_make_it(tmp_path: Path) -> None:
    module = TokenDataModule(tmp_path / "nothing")
    for use in (module.check, lambda: module.setup("fit"), lambda: module.vocab_size, module.train_dataloader):
        with pytest.raises(ConfigurationError, match=r"nothing does not exist.*lightning-llm tokenize"):
            use()


def test_too_short_corpora_are_refused_with_the_arithmetic(corpus: TokenizedCorpus) -> None:
    sequences = sum(corpus.train.sequences_per_chunk(SEQ_LEN))
    with pytest.raises(ConfigurationError, match=rf"are {sequences} sequences of seq_len\(64\) \+ 1 tokens"):
        data(corpus, batch_size=sequences + 1).check()
    data(corpus, batch_size=sequences).check()
    longest = max(chunk.tokens for chunk in corpus.train.chunks)
    with pytest.raises(ConfigurationError, match=r"are 0 sequences"):
        data(corpus, batch_size=1, seq_len=longest).check()
    with pytest.raises(ConfigurationError, match=r"validation part .* fewer than one sequence of seq_len\(\d+\) \+ 1"):
        data(corpus, batch_size=1, seq_len=max(chunk.tokens for chunk in corpus.val.chunks)).check()


def test_damaged_corpus_is_refused(copied_corpus: Callable[[], TokenizedCorpus]) -> None:
    copy = copied_corpus()
    (copy.path / "train" / "chunk-0-1.bin").unlink()
    with pytest.raises(ConfigurationError, match=r"train/chunk-0-1.bin is missing"):
        data(copy).setup("fit")


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"seq_len": 0}, {"num_workers": -1}, {"seed": -1}])
def test_impossible_sizes_are_refused(tmp_path: Path, option: dict[str, int]) -> None:
    name, value = next(iter(option.items()))
    with pytest.raises(ConfigurationError, match=f"{name}={value} of TokenDataModule must be at least"):
        TokenDataModule(tmp_path, **option)  # type: ignore[arg-type]
