"""Manifests are what the cluster's own types take, hold what the run needs, and end as the launcher's codes say."""

from __future__ import annotations

import os
import signal
import subprocess
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from kubeflow_trainer_api.models import (
    IoK8sApiCoreV1ConfigMap,
    IoK8sApiCoreV1PodTemplateSpec,
    JobsetV1alpha2JobSet,
)

from lightning_llm.arguments import parse_arguments
from lightning_llm.errors import ConfigurationError
from lightning_llm.launch.commands import Options as LaunchOptions
from lightning_llm.launch.commands import main
from lightning_llm.launch.kubernetes import Options, manifests, to_yaml
from lightning_llm.launch.manifests import TRANSLATE, Manifest
from lightning_llm.resilience.restarts import FINAL_CODES, REQUEUE
from tests.launch.jobs import COMMAND, Job
from tests.ports import free_port
from tests.resilience.exposition import names_of
from tests.structures import lost
from tests.waiting import until

ROOT = Path(__file__).parents[2]
RECIPE = "examples/recipes/7b-to-30b.yaml"
EXAMPLE = {"nodes": 8, "nproc_per_node": 8, "image": "registry.example.com/lightning-llm:0.1", "name": "pretrain"}
CRDS = os.environ.get("LIGHTNING_LLM_CRDS")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def made(kind: str, *program: str, **changes: Any) -> list[Manifest]:
    options = Options(**{**EXAMPLE, "kind": kind, "pvc": "checkpoints:/runs", **changes})
    return manifests(options, program or ("fit", "-c", RECIPE, "--data.path", "corpus"))


def template_of(job: Manifest) -> Manifest:
    if job["kind"] == "JobSet":
        return job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    return job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]


def container_of(job: Manifest) -> Manifest:
    [container] = template_of(job)["spec"]["containers"]
    return container


@pytest.mark.parametrize("kind", ["jobset", "pytorchjob"])
@pytest.mark.parametrize("changes", [{}, {"pvc": None, "namespace": "research", "gpus_per_node": 0, "nodes": 1}])
def test_kubernetes_types_know_every_field(kind: str, changes: dict[str, Any]) -> None:
    files, job = made(kind, **changes)
    pods = template_of(job)
    types = [(IoK8sApiCoreV1ConfigMap, files), (IoK8sApiCoreV1PodTemplateSpec, pods)]
    if kind == "jobset":
        types.append((JobsetV1alpha2JobSet, job))
    for known, given in types:
        assert lost(given, known.from_dict(given).to_dict()) == []
    with pytest.raises(ValueError, match="validation error"):
        container_of(job)["ports"][0]["containerPort"] = "29500"
        IoK8sApiCoreV1PodTemplateSpec.from_dict(pods)


@pytest.mark.skipif(CRDS is None, reason="LIGHTNING_LLM_CRDS: a folder with the definitions of JobSet and PyTorchJob")
@pytest.mark.parametrize("kind", ["jobset", "pytorchjob"])
def test_the_controllers_own_definitions_take_them(kind: str) -> None:
    [*_, job] = made(kind)
    definitions = [yaml.safe_load(path.read_text()) for path in Path(CRDS or "").glob("*.yaml")]
    [definition] = [one for one in definitions if one["spec"]["names"]["kind"] == job["kind"]]
    [schema] = [
        version["schema"]["openAPIV3Schema"]
        for version in definition["spec"]["versions"]
        if job["apiVersion"].endswith(version["name"])
    ]
    refuse_unknown_fields(schema)
    validator = jsonschema_rs.validator_for(schema)
    assert [error.message for error in validator.iter_errors(job)] == []
    template_of(job)["spec"]["restartPollicy"] = "Never"
    assert not validator.is_valid(job)


