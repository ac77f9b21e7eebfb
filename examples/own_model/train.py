"""Trains the model of gpt.py in the layout that you ask for.

python examples/own_model/train.py --devices 8 --tensor-parallel-size 2 --pipeline-parallel-size 2
"""

from __future__ import annotations

import argparse

from gpt import GPTModule
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_llm import ConfigurationError, LLM3DStrategy, TokenDataModule
from lightning_llm.callbacks import StepProgressBar


def train(options: argparse.Namespace) -> None:
    seed_everything(0)
    data = TokenDataModule(options.data, batch_size=options.batch_size, seq_len=options.seq_len)
    module = GPTModule(vocab_size=data.vocab_size, max_seq_len=options.seq_len)
    strategy = LLM3DStrategy(
        tensor_parallel_size=options.tensor_parallel_size,
        pipeline_parallel_size=options.pipeline_parallel_size,
        context_parallel_size=options.context_parallel_size,
    )  # the data-parallel size is what is left of the devices
    trainer = Trainer(
        strategy=strategy,
        accelerator=options.accelerator,
        devices=options.devices,
        max_steps=options.max_steps,
        val_check_interval=options.max_steps,
        limit_val_batches=4,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
        logger=CSVLogger("runs/own_model", name="logs"),
        callbacks=[StepProgressBar()],
    )
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint("runs/own_model/checkpoint", weights_only=False)
    if trainer.is_global_zero:
        print(f"val_loss {float(trainer.callback_metrics['val_loss']):.4f}; checkpoint in runs/own_model/checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="runs/own_model/data", help="folder that `lightning-llm tokenize` made")
    parser.add_argument("--accelerator", default="cpu", help="cpu or gpu")
    parser.add_argument("--devices", type=int, default=1, help="processes")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="processes that share each matrix")
    parser.add_argument("--pipeline-parallel-size", type=int, default=1, help="stages that share the blocks")
    parser.add_argument("--context-parallel-size", type=int, default=1, help="processes that share each sequence")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences per optimizer step, over all processes")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--max-steps", type=int, default=100, help="optimizer steps")
    try:
        train(parser.parse_args())
    except ConfigurationError as error:  # sizes that do not fit, in one sentence, before any process was started
        parser.error(str(error))


if __name__ == "__main__":
    main()
