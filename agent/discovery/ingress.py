"""Services that are reached through an ingress controller of their cluster: what Ingresses say, and where the controller is.

The controller tells services apart by the Host of a request, which is the caller's, or what a route makes of it (`host_rewrite`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lightkube.core.generic_client import GenericAsyncClient
from lightkube.models import networking_v1
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources import core_v1 as resources
from lightkube.resources import networking_v1 as networking
from lightkube.resources.discovery_v1 import EndpointSlice

from agent.discovery.objects import DeclaredPort, DeclaredService, Node, Slice, discovered, node_addresses, read_service, read_slice
from agent.discovery.reflector import Reflector
from agent.discovery.table import Service
from agent.envoy.inputs import Endpoint
from agent.protocol.items import IngressController

ANY_HOST = "*"
_CLASS_ANNOTATION = "kubernetes.io/ingress.class"
"""Before Ingresses had a field for it."""


@dataclass(frozen=True)
class Backend:
    """All paths of a host lead to one port of a service."""

    host: str
    service: str
    """`name.namespace`."""
    port: str
    """Its number or name."""


@dataclass(frozen=True)
class Ingress:
    namespace: str
    name: str
    backends: tuple[Backend, ...]


@dataclass(frozen=True)
class Controller:
    """Where an ingress controller is reached, and what it leads to."""

    endpoints: tuple[Endpoint, ...] = ()
    """Sorted; an address may be a DNS name."""
    reason: str = ""
    """Why there are none."""
    backends: frozenset[Backend] = frozenset()

    def hosts(self, service: DeclaredService, port: DeclaredPort) -> tuple[str, ...]:
        """Under which the controller leads to this port, sorted."""
        ports = {str(port.port), port.name} - {""}
        return tuple(sorted({it.host for it in self.backends if it.service == service.key and it.port in ports}))


class FollowedController:
    """An ingress controller, whichever namespaces are discovered. `looked` is told whether `controller` changed, also when only a failure did."""

    def __init__(self, client: GenericAsyncClient, at: IngressController, nodes: Mapping[str, Node], looked: "Looked") -> None:
        """`nodes` is kept right by somebody else, who calls `look`."""
        self.controller = Controller()
        name, _, namespace = at.service.partition(".")
        self._at, self._nodes, self._looked = at, nodes, looked
        self._service = Reflector(client, resources.Service, read_service, self.look, namespace, name)
        self._slices = Reflector(client, EndpointSlice, self._read_slice, self.look, namespace)
        self._ingresses = Reflector(client, networking.Ingress, lambda body: read_ingress(body, at.ingress_class), self.look)
        self.reflectors: tuple[Reflector[Any], ...] = (self._service, self._slices, self._ingresses)

    def look(self, _: Sequence[Any] = ()) -> None:
        before = self.controller
        service = next(iter(self._service.objects.values()), None)
        self.controller = controller(service, self._at.port, self._slices.objects.values(), self._nodes, self._ingresses.objects.values())
        self._looked(changed=self.controller != before)

    def _read_slice(self, body: EndpointSlice) -> Slice | None:
        part = read_slice(body)
        return part if part and part.service == self._at.service else None


class Looked(Protocol):
    def __call__(self, *, changed: bool) -> None: ...


def read_ingress(body: networking_v1.Ingress, wanted_class: str) -> Ingress | None:
    """None if it is not of that class; an empty class is any. Hosts of which only some paths lead to a service are left out."""
    metadata, spec = body.metadata or ObjectMeta(), body.spec or networking_v1.IngressSpec()
    own_class = spec.ingressClassName or (metadata.annotations or {}).get(_CLASS_ANNOTATION, "")
    if wanted_class and own_class != wanted_class:
        return None
    found = [(rule.host or ANY_HOST, path.backend) for rule in spec.rules or () for path in _whole(rule)]
    if spec.defaultBackend:
        found.append((ANY_HOST, spec.defaultBackend))
    backends = tuple(backend for host, one in found if (backend := _backend(host, one, metadata.namespace or "")))
    return Ingress(metadata.namespace or "", metadata.name or "", backends)


def controller(
    service: DeclaredService | None, port: int, slices: Iterable[Slice], nodes: Mapping[str, Node], ingresses: Iterable[Ingress]
) -> Controller:
    """At its load balancer if that has an address, else at its node port."""
    backends = frozenset(backend for one in ingresses for backend in one.backends)
    if service is None:
        return Controller(reason="the ingress controller's service is not there", backends=backends)
    own = next((each for each in service.ports if each.port == port and each.protocol == "TCP"), None)
    if own is None:
        return Controller(reason=f"the ingress controller's service has no port {port}", backends=backends)
    found = tuple(Endpoint(address, port) for address in service.balancers)
    if not found and own.node_port:
        found = tuple(Endpoint(address, own.node_port) for address in node_addresses(service, tuple(slices), nodes))
    reason = "" if found else "the ingress controller has neither a load balancer with an address nor a node port at a node that is ready"
    return Controller(tuple(sorted(found)), reason, backends)


def through(controller: Controller, declared: DeclaredService, slices: Iterable[Slice]) -> Service:
    """A service as it is reached: at the controller's endpoints while it has ready ones of its own."""
    own = discovered(declared, slices, {}, "reachable")
    if declared.external_name:
        return own
    hosts = [controller.hosts(declared, port) for port in declared.ports]
    reason = controller.reason if any(hosts) else "no Ingress leads all paths of a host to it"
    pairs = zip(own.ports, hosts, strict=True)
    ports = tuple(replace(port, endpoints=controller.endpoints if port.endpoints and known else ()) for port, known in pairs)
    every = tuple(sorted({host for known in hosts for host in known}))
    return replace(own, ports=ports, any_port=(), hosts=every, delivery="none" if reason else "ingress_controller", reason=reason)


def _whole(rule: networking_v1.IngressRule) -> list[networking_v1.HTTPIngressPath]:
    """The path to which a rule leads whatever no other path takes, if it leads nowhere else."""
    paths = rule.http.paths if rule.http else []
    return paths if len(paths) == 1 and paths[0].pathType != "Exact" and (paths[0].path or "/") == "/" else []


def _backend(host: str, backend: networking_v1.IngressBackend, namespace: str) -> Backend | None:
    service = backend.service
    if service is None or service.port is None:
        return None
    return Backend(host, f"{service.name}.{namespace}", str(service.port.number or service.port.name or ""))
