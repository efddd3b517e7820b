"""Under `/api/register`: tokens and registrations for people, enrolment for nodes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal
from uuid import UUID

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import Field

from agent.protocol.enrolment import BOOTSTRAP_PATH, CA_PATH, REQUEST_CONFIG_PATH, BootstrapRequest, ConfigRequest, Credentials, TokenClaims
from controlplane.api.deps import (
    ClientAddress,
    CurrentCaller,
    CurrentServices,
    EnrolmentBody,
    JsonBody,
    NameInPath,
    Now,
    OptionalJsonBody,
    Services,
    Session,
)
from controlplane.api.description import asked, asked_object, described
from controlplane.api.requests import agree, message, read
from controlplane.auth import Caller
from controlplane.errors import FieldError, Invalid, Unauthenticated
from controlplane.resources.base import Annotations, Labels, Unless, Value
from controlplane.resources.enumeration import Names
from controlplane.resources.site import TunnelType
from controlplane.services import enrolment, manifests, registrations, sites, tokens
from controlplane.services.enrolment import Desk
from controlplane.services.manifests import Replicas
from controlplane.services.registrations import ApprovedPassport
from controlplane.store import authorities as authority_store
from controlplane.store.registrations import Registration
from controlplane.store.tokens import Token

Json = dict[str, Any]

router = APIRouter()

_SYSTEM = "/api/register/namespaces/system"

# Nodes that enrol. The token authorises them.


@router.get(CA_PATH, operation_id="isthmus.register.Roots", tags=["enrolment"], response_class=PlainTextResponse)
async def roots(services: CurrentServices) -> PlainTextResponse:
    """The fabric's roots in PEM, whose SHA-256 the tokens carry."""
    async with services.database.definer() as definer:
        roots_pem = "".join(await authority_store.roots(definer))
    return PlainTextResponse(roots_pem, media_type="application/x-pem-file")


@router.post(BOOTSTRAP_PATH, operation_id="ves.io.schema.registration.CustomAPI.RegistrationCreate", tags=["enrolment"])
async def register_bootstrap(body: EnrolmentBody, services: CurrentServices, address: ClientAddress, now: Now) -> Json:
    """Ask to become a node. Repeating it with the same key gives the same registration."""
    with _counting_failures(services, address):
        spec = message(BootstrapRequest, body).spec
        claims = tokens.claims_in(spec.token, services.fabric)
        async with services.database.sessions(UUID(claims.tenant_id)) as session:
            registration = await enrolment.bootstrap(session, _desk(services, claims), claims, spec, now)
    return {"name": registration.name, "state": registration.state}


@router.post(REQUEST_CONFIG_PATH, operation_id="ves.io.schema.registration.CustomAPI.RegistrationConfig", tags=["enrolment"])
async def request_config(body: EnrolmentBody, services: CurrentServices, address: ClientAddress, now: Now) -> Credentials:
    """The certificate of a node that was admitted; 409 while it waits."""
    with _counting_failures(services, address):
        request = message(ConfigRequest, body)
        claims = tokens.claims_in(request.token, services.fabric)
        async with services.database.sessions(UUID(claims.tenant_id)) as session:
            return await enrolment.request_config(session, _desk(services, claims), claims, request, now)


@contextmanager
def _counting_failures(services: Services, address: str) -> Iterator[None]:
    """Of tokens that never were, of those that are good no more, and of what asks for nothing that can be."""
    try:
        yield
    except (Unauthenticated, Invalid):
        services.limits.fail(address)
        raise


def _desk(services: Services, claims: TokenClaims) -> Desk:
    return Desk(services.fabric, services.entrance, UUID(claims.tenant_id))


# Tokens


@router.post(
    f"{_SYSTEM}/tokens", operation_id="ves.io.schema.token.API.Create", tags=["token"], openapi_extra=asked_object(tokens.TokenSpec)
)
async def create_token(body: JsonBody, caller: CurrentCaller, services: CurrentServices, session: Session, now: Now) -> Json:
    """Create a registration token. `spec.content` of this answer is the token; it is never shown again."""
    token, content = await tokens.create(session, caller, body, fabric=services.fabric, entrance=services.entrance, now=now)
    shown = _token(caller, token, now)
    return shown | {"spec": shown["spec"] | {"content": content}}


