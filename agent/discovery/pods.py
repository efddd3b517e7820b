"""The pods of one Kubernetes cluster as far as policies look at them: namespace, labels and addresses."""

import ipaddress
from dataclasses import dataclass
from functools import lru_cache
from sys import intern

import msgspec
from lightkube.core.resource import ApiInfo, NamespacedResourceG, ResourceDef

from agent.protocol.items import NAMESPACE_LABEL

Labels = tuple[tuple[str, str], ...]
"""Sorted."""
_DONE = frozenset({"Succeeded", "Failed"})
"""Phases of pods whose addresses may be other pods' by now."""


class _Address(msgspec.Struct):
    ip: str = ""


class _Metadata(msgspec.Struct):
    name: str = ""
    namespace: str = ""
    resourceVersion: str = ""  # noqa: N815 - Kubernetes' word
    creationTimestamp: str = ""  # noqa: N815
    labels: dict[str, str] | None = None


class _Spec(msgspec.Struct):
    hostNetwork: bool | None = None  # noqa: N815


class _Status(msgspec.Struct):
    phase: str = ""
    podIPs: list[_Address] | None = None  # noqa: N815


class Pod(NamespacedResourceG, msgspec.Struct):
    """Only what is looked at: decoding all of a pod costs ten times as much."""

    _api_info = ApiInfo(resource=ResourceDef("", "v1", "Pod"), plural="pods", verbs=["global_list", "global_watch"])

    metadata: _Metadata
    spec: _Spec = msgspec.field(default_factory=_Spec)
    status: _Status = msgspec.field(default_factory=_Status)


@dataclass(frozen=True, slots=True)
class Identity:
    """What is known of whoever calls from these addresses."""

    labels: Labels
    """With `NAMESPACE_LABEL`."""
    addresses: tuple[str, ...]
    since: str
    """When the pod was made. Of several at one address, the newest has it."""


def read_pod(pod: Pod) -> Identity | None:
    """None for a pod without addresses of its own."""
    addresses = tuple(sorted({one.ip for one in pod.status.podIPs or () if _is_address(one.ip)}))
    if pod.spec.hostNetwork or pod.status.phase in _DONE or not addresses:
        return None
    labels = {**(pod.metadata.labels or {}), NAMESPACE_LABEL: pod.metadata.namespace}
    return Identity(_shared(tuple(sorted(labels.items()))), addresses, pod.metadata.creationTimestamp)


@lru_cache(10_000)
def _shared(labels: Labels) -> Labels:
    """One object for all pods of a kind."""
    return tuple((intern(key), intern(value)) for key, value in labels)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
