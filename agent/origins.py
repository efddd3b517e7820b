"""Where the origins of this site are now: clusters and DNS names that are followed as the snapshot needs them."""

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, takewhile

from agent.discovery.dns import FollowedNames
from agent.discovery.kubeconfig import ClusterAccess, from_item
from agent.discovery.kubernetes import MAX_REASON, WatchedCluster
from agent.discovery.table import Names, ServiceTable, needed_names, resolve
from agent.envoy.inputs import AgentSnapshot, Endpoint, Item, OriginId, body
from agent.envoy.pools import last
from agent.errors import Misconfigured
from agent.protocol.items import Discovery, ItemKind, Origin, OriginPool
from agent.protocol.report import DiscoveryReport
from agent.tasks import end, lasting

_REMEMBERED = 20_000
_PATIENCE_S = 5.0
"""How long a cluster or a name server may take with its first answer before others stop waiting for it."""
_SERVICES_AGAIN_S = 5.0
"""Reports of services that changed are made no more often; traffic does not wait for them."""
OWN = "in-cluster"
"""Key under which the node's own cluster is reported."""


@dataclass
class _Followed:
    cluster: WatchedCluster
    task: asyncio.Task[None]
    hash: str
    reported: tuple[ServiceTable | None, bool, str] | None = None
    last: DiscoveryReport | None = None
    made_at: float = -math.inf

    def report(self, key: str) -> DiscoveryReport:
        """Made anew only when there is something new, and of services not often: a cluster may have thousands that change all the time."""
        state = (self.cluster.table, self.cluster.connected, self.cluster.reason)
        now = time.monotonic()
        others = self.reported is None or self.reported[0] is not state[0]
        told = self.reported is not None and self.reported[1:] == state[1:]
        if self.last is None or not told or (others and now - self.made_at >= _SERVICES_AGAIN_S):
            self.reported, self.made_at, self.last = state, now, self.cluster.report(key)
        return self.last


