"""The Multi-Cluster Services API (KEP-1645): its kinds, and what a cluster exports by it."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lightkube.generic_resource import GenericNamespacedResource, create_namespaced_resource

GROUP, VERSION = "multicluster.x-k8s.io", "v1alpha1"
ServiceExport = create_namespaced_resource(GROUP, VERSION, "ServiceExport", "serviceexports")
ServiceImport = create_namespaced_resource(GROUP, VERSION, "ServiceImport", "serviceimports")


@dataclass(frozen=True)
class Condition:
    type: str
    status: str
    reason: str
    message: str


@dataclass(frozen=True)
class Export:
    """A ServiceExport as written, and what its status says."""

    namespace: str
    name: str
    created_at: float
    """Unix seconds."""
    conditions: frozenset[Condition]


def read_export(body: GenericNamespacedResource) -> Export:
    metadata: dict[str, Any] = body["metadata"]
    return Export(
        namespace=metadata.get("namespace") or "",
        name=metadata.get("name") or "",
        created_at=datetime.fromisoformat(metadata["creationTimestamp"]).timestamp() if metadata.get("creationTimestamp") else 0.0,
        conditions=frozenset(map(_condition, (body.get("status") or {}).get("conditions") or ())),
    )


def _condition(body: dict[str, Any]) -> Condition:
    return Condition(*(str(body.get(name) or "") for name in ("type", "status", "reason", "message")))
