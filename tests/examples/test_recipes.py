"""Every recipe fits the machine that it is for, and one rank of it can be built as it was planned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.commands import call_forked

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_and_is_built_as_planned(recipe: Path) -> None:
    done = call_forked("plan", "--config", recipe, "--device", "h100", "--dry-run")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    compared = re.search(r"dry run: .*\(([+-][\d.]+)%\)", done.stdout)
    assert compared is not None and abs(float(compared[1])) < 5, done.stdout


def test_there_is_one_for_each_row_of_the_recommendation_matrix() -> None:
    strategies = [yaml.safe_load(path.read_text())["trainer"]["strategy"]["init_args"] for path in RECIPES]
    sizes = {tuple(s.get(f"{axis}_parallel_size", 1) for axis in ("tensor", "pipeline", "expert")) for s in strategies}
    assert sizes == {(1, 1, 1), (8, 1, 1), (8, 4, 1), (8, 16, 1), (1, 1, 8)}