@router.get(f"{_SYSTEM}/tokens", operation_id="ves.io.schema.token.API.List", tags=["token"])
async def list_tokens(caller: CurrentCaller, session: Session, now: Now) -> Json:
    """All registration tokens, by name."""
    found = await tokens.list_all(session, caller)
    items = [_item(caller, token.meta, token.id) | {"get_spec": _token(caller, token, now)["spec"]} for token in found]
    return {"items": items, "errors": []}


_TOKEN = f"{_SYSTEM}/tokens/{{name}}"


@router.get(_TOKEN, operation_id="ves.io.schema.token.API.Get", tags=["token"], openapi_extra=described(_TOKEN))
async def get_token(name: NameInPath, caller: CurrentCaller, session: Session, now: Now) -> Json:
    """What a token admits and how often it was used; not the token itself."""
    return _token(caller, await tokens.get(session, caller, name), now)


@router.put(
    _TOKEN, operation_id="ves.io.schema.token.API.Replace", tags=["token"], openapi_extra=described(_TOKEN) | asked_object(tokens.TokenSpec)
)
async def replace_token(
    name: NameInPath, body: JsonBody, caller: CurrentCaller, services: CurrentServices, session: Session, now: Now
) -> Json:
    """Replace a token's metadata; what it admits cannot be changed."""
    return _token(caller, await tokens.describe(session, caller, name, body, entrance=services.entrance, now=now), now)


@router.delete(_TOKEN, operation_id="ves.io.schema.token.API.Delete", tags=["token"], openapi_extra=described(_TOKEN))
async def delete_token(name: NameInPath, body: OptionalJsonBody, caller: CurrentCaller, session: Session, now: Now) -> Json:
    """Revoke a token: it admits nobody any more."""
    agree(body, name=name, namespace="system")
    await tokens.delete(session, caller, name, now=now)
    return {}


class YamlResponse(PlainTextResponse):
    media_type = "application/yaml"


_MANIFEST = f"{_TOKEN}/manifest"


@router.post(
    _MANIFEST,
    operation_id="isthmus.token.Manifest",
    tags=["token"],
    response_class=YamlResponse,
    openapi_extra=described(_MANIFEST) | asked_object(tokens.TokenSpec, required=False),
)
async def create_manifest(
    name: NameInPath,
    body: OptionalJsonBody,
    caller: CurrentCaller,
    services: CurrentServices,
    session: Session,
    now: Now,
    replicas: Replicas = "1",
) -> YamlResponse:
    """Create the registration token `name`, and answer with everything that installs the agent in a Kubernetes cluster: `… | kubectl apply -f -`.

    The body is as for the creation of a token, or empty: then the token is for the site of the same name, once for each replica. As its
    creation shows a token once, so does this; a token that exists already is refused.
    """
    given = body.get("spec") if isinstance(body, dict) else None
    if isinstance(body, dict) and isinstance(given, dict | None):
        body = body | {"spec": {"type": "JWT", "site_name": name, "max_uses": int(replicas)} | (given or {})}
    token, content = await tokens.create(session, caller, body, fabric=services.fabric, entrance=services.entrance, now=now, name=name)
    if token.edge:
        raise Invalid(
            f"{token.site_name} is a regional edge, which no cluster's agent can be", [FieldError("spec.site_name", "is a regional edge")]
        )
    return YamlResponse(manifests.manifest(replicas, token, content, services.entrance.agent_image))


class TokenState(Value):
    name: str = ""
    namespace: str = "system"
    state: Annotated[Literal["EXPIRED"], Names("UNKNOWN", "VALID", "EXPIRED", refused={"VALID": "a token cannot be made valid again"})]


_TOKEN_STATE = f"{_TOKEN}/state"


@router.post(
    _TOKEN_STATE,
    operation_id="ves.io.schema.token.CustomAPI.ObjectState",
    tags=["token"],
    openapi_extra=described(_TOKEN_STATE) | asked(TokenState),
)
async def set_token_state(name: NameInPath, body: JsonBody, caller: CurrentCaller, session: Session, now: Now) -> Json:
    """Revoke a token, keeping its record."""
    read(TokenState, body, "system", name=name)
    return {"obj": _token(caller, await tokens.revoke(session, caller, name, now=now), now)}


