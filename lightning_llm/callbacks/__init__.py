"""What is watched: checkpoints, throughput, progress, float8 and where a run's figures go.

Used through `Trainer(callbacks=..., logger=...)` or by class path in YAML.
Nothing here imports wandb or torchao before it is used.
"""

from lightning_llm.callbacks.checkpoint import AsyncDistributedCheckpoint
from lightning_llm.callbacks.fp8 import FP8Precision
from lightning_llm.callbacks.heartbeat import Heartbeat
from lightning_llm.callbacks.progress import StepProgressBar
from lightning_llm.callbacks.summary import RunSummary
from lightning_llm.callbacks.throughput import Throughput
from lightning_llm.callbacks.tracking import WandbLogger

__all__ = [
    "AsyncDistributedCheckpoint",
    "FP8Precision",
    "Heartbeat",
    "RunSummary",
    "StepProgressBar",
    "Throughput",
    "WandbLogger",
]
