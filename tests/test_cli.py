"""The command as a user calls it: real processes, real signals, wrong arguments."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lightning_llm.cli import COMMANDS, TRAINER_COMMANDS
from tests.commands import call_forked
from tests.launch.jobs import ROOT, Job
from tests.waiting import until

pytestmark = pytest.mark.alone

COMMAND = Path(sys.executable).with_name("lightning-llm")
STDLIB = Path(sysconfig.get_path("stdlib"))


def call(*arguments: object, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "data"
    done = call("tokenize", "--input", STDLIB / "json", STDLIB / "asyncio", "--output", folder, "--vocab-size", 512)
    assert done.returncode == 0, done.stderr
    assert "vocabulary 512" in done.stdout
    return folder


def fit_arguments(data: Path, root: Path, devices: int, **trainer: object) -> list[str]:
    settings = {
        "accelerator": "cpu",
        "devices": devices,
        "max_steps": 4,
        "logger": "false",
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": "false",
        "default_root_dir": root,
        **trainer,
    }
    return [
        "fit",
        "--model.model=tiny",
        "--model.warmup_steps=1",
        f"--data.path={data}",
        "--data.seq_len=32",
        *(f"--trainer.{name}={value}" for name, value in settings.items()),
    ]


def test_help_lists_every_command_and_an_unknown_one_is_refused() -> None:
    listing = call("--help")
    assert listing.returncode == 0
    for name in (*TRAINER_COMMANDS, *COMMANDS, "verify", "checkpoints", "export", "reshard", "import", "doctor"):
        assert re.search(rf"^  {name} ", listing.stdout, re.MULTILINE)
    refused = call("trian")
    assert refused.returncode == 2 and "no command 'trian'" in refused.stderr


@pytest.mark.slow
def test_from_text_to_text(data: Path, tmp_path: Path) -> None:
    """tokenize, fit on 4 processes, export, generate."""
    again = call("tokenize", "--input", STDLIB / "json", STDLIB / "asyncio", "--output", data, "--vocab-size", 512)
    assert again.returncode == 0 and "reused" in again.stdout
    checkpoints = tmp_path / "checkpoints"
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
model: {{model: tiny, vocab_size: 512, warmup_steps: 2}}
data: {{path: {data}, batch_size: 8, seq_len: 32}}
trainer:
  accelerator: cpu
  devices: 4
  max_steps: 3
  num_sanity_val_steps: 0
  limit_val_batches: 1
  val_check_interval: 3
  default_root_dir: {tmp_path}
  strategy: {{class_path: lightning_llm.LLM3DStrategy,
              init_args: {{tensor_parallel_size: 2, pipeline_parallel_size: 2}}}}
  logger: {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {tmp_path}, name: logs}}}}
  callbacks:
    - class_path: lightning_llm.callbacks.StepProgressBar
    - class_path: lightning_llm.callbacks.Throughput
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: {checkpoints}, save_last: true, monitor: val_loss}}
"""
    )
    fitted = call(
        "fit", "-c", config, "--trainer.max_steps=4", "--trainer.val_check_interval=4", "--trainer.log_every_n_steps=1"
    )
    assert fitted.returncode == 0, fitted.stderr
    assert "4 processes = pipeline(2) * data(1) * tensor(2)" in fitted.stdout + fitted.stderr
    (metrics,) = (tmp_path / "logs").glob("*/metrics.csv")
    header = metrics.read_text().splitlines()[0].split(",")
    assert {"train_loss", "val_loss", "grad_norm", "tokens_per_second", "lr-AdamW/pg1"} <= set(header)

    exported = call("export", checkpoints / "last.ckpt", tmp_path / "model")
    assert exported.returncode == 0, exported.stderr
    written = [
        call("generate", tmp_path / "model", "--prompt", "def ", "--max-tokens", 12, "--temperature", 1, "--seed", seed)
        for seed in (1, 1, 2)
    ]
    assert all(text.returncode == 0 and text.stdout.startswith("def ") for text in written), written[0].stderr
    assert written[0].stdout == written[1].stdout != written[2].stdout

    resumed = call("fit", "-c", config, "--trainer.max_steps=5", f"--ckpt_path={checkpoints / 'last.ckpt'}")
    assert resumed.returncode == 0, resumed.stderr
    assert "step 5/5" in resumed.stdout


