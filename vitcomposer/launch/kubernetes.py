"""Describes a run as objects of Kubernetes: an Indexed Job with its Service, a JobSet, a PyTorchJob."""

import re
from dataclasses import dataclass
from typing import Any

from vitcomposer.launch.shell import CONFIGURATION_ERROR, INTERRUPTED, PORT, STOPPED, Launch, node_script

_JOB_RANK, _PYTORCHJOB_RANK = "JOB_COMPLETION_INDEX", "RANK"


@dataclass(frozen=True, kw_only=True)
class Pods:
    """What the pods of a run need beside the machines.

    Attributes:
        secrets: Whose keys become variables of the environment.
        volumes: PersistentVolumeClaims and where they are mounted.
        shared_memory: GiB of /dev/shm, through which the loader's workers hand over their batches.
    """

    image: str
    namespace: str | None
    secrets: tuple[str, ...]
    volumes: tuple[tuple[str, str], ...]
    shared_memory: int


def indexed_job(launch: Launch, pods: Pods) -> list[dict[str, Any]]:
    """``batch/v1`` Job with a pod for each node, and the headless Service that gives them names."""
    name = launch.name
    script = node_script(launch, rank=_JOB_RANK, master=f"{name}-0.{name}", port=str(PORT))
    pod = {"subdomain": name, **_pod(launch, pods, script)}
    job = {
        **_indexed(launch, pod),
        # Every failure of a rank fails its node, and with it, a little later, all the others.
        "backoffLimitPerIndex": launch.retries,
        "maxFailedIndexes": 0,
    }
    service = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"batch.kubernetes.io/job-name": name},
        "ports": [{"name": "master", "port": PORT}],
    }
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(launch, pods), "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(launch, pods), "spec": job},
    ]


def job_set(launch: Launch, pods: Pods) -> list[dict[str, Any]]:
    """``jobset.x-k8s.io/v1alpha2``: all pods are made anew when one fails."""
    name = launch.name
    script = node_script(launch, rank=_JOB_RANK, master=f"{name}-nodes-0-0.{name}", port=str(PORT))
    job = {**_indexed(launch, _pod(launch, pods, script)), "backoffLimit": 0}
    final = {"name": "configuration", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    spec = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name},
        "failurePolicy": {"maxRestarts": launch.retries, "rules": [final]},
        "replicatedJobs": [{"name": "nodes", "replicas": 1, "template": {"spec": job}}],
    }
    kind = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet"}
    return [{**kind, "metadata": _metadata(launch, pods), "spec": spec}]


def pytorch_job(launch: Launch, pods: Pods) -> list[dict[str, Any]]:
    """``kubeflow.org/v1``: the operator starts a pod again that leaves with 128 or more, and ends the run else."""
    script = node_script(launch, rank=_PYTORCHJOB_RANK, master='"$MASTER_ADDR"', port='"$MASTER_PORT"')
    # The operator sets it itself, from the replica's.
    pod = {key: value for key, value in _pod(launch, pods, script).items() if key != "restartPolicy"}
    replicas = {
        kind: {"replicas": count, "restartPolicy": "ExitCode", "template": {"spec": pod}}
        for kind, count in (("Master", 1), ("Worker", launch.nodes - 1))
        if count
    }
    spec = {"runPolicy": {"cleanPodPolicy": "Running"}, "pytorchReplicaSpecs": replicas}
    kind = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob"}
    return [{**kind, "metadata": _metadata(launch, pods), "spec": spec}]


def _metadata(launch: Launch, pods: Pods) -> dict[str, str]:
    return {"name": launch.name} | ({} if pods.namespace is None else {"namespace": pods.namespace})


def _indexed(launch: Launch, pod: dict[str, Any]) -> dict[str, Any]:
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    rules = [
        {"action": "FailJob", "onExitCodes": _exit(CONFIGURATION_ERROR)},
        {"action": "Ignore", "onExitCodes": _exit(INTERRUPTED, STOPPED)},
        {"action": "Ignore", "onPodConditions": disrupted},
    ]
    return {
        "completionMode": "Indexed",
        "completions": launch.nodes,
        "parallelism": launch.nodes,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": pod},
    }


def _exit(*statuses: int) -> dict[str, Any]:
    return {"containerName": "pytorch", "operator": "In", "values": sorted(statuses)}  # the API wants them in order


def _pod(launch: Launch, pods: Pods, script: str) -> dict[str, Any]:
    needs: dict[str, Any] = {"nvidia.com/gpu": launch.gpus}
    wishes: dict[str, Any] = {}
    if launch.memory is not None:
        needs["memory"] = f"{launch.memory}Gi"
    if launch.cpus is not None:
        wishes["cpu"] = launch.cpus  # no limit, which would hold back the loader's workers
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{pods.shared_memory}Gi"}}
    ]
    for number, (claim, path) in enumerate(pods.volumes):
        mounts.append({"name": f"volume-{number}", "mountPath": path})
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}})
    container = {
        "name": "pytorch",  # the name that the operator of PyTorchJobs looks for
        "image": pods.image,
        "command": ["bash", "-c", _literal(script)],
        "env": [{"name": key, "value": _literal(value)} for key, value in launch.environment],
        "envFrom": [{"secretRef": {"name": name}} for name in pods.secrets],
        "resources": {"limits": needs, "requests": {**needs, **wishes}},
        "volumeMounts": mounts,
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": launch.grace,
        "automountServiceAccountToken": False,
        # Else a Service named master would set MASTER_PORT.
        "enableServiceLinks": False,
        "containers": [{key: value for key, value in container.items() if value != []}],
        "volumes": volumes,
    }


def _literal(text: str) -> str:
    """``text`` such that Kubernetes, which replaces $(NAME) and reads $$ as $, hands it over as it is."""
    return re.sub(r"\$(?=[$(])", "$$", text)
