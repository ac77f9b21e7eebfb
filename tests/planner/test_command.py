"""`lightning-llm plan` as a user calls it."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from lightning_llm.cli import main
from lightning_llm.planner import Plan
from lightning_llm.planner.hosts import GIB
from tests.commands import call_forked

call = partial(call_forked, "plan")


@pytest.mark.parametrize(
    ("model", "devices"), [("llama3-8b", 8), ("llama3-70b", 512), ("llama3-405b", 4096), ("mixtral-8x7b", 64)]
)
def test_the_four_sizes(model: str, devices: int, tmp_path: Path) -> None:
    done = call("--model", model, "--devices", devices, "--device", "h100", "--json", "--dry-run")
    assert done.returncode == 0, done.stderr
    made = Plan.from_json(done.stdout)
    assert made.layout.world_size == devices and made.fits
    values = json.loads(done.stdout)
    assert values["memory_total"] == pytest.approx(sum(values["estimate"]["memory"].values()))
    assert len(values["bubble_by_rank"]) == made.layout.pipeline_parallel_size
    assert "dry run: rank" in done.stderr and "+0.00%" in done.stderr


def test_the_table_and_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out.svg"
    done = call("--model", "llama3-8b", "--devices", 16, "--tensor", 2, "--pipeline", 2, "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert "tensor_parallel_size: 2" in done.stdout and "mesh" in done.stdout
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "llama3-8b"), "plan needs --model and --devices"),
        (("--model", "llama9", "--devices", 8), "There is no preset 'llama9'"),
        (("--model", "llama3-70b", "--devices", 8, "--host-memory-gib", 64), "needs 1.8x the memory"),
        (("--config", "nowhere.yaml"), "There is no run file nowhere.yaml"),
    ],
)
def test_mistakes_end_with_one_sentence(
    arguments: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-llm", "plan", *map(str, arguments)])
    assert main() == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""


def test_another_engine_has_no_dry_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["lightning-llm", "plan", "--model", "llama3-8b", "--devices", "8", "--engine", "deepspeed", "--dry-run"]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 2
    printed = capsys.readouterr()
    assert "A dry run builds what LLM3DStrategy keeps" in printed.err
    assert "class_path: lightning_llm.LLM3DDeepSpeedStrategy" in printed.out


RUN = """
model: {{model: llama3-8b}}
data: {{path: nowhere, batch_size: 64, seq_len: 8192}}
trainer:
  accelerator: gpu
  devices: 8
  num_nodes: 2
  precision: bf16-mixed
  strategy:
    class_path: lightning_llm.LLM3DStrategy
    init_args: {{tensor_parallel_size: {tensor}, pipeline_parallel_size: {pipeline}, microbatches: 8}}
"""


def test_a_run_file_that_offloads_is_weighed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.yaml"
    text = RUN.format(tensor=2, pipeline=1).replace("microbatches: 8", "offload_parameters: cpu, recompute: full")
    run.write_text(text.replace("  num_nodes", "  accumulate_grad_batches: 8\n  num_nodes"))
    monkeypatch.setattr(sys, "argv", ["lightning-llm", "plan", "--config", str(run), "--json"])
    assert main() == 0
    made = Plan.from_json(capsys.readouterr().out)
    assert made.layout.offload_parameters == "cpu"
    assert made.estimate.memory.parameters == made.estimate.memory.optimizer == 0
    assert made.estimate.host_bytes > 8 * made.num_parameters  # half of 16 bytes a parameter on each of two nodes


def test_a_run_file_is_weighed_as_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(RUN.format(tensor=2, pipeline=2))
    done = call("--config", run, "--json", "--dry-run")
    assert done.returncode == 0, done.stderr
    made = Plan.from_json(done.stdout)
    layout = made.layout
    assert (layout.tensor_parallel_size, layout.pipeline_parallel_size, layout.data_parallel_size) == (2, 2, 4)
    assert (layout.microbatches, layout.microbatch_size, layout.global_batch) == (8, 2, 64)
    assert made.reasons == () and made.estimate.memory.total / GIB < 80
    assert "+0.00%" in done.stderr
