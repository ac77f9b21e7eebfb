"""Run files as the planner reads them: the layout that a run would have, and the strategy's own refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner import Layout
from lightning_llm.strategies.run_file import plan_of_run

STRATEGY = """
  strategy:
    class_path: lightning_llm.LLM3DStrategy
    init_args: {arguments}
"""


def written(
    tmp_path: Path, arguments: str = "{}", *, trainer: str = "", data: str = "", strategy: str = STRATEGY
) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {model: small}\n"
        f"data: {{path: nowhere, batch_size: 16, seq_len: 256{data}}}\n"
        f"trainer:\n  accelerator: gpu\n  devices: 8\n{trainer}" + strategy.replace("{arguments}", arguments)
    )
    return path


def test_sizes_batches_and_precision_are_those_of_the_run(tmp_path: Path) -> None:
    arguments = "{tensor_parallel_size: 2, replicate_size: 2, zero_stage: 2, sequence_parallel: false}"
    path = written(tmp_path, arguments, trainer="  precision: bf16-true\n  accumulate_grad_batches: 2\n")
    made, config = plan_of_run(path, "a100-40g")
    assert made.layout == Layout(
        data_parallel_size=4,
        replicate_size=2,
        tensor_parallel_size=2,
        zero_stage=2,
        sequence_parallel=False,
        microbatch_size=2,
        microbatches=2,
    )
    assert made.workload.precision == "bf16-true" and made.workload.seq_len == 256
    assert (made.model, made.device, made.devices) == ("small", "a100-40g", 8)
    assert config.num_hidden_layers == 6


@pytest.mark.parametrize("strategy", ["  strategy: llm3d_tp2\n", ""])
def test_registered_names_and_the_default_are_known(tmp_path: Path, strategy: str) -> None:
    made, _ = plan_of_run(written(tmp_path, strategy=strategy), "cpu")
    assert made.layout.tensor_parallel_size == (2 if strategy else 1)
    assert made.workload.precision == "32-true"


def test_automatic_devices_need_a_number(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text().replace("devices: 8", "devices: auto\n  num_nodes: 2"))
    with pytest.raises(ConfigurationError, match="devices: auto. Say how many there are in all: --devices N"):
        plan_of_run(path, "h100")
    made, _ = plan_of_run(path, "h100", devices=16)
    assert (made.devices, made.devices_per_node) == (16, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("{tensor_parallel_size: 3}", r"pipeline\(1\) \* data\(2\) \* tensor\(3\) = 6 != world size 8"),
        ("{tensor_parallel_size: 4}", r"tensor_parallel_size\(4\) does not divide num_attention_heads\(6\)"),
        ("{pipeline_parallel_size: 8}", "more than the 6 layers"),
        ("{pipeline_parallel_size: 4, microbatches: 3}", r"microbatches\(3\)"),
        ("{recompute: 0.5, compile: true}", "no figures for recompute as a memory budget"),
        ("{data_parallel_size: 8, replicate_size: 3}", r"replicate_size\(3\) does not divide"),
    ],
)
def test_what_the_strategy_refuses_is_refused_in_its_words(tmp_path: Path, arguments: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        plan_of_run(written(tmp_path, arguments), "h100")


def test_batches_and_sequences_that_do_not_divide_are_refused_in_their_owners_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"batch_size\(16\) does not divide by data ranks\(8\)"):
        plan_of_run(written(tmp_path, trainer="  accumulate_grad_batches: 3\n"), "h100")
    path = written(tmp_path, "{tensor_parallel_size: 2}")
    path.write_text(path.read_text().replace("seq_len: 256", "seq_len: 255"))
    with pytest.raises(ConfigurationError, match=r"sequence length\(255\) is not divisible"):
        plan_of_run(path, "h100")


def test_another_strategy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="strategy is ddp: the planner knows the layouts of LLM3DStrategy"):
        plan_of_run(written(tmp_path, strategy="  strategy: ddp\n"), "h100")
