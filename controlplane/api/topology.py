"""Under `/api/data/namespaces/system/topology`: sites, meshes, and why one site reaches another as it does."""

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from agent.protocol.report import IpsecTunnel
from controlplane.api.deps import CurrentCaller, CurrentServices, JsonBody, NameInPath, Now, Services
from controlplane.api.description import asked, described
from controlplane.api.requests import read
from controlplane.auth import Caller
from controlplane.resources.base import Value
from controlplane.services import topology
from controlplane.services.topology import Group, Link, Observed, Pair
from controlplane.services.why import explain, named

Json = dict[str, Any]

router = APIRouter(prefix="/api/data/namespaces/system/topology", tags=["topology"])

_LINKS = "metrics of links are in the links themselves"
_GROUP = "/site_mesh_group/{name}"
_SITE = "/site/{name}"


class MeshQuery(Value):
    unsupported = {"metric_selector": _LINKS}

    site_mesh_group: str = ""


class SiteQuery(Value):
    unsupported = {
        "metric_selector": _LINKS,
        "level": "the answer always has the sites that this one is joined to or talks to",
        "group_site_mesh_nodes": "every site is a node of its own",
        "node_id": "a site is shown with all its nodes",
    }
    ignored = frozenset({"group_dc_cluster_nodes"})

    site: str = ""


@router.get("/site_mesh_groups", operation_id="ves.io.schema.topology.CustomAPI.GetSiteMeshGroupsSummary", response_model=Json)
async def site_mesh_groups(caller: CurrentCaller, services: CurrentServices, now: Now) -> JSONResponse:
    """Every site mesh group as a node, with how many of its links are up; an edge leads from spokes to their hubs."""
    return await _answer(caller, services, now, _summary)


@router.post(
    _GROUP,
    operation_id="ves.io.schema.topology.CustomAPI.GetSiteMeshTopology",
    openapi_extra=described(_GROUP) | asked(MeshQuery),
    response_model=Json,
)
async def site_mesh_group(name: NameInPath, body: JsonBody, caller: CurrentCaller, services: CurrentServices, now: Now) -> JSONResponse:
    """Sites of a mesh, and each path between them as the nodes at both ends measure it."""
    read(MeshQuery, body, "system", site_mesh_group=name)
    return await _answer(caller, services, now, partial(_mesh, name))


@router.post(
    _SITE,
    operation_id="ves.io.schema.topology.CustomAPI.GetSiteTopology",
    openapi_extra=described(_SITE) | asked(SiteQuery),
    response_model=Json,
)
async def site(name: NameInPath, body: JsonBody, caller: CurrentCaller, services: CurrentServices, now: Now) -> JSONResponse:
    """A site, the sites that it is joined to or talks to, and each path between them."""
    read(SiteQuery, body, "system", site=name)
    return await _answer(caller, services, now, partial(_surroundings, name))


@router.get("/path", operation_id="isthmus.topology.Path", response_model=Json)
async def path(
    caller: CurrentCaller,
    services: CurrentServices,
    now: Now,
    source: Annotated[str, Query(alias="from", max_length=128)],
    to: Annotated[str, Query(max_length=128)],
) -> JSONResponse:
    """How one site reaches another now: by which path, why, and what would make it direct; and what is known of each path."""
    return await _answer(caller, services, now, partial(_path, source, to))


async def _answer(caller: Caller, services: Services, now: datetime, show: Callable[[Observed], Json]) -> JSONResponse:
    """Made into bytes in a thread, too: there may be tens of thousands of pairs, and FastAPI would go through them on the event loop."""
    observed = await topology.observe(services.database, services.delivery, caller.tenant_id, now)
    return await run_in_threadpool(lambda: JSONResponse(show(observed)))


def _summary(observed: Observed) -> Json:
    groups = topology.groups(observed)
    edges = [
        {"node_id1": str(each.group.uid), "node_id2": str(each.hub.uid), "status": _together(each.pairs), "links": []}
        for each in groups
        if each.hub
    ]
    return {"step": "", "nodes": [_group(each) for each in groups], "edges": edges}


def _mesh(name: str, observed: Observed) -> Json:
    found = topology.group(observed, name)
    nodes = [_group(found), *(_site(site, observed, found) for site in found.sites)]
    return {"step": "", "nodes": nodes, "edges": [_pair(pair, observed) for pair in found.pairs]}


def _surroundings(name: str, observed: Observed) -> Json:
    found = topology.surroundings(observed, name)
    return {
        "step": "",
        "nodes": [_site(each, observed) for each in found.sites],
        "edges": [_pair(pair, observed) for pair in found.pairs],
    }


def _path(source: str, to: str, observed: Observed) -> Json:
    found = topology.between(observed, source, to)
    answer = explain(found)
    return {
        "from": source,
        "to": to,
        "path": answer.path,
        "direct": answer.direct,
        "why": answer.why,
        "to_be_direct": answer.to_be_direct,
        "status": topology.together(link.status for link in found.links),
        "site_mesh_groups": list(found.meshes),
        "re_fallback": found.fallback,
        "lost": found.lost,
        "tunnels": sorted(found.encapsulations),
        "no_ipsec": found.no_ipsec,
        "paths": [_link(link, observed) for link in found.links],
    }


def _group(found: Group) -> Json:
    links = Counter(link.status for pair in found.pairs for link in pair.links)
    edges = Counter(pair.status for pair in found.pairs)
    return {
        "id": str(found.group.uid),
        "metadata": {"name": found.group.metadata.name, "namespace": "system"},
        "site_mesh_group": {
            "info": found.group.spec.model_dump(mode="json", exclude_none=True),
            "summary": {
                "sites": len(found.mesh.members),
                "other_connected_site_mesh_group_sites": len(found.mesh.sites - found.mesh.members),
                "link_status_summary": [
                    {"type": "LINK_TYPE_TUNNEL", "status": status, "count": count} for status, count in sorted(links.items())
                ],
                "edge_status_summary": [{"status": status, "count": count} for status, count in sorted(edges.items())],
            },
        },
    }


def _site(site: Any, observed: Observed, group: Group | None = None) -> Json:
    site_id = str(site.uid)
    own = observed.view.fleet.live.get(site_id, ())
    shown: Json = {
        "info": {"site_type": site.spec.site_type},
        "summary": {"node_count": len(own), "node_info": [{"name": node.name, "ipsec": node.ipsec} for node in own]},
        "metric": [],
        "lost": site_id in observed.view.fleet.observations.lost,
    }
    if group:
        roles = ("spoke", "hub") if group.mesh.hubs is not None else ("hub",) * 2 if group.group.spec.hub_mesh else ("member",) * 2
        shown["role"] = roles[0] if site_id in group.mesh.members else roles[1]
    return {"id": site_id, "metadata": {"name": site.metadata.name, "namespace": "system"}, "site": shown}


def _pair(pair: Pair, observed: Observed) -> Json:
    return {
        "node_id1": str(pair.sites[0].uid),
        "node_id2": str(pair.sites[1].uid),
        "status": pair.status,
        "links": [_link(link, observed) for link in pair.links],
    }


def _link(link: Link, observed: Observed) -> Json:
    report, source, destination = link.report, link.source, link.destination
    name = f"{source.metadata.name}/{link.node.name} to {destination.metadata.name} by {named(link)}"
    return {
        "info": {
            "name": name,
            "src_id": str(source.uid),
            "dst_id": str(destination.uid),
            "status": link.status,
            "type": "LINK_TYPE_TUNNEL",
        },
        "metric": [],
        "status": link.status,
        "src_site": source.metadata.name,
        "src_node": link.node.name,
        "dst_site": destination.metadata.name,
        "path": report.path,
        "edge": link.edge,
        "in_use": report.in_use and link.status != topology.UNKNOWN,
        "reason": link.stale or report.reason,
        "encap": "IPSEC_PKI" if report.path == "ipsec" else "SSL",
        "since": link.since.isoformat(),
        "last_evidence": link.last_evidence.isoformat() if link.last_evidence else None,
        "last_evidence_age_s": _age_s(link.last_evidence, observed.now) if link.last_evidence else None,
        "reported_age_s": _age_s(link.reported_at, observed.now),
        "rtt_ms": report.rtt_ms,
        "tls": report.tls,
        "error": report.error,
        "tunnels": [_tunnel(tunnel, link, observed) for tunnel in report.ipsec],
    }


def _tunnel(tunnel: IpsecTunnel, link: Link, observed: Observed) -> Json:
    """With one node of the peer. Ages are those of the report, and what has passed since. One that has never been up has a reason without a time."""
    since_s = _age_s(link.reported_at, observed.now)
    role = "TUNNEL_INITIATOR" if tunnel.initiator else "TUNNEL_RESPONDER"
    return {
        "node": observed.node_name(tunnel.node_id),
        "state": "UNKNOWN_TUNNEL_STATE" if link.stale else "TUNNEL_UP" if tunnel.up else "TUNNEL_DOWN",
        "role": role if tunnel.up else "UNKNOWN_TUNNEL_ROLE",
        "encap": "IPSEC_PKI",
        "remoteAddress": tunnel.remote,
        "ike": {"cipher_suite": tunnel.ike, "age_s": tunnel.ike_age_s + since_s} if tunnel.up else None,
        "esp": _child(tunnel, since_s) if tunnel.up else None,
        "ike_tunnel_flap_reason": {"flap_reason": tunnel.flap_reason, "time": _moment(tunnel.last_flap)} if tunnel.flap_reason else None,
    }


def _child(tunnel: IpsecTunnel, since_s: float) -> Json:
    return {
        "cipher_suite": tunnel.esp,
        "spi_in": tunnel.spi_in,
        "spi_out": tunnel.spi_out,
        "spi_age_s": tunnel.spi_age_s + since_s,
        "bytes_in": tunnel.bytes_in,
        "bytes_out": tunnel.bytes_out,
    }


def _moment(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat()


def _together(pairs: tuple[Pair, ...]) -> str:
    return topology.together(pair.status for pair in pairs if pair.status != topology.NOT_APPLICABLE)


def _age_s(at: datetime, now: datetime) -> float:
    return round(max(0.0, (now - at).total_seconds()), 1)