def _token(caller: Caller, token: Token, now: datetime) -> Json:
    spec = tokens.spec_json(token)
    told = {"state": tokens.state(token, now), "uses": token.uses, "expiration_timestamp": token.expires_at.isoformat()}
    creator = {"creator_id": token.creator_id, "creator_class": token.creator_class}
    return {"metadata": token.meta, "system_metadata": _system_metadata(caller, token.id, token.created_at, creator), "spec": spec | told}


# Registrations


class Approval(Value):
    name: str = ""
    namespace: str = "system"
    unsupported: ClassVar[Mapping[str, str | Unless]] = {
        "connected_region": "regional edges are chosen by the site's re_select",
        "backup_connected_region": "regional edges are chosen by the site's re_select",
        "preferred_active_re": "regional edges are chosen by the site's re_select",
    }

    state: Annotated[Literal["APPROVED", "RETIRED"], Names(*registrations.STATES)]
    passport: ApprovedPassport | None = None
    labels: Labels = {}
    annotations: Annotations = {}
    tunnel_type: TunnelType | None = None
    """Of the site; left out, it stays what it is."""


class ByState(Value):
    namespace: str = "system"
    state: Annotated[registrations.State, Names(*registrations.STATES)] = "NOTSET"


class ByToken(Value):
    namespace: str = "system"
    token: str = Field(min_length=1)


_LIST_BY_STATE = "/api/register/namespaces/system/listregistrationsbystate"


@router.post(
    _LIST_BY_STATE,
    operation_id="ves.io.schema.registration.CustomAPI.ListRegistrationsByState",
    tags=["registration"],
    openapi_extra=asked(ByState),
)
async def list_registrations_by_state(body: JsonBody, caller: CurrentCaller, session: Session) -> Json:
    """Registrations in one state; without one, all."""
    state = read(ByState, body, "system").state
    return _listed(caller, await registrations.search(session, caller, state=None if state == "NOTSET" else state))


@router.get(f"{_SYSTEM}/registrations", operation_id="ves.io.schema.registration.API.List", tags=["registration"])
async def list_registrations(caller: CurrentCaller, session: Session) -> Json:
    """All registrations, oldest first."""
    return _listed(caller, await registrations.search(session, caller))


_BY_SITE = f"{_SYSTEM}/registrations_by_site/{{name}}"


@router.get(
    _BY_SITE,
    operation_id="ves.io.schema.registration.CustomAPI.ListRegistrationsBySite",
    tags=["registration"],
    openapi_extra=described(_BY_SITE),
)
async def list_registrations_by_site(name: NameInPath, caller: CurrentCaller, session: Session) -> Json:
    """Registrations for one site."""
    return _listed(caller, await registrations.search(session, caller, site_name=name))


@router.post(
    f"{_SYSTEM}/get-registrations-by-token",
    operation_id="ves.io.schema.registration.CustomAPI.GetRegistrationsByToken",
    tags=["registration"],
    openapi_extra=asked(ByToken),
)
async def list_registrations_by_token(body: JsonBody, caller: CurrentCaller, session: Session) -> Json:
    """Registrations that one token, given by its name, brought."""
    return _listed(caller, await registrations.search(session, caller, token=read(ByToken, body, "system").token))


_REGISTRATION = f"{_SYSTEM}/registrations/{{name}}"


@router.get(_REGISTRATION, operation_id="ves.io.schema.registration.API.Get", tags=["registration"], openapi_extra=described(_REGISTRATION))
async def get_registration(name: NameInPath, caller: CurrentCaller, session: Session) -> Json:
    """Who wants to be a node of which site."""
    return _registration(caller, await registrations.get(session, caller, name))


@router.delete(
    _REGISTRATION, operation_id="ves.io.schema.registration.API.Delete", tags=["registration"], openapi_extra=described(_REGISTRATION)
)
async def delete_registration(
    name: NameInPath, body: OptionalJsonBody, caller: CurrentCaller, services: CurrentServices, session: Session, now: Now
) -> Json:
    """Retire a registration, and forget it."""
    agree(body, name=name, namespace="system")
    await registrations.delete(session, caller, name, ring=services.fabric.ring, now=now)
    return {}


