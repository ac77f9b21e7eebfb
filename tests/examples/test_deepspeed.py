"""The examples on DeepSpeed's engine, as they stand, on little data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.examples.runs import call

EXAMPLES = Path(__file__).parents[2] / "examples" / "deepspeed"
SHORT = (
    "--trainer.accelerator cpu --trainer.max_steps 3 --trainer.val_check_interval 3 --trainer.limit_val_batches 1 "
    "--data.batch_size 8 --data.seq_len 32"
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("zero3", marks=pytest.mark.slow),
        "offload",
        pytest.param("3d", marks=pytest.mark.slow),
    ],
)
def test_an_example_trains_and_goes_on(root: Path, data: Path, tmp_path: Path, name: str) -> None:
    checkpoints = tmp_path / "checkpoints"
    command = (
        f"lightning-llm fit -c examples/deepspeed/{name}.yaml {SHORT} --data.path {data} "
        f"--trainer.default_root_dir {tmp_path} --trainer.callbacks.init_args.dirpath {checkpoints}"
    )
    done = call(command, root)
    assert done.returncode == 0, done.stderr[-3000:]
    manifests = [json.loads(path.read_text()) for path in checkpoints.glob("*/manifest.json")]
    assert {manifest["step"] for manifest in manifests} == {3}
    again = call(f"{command} --trainer.max_steps 4 --ckpt_path {checkpoints}", root)
    assert again.returncode == 0 and "step 3" in again.stderr, again.stderr[-3000:]


def test_every_example_is_in_the_readme() -> None:
    text = (EXAMPLES / "README.md").read_text()
    assert all(f"examples/deepspeed/{path.name}" in text for path in EXAMPLES.glob("*.yaml"))
