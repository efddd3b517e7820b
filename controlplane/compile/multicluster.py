"""Services that clusters export to each other (KEP-1645), as the objects that a user would have written for them.

For each port of each service there are an origin pool over the sites that export it, and a TCP load balancer on the service network of all sites
of the mesh group that take part. They are part of the intent and stored nowhere.
"""

import sys
from collections import defaultdict
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from operator import attrgetter
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from agent.protocol.report import ExportedPort, ServiceExport
from controlplane.compile.imports import Import, ImportedPort
from controlplane.compile.intent import CACHE, Intent
from controlplane.compile.members import SITES, Topology, topology
from controlplane.resources.advertise import AdvertiseCustom, AdvertiseVk8sService, AdvertiseWhere
from controlplane.resources.base import EMPTY, Key, Metadata, OriginPoolRef, R, SiteRef, Stored
from controlplane.resources.origin_pool import K8sService, OriginPool, OriginServer, SiteLocator
from controlplane.resources.registry import parse
from controlplane.resources.route import PoolWithWeight
from controlplane.resources.site_mesh_group import SiteMeshGroup
from controlplane.resources.tcp_loadbalancer import TcpLoadBalancer

Exported = Mapping[str, tuple[ServiceExport, ...]]
"""By id of each site whose cluster takes part: what it exports."""
Offer = tuple[ServiceExport, str]
"""With the id of the site."""
PORTS = range(20_000, 30_000)
"""Where load balancers of imports listen: below the ports that systems give to connections of their own, and those of node ports."""
MOST_PORTS = len(PORTS) // 2
"""Of all imports of a tenant; so each finds a place near the one that its key falls on."""
_KINDS = ("origin_pool", "tcp_loadbalancer")
"""Of the objects that an import makes."""
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)


def with_imports(intent: Intent, exported: Exported) -> Intent:
    """The same intent if there is nothing new."""
    wanted = imports(intent, exported)
    if wanted == intent.imports:
        return intent
    gone = {key for each in intent.imports for key in each.keys}
    where = topology(intent)
    names = {site_id: site.metadata.name for site_id, site in where.sites.items()}
    made = [stored for each in wanted for port in each.ports for stored in _objects(each, port, _named(each, port, names))]
    objects = dict(intent.objects)
    for kind in _KINDS:
        kept = {key: stored for key, stored in intent.of(kind).items() if key not in gone}
        objects[kind] = {**kept, **{stored.key: stored for stored in made if stored.kind == kind}}
    touched = {(kind, key) for kind in _KINDS for key in gone} | {(stored.kind, stored.key) for stored in made}
    return replace(intent, objects=objects, imports=wanted, touched=intent.touched | touched)


def imports(intent: Intent, exported: Exported) -> tuple[Import, ...]:
    """Sorted by group and service."""
    groups = [group for group in intent.enabled("site_mesh_group") if group.spec.enable_multi_cluster_services] if exported else []
    if not groups:
        return ()
    where = topology(intent)
    merged = [each for group in groups for each in _of_group(group, where, exported)]
    return tuple(_with_target_ports(merged))


def _of_group(group: Stored[SiteMeshGroup], where: Topology, exported: Exported) -> Iterator[Import]:
    sites = sorted(where.meshes[group.key].sites & exported.keys()) if group.key in where.meshes else []
    offers: dict[tuple[str, str], list[Offer]] = defaultdict(list)
    for site_id in sites:
        for export in exported[site_id]:
            offers[export.namespace, export.name].append((export, site_id))
    for service, own in sorted(offers.items()):
        yield _merged(group.key, service, sorted(own, key=lambda offer: (offer[0].created_at, offer[1])), sites)


def _merged(group: Key, service: tuple[str, str], offers: Sequence[Offer], sites: Sequence[str]) -> Import:
    """All ports that some site exports. Of two that differ and have the same name or number, the older export's holds."""
    ports: dict[ExportedPort, list[str]] = {}
    conflicts: dict[str, str] = {}
    for export, site_id in offers:
        for port in export.ports:
            other = next((held for held in ports if held.port == port.port or held.name == port.name), None)
            if other is None or other == port:
                ports.setdefault(port, []).append(site_id)
            else:
                conflicts.setdefault(site_id, f"an older export has the port {_described(other)}, and not {_described(port)}")
    found = (ImportedPort(_port_name(port, ports), port.port, 0, tuple(sorted(at))) for port, at in ports.items())
    return Import(
        group=group,
        namespace=service[0],
        name=service[1],
        since=offers[0][0].created_at,
        ports=tuple(sorted(found, key=attrgetter("port"))),
        exporters=tuple(site_id for _, site_id in offers),
        conflicts=tuple(sorted(conflicts.items())),
        importers=tuple(sites),
    )


