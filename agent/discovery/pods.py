"""The pods of one Kubernetes cluster as far as policies look at them: namespace, labels and addresses. Followed only while somebody asks."""

import asyncio
import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from sys import intern
from typing import NoReturn

import msgspec
from lightkube.core.resource import ApiInfo, NamespacedResourceG, ResourceDef

from agent.discovery.kubeconfig import ClusterAccess
from agent.discovery.reflector import Difference, ReadFailed, ReadForbidden, Reflector, pauses
from agent.errors import Misconfigured
from agent.log import log
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


class FollowedPods:
    """Follows while `run` runs; `changed` is called, in the event loop, when there is something new."""

    def __init__(self, load: Callable[[], ClusterAccess], changed: Callable[[], None]) -> None:
        """`load` is called again when the credentials are refused; it may raise `Misconfigured`."""
        self.pods: Mapping[tuple[str, str], Identity] | None = None
        """The last that could be read, by namespace and name. None: nothing was read yet."""
        self.version = 0
        """Another one for other pods."""
        self.reason = ""
        """Why they are not being followed."""
        self.forbidden = False
        """Whether that is because they may not be read; then nothing that was read before counts."""
        self._load = load
        self._changed = changed
        self._reflector: Reflector[Identity] | None = None

    async def run(self) -> NoReturn:
        """Keep following, whatever goes wrong."""
        delays = pauses()
        while True:
            try:
                access = self._load()
                async with access.connect() as client:
                    self._reflector = Reflector(client, Pod, read_pod, self._take)
                    await self._reflector.run()
            except (ReadFailed, Misconfigured) as error:
                self._say(error)
            if self._reflector and self._reflector.listed:
                delays = pauses()
            await asyncio.sleep(next(delays))

    def _take(self, differences: Sequence[Difference[Identity]]) -> None:
        assert self._reflector is not None
        if self._reflector.listed and (differences or self.pods is not self._reflector.objects):
            self.pods = self._reflector.objects
            self.version += 1
            self._changed()
        self._say(self._reflector.failure)

    def _say(self, failure: Exception | None) -> None:
        reason, forbidden = str(failure or ""), isinstance(failure, ReadForbidden)
        if (reason, forbidden) != (self.reason, self.forbidden):
            log.info("pods", followed=failure is None, reason=reason)
            self.reason, self.forbidden = reason, forbidden
            self._changed()