def refuse_unknown_fields(schema: Any) -> None:
    """A cluster would drop them, or say so."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for part in schema.values():
            refuse_unknown_fields(part)
    elif isinstance(schema, list):
        for part in schema:
            refuse_unknown_fields(part)


@pytest.mark.parametrize(
    ("kind", "first"), [("jobset", "pretrain-node-0-0.pretrain"), ("pytorchjob", "pretrain-worker-0")]
)
def test_the_pods_run_the_launcher(kind: str, first: str) -> None:
    files, job = made(kind)
    container = container_of(job)
    words = container["command"]
    words = words[words.index("launch") + 1 :]
    own, program = words[: words.index("--")], words[words.index("--") + 1 :]
    told = LaunchOptions(**parsed(own))
    assert told.nodes == (8, 8) and told.nproc_per_node == 8
    assert told.endpoint == (first, 29500) and told.port == 9400
    assert program == ["fit", "-c", "/etc/lightning-llm/7b-to-30b.yaml", "--data.path", "corpus"]
    assert files["data"] == {"7b-to-30b.yaml": Path(RECIPE).read_text()}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in template_of(job)["spec"]["volumes"]}
    assert volumes[mounts["/dev/shm"]] == {"emptyDir": {"medium": "Memory"}}
    assert volumes[mounts["/etc/lightning-llm"]] == {"configMap": {"name": files["metadata"]["name"]}}
    assert volumes[mounts["/runs"]] == {"persistentVolumeClaim": {"claimName": "checkpoints"}}
    assert container["workingDir"] == "/runs", "where the run file's relative folder of checkpoints is"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert ports[container[probe]["httpGet"]["port"]] == 9400


def parsed(words: list[str]) -> dict[str, Any]:
    return parse_arguments(LaunchOptions, words, "launch")


def test_every_code_of_the_launcher_is_provided_for() -> None:
    [*_, job] = made("jobset")
    job_spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    rules = job_spec["podFailurePolicy"]["rules"]
    by_code = {code: rule["action"] for rule in rules for code in rule.get("onExitCodes", {}).get("values", [])}
    assert by_code == {code: "Ignore" if code == REQUEUE else "FailJob" for code in FINAL_CODES}
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in rules
    assert template_of(job)["spec"]["restartPolicy"] == "Never", "or the policy is refused"


@pytest.mark.parametrize(("code", "shown"), [(0, 0), (1, 1), (75, 138), (76, 76), (93, 93), (137, 137)])
def test_a_pytorch_job_is_told_to_start_again_what_is_to_be_requeued(code: int, shown: int) -> None:
    done = subprocess.run(["sh", "-c", TRANSLATE, "name", "sh", "-c", f"exit {code}"], timeout=30)
    assert done.returncode == shown


def test_in_a_pytorch_job_a_signal_reaches_the_launcher_and_its_end_is_waited_for(tmp_path: Path) -> None:
    saving = "trap 'sleep 0.5; echo > saved; exit 75' TERM; echo > on; while :; do sleep 0.1; done"
    shell = subprocess.Popen(["sh", "-c", TRANSLATE, "name", "sh", "-c", saving], cwd=tmp_path)
    until((tmp_path / "on").exists)
    shell.send_signal(signal.SIGTERM)
    assert shell.wait(20) == 138 and (tmp_path / "saved").exists()


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(("kind", "code"), [("jobset", REQUEUE), ("pytorchjob", 138)])
def test_a_pods_command_answers_its_probes_and_ends_as_its_manifest_expects(
    job: Callable[..., Job], kind: str, code: int
) -> None:
    """One pod's container without its container: what it runs, in its folder, probed as the kubelet would."""
    run, port = job(max_steps=100_000), free_port()
    [_, manifest] = made(kind, "fit", "-c", str(run.run_file), nodes=1, nproc_per_node=2, gpus_per_node=0, port=port)
    container = container_of(manifest)
    words = [word.replace("/etc/lightning-llm", str(run.folder)) for word in container["command"]]
    words[words.index("launch") - 1] = str(COMMAND)

    def answers(probe: str) -> bool:
        path = container[probe]["httpGet"]["path"]
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status == 200
        return False

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with run.log().open("wb") as log:
        pod = subprocess.Popen(words, cwd=run.folder, env=environment, stdout=log, stderr=log)
    try:
        until(lambda: answers("startupProbe"))
        until(lambda: len(run.events("step")) > 20)
        assert answers("livenessProbe") and answers("readinessProbe"), run.said
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert "lightning_llm_train_loss" in names_of(answer.read().decode())
        pod.send_signal(signal.SIGTERM)
        assert pod.wait(60) == code, run.said
        assert list((run.folder / "checkpoints").glob("*/manifest.json"))
    finally:
        pod.kill()
        pod.wait()


