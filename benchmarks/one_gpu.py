"""What settings of a run change on one GPU: types, compiled blocks, recomputation. Step time, MFU and memory.

    python benchmarks/one_gpu.py [--variants bf16 compiled fp8-rowwise] [--model PRESET|FOLDER] [--batch-size 4]

See README.md beside this file for what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from bare_loop import Recipe
from lightning.pytorch import Callback, LightningModule, Trainer
from ranks import run_on_ranks
from taking_turns import print_table, say, spread
from torch import Tensor
from train_overhead import Layout
from training_job import Job

from lightning_llm import DecoderConfig, LLM3DStrategy, LLMModule
from lightning_llm.callbacks import FP8Precision
from lightning_llm.callbacks.throughput import dense_bf16_peak
from lightning_llm.models.module import resolve_config
from lightning_llm.models.weights import Box, box_bounds

VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "compiled": {"compile": True},
    "recompute-selective": {"recompute": "selective"},
    "recompute-full": {"recompute": "full"},
    "compiled-recompute-full": {"compile": True, "recompute": "full"},
    "fp8-tensorwise": {"compile": True, "fp8": "tensorwise"},
    "fp8-rowwise": {"compile": True, "fp8": "rowwise"},
    "fp8-rowwise-gw-hp": {"compile": True, "fp8": "rowwise_with_gw_hp"},
}
# Blocks as wide as those of an 8B model, where float8 is for; four of them, so that a GPU has room for the optimizer.
WIDE = DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=4,
    num_attention_heads=32,
    num_key_value_heads=8,
)


class SameNumbers:
    """Initial weights that cost no time: the same random numbers again and again."""

    def __init__(self) -> None:
        self.numbers = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02

    def read(self, name: str, box: Box, shape: tuple[int, ...]) -> Tensor:
        size = [stop - start for start, stop in box_bounds(box, shape)]
        if name.endswith("norm.weight"):
            return torch.ones(size)
        count = torch.Size(size).numel()
        return self.numbers.repeat(-(-count // len(self.numbers)))[:count].view(size)


class QuickModule(LLMModule):
    def weight_source(self) -> Any:
        return SameNumbers()


class Clock(Callback):
    """Notes when the device is through with each step, without waiting for it."""

    def __init__(self) -> None:
        self.marks: list[torch.cuda.Event] = []
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)
        self.losses.append(trainer.callback_metrics["train_loss"])

    def seconds(self) -> list[float]:
        torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [first.elapsed_time(last) / 1000 for first, last in pairs]


def measure(job: Job[Layout], variant: str) -> dict[str, Any]:
    """One variant's run."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings = dict(VARIANTS[variant])
    recipe, clock = settings.pop("fp8", None), Clock()
    trainer = job.trainer(LLM3DStrategy(**settings), clock, variant)
    if recipe is not None:
        trainer.callbacks.insert(0, FP8Precision(recipe))  # type: ignore[attr-defined]
    trainer.fit(job.module(QuickModule), job.loader(0))
    return {
        "variant": variant,
        "device": torch.cuda.get_device_name(),
        "seconds": clock.seconds()[job.warmup :],
        "losses": [float(loss) for loss in clock.losses],
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def compare(job: Job[Layout], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each run comes to beside the first; the ratios are of its steps to the first one's median."""
    tokens = job.layout.batch_size * job.seq_len
    peak = dense_bf16_peak(runs[0]["device"])
    first = statistics.median(runs[0]["seconds"])
    for run in runs:
        step = statistics.median(run["seconds"])
        run["step_ms"] = spread([1000 * second for second in run["seconds"]])
        run["tokens_per_second"] = tokens / step
        run["mfu"] = peak and tokens * job.config.flops_per_token(job.seq_len) / step / peak
        run["over_first"] = spread([second / first for second in run["seconds"]])
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["bf16", "compiled", "recompute-full"])
    parser.add_argument("--model", help="a preset or a folder (default: four blocks of an 8B model)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=15, help="timed steps")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "one_gpu.json")
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory(prefix="one-gpu-") as folder:
        job = Job(
            layout=Layout("1", 1, 1, 1, arguments.batch_size),
            config=WIDE if arguments.model is None else resolve_config(arguments.model),
            seq_len=arguments.seq_len,
            steps=arguments.steps,
            warmup=arguments.warmup,
            threads=1,
            folder=folder,
            profile=False,
            recipe=Recipe(accelerator="cuda", precision="bf16-mixed"),
        )
        for variant in arguments.variants:
            try:
                runs += run_on_ranks(measure, 1, job, variant, accelerator="cuda")
                say(f"{variant}: {1000 * statistics.median(runs[-1]['seconds']):.1f} ms")
            except RuntimeError as error:
                say(f"{variant} failed: {error}")
    if not runs:
        return 1
    compare(job, runs)
    columns = ["variant", "step, ms", "tokens/s", "MFU", "over the first", "peak GB", "last loss"]
    rows = [
        [run["variant"], run["step_ms"], run["tokens_per_second"], run["mfu"], run["over_first"], run["peak_gb"]]
        + [run["losses"][-1]]
        for run in runs
    ]
    parameters = sum(torch.Size(shape).numel() for shape in job.config.parameter_shapes().values())
    print_table(f"{runs[0]['device']}, {parameters / 1e9:.2f}B parameters; min / median / max", columns, rows)
    results = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": job.config.to_dict(),
        "run": {name: getattr(arguments, name) for name in ("batch_size", "seq_len", "steps", "warmup")},
        "runs": runs,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if len(runs) == len(arguments.variants) else 1


if __name__ == "__main__":
    sys.exit(main())
