"""The services of one Kubernetes cluster, as they are now."""

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from lightkube.core.generic_client import ALL_NS, GenericAsyncClient
from lightkube.core.resource import Resource
from lightkube.resources.core_v1 import Namespace, Node, Service
from lightkube.resources.discovery_v1 import EndpointSlice

from agent.discovery import objects
from agent.discovery.ingress import FollowedController, through
from agent.discovery.kubeconfig import ClusterAccess
from agent.discovery.reflector import AccessRefused, Difference, ReadFailed, ReadForbidden, Reflector, ask, pauses
from agent.discovery.table import Delivery, ServiceTable
from agent.discovery.table import Service as DiscoveredService
from agent.errors import Misconfigured
from agent.log import log
from agent.protocol.items import IngressController, NamespaceMapping
from agent.protocol.report import MOST_SERVICES, DiscoveryReport
from agent.published import is_published

MAX_REASON = 1_000
"""Characters."""
RIGHTS_EVERY_S = 15.0
"""Where neither all namespaces may be read nor which there are, it is looked again whether that is allowed now."""


class _MayReadMore(Exception):
    """There is to be another connection, that reads all."""


class WatchedCluster:
    """Follows a cluster while `run` runs. `changed` is called, in the event loop, when `table`, `connected` or `reason` are others."""

    def __init__(
        self,
        load: Callable[[], ClusterAccess],
        changed: Callable[[], None],
        *,
        cluster_id: str = "",
        delivery: Delivery = "reachable",
        ingress_controller: IngressController | None = None,
        namespace_mapping: Sequence[NamespaceMapping] = (),
        last_known: ServiceTable | None = None,
    ) -> None:
        """`load` is called again when the credentials are refused; it may raise `Misconfigured`, and so may this."""
        self.table = last_known
        """The last that could be read, even if it cannot be read now. None: nothing is known yet, which does not mean that there is nothing."""
        self.connected = False
        self.reason = "not connected yet"
        """Why the cluster, or part of it, is not being followed."""
        self._load = load
        self._changed = changed
        self.cluster_id = cluster_id
        self._delivery, self._ingress_controller = delivery, ingress_controller
        self._namespaces = _Namespaces.of(namespace_mapping)
        self._connection: _Connection | None = None
        self._read: _Connection | None = None
        """The last one that has read what it may."""
        self._server = ""

    def has_read(self, namespace: str) -> bool:
        """Whether `table` says all of it; what it does not have in other namespaces is not known to be gone."""
        return self._read is not None and self._read.has_read(namespace)

    def report(self, discovery: str) -> DiscoveryReport:
        table = self.table or ServiceTable()
        reason = self.reason
        if len(table.services) > MOST_SERVICES:
            reason = f"only {MOST_SERVICES} of {len(table.services)} services are listed; {reason}".rstrip("; ")
        return DiscoveryReport(discovery=discovery, connected=self.connected, reason=reason, services=table.report())

    async def run(self) -> NoReturn:
        """Keep following, whatever goes wrong."""
        delays = pauses()
        while True:
            self._connection, self._server = None, ""
            try:
                access = self._load()
                self._server = access.origin
                async with access.connect() as client:
                    self._connection = _Connection(client, self._namespaces, self._delivery, self._ingress_controller, self._update)
                    await self._connection.follow(access.namespace)
            except* _MayReadMore:
                pass
            except* (ReadFailed, Misconfigured) as group:
                self._set_status(connected=False, reason=self._text(_leaves(group)))
            if self._connection and self._connection.settled:
                delays = pauses()
            await asyncio.sleep(next(delays))

    def failed(self, reason: str) -> None:
        """`run` broke off."""
        self._set_status(connected=False, reason=reason)

    def _update(self, keys: Iterable[str]) -> None:
        """Take over what the connection has read of these services; everything, as soon as it has read everything once."""
        connection = self._connection
        assert connection is not None
        if not connection.settled and connection.complete():
            connection.settled, self._read, keys = True, connection, connection.services
        if connection.settled:
            known = self.table.services if self.table else {}
            self._set_table(_with(known, {*keys, *_gone(known, connection)}, connection))
        reason = self._text(connection.failures()) or ("" if connection.settled else self.reason)
        self._set_status(connected=connection.connected(), reason=reason)

    def _set_table(self, services: Mapping[str, DiscoveredService]) -> None:
        table = ServiceTable(self.cluster_id, services)
        if table != self.table:
            self.table = table
            self._changed()

    def _text(self, failures: Iterable[BaseException]) -> str:
        """One line that names the server, as soon as it is known."""
        text = "; ".join(sorted({" ".join(str(failure).split()) for failure in failures}))
        return (f"{self._server}: {text}" if text and self._server else text)[:MAX_REASON]

    def _set_status(self, *, connected: bool, reason: str) -> None:
        if (connected, reason) != (self.connected, self.reason):
            log.info("kubernetes discovery", cluster=self.cluster_id, connected=connected, reason=reason)
            self.connected, self.reason = connected, reason
            self._changed()


