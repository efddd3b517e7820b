"""Create, replace, get, list and delete, for every kind of the registry, at the paths of the F5 XC API."""

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.api import status
from controlplane.api.deps import (
    CurrentCaller,
    CurrentServices,
    JsonBody,
    KeyInPath,
    NamespaceInPath,
    Now,
    OptionalJsonBody,
    Services,
    Session,
)
from controlplane.api.description import described
from controlplane.api.requests import agree, selector
from controlplane.auth import OPERATOR_TENANT, Caller
from controlplane.errors import FieldError, Invalid
from controlplane.resources.base import Key
from controlplane.resources.registry import KINDS, Kind
from controlplane.services import resources, sites
from controlplane.services.resources import Page
from controlplane.services.sites import Observed
from controlplane.store.changes import StoredJson

Json = dict[str, Any]

LONGEST_PAGE = 1000
_LAST = re.compile(r"([-a-z0-9]*)/([-a-z0-9]+)")
"""The key in a token of a list."""

FORMATS = (
    "GET_RSP_FORMAT_DEFAULT",
    "GET_RSP_FORMAT_FOR_CREATE",
    "GET_RSP_FORMAT_FOR_REPLACE",
    "GET_RSP_FORMAT_STATUS",
    "GET_RSP_FORMAT_READ",
    "GET_RSP_FORMAT_REFERRING_OBJECTS",
    "GET_RSP_FORMAT_BROKEN_REFERENCES",
)
"""In the order of their numbers."""