def curve(folder: Path) -> list[float]:
    """Losses of a run's steps and of its validation, as its logger wrote them."""
    (metrics,) = folder.glob("logs/*/metrics.csv")
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    return [float(row[name]) for name in ("train_loss", "val_loss") for row in rows if row[name]]


@pytest.mark.parametrize(
    "preset",
    [
        "llm3d_deepspeed",
        pytest.param("llm3d_deepspeed_zero1", marks=pytest.mark.slow),
        pytest.param("llm3d_deepspeed_zero2", marks=pytest.mark.slow),
        pytest.param("llm3d_deepspeed_zero3_offload", marks=pytest.mark.slow),
        pytest.param("llm3d_zero3", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_one_file_gives_one_curve_on_either_engine(data: Path, tmp_path: Path, preset: str) -> None:
    """The same YAML with another name for the strategy: `llm3d` in one process, `preset` in two."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
model: {{model: tiny, vocab_size: 512, warmup_steps: 2}}
data: {{path: {data}, batch_size: 8, seq_len: 32}}
trainer:
  accelerator: cpu
  max_steps: 5
  limit_val_batches: 1
  val_check_interval: 5
  log_every_n_steps: 1
  enable_checkpointing: false
  logger: {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {tmp_path}, name: logs}}}}
"""
    )
    curves = []
    for strategy, devices, run in (("llm3d", 1, call_forked), (preset, 2, call)):
        folder = tmp_path / strategy
        options = {"strategy": strategy, "devices": devices, "logger.init_args.save_dir": folder}
        fitted = run("fit", "-c", config, *(f"--trainer.{name}={value}" for name, value in options.items()))
        assert fitted.returncode == 0, fitted.stderr
        curves.append(curve(folder))
    one, several = curves
    assert len(one) == 5 + 1 and one[4] < one[0] - 0.2, "it must learn"
    assert several == pytest.approx(one, abs=1e-4)


def test_print_config_is_complete() -> None:
    printed = call_forked("fit", "--print_config")
    assert printed.returncode == 0
    for field in (
        "model:",
        "learning_rate:",
        "optimizer_state_dtype: float32",
        "adjust_lr_fn: match_rms_adamw",
        "data:",
        "batch_size:",
        "trainer:",
        "strategy: llm3d",
        "gradient_clip_val:",
    ):
        assert field in printed.stdout


STRATEGY = "lightning_llm.LLM3DStrategy"
DEEPSPEED = "lightning_llm.LLM3DDeepSpeedStrategy"
BY_VALUE = ["--trainer.gradient_clip_val=1", "--trainer.gradient_clip_algorithm=value"]
PIPELINED = ["--trainer.strategy.pipeline_parallel_size=2"]


@pytest.mark.parametrize(
    ("devices", "options", "message"),
    [
        pytest.param(
            6,
            [f"--trainer.strategy={STRATEGY}", "--trainer.strategy.tensor_parallel_size=4"],
            r"pipeline\(1\) \* data\(1\) \* tensor\(4\) = 4 != world size 6. Start 4 processes",
            id="sizes and world",
        ),
        pytest.param(
            8,
            [f"--trainer.strategy={STRATEGY}", "--trainer.strategy.tensor_parallel_size=8"],
            r"tensor_parallel_size\(8\) does not divide num_key_value_heads\(4\)",
            id="heads",
        ),
        pytest.param(
            8,
            [f"--trainer.strategy={STRATEGY}", "--trainer.strategy.pipeline_parallel_size=8"],
            r"pipeline_parallel_size\(8\) is more than the 4 layers",
            id="stages and layers",
        ),
        pytest.param(3, [], r"batch_size\(8\) does not divide by data ranks\(3\)", id="batch"),
        pytest.param(
            2, ["--trainer.strategy=llm3d_pp2", "--data.batch_size=1"], "fewer than the 2 pipeline stages", id="mb"
        ),
        pytest.param(2, ["--trainer.strategy=llm3d_tp2", "--data.seq_len=33"], r"sequence length\(33\)", id="sequence"),
        pytest.param(
            2, ["--trainer.strategy=llm3d_cp2", "--data.seq_len=34"], r"nearest length that is: 3[26]", id="cp"
        ),
        pytest.param(2, ["--trainer.strategy=llm3d_ep2"], "Decoder has no experts", id="experts"),
        pytest.param(
            2,
            [f"--trainer.strategy={STRATEGY}", "--trainer.strategy.pipeline_schedule=2F2B"],
            "no pipeline schedule '2F2B'. Use one of GPipe",
            id="schedule",
        ),
        pytest.param(
            2,
            [f"--trainer.strategy={DEEPSPEED}", "--trainer.strategy.zero_stage=3", *PIPELINED],
            r"pipeline_parallel_size=2 with zero_stage=3: .* Set zero_stage to 1 or 0, or use strategy=\"llm3d\"",
            id="DeepSpeed: stages and ZeRO-3",
        ),
        pytest.param(
            2,
            [f"--trainer.strategy={DEEPSPEED}", "--trainer.strategy.zero_stage=0", "--trainer.precision=bf16-mixed"],
            r"precision='bf16-mixed' with zero_stage=0: .* Set zero_stage=1: the same arithmetic",
            id="DeepSpeed: precision",
        ),
        pytest.param(
            2,
            ["--trainer.strategy=llm3d_deepspeed", *BY_VALUE],
            r"DeepSpeed's engine clips by the norm alone\. Use 'norm', or strategy=\"llm3d\"",
            id="DeepSpeed: clipping",
        ),
        pytest.param(
            3,
            [f"--trainer.strategy={DEEPSPEED}", *PIPELINED],
            r"pipeline\(2\) \* data\(1\) \* tensor\(1\) = 2 != world size 3",
            id="DeepSpeed: sizes and world",
        ),
        pytest.param(
            2, ["--model.vocab_size=300"], "has 512 tokens, but the model's vocab_size is 300", id="vocabulary"
        ),
        pytest.param(2, ["--model.model=tinny"], "tinny", id="preset"),
        pytest.param(2, ["--data.path=nowhere"], "nowhere does not exist", id="data folder"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_it_starts(
    data: Path, tmp_path: Path, devices: int, options: list[str], message: str
) -> None:
    done = call_forked(*fit_arguments(data, tmp_path, devices), *options)
    assert done.returncode == 2, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert "Starting with" not in done.stderr, "no process may have been started"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenize", "--input", "nowhere", "--output", "out"], "nowhere"),
        (["export", "nowhere", "out"], "no checkpoint at nowhere"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere"),
        (["generate", "nowhere"], "--prompt"),
        (["generate", "nowhere", "--prompt", "x", "--max-token", "3"], "--max-token"),
    ],
)
def test_wrong_arguments_end_with_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = call_forked(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_doctor_knows_this_machine() -> None:
    done = call("doctor", "--json")
    assert done.returncode == 0, done.stdout
    names = {finding["name"] for finding in json.loads(done.stdout)}
    assert {"torch", "gloo"} <= names


SCRIPT = """
import os, sys
import torch
from lightning.pytorch import Callback, Trainer
import lightning_llm

class Trouble(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        print(f"rank {trainer.global_rank} pid {os.getpid()} step {trainer.global_step}", flush=True)
        if trainer.global_step == 2 and trainer.global_rank == int(sys.argv[2]):
            raise RuntimeError("planted trouble")

trainer = Trainer(strategy=sys.argv[3], accelerator="cpu", devices=int(sys.argv[4]), max_steps=100000, logger=False,
                  enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                  callbacks=[Trouble()], limit_val_batches=0)
trainer.fit(lightning_llm.LLMModule("tiny", vocab_size=512),
            datamodule=lightning_llm.TokenDataModule(sys.argv[1], batch_size=8, seq_len=32))
"""


@pytest.fixture
def running(data: Path, tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def start(
    running: list[subprocess.Popen[str]],
    data: Path,
    tmp_path: Path,
    failing_rank: int,
    strategy: str = "llm3d_tp2_pp2",
    devices: int = 4,
) -> subprocess.Popen[str]:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, data, str(failing_rank), strategy, str(devices)],
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr").open("w"),
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C goes to a whole process group
    )
    running.append(process)
    return process


def pids_once_training(process: subprocess.Popen[str]) -> dict[int, int]:
    """Rank -> pid, from what the ranks print after their second step."""
    pids: dict[int, int] = {}
    assert process.stdout is not None
    for line in process.stdout:
        found = re.match(r"rank (\d) pid (\d+) step (\d+)", line)
        if found and int(found[3]) >= 2:
            pids[int(found[1])] = int(found[2])
        if len(pids) == 4:
            return pids
    raise AssertionError("the run ended before all ranks trained")


def seconds_until_gone(pids: dict[int, int], limit: float) -> float:
    started = time.monotonic()
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids.values()):
        if time.monotonic() - started > limit:
            return float("inf")
        time.sleep(0.05)
    return time.monotonic() - started


@pytest.mark.parametrize(
    ("strategy", "devices", "failing_rank"),
    [
        ("llm3d_tp2_pp2", 4, 0),
        ("llm3d_tp2_pp2", 4, 3),
        pytest.param("llm3d_deepspeed", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_an_exception_in_one_rank_ends_the_run_and_is_shown_once(
    running: list[subprocess.Popen[str]], data: Path, tmp_path: Path, strategy: str, devices: int, failing_rank: int
) -> None:
    process = start(running, data, tmp_path, failing_rank, strategy, devices)
    pids = {}
    assert process.stdout is not None
    for line in process.stdout:
        found = re.match(r"rank (\d) pid (\d+) step 2", line)
        if found:
            pids[int(found[1])] = int(found[2])
            if int(found[1]) == failing_rank:
                break
    assert seconds_until_gone({0: process.pid, **pids}, 10) <= 10
    assert process.wait(timeout=1) == 1
    errors = (tmp_path / "stderr").read_text()
    assert errors.count("RuntimeError: planted trouble") == 1, errors
    assert errors.count("Traceback (most recent call last)") == 1, errors


@pytest.mark.parametrize("to_all", [True, False], ids=["terminal", "main process alone"])
def test_ctrl_c_ends_all_processes(
    running: list[subprocess.Popen[str]], data: Path, tmp_path: Path, to_all: bool
) -> None:
    process = start(running, data, tmp_path, failing_rank=-1)
    pids = pids_once_training(process)
    if to_all:
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid, signal.SIGINT)
    assert seconds_until_gone(pids, 5) <= 5
    errors = (tmp_path / "stderr").read_text()
    assert "Traceback" not in errors, errors


def test_ctrl_c_ends_fit_with_130(running: list[subprocess.Popen[str]], data: Path, tmp_path: Path) -> None:
    job = Job(folder=tmp_path / "job", data=data, ranks=1, max_steps=10_000)
    command = [COMMAND, "fit", "-c", job.run_file]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, stderr=subprocess.PIPE)
    running.append(process)
    until(lambda: job.events("step"))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors, errors


def test_no_orphans_when_the_main_process_is_killed(
    running: list[subprocess.Popen[str]], data: Path, tmp_path: Path
) -> None:
    process = start(running, data, tmp_path, failing_rank=-1)
    pids = pids_once_training(process)
    os.kill(process.pid, signal.SIGKILL)
    assert seconds_until_gone(pids, 5) <= 5