@dataclass(frozen=True)
class _Namespaces:
    """Which namespaces are discovered."""

    patterns: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, mapping: Iterable[NamespaceMapping]) -> "_Namespaces":
        try:
            return cls(tuple(re.compile(one.namespace_regex) for one in mapping))
        except re.error as error:
            raise Misconfigured(f"a namespace_regex cannot be read: {error}") from None

    def has(self, namespace: str) -> bool:
        return not self.patterns or any(pattern.fullmatch(namespace) for pattern in self.patterns)

    def literals(self) -> set[str]:
        """Those that are written out; the only ones that can be known without listing namespaces."""
        return {pattern.pattern for pattern in self.patterns if re.fullmatch(r"[a-z0-9-]+", pattern.pattern)}


@dataclass
class _Scope:
    """The reflectors of one namespace, or of all."""

    reflectors: tuple[Reflector[Any], ...]
    tasks: tuple[asyncio.Task[NoReturn], ...]

    @property
    def listed(self) -> bool:
        return all(one.listed for one in self.reflectors)


@dataclass
class _Connection:
    """What was read with one set of credentials."""

    client: GenericAsyncClient
    namespaces: _Namespaces
    delivery: Delivery
    ingress_controller: IngressController | None
    update: Callable[[Iterable[str]], None]
    """Called with the keys of services that may have changed."""
    services: dict[str, objects.DeclaredService] = field(default_factory=dict)
    slices: dict[str, dict[str, objects.Slice]] = field(default_factory=dict)
    """By service and name."""
    nodes: dict[str, objects.Node] = field(default_factory=dict)
    through: FollowedController | None = None
    """What services are reached through, if it is an ingress controller."""
    cluster: list[Reflector[Any]] = field(default_factory=list)
    """What belongs to no namespace."""
    scopes: dict[str, _Scope] = field(default_factory=dict)
    """By namespace, or `ALL_NS`."""
    opened: bool = False
    """Whether it is known what there is to read."""
    settled: bool = False
    """Whether all of it was read once."""

    async def follow(self, own_namespace: str) -> None:
        """Until the credentials are refused, or no longer suffice, which raises an ExceptionGroup of `ReadFailed`."""
        async with asyncio.TaskGroup() as group:
            if self.delivery in {"isolated", "ingress_controller"}:
                self._start(group, self._reflector(Node, objects.read_node, self._nodes_changed), self.cluster)
            if self.ingress_controller:
                self.through = FollowedController(self.client, self.ingress_controller, self.nodes, self._controller_looked)
                for reflector in self.through.reflectors:
                    self._start(group, reflector, self.cluster)
            if await self._may_list_all():
                self._open(group, ALL_NS)
            elif await self._may_list(Namespace):
                changed = partial(self._namespaces_changed, group)
                self._start(group, self._reflector(Namespace, self._read_namespace, changed), self.cluster)
            else:
                self._open_known(group, own_namespace)
                group.create_task(self._until_more_may_be_read())
            self.opened = True

    def service(self, key: str) -> DiscoveredService:
        declared, slices = self.services[key], self.slices.get(key, {}).values()
        if self.through:
            return through(self.through.controller, declared, slices)
        return objects.discovered(declared, slices, self.nodes, self.delivery)

    def complete(self) -> bool:
        """Whether everything has been read that may be read, and that is something."""
        answered = all(one.listed or isinstance(one.failure, ReadForbidden) for one in self._reflectors())
        return self.opened and answered and (not self.scopes or any(scope.listed for scope in self.scopes.values()))

    def connected(self) -> bool:
        """Whether everything is being followed but namespaces that may not be read, if there are others."""
        namespaced = [one.failure for scope in self.scopes.values() for one in scope.reflectors]
        if not self.settled or any(one.failure for one in self.cluster) or (namespaced and all(namespaced)):
            return False
        return all(isinstance(failure, ReadForbidden) for failure in namespaced if failure)

    def has_read(self, namespace: str) -> bool:
        """Whether `services` has all of this namespace that is to be discovered."""
        scope = self.scopes.get(namespace) or self.scopes.get(ALL_NS)
        if scope:
            return scope.listed
        return not self.namespaces.has(namespace) or any(one.resource is Namespace and one.listed for one in self.cluster)

    def failures(self) -> list[ReadFailed]:
        return [one.failure for one in self._reflectors() if one.failure]

    def _reflectors(self) -> list[Reflector[Any]]:
        return [*self.cluster, *(one for scope in self.scopes.values() for one in scope.reflectors)]

    async def _until_more_may_be_read(self) -> NoReturn:
        """Raises `_MayReadMore`."""
        while True:
            await asyncio.sleep(RIGHTS_EVERY_S)
            with suppress(ReadFailed):  # what goes wrong is said by those who read
                if await self._may_list_all() or await self._may_list(Namespace):
                    raise _MayReadMore

    async def _may_list_all(self) -> bool:
        return await self._may_list(Service) and await self._may_list(EndpointSlice)

    async def _may_list(self, resource: type[Resource]) -> bool:
        """In all namespaces."""
        try:
            await ask(self.client, resource, ALL_NS, limit="1")
        except ReadForbidden:
            return False
        return True

    def _open_known(self, group: asyncio.TaskGroup, own_namespace: str) -> None:
        names = self.namespaces.literals() | {name for name in (own_namespace,) if name and self.namespaces.has(name)}
        if not names:
            raise ReadForbidden("neither services of all namespaces nor namespaces may be listed, and no namespace is named in full")
        for name in sorted(names):
            self._open(group, name)

    def _namespaces_changed(self, group: asyncio.TaskGroup, differences: Sequence[Difference[str]]) -> None:
        for old, new in differences:
            if old is not None:
                self._close(old)
            if new is not None:
                self._open(group, new)
        self.update(())

    def _open(self, group: asyncio.TaskGroup, namespace: str) -> None:
        reflectors = (
            self._reflector(Service, self._read_service, self._services_changed, namespace),
            self._reflector(EndpointSlice, self._read_slice, self._slices_changed, namespace),
        )
        self.scopes[namespace] = _Scope(reflectors, tuple(group.create_task(one.run()) for one in reflectors))

    def _close(self, namespace: str) -> None:
        """A namespace is gone, and all in it."""
        scope = self.scopes.pop(namespace)
        for task in scope.tasks:
            task.cancel()
        for reflector in scope.reflectors:
            reflector.changed([(value, None) for value in reflector.objects.values()])

    def _reflector(
        self,
        resource: type[Resource],
        read: Callable[[Any], Any],
        changed: Callable[[Sequence[Difference[Any]]], None],
        namespace: str = ALL_NS,
    ) -> Reflector[Any]:
        """Who may suddenly not read all namespaces any more is to look which remain."""
        fatal = (AccessRefused, ReadForbidden) if resource in {Service, EndpointSlice} and namespace == ALL_NS else (AccessRefused,)
        return Reflector(self.client, resource, read, changed, namespace, fatal=fatal)

    def _start(self, group: asyncio.TaskGroup, reflector: Reflector[Any], among: list[Reflector[Any]]) -> None:
        among.append(reflector)
        group.create_task(reflector.run())

    def _read_namespace(self, body: Namespace) -> str | None:
        name = body.metadata.name if body.metadata else None
        return name if name and self.namespaces.has(name) else None

    def _read_service(self, body: Service) -> objects.DeclaredService | None:
        if body.metadata and is_published(body.metadata.labels):
            return None  # it leads back to a load balancer
        service = objects.read_service(body)
        return service if self.namespaces.has(service.namespace) else None

    def _read_slice(self, body: EndpointSlice) -> objects.Slice | None:
        part = objects.read_slice(body)
        return part if part and self.namespaces.has(part.namespace) else None

    def _services_changed(self, differences: Sequence[Difference[objects.DeclaredService]]) -> None:
        for old, new in differences:
            if old and not new:
                del self.services[old.key]
            if new:
                self.services[new.key] = new
        self.update({one.key for pair in differences for one in pair if one})

    def _slices_changed(self, differences: Sequence[Difference[objects.Slice]]) -> None:
        for old, new in differences:
            if old:
                _take_out(self.slices, old)
            if new:
                self.slices.setdefault(new.service, {})[new.name] = new
        self.update({one.service for pair in differences for one in pair if one})

    def _nodes_changed(self, differences: Sequence[Difference[objects.Node]]) -> None:
        for old, new in differences:
            if old and not new:
                del self.nodes[old.name]
            if new:
                self.nodes[new.name] = new
        if self.through:
            self.through.look()
        else:
            self.update(tuple(self.services) if differences else ())

    def _controller_looked(self, *, changed: bool) -> None:
        self.update(tuple(self.services) if changed else ())


def _gone(services: Mapping[str, DiscoveredService], connection: _Connection) -> set[str]:
    """Those that the connection does not have. That their namespace may no longer be read is no reason to think that they are gone."""
    return {key for key in services.keys() - connection.services.keys() if connection.has_read(services[key].namespace)}


def _with(services: Mapping[str, DiscoveredService], keys: Iterable[str], connection: _Connection) -> Mapping[str, DiscoveredService]:
    """The services with these read anew; the others are the same objects, so that tables compare quickly."""
    result = dict(services)
    for key in keys:
        if key in connection.services:
            result[key] = connection.service(key)
        else:
            result.pop(key, None)
    return result


def _take_out(slices: dict[str, dict[str, objects.Slice]], part: objects.Slice) -> None:
    del slices[part.service][part.name]
    if not slices[part.service]:
        del slices[part.service]


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [leaf for one in group.exceptions for leaf in (_leaves(one) if isinstance(one, BaseExceptionGroup) else [one])]