class Routes:
    """The routes of one kind."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    async def create(
        self, namespace: NamespaceInPath, body: JsonBody, caller: CurrentCaller, services: CurrentServices, session: Session, now: Now
    ) -> Json:
        """Create an object. It is committed when the answer arrives; `revision` is what to wait for in its status."""
        written = await resources.create(session, caller, self.kind.kind, namespace, body, ring=services.fabric.ring, now=now)
        return await self._shown(session, services, caller, written, now)

    async def replace(
        self, key: KeyInPath, body: JsonBody, caller: CurrentCaller, services: CurrentServices, session: Session, now: Now
    ) -> Json:
        """Replace an object as a whole. An empty `resource_version` means that the last writer wins; another than the current one is refused."""
        written = await resources.replace(session, caller, self.kind.kind, key, body, ring=services.fabric.ring, now=now)
        return await self._shown(session, services, caller, written, now)

    async def get(
        self,
        key: KeyInPath,
        caller: CurrentCaller,
        services: CurrentServices,
        now: Now,
        response_format: Annotated[str, Query()] = "0",
    ) -> Json:
        """Read an object; `response_format` by name or number chooses what of it."""
        chosen = _format(response_format)
        async with services.database.sessions(caller.tenant_id) as session:
            found = await resources.get(session, caller, self.kind.kind, key)
            if chosen != "GET_RSP_FORMAT_STATUS":
                return await self._formatted(session, services, caller, found, chosen, now)
        # Only now: whoever looks needs connections of its own.
        report = await services.observer.look(caller.tenant_id, self.kind.kind, key)
        return _answer(metadata=found.meta, system_metadata=_system_metadata(caller, found), status=status.items(report, now))

    async def list_page(  # noqa: PLR0917 - FastAPI passes them by name
        self,
        request: Request,
        namespace: NamespaceInPath,
        caller: CurrentCaller,
        services: CurrentServices,
        session: Session,
        now: Now,
        label_filter: Annotated[str, Query(max_length=4096)] = "",
        report_fields: Annotated[list[str] | None, Query()] = None,
        limit: Annotated[int | None, Query(ge=1, le=LONGEST_PAGE)] = None,
        after: Annotated[str, Query(alias="continue", max_length=512)] = "",
    ) -> Json:
        """List objects, by name; with their specs only if `report_fields` is there, even if empty.

        With `limit`, a list that goes on has a token in `continue`, which gives the next page.
        """
        page = await resources.list_page(
            session, caller, self.kind.kind, namespace, selector=selector(label_filter), after=_read_token(after), limit=limit
        )
        complete = report_fields is not None or "report_fields" in request.query_params
        states = await self._states(session, services, caller, page.items, now) if complete else {}
        items = [_item(caller, found) | (_whole(caller, found, states) if complete else {}) for found in page.items]
        return {"items": items, "errors": [], "continue": _token(page)}

    async def delete(self, key: KeyInPath, body: OptionalJsonBody, caller: CurrentCaller, session: Session, now: Now) -> Json:
        """Delete an object. Always refused while others refer to it, whatever `fail_if_referred` says; a site always can be deleted."""
        agree(body, name=key.name, namespace=key.namespace)
        if self.kind.kind == "site":
            await sites.decommission(session, caller, key.name, now=now)
        else:
            await resources.delete(session, caller, self.kind.kind, key, now=now)
        return {}

    async def _formatted(
        self, session: AsyncSession, services: Services, caller: Caller, found: StoredJson, chosen: str, now: datetime
    ) -> Json:
        """What the stored object and those beside it tell."""
        match chosen:
            case "GET_RSP_FORMAT_FOR_CREATE":
                return _answer(create_form={"metadata": found.meta, "spec": found.spec})
            case "GET_RSP_FORMAT_FOR_REPLACE":
                form = {"metadata": found.meta, "spec": found.spec}
                return _answer(replace_form=form, resource_version=str(found.version))
            case "GET_RSP_FORMAT_REFERRING_OBJECTS":
                return _answer(referring_objects=await self._referrers(session, caller, found.key))
            case "GET_RSP_FORMAT_BROKEN_REFERENCES":
                return _answer(**await self._broken(session, caller, found.key))
            case _:
                return _answer(**await self._shown(session, services, caller, found, now))

    async def _shown(self, session: AsyncSession, services: Services, caller: Caller, found: StoredJson, now: datetime) -> Json:
        states = await self._states(session, services, caller, (found,), now)
        return {
            "metadata": found.meta,
            "system_metadata": _system_metadata(caller, found),
            "spec": _spec(found, states),
            "resource_version": str(found.version),
            "revision": found.revision,
        }

    async def _states(
        self, session: AsyncSession, services: Services, caller: Caller, found: tuple[StoredJson, ...], now: datetime
    ) -> dict[UUID, Observed]:
        """What only sites have."""
        if self.kind.kind != "site":
            return {}
        return await sites.observed(session, caller.tenant_id, [json.uid for json in found], services.heartbeats, now)

    async def _referrers(self, session: AsyncSession, caller: Caller, key: Key) -> list[Json]:
        found = await resources.referrers(session, caller, self.kind.kind, key)
        return [_object_ref(caller, referrer.kind, referrer.key) for referrer in found]

    async def _broken(self, session: AsyncSession, caller: Caller, key: Key) -> Json:
        broken = await resources.broken_references(session, caller, self.kind.kind, key)
        return {
            "deleted_referred_objects": [_object_ref(caller, kind, target) for kind, target, there in broken if not there],
            "disabled_referred_objects": [_object_ref(caller, kind, target) for kind, target, there in broken if there],
        }


def router() -> APIRouter:
    """One set of routes per kind, so that the API's description shows each with its spec."""
    made = APIRouter()
    for kind in KINDS.values():
        _add(made, kind)
    return made