def _port_name(port: ExportedPort, among: Collection[ExportedPort]) -> str:
    """Only one that is alone may do without."""
    return port.name or (f"port-{port.port}" if len(among) > 1 else "")


def _described(port: ExportedPort) -> str:
    return f"{port.name} {port.port}" if port.name else str(port.port)


def _with_target_ports(merged: Sequence[Import]) -> Iterator[Import]:
    """Each port has the place that its key falls on, or the next one that no older import has. Whoever comes too late goes without."""
    taken: dict[int, Key] = {}
    by_age = sorted(merged, key=attrgetter("since", "group", "service"))
    for key in islice((key for each in by_age for key in each.keys), MOST_PORTS):
        taken[_place(key, taken)] = key
    places = {key: port for port, key in taken.items()}
    for each in merged:
        placed = (port._replace(target_port=places[each.key(port.port)]) for port in each.ports if each.key(port.port) in places)
        unplaced = tuple(port.port for port in each.ports if each.key(port.port) not in places)
        yield replace(each, ports=tuple(placed), unplaced=unplaced)


def _place(key: Key, taken: Container[int]) -> int:
    start = int.from_bytes(sha256(str(key).encode()).digest()[:8])
    return next(port for step in range(len(PORTS)) if (port := PORTS[(start + step) % len(PORTS)]) not in taken)


def _named(each: Import, port: ImportedPort, names: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the sites that export it, and of those that import it."""
    return tuple(names[site_id] for site_id in port.exporters), tuple(names[site_id] for site_id in each.importers)


def _objects(each: Import, port: ImportedPort, sites: tuple[tuple[str, ...], tuple[str, ...]]) -> tuple[Stored[Any], ...]:
    exporters, importers = sites
    key = each.key(port.port)
    return _pool(key, f"{each.name}.{each.namespace}", port.port, exporters), _load_balancer(key, port.target_port, importers)


@lru_cache(CACHE)
def _pool(key: Key, service: str, port: int, sites: tuple[str, ...]) -> Stored[OriginPool]:
    """Calls stay in a cluster that has the service itself, while it has endpoints."""
    origins = (K8sService(service_name=service, site_locator=SiteLocator(site=_site(name)), inside_network=EMPTY) for name in sites)
    servers = tuple(OriginServer(k8s_service=origin) for origin in origins)
    return _stored("origin_pool", key, _PLAIN_POOL.model_copy(update={"origin_servers": servers, "port": port}))


@lru_cache(CACHE)
def _load_balancer(key: Key, port: int, sites: tuple[str, ...]) -> Stored[TcpLoadBalancer]:
    """At more sites than a user may name one by one."""
    where = tuple(AdvertiseWhere(vk8s_service=AdvertiseVk8sService(site=_site(name)), use_default_port=EMPTY) for name in sites)
    pool = PoolWithWeight(pool=OriginPoolRef.model_construct(namespace=key.namespace, name=key.name))
    changed = {
        "listen_port": port,
        "advertise_custom": AdvertiseCustom.model_construct(advertise_where=where),
        "origin_pools_weights": (pool,),
    }
    return _stored("tcp_loadbalancer", key, _PLAIN_LOAD_BALANCER.model_copy(update=changed))


def _site(name: str) -> SiteRef:
    return SiteRef(namespace=SITES, name=name)


def _plain(kind: str, spec: dict[str, Any]) -> Any:
    """With what is chosen where nothing is said."""
    return parse(kind, {"metadata": {"name": "any"}, "spec": spec}, namespace="any").spec


_PLAIN_POOL: OriginPool = _plain(
    "origin_pool", {"origin_servers": [{"public_ip": {"ip": "192.0.2.1"}}], "port": 1, "endpoint_selection": "LOCAL_PREFERRED"}
)
_PLAIN_LOAD_BALANCER: TcpLoadBalancer = _plain(
    "tcp_loadbalancer", {"listen_port": 1, "do_not_advertise": {}, "origin_pools_weights": [{"pool": {"name": "any"}}]}
).model_copy(update={"do_not_advertise": None})


def _stored(kind: str, key: Key, spec: R) -> Stored[R]:
    """Younger than whatever a user writes, so that it gives way to that."""
    metadata = Metadata(name="any", namespace=key.namespace).model_copy(update={"name": key.name})
    return Stored(kind, uuid5(NAMESPACE_URL, f"{kind}/{key}"), metadata, spec, 0, 0, sys.maxsize, _NEVER, _NEVER)
