"""Public names: paths of our own, for tenants to prove them and for the operator to grant them."""

from typing import Any

from fastapi import APIRouter

from controlplane.api.deps import CurrentCaller, CurrentServices, JsonBody, Now, Operator, Session
from controlplane.api.description import asked
from controlplane.api.requests import read
from controlplane.resources.base import Name, Value
from controlplane.services import public_names
from controlplane.store.public_names import OwnedName, PublicName

router = APIRouter(tags=["public_name"])

Json = dict[str, Any]

_OWN = "/api/config/namespaces/system/public_names"
_ALL = "/api/operator/public_names"


class WantedName(Value):
    name: str


class GrantedName(Value):
    name: str
    """A domain, with all that is under it, or a port of the regional edges as `:8443`."""
    tenant: Name


@router.post(_OWN, operation_id="isthmus.public_name.Create", openapi_extra=asked(WantedName))
async def prove_name(body: JsonBody, caller: CurrentCaller, services: CurrentServices, now: Now) -> Json:
    """Make a domain the tenant's, with all that is under it, if its DNS says so: a TXT record at `_isthmus.<name>` with
    `isthmus-tenant=<id of the tenant>`. Load balancers on regional edges need their domains to belong to their tenant.
    """
    name = await public_names.proved(caller, read(WantedName, body).name, services.txt)
    async with services.database.sessions(caller.tenant_id) as session:
        return _shown(await public_names.keep(session, caller, name, granted=False, now=now))


@router.get(_OWN, operation_id="isthmus.public_name.List")
async def list_names(caller: CurrentCaller, session: Session) -> Json:
    """The public names of the tenant."""
    return {"items": [_shown(name) for name in await public_names.list_own(session, caller)]}


@router.delete(f"{_OWN}/{{name}}", operation_id="isthmus.public_name.Delete")
async def delete_name(name: str, caller: CurrentCaller, session: Session, now: Now) -> Json:
    """Give a name up. Load balancers that need it leave the regional edges."""
    await public_names.delete(session, caller, public_names.checked(name), now)
    return {}


@router.post(_ALL, operation_id="isthmus.public_name.Grant", openapi_extra=asked(GrantedName))
async def grant_name(body: JsonBody, caller: Operator, session: Session, now: Now) -> Json:
    """Give a name to a tenant; refused while another has it, something under it, or what it is under."""
    wanted = read(GrantedName, body)
    return _owned(await public_names.grant(session, caller, wanted.name, wanted.tenant, now))


@router.get(_ALL, operation_id="isthmus.public_name.ListAll")
async def list_all_names(caller: Operator, session: Session) -> Json:
    """The public names of all tenants."""
    return {"items": [_owned(name) for name in await public_names.list_all(session)]}


@router.delete(f"{_ALL}/{{name}}", operation_id="isthmus.public_name.Withdraw")
async def withdraw_name(name: str, caller: Operator, session: Session, now: Now) -> Json:
    """Take a name from whichever tenant has it. Load balancers that need it leave the regional edges."""
    await public_names.withdraw(session, caller, public_names.checked(name), now)
    return {}


def _owned(name: OwnedName) -> Json:
    return _shown(name) | {"tenant": name.tenant}


def _shown(name: PublicName) -> Json:
    return {"name": name.name, "granted": name.granted, "creation_timestamp": name.created_at.isoformat()}
