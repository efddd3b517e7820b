"""Registration tokens: signed, shown once, short-lived, counted and revocable by their id."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, ClassVar, Literal
from uuid import UUID, uuid4

import jwt
from pydantic import Field, ValidationError
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from agent.protocol.enrolment import TokenClaims
from controlplane.auth import Caller
from controlplane.errors import AlreadyExists, FieldError, Forbidden, Invalid, NotFound, Unauthenticated
from controlplane.resources.base import Flag, Key, Metadata, Name, Value, Whole
from controlplane.resources.enumeration import Names
from controlplane.resources.envelope import read, read_envelope, refuse_all
from controlplane.resources.normal import NIL, Reading
from controlplane.services import auditing
from controlplane.services.authorities import Fabric, ca_pin
from controlplane.store import resources
from controlplane.store import tokens as store
from controlplane.store.tokens import Token

NAMESPACE = "system"
DEFAULT_LIFE_S = 900


@dataclass(frozen=True)
class Entrance:
    """Where agents find this control plane, and what they may be let in with."""

    urls: tuple[str, ...]
    longest_token_life_s: int
    agent_image: str
    """Of the container that manifests install."""


class TokenSpec(Value):
    """NORMAL: may bring any new site, and a person approves each. JWT: for one site, by default admitted at once."""

    ignored: ClassVar[frozenset[str]] = frozenset({"content", "state", "uses", "expiration_timestamp"})

    type: Annotated[Literal["NORMAL", "JWT"], Names("NORMAL", "JWT")] = "NORMAL"
    site_name: Name | None = None
    max_uses: Whole = Field(1, ge=0, le=100_000)
    """0: unlimited."""
    expiration_seconds: Whole = Field(DEFAULT_LIFE_S, ge=1)
    auto_approve: Flag | None = None


async def create(
    session: AsyncSession,
    caller: Caller,
    body: Mapping[str, Any],
    *,
    fabric: Fabric,
    entrance: Entrance,
    now: datetime,
    name: str | None = None,
) -> tuple[Token, str]:
    """The token's record, and the token itself, which is kept nowhere. Raises `Invalid`, `Forbidden` and `AlreadyExists`."""
    metadata, spec = _read(body, name, entrance)
    edge = await _is_edge(session, caller, spec.site_name)
    life = timedelta(seconds=spec.expiration_seconds)
    token = Token(
        id=uuid4(),
        name=metadata.name,
        meta=metadata.model_dump(mode="json"),
        site_name=spec.site_name,
        approve=spec.type == "JWT" and spec.auto_approve is not False,
        uses=0,
        max_uses=spec.max_uses,
        created_at=now,
        expires_at=now + life,
        edge=edge,
        creator_id=caller.credential,
        creator_class=caller.creator_class,
    )
    try:
        async with session.begin_nested():
            await store.create(session, caller.tenant_id, token)
    except IntegrityError:
        raise AlreadyExists(f"token {token.name} exists already") from None
    await _record(session, caller, "API.Create", token, now)
    return token, _signed(token, caller.tenant_id, fabric, entrance, await ca_pin(session, fabric))


async def get(session: AsyncSession, caller: Caller, name: str) -> Token:
    found = await store.get(session, caller.tenant_id, name)
    if found is None:
        raise NotFound(f"token {name} does not exist")
    return found


async def list_all(session: AsyncSession, caller: Caller) -> tuple[Token, ...]:
    """By name."""
    return await store.list_all(session, caller.tenant_id)


async def describe(
    session: AsyncSession, caller: Caller, name: str, body: Mapping[str, Any], *, entrance: Entrance, now: datetime
) -> Token:
    """Replace the metadata; what a token admits cannot be changed once it was handed out."""
    metadata, spec = _read(body, name, entrance)
    token = await get(session, caller, name)
    if body.get("spec") and spec_of(spec, token) != spec_json(token):
        raise Invalid("spec: a token cannot be changed; create another one", [FieldError("spec", "cannot be changed")])
    await store.describe(session, caller.tenant_id, name, metadata.model_dump(mode="json"))
    await _record(session, caller, "API.Replace", token, now)
    return await get(session, caller, name)


