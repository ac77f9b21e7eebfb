"""What a plan prints, draws and says in YAML."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from lightning_llm import LLM3DStrategy
from lightning_llm.errors import ConfigurationError
from lightning_llm.planner import Layout, Options, Plan, plan
from lightning_llm.planner.plan import default_global_batch
from lightning_llm.planner.plot import save_plot
from lightning_llm.planner.report import draw_mesh, draw_timeline, render
from lightning_llm.planner.timeline import simulate


@pytest.fixture(scope="module")
def made() -> Plan:
    options = Options(tensor_parallel_size=8, pipeline_parallel_size=4, schedules=("1F1B",))
    return plan("llama3-70b", 64, options=options, global_batch=128)


def printed(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=140, highlight=False)
    render(plan, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_everything_is_on_the_terminal(made: Plan) -> None:
    text = printed(made)
    for part in made.estimate.memory.parts():
        assert part.replace("_", " ") in text
    for expected in (
        "llama3-70b (70.6B parameters) on 64 x h100",
        "tensor_parallel_size: 8",
        "traffic of a device",
        "MFU",
        "64 ranks",
        "% idle",
        made.reasons[0][:40],
    ):
        assert expected in text
    assert f"{made.estimate.memory.total / 2**30:.2f}" in text


def test_a_layout_that_does_not_fit_is_told_so() -> None:
    made = plan("llama3-70b", 8, layout=Layout(data_parallel_size=8))
    assert not made.fits
    assert "It does not fit: it needs" in printed(made)


def test_the_lines_to_paste_are_a_run_file_that_the_strategy_takes(made: Plan) -> None:
    values = yaml.safe_load(printed(made).split("\n\n")[1])
    assert values == made.run_file()
    strategy = values["trainer"]["strategy"]
    assert strategy["class_path"] == "lightning_llm.LLM3DStrategy"
    taken = LLM3DStrategy(**strategy["init_args"])
    assert taken.sizes["tensor_parallel_size"] == 8 and taken.layout.microbatches == made.layout.microbatches
    assert values["trainer"]["devices"] * values["trainer"]["num_nodes"] == 64
    assert values["data"] == {"batch_size": 128, "seq_len": 8192}


def test_without_a_pipeline_microbatches_are_accumulated() -> None:
    made = plan("llama3.2-1b", 8, global_batch=512)
    trainer = made.run_file()["trainer"]
    per_batch = 512 // 8 // trainer.get("accumulate_grad_batches", 1)
    assert per_batch == made.layout.microbatch_size
    assert "microbatches" not in made.strategy_arguments()


def test_a_short_schedule_is_drawn_whole_and_a_long_one_in_its_beginning() -> None:
    line = simulate("1F1B", 2, 1, 2, forward=[1.0, 1.0], backward=[2.0, 2.0])
    assert draw_timeline(line, width=9).splitlines() == [
        "    0 01..bb.bb 33.3% idle",
        "    1 .0bb1bb.. 33.3% idle",
    ]
    long = simulate("1F1B", 2, 1, 64, forward=[1.0, 1.0], backward=[2.0, 2.0])
    assert "the first 20.00 of 195.00 s" in draw_timeline(long, width=20)


def test_the_mesh_marks_nodes_and_is_cut_short() -> None:
    text = draw_mesh(Layout(tensor_parallel_size=4, data_parallel_size=2, pipeline_parallel_size=2), per_node=8)
    assert text.splitlines()[1].endswith("| 0  1  2  3")
    assert "stage 1  data 0    tensor | 8" in text
    large = draw_mesh(Layout(tensor_parallel_size=8, data_parallel_size=512), per_node=8)
    assert "more rows" in large and large.endswith("4095") and len(large.splitlines()) < 20


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_a_plot_is_written(made: Plan, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    path = save_plot(made, tmp_path / "plots" / f"plan.{ending}")
    content = path.read_bytes()
    assert content.startswith({"svg": b"<?xml", "png": b"\x89PNG"}[ending]) and len(content) > 10_000
    if ending == "svg":
        assert content.count(b"<path") > 100  # bars of the schedule


def test_an_unknown_format_is_refused(made: Plan, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="must end in .svg"):
        save_plot(made, tmp_path / "plan.txt")


def test_a_missing_matplotlib_is_named(made: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # how Python marks a module that cannot be imported
    with pytest.raises(ConfigurationError, match=r"lightning-llm\[plot\]"):
        save_plot(made, tmp_path / "plan.svg")


def test_batches_are_llama_3s_and_divide_over_odd_numbers_of_devices() -> None:
    assert default_global_batch(70 * 10**9, 8192, 512) == 512
    assert default_global_batch(405 * 10**9, 8192, 4096) == 2048
    assert default_global_batch(10**9, 2048, 8) == 512
    assert default_global_batch(8 * 10**9, 8192, 24) % 3 == 0