def _add(router: APIRouter, kind: Kind) -> None:
    """Namespaces are not inside one, and are deleted in their own way."""
    routes = Routes(kind)
    inside = kind.lives_in != "none"
    many = f"/api/{kind.slug}/namespaces/{{namespace}}/{kind.plural}" if inside else f"/api/{kind.slug}/{kind.plural}"
    one = f"{many}/{{name}}"
    verbs: list[tuple[str, str, str, Callable[..., Any]]] = [
        ("Create", "POST", many, routes.create),
        ("List", "GET", many, routes.list_page),
        ("Get", "GET", one, routes.get),
        ("Replace", "PUT", one, routes.replace),
    ]
    if inside:
        verbs.append(("Delete", "DELETE", one, routes.delete))
    for verb, method, path, endpoint in verbs:
        router.add_api_route(
            path,
            endpoint,
            methods=[method],
            operation_id=f"ves.io.schema.{kind.kind}.API.{verb}",
            tags=[kind.kind],
            openapi_extra=described(path, kind=kind if method in ("POST", "PUT") else None),
        )


def _answer(**parts: Any) -> Json:
    """All members of the API's GetResponse; those that were not asked for are null or empty."""
    nothing: Json = {
        "create_form": None,
        "replace_form": None,
        "metadata": None,
        "system_metadata": None,
        "spec": None,
        "status": [],
        "referring_objects": [],
        "deleted_referred_objects": [],
        "disabled_referred_objects": [],
    }
    return nothing | parts


def _item(caller: Caller, found: StoredJson) -> Json:
    return {
        "tenant": caller.tenant,
        "namespace": found.namespace,
        "name": found.name,
        "uid": str(found.uid),
        "labels": found.meta["labels"],
        "annotations": found.meta["annotations"],
        "description": found.meta["description"],
        "disabled": found.meta["disable"],
        "owner_view": None,
        "status_set": [],
    }


def _whole(caller: Caller, found: StoredJson, states: Mapping[UUID, Observed]) -> Json:
    return {"metadata": found.meta, "system_metadata": _system_metadata(caller, found), "get_spec": _spec(found, states)}


def _spec(found: StoredJson, states: Mapping[UUID, Observed]) -> Json:
    """As it was written, with documented defaults; a site also has its state, and the regional edges to which it is connected."""
    if found.uid not in states:
        return found.spec
    told = states[found.uid]
    connected = {name: [_edge_ref(edge) for edge in getattr(told, name)] for name in ("connected_re", "connected_re_for_config")}
    return {**found.spec, "site_state": told.state, **connected}


def _edge_ref(name: str) -> Json:
    return {"kind": "site", "uid": "", "tenant": OPERATOR_TENANT, "namespace": sites.NAMESPACE, "name": name}


def _system_metadata(caller: Caller, found: StoredJson) -> Json:
    return {
        "uid": str(found.uid),
        "tenant": caller.tenant,
        "creation_timestamp": found.created_at.isoformat(),
        "modification_timestamp": found.modified_at.isoformat(),
        "creator_id": found.creator_id,
        "creator_class": found.creator_class,
        "deletion_timestamp": None,
        "finalizers": [],
        "initializers": None,
        "labels": sites.system_labels(found) if found.kind == "site" else {},
        "owner_view": None,
    }


def _object_ref(caller: Caller, kind: str, key: Key) -> Json:
    return {"kind": kind, "uid": "", "tenant": caller.tenant, "namespace": key.namespace, "name": key.name}


def _format(text: str) -> str:
    name = {str(number): name for number, name in enumerate(FORMATS)}.get(text, text)
    if name not in FORMATS:
        raise Invalid(
            f"response_format {text[:64]!r} should be one of {', '.join(FORMATS)}", [FieldError("response_format", "is not known")]
        )
    return name


def _token(page: Page) -> str:
    return base64.urlsafe_b64encode(str(page.next).encode()).decode() if page.next else ""


def _read_token(token: str) -> Key | None:
    if not token:
        return None
    try:
        key = _LAST.fullmatch(base64.urlsafe_b64decode(token.encode()).decode("ascii"))
    except (binascii.Error, UnicodeError):
        key = None
    if key is None:
        raise Invalid("continue: is not a token of a list", [FieldError("continue", "is not a token of a list")])
    return Key(*key.groups())
