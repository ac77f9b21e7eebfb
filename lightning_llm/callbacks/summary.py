"""What came of a run, in a few lines at its end: loss, speed, and where checkpoint and logs are."""

import math
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override


class RunSummary(Callback):
    """Prints final losses, tokens per second (with `Throughput`), checkpoints and log folders after a fit."""

    @override
    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        print("\n".join(self.lines(trainer, pl_module)), flush=True)

    def lines(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """The summary, a line each."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        found = [f"steps       {trainer.global_step:,}"]
        if "tokens_seen" in metrics:
            found[0] += f", {metrics['tokens_seen']:,.0f} tokens"
        if "tokens_per_second" in metrics:
            found[0] += f", {metrics['tokens_per_second']:,.0f} tokens/s"
        vocab_size = getattr(getattr(pl_module, "config", None), "vocab_size", None)
        for name in ("train_loss", "val_loss"):
            if name in metrics:
                line = f"{name:<11} {metrics[name]:.4f} nats per token"
                if vocab_size:
                    guess = math.log(vocab_size)
                    line += f", {guess - metrics[name]:.2f} below a blind guess (ln {vocab_size} = {guess:.2f})"
                found.append(line)
        found += [f"checkpoint  {path}" for path in self._checkpoints(trainer)]
        folders = [logger.log_dir or logger.save_dir for logger in trainer.loggers]
        found += [f"logs        {_short(folder)}" for folder in folders if folder]
        return found

    def _checkpoints(self, trainer: Trainer) -> list[str]:
        paths = [
            path
            for callback in trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint)
            for path in (callback.best_model_path, callback.last_model_path)
            if path
        ]
        return [_short(path) for path in dict.fromkeys(paths)]


def _short(path: str) -> str:
    """Relative to the working folder where it lies within."""
    full = Path(path).absolute()
    return str(full.relative_to(Path.cwd())) if full.is_relative_to(Path.cwd()) else str(path)
