"""What `lightning-llm launch` refuses before it starts anything, and how it reads what it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_llm.errors import ConfigurationError
from lightning_llm.launch.commands import Options, main
from lightning_llm.launch.layouts import ranks_of_node, usable_nodes
from tests.commands import call_forked


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nproc_per_node": 0}, "--nproc-per-node 0 must be at least 1"),
        ({"nnodes": "two"}, "must be a number, or MIN:MAX"),
        ({"nnodes": "4:2", "rdzv_endpoint": "a:1"}, "MIN not above MAX"),
        ({"nnodes": "2"}, "--nnodes 2 needs --rdzv-endpoint HOST:PORT"),
        ({"rdzv_endpoint": "host:many"}, "must be HOST:PORT"),
        ({"max_restarts": -1}, "--max-restarts -1 must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Options(**wrong)


def test_what_is_written_is_what_is_meant() -> None:
    options = Options(nnodes="2:4", rdzv_endpoint="node-1")
    assert options.nodes == (2, 4) and options.endpoint == ("node-1", 29500)
    assert Options().nodes == (1, 1)


def test_without_a_program_nothing_is_launched() -> None:
    for words in ([], ["--max-restarts", "3"], ["--"], ["fit", "-c", "run.yaml"]):
        with pytest.raises(ConfigurationError, match="launch needs a program behind `--`"):
            main(words)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"There is no script .*train.py"):
        main(["--", str(tmp_path / "train.py")])
    done = call_forked("launch", "--", "fit", "-c", tmp_path / "no.yaml")
    assert done.returncode == 2 and "There is no run file" in done.stderr


def run_file(folder: Path, **sizes: Any) -> list[str]:
    run = {
        "model": {"model": "tiny"},
        "data": {"path": "nowhere", "batch_size": 12},
        "trainer": {"devices": 4, "strategy": {"class_path": "lightning_llm.LLM3DStrategy", "init_args": sizes}},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return ["fit", "-c", str(path)]


def test_auto_is_what_the_run_file_says_where_there_are_no_gpus(tmp_path: Path) -> None:
    assert ranks_of_node("auto", run_file(tmp_path)) == 4
    assert ranks_of_node(3, ["train.py"]) == 3


def test_only_data_parallelism_shrinks(tmp_path: Path) -> None:
    program = run_file(tmp_path, tensor_parallel_size=2, pipeline_parallel_size=2, data_parallel_size=6)
    # 2 ranks a node: a model needs 2 nodes, and a batch of 12 is not for 5 data ranks.
    assert usable_nodes(program, 2, (2, 12)) == {2: 2, 3: 2, 4: 4, 5: 4, 6: 6, 7: 6, 8: 8, 9: 8, 10: 8, 11: 8, 12: 12}
    with pytest.raises(ConfigurationError, match=r"on 1 nodes of 2: .* Nodes that can be used: 2, 4"):
        usable_nodes(program, 2, (1, 4))
    assert usable_nodes(["train.py"], 2, (1, 3)) == {1: 1, 2: 2, 3: 3}, "a script's layout is its own affair"


def test_where_the_model_does_not_fit_into_fewer_devices_they_are_not_used(tmp_path: Path) -> None:
    program = [*run_file(tmp_path, tensor_parallel_size=8), "--model.model=llama3-70b", "--data.batch_size=16"]
    # Weights, gradients and AdamW's states in float32 are 16 bytes for each of 70 billion parameters.
    with pytest.raises(ConfigurationError, match=r"on 1 nodes of 8: the model does not fit into h100's memory.*: 4, 8"):
        usable_nodes(program, 8, (1, 8), "h100")
    assert usable_nodes(program, 8, (1, 4)) == {1: 1, 2: 2, 3: 2, 4: 4}, "on devices that nobody knows"
    assert usable_nodes(program, 8, (4, 6), "h100") == {4: 4, 5: 4, 6: 4}
