"""The dashboard is what Grafana's own types take, and shows metrics that there are."""

from __future__ import annotations

import json
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.deploy.observability import DEPLOY, metrics_in
from tests.resilience.exposition import full_status, names_of
from tests.structures import lost


def dashboard() -> dict[str, Any]:
    return json.loads((DEPLOY / "grafana" / "training.json").read_text())


def test_grafanas_types_know_every_field() -> None:
    register_default_plugins()
    given = dashboard()
    assert lost(given, json.loads(JSONEncoder().encode(Dashboard.from_json(given)))) == []


def test_every_metric_is_shown_and_none_that_there_is_not() -> None:
    given = dashboard()
    variables = [variable["query"] for variable in given["templating"]["list"]]
    used = metrics_in(json.dumps([given["panels"], given["annotations"], variables]))
    assert used == names_of(full_status().metrics())


def test_panels_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells and place["x"] + place["w"] <= 24, panel["title"]
        cells |= own
