"""A real run, a real Prometheus, a real Alertmanager: what happens to a rank arrives where people are told."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_llm.callbacks import Heartbeat, Throughput
from lightning_llm.resilience.monitor import process_state
from tests.deploy.observability import PROMETHEUS, ask, needs, running
from tests.distributed import start_ranks
from tests.ports import free_port
from tests.strategies.training import loader, make_module, make_strategy, make_trainer
from tests.waiting import until


def endless(folder: Path, port: int) -> None:
    heartbeat = Heartbeat(alive_timeout=3.0, dirpath=folder, port=port)
    strategy = make_strategy({"zero_stage": 2})
    trainer = make_trainer(
        strategy, 2, callbacks=[heartbeat, Throughput()], max_steps=1_000_000, max_epochs=-1, limit_val_batches=0
    )
    trainer.fit(make_module(), loader(trainer, strategy))


def configurations(folder: Path, target: int, alertmanager: int) -> tuple[Path, Path]:
    """Those of deploy/, for this machine's ports, and with a second for what takes fifteen or a minute there."""
    rules = (PROMETHEUS / "alerts.yaml").read_text().replace("for: 1m", "for: 1s")
    (folder / "alerts.yaml").write_text(rules)
    example = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())
    example["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    example["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{alertmanager}"]
    example["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{target}"]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(example))
    return folder / "prometheus.yaml", PROMETHEUS / "alertmanager.yaml"


@pytest.mark.slow
@pytest.mark.alone
@needs("prometheus", "prometheus-alertmanager")
def test_a_suspended_rank_and_a_lost_node_arrive(tmp_path: Path) -> None:
    target, prometheus_port, alertmanager_port = free_port(), free_port(), free_port()
    prometheus, alertmanager = configurations(tmp_path, target, alertmanager_port)

    def alerts(name: str) -> list[dict[str, Any]]:
        found = ask(f"http://127.0.0.1:{alertmanager_port}/api/v2/alerts") or []
        return [alert for alert in found if alert["labels"]["alertname"] == name]

    def value(query: str) -> float | None:
        answer = ask(f"http://127.0.0.1:{prometheus_port}/api/v1/query?query={query}")
        results = answer["data"]["result"] if answer is not None else []
        return float(results[0]["value"][1]) if results else None

    with (
        running(
            "prometheus-alertmanager",
            f"--config.file={alertmanager}",
            f"--storage.path={tmp_path / 'alertmanager'}",
            f"--web.listen-address=127.0.0.1:{alertmanager_port}",
            "--cluster.listen-address=",
            log=tmp_path / "alertmanager.log",
        ),
        running(
            "prometheus",
            f"--config.file={prometheus}",
            f"--storage.tsdb.path={tmp_path / 'prometheus'}",
            f"--web.listen-address=127.0.0.1:{prometheus_port}",
            log=tmp_path / "prometheus.log",
        ),
    ):
        ranks = start_ranks(endless, 2, tmp_path, target)
        try:
            until(lambda: value("lightning_llm_train_loss"), 60, "a loss in Prometheus")
            assert alerts("TrainingRankStuck") == []
            os.kill(ranks.pids[1], signal.SIGSTOP)
            [alert] = until(lambda: alerts("TrainingRankStuck"), 30, "an alert of the suspended rank")
            assert (alert["labels"]["rank"], alert["labels"]["cause"]) == ("1", "stopped")
            assert alert["annotations"]["summary"] == f"Rank 1 on 127.0.0.1:{target}: stopped"
            assert [receiver["name"] for receiver in alert["receivers"]] == ["people"]
            os.kill(ranks.pids[1], signal.SIGCONT)
            until(lambda: value("count(lightning_llm_rank_fault)") is None, 30, "that the rank gets on")
            assert alerts("TrainingHeartbeatLost") == []
            for pid in ranks.pids.values():
                os.kill(pid, signal.SIGKILL)
            [alert] = until(lambda: alerts("TrainingHeartbeatLost"), 30, "an alert of the lost node")
            assert alert["labels"]["instance"] == f"127.0.0.1:{target}"
        finally:
            for pid in ranks.pids.values():
                if process_state(pid) == "T":
                    os.kill(pid, signal.SIGCONT)
            ranks.end()
