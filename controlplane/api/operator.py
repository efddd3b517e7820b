"""Tenants, for the operator of the fabric: paths of our own."""

from typing import Any

from fastapi import APIRouter

from controlplane.api.deps import CurrentServices, JsonBody, NameInPath, Now, Operator, Session
from controlplane.api.description import asked, described
from controlplane.api.requests import read
from controlplane.resources.base import Name, Value
from controlplane.services import tenants
from controlplane.store.tenants import TenantRecord

router = APIRouter(prefix="/api/operator/tenants", tags=["tenant"])

Json = dict[str, Any]


class NewTenant(Value):
    name: Name


@router.post("", operation_id="isthmus.tenant.Create", openapi_extra=asked(NewTenant))
async def create_tenant(body: JsonBody, caller: Operator, services: CurrentServices, session: Session, now: Now) -> Json:
    """Create a tenant with its namespaces and its certificate authority. `token` is the API token of its first administrator, shown this once."""
    wanted = read(NewTenant, body)
    tenant_id, token = await tenants.create(session, services.fabric, caller, wanted.name, now)
    return {"name": wanted.name, "id": str(tenant_id), "token": token}


@router.get("", operation_id="isthmus.tenant.List")
async def list_tenants(caller: Operator, session: Session) -> Json:
    return {"items": [_shown(tenant) for tenant in await tenants.list_all(session)]}


@router.get("/{name}", operation_id="isthmus.tenant.Get", openapi_extra=described("/{name}"))
async def get_tenant(name: NameInPath, caller: Operator, session: Session) -> Json:
    return _shown(await tenants.get(session, name))


@router.delete("/{name}", operation_id="isthmus.tenant.Delete", openapi_extra=described("/{name}"))
async def delete_tenant(name: NameInPath, caller: Operator, session: Session, now: Now) -> Json:
    """Delete a tenant with everything in it; refused while it has sites."""
    await tenants.delete(session, caller, await tenants.get(session, name), now)
    return {}


def _shown(tenant: TenantRecord) -> Json:
    return {
        "name": tenant.name,
        "id": str(tenant.id),
        "revision": tenant.revision,
        "creation_timestamp": tenant.created_at.isoformat(),
    }
