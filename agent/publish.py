"""Keeps Services in the node's own cluster that lead to this site's load balancers, so that pods call them by ordinary names.

Level-triggered: each pass reads what is there and changes what differs. All nodes of a site write EndpointSlices of their own; one at a
time, who holds the site's Lease, keeps the Services and clears up behind nodes that are gone. The control plane is not needed.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from operator import attrgetter
from random import uniform
from typing import Any, TypeVar

from lightkube.core.generic_client import ALL_NS
from lightkube.generic_resource import GenericNamespacedResource
from lightkube.resources.core_v1 import Service
from lightkube.resources.discovery_v1 import EndpointSlice

from agent.backoff import backoff
from agent.cluster import CONFLICT, FORBIDDEN, NOT_FOUND, Cluster, ClusterAway, ObjectRefused
from agent.discovery.kubeconfig import ClusterAccess
from agent.envoy.inputs import AgentSnapshot, Item, ItemId
from agent.envoy.resources import Resources
from agent.errors import Misconfigured
from agent.leases import Leases, home
from agent.log import log
from agent.multicluster import Condition, Export, ServiceExport, ServiceImport
from agent.protocol.items import ItemKind
from agent.published import Change, Place, Publication, Publisher, imports, obstacle, place_of, publications, services, slices
from agent.service_exports import ServiceExports
from agent.tasks import woken

R = TypeVar("R", Service, GenericNamespacedResource)

PACE_S = 10.0
"""Between passes while nothing happens."""
_WITHDRAW_S = 3.0
_OFF = "publishing is off at this node: set AGENT_PUBLISH=true"


@dataclass
class _Pass:
    """One look at the cluster."""

    cluster: Cluster
    who: Publisher
    wanted: tuple[Publication, ...]
    namespaces: frozenset[str]
    """Where something is wanted, or was."""
    services: dict[Place, Service] = field(default_factory=dict)
    slices: list[EndpointSlice] = field(default_factory=list)
    imports: dict[Place, GenericNamespacedResource] | None = None
    """ServiceImports; None: they were not read."""
    unsaid: dict[Place, str] = field(default_factory=dict)
    """ServiceExports whose status could not be written, and why."""
    missing: set[Place] = field(default_factory=set)
    """Of namespaces that are not there."""
    refused: dict[Place, str] = field(default_factory=dict)
    raced: bool = False
    """Whether somebody else wrote at the same time: look again soon."""

    async def read(self) -> None:
        """What is ours; where not all namespaces may be read, those where there is a reason to."""
        try:
            await self._read(ALL_NS)
        except ObjectRefused as refusal:
            if refusal.status != FORBIDDEN:
                raise
            for namespace in sorted(self.namespaces):
                with self._of(each.place for each in self.wanted if each.namespace == namespace):
                    await self._read(namespace)

    async def _read(self, namespace: str) -> None:
        found = await self.cluster.listed(Service, self.who.site_labels, namespace)
        self.slices += await self.cluster.listed(EndpointSlice, self.who.site_labels, namespace)
        self.services |= {place_of(each): each for each in found}

    async def read_imports(self) -> None:
        """ServiceImports that are ours."""
        try:
            found = await self.cluster.listed(ServiceImport, self.who.site_labels)
        except ObjectRefused as refusal:
            self.refused |= {each.place: f"ServiceImports: {refusal}" for each in self.wanted if each.service_import}
        else:
            self.imports = {place_of(each): each for each in found}

    async def find_taken(self) -> None:
        """Names that are wanted and that others have."""
        for each in self.wanted:
            if each.place not in self.services and each.place not in self.refused:
                with self._of((each.place,)):
                    found = await self._owned(each, Service, each.name)
                    if found:
                        self.services[each.place] = found

    async def make_imports(self) -> None:
        """As far as their names are not others'."""
        if self.imports is None:
            return
        for each in self.wanted:
            place = (each.namespace, each.service_import)
            if each.service_import and place not in self.imports and each.place not in self.refused:
                with self._of((each.place,)):
                    found = await self._owned(each, ServiceImport, each.service_import)
                    if found:
                        self.imports[place] = found
        await self.make([*imports(self.wanted, self.services, self.imports, self.refused, self.who)])

    async def _owned(self, wanted: Publication, resource: type[R], name: str) -> R | None:
        """If it is there and ours."""
        found = await self.cluster.get(resource, name, wanted.namespace)
        if found and not self.who.owns(found):
            kind = resource.__name__
            self.refused[wanted.place] = f"the cluster has a {kind} {name} in namespace {wanted.namespace} that is not this site's"
            return None
        return found

    async def say(self, export: Export, conditions: frozenset[Condition], now: str) -> None:
        """In the status of a ServiceExport, beside what others say there."""
        try:
            found = await self.cluster.get(ServiceExport, export.name, export.namespace)
            if found:
                status = _status(found, conditions, now)
                await self.cluster.replace(ServiceExport.Status.from_dict({**found, "status": status}))
        except ObjectRefused as refusal:
            if refusal.status == CONFLICT:
                self.raced = True
            else:
                self.unsaid[export.namespace, export.name] = f"its status cannot be written: {refusal}"

    async def make(self, changes: Iterable[Change]) -> bool:
        """Whether there were any."""
        changed = False
        for change in changes:
            changed = True
            with self._of((change.place,)):
                await self._make(change)
        return changed

    async def _make(self, change: Change) -> None:
        written: Any = None
        if change.verb == "delete":
            await self.cluster.delete(change.object)
        else:
            write = self.cluster.create if change.verb == "post" else self.cluster.replace
            written = await write(change.object)
        log.info("published", verb=change.verb, kind=type(change.object).__name__, service="/".join(change.place))
        if isinstance(change.object, Service):
            self.services.pop(change.place, None)
            if written:
                self.services[change.place] = written

    @contextmanager
    def _of(self, places: Iterable[Place]) -> Iterator[None]:
        """What is refused concerns these alone."""
        concerned = tuple(places)
        try:
            yield
        except ObjectRefused as refusal:
            if refusal.status == NOT_FOUND:
                self.missing.update(concerned)
            if refusal.status == CONFLICT:
                self.raced = True
            else:
                self.refused |= dict.fromkeys(concerned, str(refusal))


