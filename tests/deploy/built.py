"""What the kustomizations of `deploy/kubernetes` come to."""

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # ships no types

ROOT = Path(__file__).parents[2]
AGENTS = {name: f"agent/overlays/{name}" for name in ("one-replica", "three-replicas", "openshift")}
ALL = {**AGENTS, "controlplane": "controlplane"}
RIGHTS = {
    **ALL,
    **{
        name: f"agent/overlays/{name}"
        for name in ("publishing", "ipsec", "multi-cluster-services", "pod-selectors", "load-balancer", "machine-address")
    },
    "discovery": "discovery",
}
"""With those that differ from them in little but rights."""
SHIPPED = ROOT / "controlplane/installation"

Json = dict[str, Any]


@cache
def text(name: str) -> str:
    """As kubectl builds it. Skips the test where there is no kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl, whose kustomize builds the overlays")
    where = ROOT / "deploy/kubernetes" / RIGHTS.get(name, name)
    built = subprocess.run(["kubectl", "kustomize", where], check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return built.stdout


def parsed(name: str) -> list[Json]:
    """Overlays that are shipped are read from there, so that they are looked at where there is no kubectl, too."""
    shipped = SHIPPED / f"{name}.yaml"
    return list(yaml.safe_load_all(shipped.read_text() if shipped.exists() else text(name)))


def pods(objects: list[Json]) -> Iterator[Json]:
    """Specs of the pods that these make."""
    for each in objects:
        if each["kind"] in {"StatefulSet", "Deployment", "Job"}:
            yield each["spec"]["template"]["spec"]


def variables(pod: Mapping[str, Any], prefix: str) -> dict[str, Json]:
    """Of the environment, by name."""
    return {it["name"]: it for container in pod["containers"] for it in container["env"] if it["name"].startswith(prefix)}
