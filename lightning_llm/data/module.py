"""`TokenDataModule`: a tokenised corpus as Lightning's data module, for any strategy and any layout of ranks.

The Trainer calls it; it asks the Trainer's strategy which part of the data this process is for. `tokenize.py` makes the
folder that it reads.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from typing_extensions import override

from lightning_llm.data._lightning import data_coordinates, resume_exactly
from lightning_llm.data._litdata import import_litdata
from lightning_llm.data.corpus import TokenizedCorpus
from lightning_llm.data.loader import Sequences, TokenLoader
from lightning_llm.data.sampler import SequenceOrder
from lightning_llm.errors import ConfigurationError


class TokenDataModule(LightningDataModule):
    """Batches of packed tokens: `{"input_ids", "labels"[, "document_ids"]}`, all int64 [local batch, seq_len].

    `labels` are shifted already: `labels[b, t]` is the token that follows `input_ids[b, t]`; -100 is to be ignored.
    With `Trainer(accumulate_grad_batches=A)` on D data ranks each batch has `batch_size / A / D` sequences, so that an
    optimizer step always sees the same `batch_size` sequences, in the same order, on every layout.

    Args:
        path: the folder that `lightning-llm tokenize` made.
        batch_size: sequences per optimizer step over all data ranks.
        seq_len: tokens per sequence.
        num_workers: processes per rank that read ahead; 0 reads in the training process (a memory map, so it is fast).
        seed: of the order in which sequences are seen; the same for all ranks.
        shuffle: see the training sequences in a new order each epoch.
        document_mask: add `document_ids` to the batches, so that tokens attend to tokens of their own document only.

    Raises:
        ConfigurationError: from `check` (which `setup` calls), when the corpus or a size cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        batch_size: int = 8,
        seq_len: int = 512,
        num_workers: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        document_mask: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seq_len", seq_len, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ConfigurationError(f"{name}={value} of TokenDataModule must be at least {least}.")
        self.path = Path(path)
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.num_workers = num_workers
        self.seed = seed
        self.shuffle = shuffle
        self.document_mask = document_mask
        self._corpus: TokenizedCorpus | None = None

    @property
    def corpus(self) -> TokenizedCorpus:
        """What is in the folder; read once."""
        if self._corpus is None:
            self._corpus = TokenizedCorpus.load(self.path)
        return self._corpus

    @property
    def vocab_size(self) -> int:
        """Rows that the model's embedding needs."""
        return self.corpus.vocab_size

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer.json that made the tokens."""
        return self.corpus.tokenizer_file

    @property
    def end_of_text_id(self) -> int:
        """The token that ends each document."""
        return self.corpus.end_of_text_id

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the same on every layout."""
        return sum(self.corpus.train.sequences_per_chunk(self.seq_len)) // self.batch_size

    def check(self, num_replicas: int = 1, accumulate_grad_batches: int = 1) -> None:
        """See that this data can be trained on with these sizes, before any process waits for another.

        Args:
            num_replicas: number of data ranks.
            accumulate_grad_batches: batches per optimizer step.

        Raises:
            ConfigurationError: the folder is missing or damaged, the batch does not divide, or the corpus is too short.
        """
        import_litdata()
        corpus = self.corpus
        corpus.check_files()
        self.check_batch_size(num_replicas, accumulate_grad_batches)
        sequences = sum(corpus.train.sequences_per_chunk(self.seq_len))
        if sequences < self.batch_size:
            raise ConfigurationError(
                f"The corpus {self.path} is too short for one optimizer step: {corpus.train.tokens:,} tokens in "
                f"{len(corpus.train.chunks)} chunks are {sequences} sequences of seq_len({self.seq_len}) + 1 tokens, "
                f"batch_size is {self.batch_size}. Tokenise more text, or set a smaller seq_len or batch_size."
            )
        if corpus.val.chunks and not sum(corpus.val.sequences_per_chunk(self.seq_len)):
            raise ConfigurationError(
                f"The validation part of {self.path} has {corpus.val.tokens:,} tokens, fewer than one sequence of "
                f"seq_len({self.seq_len}) + 1. Tokenise with a larger val_fraction (or with 0, for no validation), or "
                "set a smaller seq_len."
            )

    def check_batch_size(self, num_replicas: int, accumulate_grad_batches: int) -> None:
        """See that the batch can be shared out; needs no corpus.

        Raises:
            ConfigurationError: it does not divide.
        """
        parts = num_replicas * accumulate_grad_batches
        if self.batch_size % parts:
            below = self.batch_size // parts * parts
            nearest = f"{below} or {below + parts}" if below else f"{parts}"
            raise ConfigurationError(
                f"batch_size({self.batch_size}) does not divide by data ranks({num_replicas}) * "
                f"accumulate_grad_batches({accumulate_grad_batches}) = {parts}. "
                f"batch_size counts sequences per optimizer step over all data ranks: set it to {nearest}."
            )

    @override
    def setup(self, stage: str) -> None:
        num_replicas, _ = data_coordinates(self.trainer)
        self.check(num_replicas, self._accumulate_grad_batches)

    @override
    def train_dataloader(self) -> TokenLoader:
        loader = self._loader("train")
        if self.trainer is not None:
            resume_exactly(self.trainer, loader)
            loader.sampler.before_epoch = partial(_before_epoch, self.trainer, loader)
        return loader

    @override
    def val_dataloader(self) -> TokenLoader | list[Any]:
        return self._loader("val") if self.corpus.val.chunks else []

    def _loader(self, split: str) -> TokenLoader:
        num_replicas, rank = data_coordinates(self.trainer)
        train = split == "train"
        # Trainer(overfit_batches=...) wants the same batches in every epoch.
        shuffle = not train or (self.shuffle and not getattr(self.trainer, "overfit_batches", 0))
        sizes = self.corpus.split(split).sequences_per_chunk(self.seq_len)
        # Shuffled once, so that the first batches (limit_val_batches) are a sample of all held-out text.
        order = SequenceOrder(sizes, seed=self.seed, shuffle=shuffle, same_every_epoch=not train)
        return TokenLoader(
            Sequences(self.corpus, split, self.seq_len, document_mask=self.document_mask),
            order,
            batch_size=self.batch_size // self._accumulate_grad_batches,
            step_size=self.batch_size if train else None,
            num_replicas=num_replicas,
            rank=rank,
            num_workers=self.num_workers,
            pin_memory=_on_cuda(self.trainer),
            identity={
                "corpus": self.corpus.digest,
                "split": split,
                "seq_len": self.seq_len,
                "seed": self.seed,
                "shuffle": shuffle,
            },
        )

    @property
    def _accumulate_grad_batches(self) -> int:
        return 1 if self.trainer is None else self.trainer.accumulate_grad_batches


def _before_epoch(trainer: Trainer, loader: TokenLoader, epoch: int) -> int:
    """The epoch that is about to begin, by a count that is right also when it resumes."""
    resume_exactly(trainer, loader)
    return trainer.current_epoch


def _on_cuda(trainer: Trainer | None) -> bool:
    return trainer is not None and trainer.strategy.root_device.type == "cuda"