@dataclass
class Publishing:
    """`snapshot` is what is wanted, None while nothing is served, and `accepted` what Envoy has; `changed` is called when what `refused` says is different."""

    who: Publisher
    cluster: Callable[[], ClusterAccess] | None
    """How to reach the node's own cluster. None: publishing is off."""
    snapshot: Callable[[], AgentSnapshot | None]
    accepted: Callable[[], Resources | None]
    changed: Callable[[], None]
    exports: ServiceExports
    """Of the node's own cluster."""
    _refused: Mapping[ItemId, str] = field(default_factory=dict, init=False)
    _in_place: frozenset[ItemId] = field(default_factory=frozenset, init=False)
    _seen: tuple[Publication, ...] | None = field(default=None, init=False)
    _said: frozenset[Item] = field(default_factory=frozenset, init=False)
    """What the control plane says of exports."""
    _namespaces: frozenset[str] = field(default_factory=frozenset, init=False)

    def __post_init__(self) -> None:
        self._leases = Leases(self.who)
        self._wake = asyncio.Event()
        self._obstacle = hindrance(self.who, self.cluster)

    def refused(self, snapshot: AgentSnapshot) -> Mapping[ItemId, str]:
        """Which of its items are not in force, and why."""
        if self._obstacle:
            return {item.id: self._obstacle for item in snapshot.by_kind[ItemKind.PUBLISH]}
        return self._refused

    def look(self) -> None:
        """There may be something else to publish."""
        snapshot = self.snapshot()
        if snapshot is None:
            return
        if self._publications(snapshot) != self._seen or frozenset(snapshot.by_kind[ItemKind.SERVICE_EXPORT]) != self._said:
            self._wake.set()

    def _publications(self, snapshot: AgentSnapshot) -> tuple[Publication, ...]:
        return publications(snapshot, self.accepted(), self.who)

    def wake(self) -> None:
        """There may be something else to say of exports."""
        self._wake.set()

    async def run(self) -> None:
        """For ever, if there is anything to do at all."""
        delays = backoff(0.5, 15.0)
        while self.cluster is not None:
            self._wake.clear()
            snapshot = self.snapshot()
            self._seen = self._publications(snapshot) if snapshot else None
            self._said = frozenset(snapshot.by_kind[ItemKind.SERVICE_EXPORT]) if snapshot else frozenset()
            try:
                raced = self._seen is not None and await self._pass(self.cluster(), () if self._obstacle else self._seen)
            except (ClusterAway, ObjectRefused, Misconfigured) as error:
                self._failed(error)
                await asyncio.sleep(next(delays))
                continue
            if raced:
                await asyncio.sleep(next(delays))
                continue
            delays = backoff(0.5, 15.0)
            await woken(self._wake, uniform(0.8, 1.0) * PACE_S)

    async def withdraw(self) -> None:
        """Before this node stops serving: its slices and Leases go. What cannot be taken away now, others take away later."""
        if self.cluster is None:
            return
        with suppress(ClusterAway, ObjectRefused, Misconfigured, TimeoutError):
            async with asyncio.timeout(_WITHDRAW_S):
                access = self.cluster()
                async with access.connect() as client:
                    look = _Pass(Cluster(client), self.who, (), self._namespaces)
                    await look.read()
                    await look.make(slices((), look.services, look.slices, self.who, None))
                    await self._leases.release(look.cluster, home(access))

    async def _pass(self, access: ClusterAccess, wanted: tuple[Publication, ...]) -> bool:
        """Whether the next one should follow soon, because somebody else wrote at the same time."""
        async with access.connect() as client:
            self._namespaces |= {each.namespace for each in wanted}
            look = _Pass(Cluster(client), self.who, wanted, self._namespaces)
            await look.read()
            if self.exports.reason == "":
                await look.read_imports()
            if wanted or look.services or look.slices or look.imports or self.exports.judged:
                await self._keep(look, home(access))
        ours = {place_of(each) for each in look.slices if self.who.wrote(each)}
        elsewhere = {each.place for each in wanted if each.service_import and each.place in look.missing}
        refused = {each.id: look.refused[each.place] for each in wanted if each.place in look.refused.keys() - elsewhere}
        unsaid = {ItemId(ItemKind.SERVICE_EXPORT, "/".join(place)): why for place, why in look.unsaid.items()}
        self._conclude(
            {**refused, **unsaid},
            frozenset(each.id for each in wanted if each.place in ours and each.place not in look.refused),
        )
        return look.raced

    async def _keep(self, look: _Pass, home: str) -> None:
        leads = await self._leases.renew(look.cluster, home)
        living = await self._leases.living(look.cluster, home) if leads else None
        await look.find_taken()
        if leads:
            await look.make([*services(look.wanted, look.services, look.refused, self.who)])
            await self._keep_imports(look)
        is_gone = None if living is None else lambda node: node not in living
        if await look.make(slices(look.wanted, look.services, look.slices, self.who, is_gone)):
            look.slices = []
            await look.read()

    async def _keep_imports(self, look: _Pass) -> None:
        """What the Multi-Cluster Services API shows to the cluster's users."""
        if self.exports.reason != "":
            return
        await look.make_imports()
        now = datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        for export, conditions in [*self.exports.conditions(self.snapshot() or AgentSnapshot())]:
            await look.say(export, conditions, now)

    def _failed(self, error: Exception) -> None:
        """What is in place stays so; of the rest it is said why it is not."""
        reason = f"the cluster's API: {error}"
        self._conclude({each.id: reason for each in self._seen or () if each.id not in self._in_place}, self._in_place)

    def _conclude(self, refused: Mapping[ItemId, str], in_place: frozenset[ItemId]) -> None:
        self._in_place = in_place
        if refused != self._refused and not self._obstacle:
            log.info("published", services=len(in_place), refused=sorted(refused.values())[:3])
            self._refused = refused
            self.changed()


def hindrance(who: Publisher, cluster: Callable[[], ClusterAccess] | None) -> str:
    """Why nothing can be published; empty if it can."""
    return _OFF if cluster is None else obstacle(who.address)


def _status(found: Mapping[str, Any], conditions: Iterable[Condition], now: str) -> dict[str, Any]:
    """With conditions of these types replaced; the time of a transition stays where there is none."""
    status = found.get("status") or {}
    before = {each.get("type"): each for each in status.get("conditions") or ()}
    for each in sorted(conditions, key=attrgetter("type")):
        was = before.get(each.type, {})
        since = was.get("lastTransitionTime", now) if was.get("status") == each.status else now
        before[each.type] = {**vars(each), "lastTransitionTime": since}
    return {**status, "conditions": [*before.values()]}
