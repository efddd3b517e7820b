"""Under `/api/discovery`: services that sites found."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from controlplane.api.deps import CurrentCaller, CurrentServices, NameInPath, NamespaceInPath
from controlplane.api.description import described
from controlplane.api.requests import selector
from controlplane.auth import Caller
from controlplane.errors import NotFound
from controlplane.services import discovered
from controlplane.services.discovered import Found, Wanted

Json = dict[str, Any]

router = APIRouter(prefix="/api/discovery/namespaces", tags=["discovered_service"])

_MANY = "/{namespace}/discovered_services"
_ONE = f"{_MANY}/{{name}}"


@router.get(_MANY, operation_id="ves.io.schema.discovered_service.API.List", openapi_extra=described(_MANY))
async def list_discovered_services(
    namespace: NamespaceInPath,
    caller: CurrentCaller,
    services: CurrentServices,
    *,
    site: Annotated[str | None, Query(max_length=64)] = None,
    cluster_id: Annotated[str | None, Query(max_length=64)] = None,
    service_namespace: Annotated[str | None, Query(max_length=64)] = None,
    service: Annotated[str | None, Query(max_length=64)] = None,
    label_filter: Annotated[str, Query(max_length=4096)] = "",
    limit: Annotated[int | None, Query(ge=1, le=1000)] = None,
    after: Annotated[str, Query(alias="continue", max_length=128)] = "",
) -> Json:
    """Services that a namespace may use in origin pools, by name: all, or those of a site, of a cluster (`cluster_id`; empty: of those
    without), of a namespace there, with a name, with labels. In `system`, all of them.

    With `limit`, a list that goes on has a token in `continue`, which gives the next page.
    """
    wanted = Wanted(site, cluster_id, service_namespace, service, selector(label_filter))
    found = await discovered.services(services.database, services.delivery, caller.tenant_id, namespace, wanted)
    remaining = [each for each in found if each.name > after]
    page = remaining[:limit]
    goes_on = len(remaining) > len(page)
    return {"items": [_shown(caller, namespace, each) for each in page], "errors": [], "continue": page[-1].name if goes_on else ""}


@router.get(_ONE, operation_id="ves.io.schema.discovered_service.API.Get", openapi_extra=described(_ONE))
async def get_discovered_service(namespace: NamespaceInPath, name: NameInPath, caller: CurrentCaller, services: CurrentServices) -> Json:
    """One of them."""
    for found in await discovered.services(services.database, services.delivery, caller.tenant_id, namespace, Wanted()):
        if found.name == name:
            shown = _shown(caller, namespace, found)
            return {"metadata": {"name": name, "namespace": namespace, "labels": shown["labels"]}, "spec": shown["get_spec"]}
    raise NotFound(f"discovered_service {namespace}/{name} does not exist")


def _shown(caller: Caller, namespace: str, found: Found) -> Json:
    service = found.service
    return {
        "tenant": caller.tenant,
        "namespace": namespace,
        "name": found.name,
        "labels": service.labels,
        "get_spec": {
            "k8s_service": {
                "name": service.name,
                "namespace": service.namespace,
                "service_name": f"{service.name}.{service.namespace}" + (f":{service.cluster_id}" if service.cluster_id else ""),
                "cluster_id": service.cluster_id,
                "discovery_object": found.discovery,
                "site": {"kind": "site", "namespace": "system", "name": found.site.metadata.name},
                "service_type": service.type,
                "cluster_ip": service.cluster_ip,
                "labels": service.labels,
                "ports": [port.model_dump(mode="json") for port in service.ports],
                "ready_endpoints": service.endpoints,
                "delivery": service.delivery,
                "hosts": service.hosts,
                "delivery_reason": service.reason,
            },
            "visibility_disabled": {},
        },
    }
