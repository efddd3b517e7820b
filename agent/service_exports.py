"""What the node's own cluster exports by the Multi-Cluster Services API, as the control plane is told and as the cluster's users are."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.discovery.following import Following
from agent.discovery.kubeconfig import ClusterAccess
from agent.discovery.reflector import NotServed, ReadForbidden
from agent.discovery.table import Service, ServiceTable
from agent.envoy.inputs import AgentSnapshot, body
from agent.multicluster import Condition, Export, ServiceExport, read_export
from agent.protocol import items
from agent.protocol.items import ItemKind
from agent.protocol.report import MOST_EXPORTS, MOST_PORTS, ExportedPort, MultiClusterServices
from agent.protocol.report import ServiceExport as ExportedService

_ABSENT = "the cluster does not know ServiceExports: apply deploy/kubernetes/multicluster to it"


@dataclass(frozen=True)
class Judged:
    """A ServiceExport together with the Service of its name."""

    export: Export
    ports: tuple[ExportedPort, ...]
    problem: tuple[str, str] | None
    """Reason, as conditions have it, and words: why it cannot be exported."""

    def conditions(self, item: items.ServiceExport | None) -> frozenset[Condition]:
        """`item`: what the control plane says of it; None while no other cluster may import it."""
        if self.problem:
            reason, words = self.problem
            return frozenset({Condition("Valid", "False", reason, words), Condition("Ready", "False", reason, words)})
        valid = Condition("Valid", "True", "Valid", "")
        if item is None:
            words = "no site mesh group of this site has enable_multi_cluster_services"
            return frozenset({valid, Condition("Ready", "False", "Pending", words)})
        conflict = (
            Condition("Conflict", "True", "PortConflict", item.conflict)
            if item.conflict
            else Condition("Conflict", "False", "NoConflicts", "")
        )
        return frozenset({valid, conflict, Condition("Ready", "True", "Exported", "")})


@dataclass
class ServiceExports:
    """`services` are those of the node's own cluster; `changed` is called when there may be something new to say."""

    cluster: Callable[[], ClusterAccess] | None
    """How to reach it. None: there is none."""
    services: Callable[[], ServiceTable | None]
    changed: Callable[[], None]
    off: str = ""
    """Why this node takes no part, whatever the cluster has."""
    _following: Following[Export] | None = field(default=None, init=False)

    async def run(self) -> None:
        """For ever, if there is anything to do at all."""
        if self.cluster is not None and not self.off:
            self._following = Following(self.cluster, ServiceExport, read_export, self.changed)
            await self._following.run()

    @property
    def reason(self) -> str | None:
        """Why this node takes no part; empty if it does, None while that is not known."""
        if self.off or self._following is None:
            return self.off or None
        failure = self._following.failure
        if isinstance(failure, NotServed):
            return _ABSENT
        if isinstance(failure, ReadForbidden):
            return str(failure)
        return None if self._following.objects is None else ""

    @property
    def judged(self) -> tuple[Judged, ...]:
        """By namespace and name; none while this node takes no part, or while the services are not known."""
        table = self.services()
        if self.reason != "" or table is None or self._following is None:
            return ()
        found = sorted((self._following.objects or {}).items())
        return tuple(_judge(export, table.services.get(f"{export.name}.{export.namespace}")) for _, export in found)

    @property
    def report(self) -> MultiClusterServices | None:
        """None: nothing is known yet."""
        reason = self.reason
        if self.cluster is None or reason is None or (not reason and self.services() is None):
            return None
        exported = [
            ExportedService(namespace=each.export.namespace, name=each.export.name, created_at=each.export.created_at, ports=each.ports)
            for each in self.judged
            if not each.problem
        ]
        left_out = f"only {MOST_EXPORTS} of {len(exported)} exported services are told" if len(exported) > MOST_EXPORTS else ""
        return MultiClusterServices(offered=not reason, reason=reason or left_out, exports=tuple(exported[:MOST_EXPORTS]))

    def conditions(self, snapshot: AgentSnapshot) -> Iterator[tuple[Export, frozenset[Condition]]]:
        """What the status of each ServiceExport should say, where it says something else."""
        known: Mapping[str, Any] = snapshot.by_key[ItemKind.SERVICE_EXPORT]
        for each in self.judged:
            item = known.get(f"{each.export.namespace}/{each.export.name}")
            wanted = each.conditions(body(item, items.ServiceExport) if item else None)
            if not wanted <= each.export.conditions:
                yield each.export, wanted


def _judge(export: Export, service: Service | None) -> Judged:
    problem = _problem(service)
    tcp = [port for port in service.ports if port.protocol == "TCP"] if service and not problem else []
    return Judged(export, tuple(ExportedPort(name=port.name, port=port.port) for port in tcp[:MOST_PORTS]), problem)


def _problem(service: Service | None) -> tuple[str, str] | None:
    if service is None:
        return "NoService", "there is no Service of this name"
    if service.type == "ExternalName":
        return "InvalidServiceType", "a Service of type ExternalName cannot be exported"
    if service.cluster_ip == "None":
        return "InvalidServiceType", "a headless Service cannot be exported: its pods have no addresses in other clusters"
    if not any(port.protocol == "TCP" for port in service.ports):
        return "InvalidServiceType", "it has no TCP port, and only those can be exported"
    return None