_APPROVE = f"{_SYSTEM}/registration/{{name}}/approve"


@router.post(
    _APPROVE,
    operation_id="ves.io.schema.registration.CustomAPI.RegistrationApprove",
    tags=["registration"],
    openapi_extra=described(_APPROVE) | asked(Approval),
)
async def approve_registration(
    name: NameInPath, body: JsonBody, caller: CurrentCaller, services: CurrentServices, session: Session, now: Now
) -> Json:
    """Let a node in (APPROVED, with its passport), or out for ever (RETIRED)."""
    approval = read(Approval, body, "system", name=name)
    if approval.state == "RETIRED":
        return {"obj": _registration(caller, await registrations.retire(session, caller, name, ring=services.fabric.ring, now=now))}
    if approval.passport is None:
        raise Invalid("Field passport should be not nil, got nil in request.", [FieldError("passport", "should be not nil")])
    approved = await registrations.approve(
        session,
        caller,
        name,
        approval.passport,
        approval.labels,
        approval.annotations,
        tunnel_type=approval.tunnel_type,
        ring=services.fabric.ring,
        now=now,
    )
    return {"obj": _registration(caller, approved)}


def _listed(caller: Caller, found: tuple[Registration, ...]) -> Json:
    items = [_item(caller, _registration_metadata(each), each.uid) | _registration(caller, each) for each in found]
    return {"items": [item | {"get_spec": item["spec"]} for item in items], "errors": []}


def _registration_metadata(registration: Registration) -> Json:
    return {
        "name": registration.name,
        "namespace": "system",
        "labels": registration.labels,
        "annotations": registration.annotations,
        "description": "",
        "disable": False,
    }


def _registration(caller: Caller, registration: Registration) -> Json:
    creator = {"creator_id": str(registration.token_id), "creator_class": "token"}
    status = {"current_state": registration.state, "state_update_timestamp": registration.state_at.isoformat()}
    return {
        "metadata": _registration_metadata(registration),
        "system_metadata": _system_metadata(caller, registration.uid, registration.created_at, creator),
        "spec": {
            "passport": registration.passport,
            "infra": registration.infra,
            "site": [{"kind": "site", "namespace": "system", "name": registration.site_name}],
            "node_id": str(registration.node_id) if registration.node_id else None,
            "tunnel_type": registration.tunnel_type,
            "clock_skew_s": registration.clock_skew_s,
        },
        "object": {"status": status},
    }


# Sites


class SiteState(Value):
    name: str = ""
    namespace: str = "system"
    state: Annotated[
        Literal["DECOMMISSIONING"],
        Names(
            *("ONLINE", "PROVISIONING", "UPGRADING", "STANDBY", "FAILED", "REREGISTRATION", "WAITINGNODES", "DECOMMISSIONING"),
            refused={"REREGISTRATION": "retire the registrations of its nodes instead"},
        ),
    ]


_SITE_STATE = f"{_SYSTEM}/site/{{name}}/state"


@router.post(
    _SITE_STATE,
    operation_id="ves.io.schema.site.CustomAPI.SetState",
    tags=["site"],
    openapi_extra=described(_SITE_STATE) | asked(SiteState),
)
async def set_site_state(name: NameInPath, body: JsonBody, caller: CurrentCaller, session: Session, now: Now) -> Json:
    """Decommission a site: its nodes are revoked at once, and it is gone. What refers to it stays, and shows `SiteGone`."""
    read(SiteState, body, "system", name=name)
    await sites.decommission(session, caller, name, now=now)
    return {}


def _item(caller: Caller, metadata: Json, uid: UUID) -> Json:
    return {
        "tenant": caller.tenant,
        "namespace": "system",
        "name": metadata["name"],
        "uid": str(uid),
        "labels": metadata["labels"],
        "annotations": metadata["annotations"],
        "description": metadata["description"],
        "disabled": metadata["disable"],
    }


def _system_metadata(caller: Caller, uid: UUID, created_at: datetime, creator: Json) -> Json:
    told = {"uid": str(uid), "tenant": caller.tenant, "creation_timestamp": created_at.isoformat(), "modification_timestamp": None}
    return told | creator