async def revoke(session: AsyncSession, caller: Caller, name: str, *, now: datetime) -> Token:
    """From now on it admits nobody."""
    token = await get(session, caller, name)
    await store.revoke(session, caller.tenant_id, name, now)
    await _record(session, caller, "CustomAPI.ObjectState", token, now)
    return await get(session, caller, name)


async def delete(session: AsyncSession, caller: Caller, name: str, *, now: datetime) -> None:
    token = await get(session, caller, name)
    await store.delete(session, caller.tenant_id, name)
    await _record(session, caller, "API.Delete", token, now)


def claims_in(token: str, fabric: Fabric) -> TokenClaims:
    """What the control plane signed. Whether the token is still good is known by its record. Raises `Unauthenticated`."""
    try:
        key = fabric.tokens.key.public_key()
        claims = jwt.decode(token, key, algorithms=["ES256"], options={"verify_exp": False, "verify_iat": False})
        return TokenClaims.model_validate(claims)
    except (jwt.InvalidTokenError, ValidationError):
        raise Unauthenticated("this is not a registration token of this control plane") from None


def spec_json(token: Token) -> dict[str, Any]:
    """What a GET answers; never the token itself."""
    life = int((token.expires_at - token.created_at).total_seconds())
    bound = {"type": "JWT", "site_name": token.site_name} if token.site_name else {"type": "NORMAL"}
    return {**bound, "max_uses": token.max_uses, "expiration_seconds": life, "auto_approve": token.approve}


def spec_of(spec: TokenSpec, token: Token) -> dict[str, Any]:
    """What was sent, with what it left out taken from the token."""
    given = spec.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    return {**spec_json(token), **given}


def state(token: Token, now: datetime) -> str:
    return "EXPIRED" if token.refusal(now) else "VALID"


def _read(body: Mapping[str, Any], name: str | None, entrance: Entrance) -> tuple[Metadata, TokenSpec]:
    reading = Reading(NAMESPACE, None)
    metadata, raw = read_envelope(body, name, reading)
    spec = read(TokenSpec, raw, "spec", reading)
    if spec is not None:
        _check(spec, entrance, reading)
    refuse_all(reading.errors)
    assert metadata
    assert spec
    return metadata, spec


def _check(spec: TokenSpec, entrance: Entrance, reading: Reading) -> None:
    if spec.type == "JWT" and not spec.site_name:
        reading.refuse("spec.site_name", NIL)
    if spec.type == "NORMAL" and spec.site_name:
        reading.refuse("spec.site_name", "is for tokens of type JWT")
    if spec.type == "NORMAL" and spec.auto_approve:
        reading.refuse("spec.auto_approve", "is for tokens that are bound to a site: give type JWT and site_name")
    if spec.expiration_seconds > entrance.longest_token_life_s:
        reading.refuse("spec.expiration_seconds", f"should be at most {entrance.longest_token_life_s}")


async def _is_edge(session: AsyncSession, caller: Caller, site_name: str | None) -> bool:
    """Whether there is a regional edge of that name, to which only the operator admits nodes."""
    found = await resources.get(session, caller.tenant_id, "site", Key(NAMESPACE, site_name)) if site_name else None
    if found is None or not resources.parsed(found).spec.is_edge:
        return False
    if not caller.runs_edges:
        description = f"{site_name} is a regional edge: only the operator admits nodes to it"
        raise Forbidden(description, [FieldError("spec.site_name", description)])
    return True


def _signed(token: Token, tenant_id: UUID, fabric: Fabric, entrance: Entrance, pin: str | None) -> str:
    claims = TokenClaims(
        urls=entrance.urls,
        ca_pin=pin,
        jti=str(token.id),
        tenant_id=str(tenant_id),
        site_name=token.site_name,
        iat=int(token.created_at.timestamp()),
        exp=int(token.expires_at.astimezone(UTC).timestamp()),
    )
    return jwt.encode(claims.model_dump(mode="json", exclude_none=True), fabric.tokens.key, algorithm="ES256")


async def _record(session: AsyncSession, caller: Caller, rpc: str, token: Token, now: datetime) -> None:
    shown = {"metadata": token.meta, "spec": spec_json(token)}
    await auditing.record(session, caller, f"token.{rpc}", now, namespace=NAMESPACE, name=token.name, uid=token.id, shown=shown)