@dataclass
class SiteOrigins:
    """`changed` is called when endpoints may be others. To be closed."""

    site_id: str
    own: Callable[[], ClusterAccess] | None
    """How to reach the cluster that this node belongs to, if there is one."""
    secrets: Callable[[], Mapping[str, bytes]]
    changed: Callable[[], None]
    _clusters: dict[str, _Followed] = field(default_factory=dict, init=False)
    _refused: dict[str, DiscoveryReport] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._names = FollowedNames(self.changed)
        self._asked: Mapping[str, float] = {}
        self._asked_anew = time.monotonic()
        if self.own is not None:
            self._start(OWN, "", WatchedCluster(self.own, self.changed))

    def follow(self, snapshot: AgentSnapshot) -> None:
        wanted = {item.id.key: item for item in snapshot.by_kind[ItemKind.DISCOVERY]}
        for key, followed in list(self._clusters.items()):
            if key != OWN and (key not in wanted or wanted[key].hash != followed.hash):
                self._clusters.pop(key).task.cancel()
        self._refused = {key: report for key, report in self._refused.items() if key in wanted}
        for key in wanted.keys() - self._clusters.keys():
            self._watch(wanted[key])
        self._follow_names(snapshot)

    def _watch(self, item: Item) -> None:
        discovery = body(item, Discovery)
        try:
            cluster = WatchedCluster(
                lambda: from_item(discovery, self.secrets()),
                self.changed,
                cluster_id=discovery.cluster_id,
                delivery=discovery.delivery,
                ingress_controller=discovery.ingress_controller,
                namespace_mapping=discovery.namespace_mapping,
            )
        except Misconfigured as error:
            self._refused[item.id.key] = DiscoveryReport(discovery=item.id.key, connected=False, reason=str(error)[:MAX_REASON])
            return
        self._refused.pop(item.id.key, None)
        self._start(item.id.key, item.hash, cluster)

    def _start(self, key: str, hash: str, cluster: WatchedCluster) -> None:
        self._asked_anew = time.monotonic()
        self._clusters[key] = _Followed(cluster, lasting(cluster.run, f"cluster {key}", cluster.failed), hash)

    def _follow_names(self, snapshot: AgentSnapshot) -> None:
        wanted = _names(snapshot.by_kind[ItemKind.ORIGIN_POOL], self.site_id, self._tables)
        if wanted != self._asked:
            if wanted.keys() - self._asked.keys():
                self._asked_anew = time.monotonic()
            self._asked = wanted
            self._names.follow(wanted)

    def endpoints(
        self, snapshot: AgentSnapshot, before: Mapping[OriginId, tuple[Endpoint, ...]]
    ) -> Mapping[OriginId, tuple[Endpoint, ...]]:
        """What is not known yet, or of which a part is not, is as it was before."""
        pools = snapshot.by_kind[ItemKind.ORIGIN_POOL]
        found = _endpoints(pools, self.site_id, self._tables, dict(self._names.addresses))
        if all(found.values()):
            return found
        held = {
            id: before[id] for id, origin in _dialled(pools, self.site_id) if id in before and not found[id] and self._is_unknown(origin)
        }
        return {**found, **held}

    def _is_unknown(self, origin: Origin) -> bool:
        if origin.type == "k8s_service" and self._is_unread(origin.service or ""):
            return True
        return not needed_names(origin, self._tables) <= self._names.addresses.keys()

    def _is_unread(self, service: str) -> bool:
        """Whether some cluster that may have it was not read yet, or none may be read where it would be."""
        name, _, cluster_id = service.partition(":")
        clusters = [it.cluster for it in self._clusters.values() if it.cluster.cluster_id == cluster_id]
        read = [cluster.has_read(name.partition(".")[2]) for cluster in clusters]
        return any(cluster.table is None for cluster in clusters) or (bool(read) and not any(read))

    @property
    def _tables(self) -> tuple[ServiceTable, ...]:
        """In the order in which clusters without an id of their own are asked: the node's own one first."""
        return tuple(it.cluster.table for _, it in self._ordered if it.cluster.table is not None)

    @property
    def _ordered(self) -> list[tuple[str, _Followed]]:
        return sorted(self._clusters.items(), key=lambda item: (item[0] != OWN, item[0]))

    @property
    def own_services(self) -> ServiceTable | None:
        """Of the cluster that this node belongs to, as far as they are known."""
        return self._clusters[OWN].cluster.table if OWN in self._clusters else None

    @property
    def settled(self) -> bool:
        """Whether all that was asked for anew has been answered, if only by a failure, or has had its time."""
        clusters = all(it.cluster.table is not None or it.cluster.reason for it in self._clusters.values())
        return (clusters and self._names_answered()) or time.monotonic() > self._asked_anew + _PATIENCE_S

    def _names_answered(self) -> bool:
        return self._asked.keys() <= self._names.addresses.keys() | self._names.failures.keys()

    @property
    def reports(self) -> tuple[DiscoveryReport, ...]:
        followed = (self._with_hidden(key, it.report(key)) for key, it in self._ordered)
        return (*followed, *(report for _, report in sorted(self._refused.items())))

    def _with_hidden(self, key: str, report: DiscoveryReport) -> DiscoveryReport:
        """Saying which services have a name that means those of another cluster."""
        own = self._clusters[key].cluster
        for other_key, other in takewhile(lambda item: item[0] != key, self._ordered):
            tables = (own.table, other.cluster.table)
            if own.cluster_id == other.cluster.cluster_id and (both := _in_both(*tables)):
                reason = f"{len(both)} services such as {min(both)} are not used, for {other_key} has services of these names: give one a cluster_id"
                return report.model_copy(update={"reason": f"{reason}; {report.reason}".rstrip("; ")[:MAX_REASON]})
        return report

    async def close(self) -> None:
        await end(followed.task for followed in self._clusters.values())
        await self._names.close()


def _in_both(one: ServiceTable | None, other: ServiceTable | None) -> set[str]:
    return one.services.keys() & other.services.keys() if one and other else set()


@last
def _names(pools: tuple[Item, ...], site_id: str, tables: tuple[ServiceTable, ...]) -> Mapping[str, float]:
    """DNS names that the site looks up, each again after so many seconds."""
    return {name: float(origin.refresh_interval_s) for _, origin in _dialled(pools, site_id) for name in needed_names(origin, tables)}


@last
def _endpoints(
    pools: tuple[Item, ...], site_id: str, tables: tuple[ServiceTable, ...], names: Names
) -> Mapping[OriginId, tuple[Endpoint, ...]]:
    return {id: resolve(origin, tables, names) for id, origin in _dialled(pools, site_id)}


def _dialled(pools: Iterable[Item], site_id: str) -> Iterator[tuple[OriginId, Origin]]:
    """Origins that the site dials itself."""
    return chain.from_iterable(_origins(item, site_id) for item in pools)


@lru_cache(_REMEMBERED)
def _origins(item: Item, site_id: str) -> tuple[tuple[OriginId, Origin], ...]:
    origins = body(item, OriginPool).origins
    return tuple((OriginId(item.id.key, origin.key), origin) for origin in origins if origin.sites is None or site_id in origin.sites)