@pytest.mark.parametrize("kind", ["jobset", "pytorchjob"])
def test_the_examples_are_what_the_command_makes(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = ROOT / "deploy" / "kubernetes" / f"{kind}.yaml"
    comment, _, objects = example.read_text().partition("---\n")
    [command] = [line.removeprefix("#").strip() for line in comment.splitlines() if "launch kubernetes" in line]
    words = command.partition(" > ")[0].split()
    assert main(words[words.index("launch") + 1 :]) == 0
    assert capsys.readouterr().out == "---\n" + objects


def test_what_is_written_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "my-run_2.yaml"
    files.write_text("# a comment: ä\ntrainer: {max_steps: 3}   \n")
    words = ["--nodes", "2", "--nproc-per-node", "1", "--image", "i", "--output", str(tmp_path / "out.yaml")]
    assert main(["kubernetes", *words, "--", "fit", f"--config={files}"]) == 0
    assert capsys.readouterr().out == ""
    read, job = yaml.safe_load_all((tmp_path / "out.yaml").read_text())
    assert read["data"] == {"my-run_2.yaml": files.read_text()}
    assert job["metadata"]["name"] == "my-run-2"
    assert container_of(job)["command"][-1] == "--config=/etc/lightning-llm/my-run_2.yaml"
    assert list(yaml.safe_load_all(to_yaml([read, job]))) == [read, job]


def test_a_config_map_that_is_there_is_taken() -> None:
    [job] = made("jobset", "fit", "-c", "not-here.yaml", config_map="mine")
    assert {"name": "run-file", "configMap": {"name": "mine"}} in template_of(job)["spec"]["volumes"]
    assert container_of(job)["command"][-1] == "/etc/lightning-llm/not-here.yaml"


@pytest.mark.parametrize(
    ("pvc", "dirpath", "told"),
    [
        (None, "checkpoints", True),
        (None, "s3://bucket/run", False),
        ("claim:/runs", "checkpoints", False),
        ("claim:/runs", "/runs/mine", False),
        ("claim:/runs", "/elsewhere", True),
    ],
)
def test_checkpoints_that_end_with_their_pod_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pvc: str | None, dirpath: str, told: bool
) -> None:
    saver = {"class_path": "lightning_llm.callbacks.AsyncDistributedCheckpoint", "init_args": {"dirpath": dirpath}}
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump({"trainer": {"callbacks": [saver]}}))
    made("jobset", "fit", "-c", str(run_file), pvc=pvc)
    assert (f"checkpoints in {dirpath} end with their pod" in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "--nodes 0 must be at least 1"),
        ({"pvc": "claim"}, "--pvc claim must be CLAIM:PATH"),
        ({"pvc": "claim:runs"}, "with an absolute path"),
        ({"name": "My_Run"}, "--name My_Run: it must be small letters"),
        ({"name": "a" * 49}, "48 long at most"),
    ],
)
def test_what_a_cluster_would_refuse_is_refused_here(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        made("jobset", **changes)


def test_run_files_that_cannot_go_along_are_refused(tmp_path: Path) -> None:
    wrong = {"list.yaml": "- 1\n", "broken.yaml": "a: [", "large.yaml": "a: " + "x" * 1_100_000}
    for name, text in wrong.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigurationError, match=name if "large" not in name else "a ConfigMap takes 1,000,000"):
            made("jobset", "fit", "-c", str(tmp_path / name))
    with pytest.raises(ConfigurationError, match="not-here.yaml cannot be read"):
        made("jobset", "fit", "-c", "not-here.yaml")
    with pytest.raises(ConfigurationError, match="needs a program behind `--`"):
        main(["kubernetes", "--nodes", "1", "--nproc-per-node", "1", "--image", "i"])
