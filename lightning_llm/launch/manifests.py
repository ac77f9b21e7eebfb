"""Kubernetes objects of a run, as plain dictionaries: a JobSet, a PyTorchJob, the pods of both, a ConfigMap.

Field names and what the controllers make of them were read in jobset v1alpha2 (JobSet 0.11) and kubeflow.org/v1
(Training Operator 1.9).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_llm.resilience.restarts import (
    DIVERGED,
    DO_NOT_RESTART,
    NO_GOOD_CHECKPOINT,
    REQUEUE,
    USAGE_ERROR,
)

Manifest = dict[str, Any]

FOR_GOOD = sorted((USAGE_ERROR, DIVERGED, NO_GOOD_CHECKPOINT, DO_NOT_RESTART))  # codes that no restart helps
RENDEZVOUS_PORT = 29500
CONFIG_FOLDER = "/etc/lightning-llm"  # where pods find the run file
RUN_LABEL = "lightning-llm/run"
JOBSET_RESTARTS = 3  # of all pods together

# A PyTorchJob makes a pod again that ended with 128 or more, and fails with any other code. 138 is the one that its
# documentation leaves to users. The shell is the container's first process, so it hands signals on.
REQUEUE_FOR_PYTORCH_JOB = 138
TRANSLATE = f"""\
"$@" & child=$!
trap 'kill -TERM $child' TERM INT USR1
until wait $child; code=$?; ! kill -0 $child 2>/dev/null; do :; done
[ $code -ne {REQUEUE} ] || code={REQUEUE_FOR_PYTORCH_JOB}
exit $code
"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is to run where.

    Attributes:
        name: Of all its objects.
        namespace: None leaves it to kubectl.
        nodes: Pods.
        ranks_per_node: Of each.
        gpus_per_node: Likewise.
        image: With `lightning-llm` in it.
        program: For the launcher: `fit -c ...`.
        config_map: With what is mounted on `CONFIG_FOLDER`; None for nothing.
        volume: PersistentVolumeClaim, and where it is mounted.
        grace_period: Seconds from SIGTERM to SIGKILL.
        port: Of `/livez`, `/healthz` and `/metrics`.
    """

    name: str
    namespace: str | None
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    image: str
    program: tuple[str, ...]
    config_map: str | None
    volume: tuple[str, str] | None
    grace_period: int
    port: int


def config_map(run: Run, files: Mapping[str, str]) -> Manifest:
    """The ConfigMap that the pods mount."""
    assert run.config_map is not None
    metadata = {**_metadata(run), "name": run.config_map}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": dict(files)}


def jobset(run: Run) -> Manifest:
    """A JobSet of one indexed Job; its controller makes the headless service by which the pods find the first one.

    A pod that was told to stop (75), or whose node is taken away, is made again and does not count. Where no restart
    helps, all ends. What else a container ends with is counted: after more of them than there are pods, all are made
    anew, `JOBSET_RESTARTS` times.
    """
    policy = [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": FOR_GOOD}},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [REQUEUE]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    # A pod that is not ready has a name all the same: JobSet's default, on which the rendezvous depends.
    network = {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": run.name}
    pods = _pods(run, _launch(run, f"{run.name}-node-0-0.{run.name}"), readiness="/healthz")
    pods["spec"]["restartPolicy"] = "Never"  # with which alone there is a podFailurePolicy
    job = {
        "completionMode": "Indexed",
        "completions": run.nodes,
        "parallelism": run.nodes,
        "backoffLimit": run.nodes,
        "podFailurePolicy": {"rules": policy},
        "template": pods,
    }
    ends = {"name": "noRestartHelps", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(run),
        "spec": {
            "network": network,
            "failurePolicy": {"maxRestarts": JOBSET_RESTARTS, "rules": [ends]},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }


def pytorch_job(run: Run) -> Manifest:
    """A PyTorchJob of workers alone, which has succeeded when all of them have.

    It has no `elasticPolicy`: with one, the job counts as done when the first worker is, and the others are killed.
    """
    command = ["sh", "-c", TRANSLATE, "lightning-llm", *_launch(run, f"{run.name}-worker-0")]
    # A pod that is not ready has no name there, and the rendezvous needs that of the first one while ranks hang.
    pods = _pods(run, command, readiness="/livez")
    [container] = pods["spec"]["containers"]
    container["name"] = "pytorch"  # the one that the operator looks at
    container["ports"][0]["name"] = "pytorchjob-port"  # the one that its services have
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(run),
        "spec": {
            "nprocPerNode": str(run.ranks_per_node),
            "runPolicy": {"cleanPodPolicy": "None"},
            "pytorchReplicaSpecs": {
                "Worker": {"replicas": run.nodes, "restartPolicy": "ExitCode", "template": pods},
            },
        },
    }


def _metadata(run: Run) -> Manifest:
    return {
        "name": run.name,
        **({"namespace": run.namespace} if run.namespace is not None else {}),
        "labels": _labels(run),
    }


def _labels(run: Run) -> dict[str, str]:
    return {"app.kubernetes.io/name": "lightning-llm", RUN_LABEL: run.name}


def _launch(run: Run, first_pod: str) -> list[str]:
    meeting = ["--rdzv-endpoint", f"{first_pod}:{RENDEZVOUS_PORT}", "--rdzv-id", run.name] if run.nodes > 1 else []
    sizes = ["--nnodes", str(run.nodes), "--nproc-per-node", str(run.ranks_per_node)]
    return ["lightning-llm", "launch", *sizes, *meeting, "--port", str(run.port), "--", *run.program]


def _pods(run: Run, command: list[str], readiness: str) -> Manifest:
    """The template of all pods; SIGTERM reaches the launcher, and through it the ranks, which save and end with 75."""
    volumes: list[Manifest] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts: list[Manifest] = [{"name": "shm", "mountPath": "/dev/shm"}]  # 64 MB otherwise: too little for loaders, NCCL
    if run.config_map is not None:
        volumes.append({"name": "run-file", "configMap": {"name": run.config_map}})
        mounts.append({"name": "run-file", "mountPath": CONFIG_FOLDER, "readOnly": True})
    if run.volume is not None:
        claim, path = run.volume
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": "storage", "mountPath": path})
    container = {
        "name": "launcher",
        "image": run.image,
        "command": command,
        **({"workingDir": run.volume[1]} if run.volume is not None else {}),
        "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}],
        "ports": [
            {"name": "rendezvous", "containerPort": RENDEZVOUS_PORT},
            {"name": "metrics", "containerPort": run.port},
        ],
        **({"resources": {"limits": {"nvidia.com/gpu": run.gpus_per_node}}} if run.gpus_per_node else {}),
        # The launcher answers before it has found the others. Ranks that hang make a pod not ready, and do not end it:
        # the launcher starts them again.
        "startupProbe": _probe("/livez", every=5, failures=60),
        "livenessProbe": _probe("/livez", every=30, failures=5),
        "readinessProbe": _probe(readiness, every=10, failures=1),
        "volumeMounts": mounts,
    }
    scraped = {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(run.port),
        "prometheus.io/path": "/metrics",
    }
    return {
        "metadata": {"labels": _labels(run), "annotations": scraped},
        "spec": {
            "terminationGracePeriodSeconds": run.grace_period,
            "automountServiceAccountToken": False,  # a run asks nothing of the cluster
            "enableServiceLinks": False,
            "containers": [container],
            "volumes": volumes,
        },
    }


def _probe(path: str, every: int, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": "metrics"},
        "periodSeconds": every,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }
