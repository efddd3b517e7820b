"""Whether objects are in force, by site and node."""

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from controlplane.api.deps import CurrentCaller, CurrentServices, KeyInPath, Now
from controlplane.api.description import described
from controlplane.compile.imports import Import
from controlplane.compile.snapshot import Condition
from controlplane.errors import FieldError, Invalid, NotFound
from controlplane.resources.registry import KINDS, Kind
from controlplane.services.meshes import Exporting
from controlplane.services.status import NodeReport, ObjectReport, SiteReport

Json = dict[str, Any]

LONGEST_WAIT_S = 300.0
_DURATION = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)(ms|s|m)?")
_CONDITION_STATUS = {
    "Applied": "Success",
    "Pending": "Incomplete",
    "Rejected": "Failed",
    "Conflicted": "Failed",
    "Offline": "Down",
    "NoNodes": "NotApplicable",
}
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, None: 1.0}


class Routes:
    """The routes of one kind."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    async def status(
        self,
        key: KeyInPath,
        caller: CurrentCaller,
        services: CurrentServices,
        now: Now,
        wait: Annotated[Literal["", "applied"], Query()] = "",
        revision: Annotated[int | None, Query(ge=0)] = None,
        timeout: Annotated[str, Query(max_length=16)] = "30s",  # noqa: ASYNC109 - a parameter of the API
        offline: Annotated[Literal["fail", "ignore"], Query()] = "fail",
    ) -> JSONResponse:
        """How an object is doing. With `wait=applied`: 200 as soon as the write of `revision` (or the last one) is in force wherever the
        object matters; 504 with the same body when the time is up, or when a site refuses it or another object has its listener. Sites that are offline count unless
        `offline=ignore`.
        """
        observer, kind = services.observer, self.kind.kind
        if wait:
            report = await observer.wait(caller.tenant_id, kind, key, revision, offline, _seconds(timeout))
        else:
            report = await observer.look(caller.tenant_id, kind, key, revision)
        body = shown(report, offline, now if not wait else observer.clock())
        return JSONResponse(body, 504 if wait and not body["applied"] else 200)

    async def status_at_site(
        self, key: KeyInPath, caller: CurrentCaller, services: CurrentServices, now: Now, site: Annotated[str, Query(max_length=64)]
    ) -> Json:
        """The part of one site. 404 if the object does not matter there."""
        report = await services.observer.look(caller.tenant_id, self.kind.kind, key)
        for each in report.sites:
            if each.site.metadata.name == site:
                return {"revision": report.revision, **_site(each, now)}
        raise NotFound(f"{self.kind.kind} {key} does not concern a site {site}")


def router() -> APIRouter:
    made = APIRouter()
    for kind in KINDS.values():
        if kind.lives_in != "none":
            _add(made, kind)
    return made


def _add(router: APIRouter, kind: Kind) -> None:
    routes = Routes(kind)
    paths: Mapping[str, tuple[str, Callable[..., Any]]] = {
        "Status": (f"/api/{kind.slug}/namespaces/{{namespace}}/{kind.plural}/{{name}}/status", routes.status),
        "StatusAtSite": (f"/api/data/namespaces/{{namespace}}/{kind.kind}/{{name}}/status_at_site", routes.status_at_site),
    }
    for operation, (path, endpoint) in paths.items():
        router.add_api_route(
            path,
            endpoint,
            methods=["GET"],
            operation_id=f"isthmus.{kind.kind}.{operation}",
            tags=[kind.kind],
            openapi_extra=described(path),
        )


def shown(report: ObjectReport, offline: str, now: datetime) -> Json:
    """The answer for a whole object."""
    missing = report.missing(offline)
    return {
        "revision": report.revision,
        "applied": not missing,
        "reason": report.reason(offline),
        "sites": [_site(site, now) for site in report.sites],
        "conditions": [_condition(condition) for condition in report.conditions],
    } | _mesh(report)


def items(report: ObjectReport, now: datetime) -> list[Json]:
    """`status` of an object as F5 XC has it: one item for each site, and one for a site mesh group itself."""
    found = [_item(site, now) for site in report.sites]
    if report.mesh:
        found.append({"metadata": {"creator_class": "controlplane", "publish": "STATUS_PUBLISH"}, "conditions": []} | _mesh(report))
    return found


def _mesh(report: ObjectReport) -> Json:
    """Members, with what they are and how they do, and whom the group joins them to."""
    if report.mesh is None:
        return {}
    states = {site.site.uid: site.state for site in report.sites}
    members = [
        {
            "site": [{"kind": "site", "namespace": "system", "name": site.metadata.name, "uid": str(site.uid)}],
            "annotations": [report.mesh.role, states.get(site.uid, "")],
        }
        for site in report.mesh.sites
    ]
    joined = {"site_info": members, "other_connected_sites": [site.metadata.name for site in report.mesh.others]}
    exporting = {"multi_cluster_services": _exporting(report.mesh.exporting)} if report.mesh.exporting else {}
    return {"site_mesh_group_status": joined, **exporting}


def _exporting(exporting: Exporting) -> Json:
    """Which clusters take part, and the services that they export to each other."""
    clusters = [
        {"site": name, "offered": said is not None and said.offered, "reason": said.reason if said else "nothing was heard of it yet"}
        for name, said in exporting.clusters
    ]
    return {"clusters": clusters, "services": [_service(each, exporting.names) for each in exporting.imports]}


def _service(each: Import, names: Mapping[str, str]) -> Json:
    return {
        "namespace": each.namespace,
        "name": each.name,
        "ports": [{"name": port.name, "port": port.port, "exported_by": [names[id] for id in port.exporters]} for port in each.ports],
        "exported_by": [names[id] for id in each.exporters],
        "imported_by": sorted(names[id] for id in each.importers),
        "conflicts": [{"site": names[id], "message": words} for id, words in each.conflicts],
    }


def _item(report: SiteReport, now: datetime) -> Json:
    condition = {
        "type": "Operational",
        "status": _CONDITION_STATUS[report.state],
        "reason": report.reason or report.state,
        "service_name": "",
        "hostname": "",
        "last_update_time": report.heard_at.isoformat() if report.heard_at else None,
    }
    return {
        "metadata": {
            "uid": str(report.site.uid),
            "creator_class": "site",
            "creator_id": report.site.metadata.name,
            "publish": "STATUS_PUBLISH",
        },
        "object_refs": [],
        "conditions": [condition],
        "site": _site(report, now),
    }


def _site(report: SiteReport, now: datetime) -> Json:
    return {
        "site": report.site.metadata.name,
        "site_id": str(report.site.uid),
        "state": report.state,
        "reason": report.reason,
        "nodes": [_node(node, now) for node in report.nodes],
        "origins": [
            {"pool": origin.pool, "healthy": origin.healthy, "total": origin.total, "age_s": _age_s(origin.reported_at, now)}
            for origin in report.origins
        ],
    } | _discovery(report, now)


def _discovery(report: SiteReport, now: datetime) -> Json:
    state = report.discovery
    if state is None:
        return {}
    shown = {"connected": state.connected, "reason": state.reason, "services": len(state.services or ())}
    return {"discovery": shown | {"age_s": _age_s(state.reported_at, now)}}


def _node(report: NodeReport, now: datetime) -> Json:
    told: Mapping[str, Any] = {"applied_revision": None, "applied_hash": None, "last_heartbeat_age_s": None}
    if status := report.status:
        told = {
            "applied_revision": status.applied_revision,
            "applied_hash": status.applied_hash,
            "last_heartbeat_age_s": _age_s(status.last_heartbeat_at, now),
            "version": status.version,
            "proxy": status.proxy,
            "clock_skew_s": round(status.clock_skew_s, 3),
            "warnings": [*status.warnings, *(words for _, words in report.alarms)],
        }
    return {"node": report.node.name, "node_id": str(report.node.id), "live": report.fresh, **told, "rejected": list(report.rejected)}


def _condition(condition: Condition) -> Json:
    return {"type": condition.type, "status": "Failed", "reason": condition.type, "message": condition.message}


def _age_s(at: datetime, now: datetime) -> float:
    return round(max(0.0, (now - at).total_seconds()), 1)


def _seconds(text: str) -> float:
    """`30s`, `500ms`, `2m`, or a number of seconds."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise Invalid(f"timeout: {text!r} should be a duration such as 30s", [FieldError("timeout", "should be a duration such as 30s")])
    return min(float(match[1]) * _UNITS[match[2]], LONGEST_WAIT_S)
