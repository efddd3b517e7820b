# ruff: noqa: S608 - the pieces of these statements are constants
"""Who listens where, kept unique by the database: a listener has one protocol, and a domain on it one owner.

Claims go to Postgres as arrays, one parameter per column, for there may be more of them than a statement may have parameters.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import delete, insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.resources.base import Key
from controlplane.resources.claim import Claim
from controlplane.store.tables import ListenerClaimRow, ListenerRow, ListenerWaitRow

_WANTED = """
    unnest(
        CAST(:site_ids AS uuid[]), CAST(:networks AS text[]), CAST(:addresses AS text[]), CAST(:ports AS integer[]),
        CAST(:protocols AS text[]), CAST(:domains AS text[]), CAST(:kinds AS text[]), CAST(:namespaces AS text[]), CAST(:names AS text[])
    ) WITH ORDINALITY AS wanted (site_id, network, address, port, protocol, domain, kind, namespace, name, rank)
"""

_OPEN = text(f"""
    INSERT INTO listeners (tenant_id, site_id, network, address, port, protocol)
    SELECT DISTINCT ON (site_id, network, address, port) CAST(:tenant AS uuid), site_id, network, address, port, protocol
    FROM {_WANTED} ORDER BY site_id, network, address, port, rank
    ON CONFLICT DO NOTHING
""")

_TAKE = text(f"""
    INSERT INTO listener_claims (tenant_id, site_id, network, address, port, domain, protocol, kind, namespace, name)
    SELECT tenant_id, site_id, network, address, port, domain, protocol, kind, namespace, name
    FROM {_WANTED} JOIN listeners USING (site_id, network, address, port, protocol)
    WHERE tenant_id = :tenant ORDER BY rank
    ON CONFLICT DO NOTHING
""")

_RELEASE = text(f"""
    DELETE FROM listener_claims AS claim USING {_WANTED}
    WHERE claim.tenant_id = :tenant
      AND (claim.site_id, claim.network, claim.address, claim.port, claim.domain, claim.kind, claim.namespace, claim.name)
        = (wanted.site_id, wanted.network, wanted.address, wanted.port, wanted.domain, wanted.kind, wanted.namespace, wanted.name)
""")

_CLOSE = text(f"""
    DELETE FROM listeners AS listener USING {_WANTED}
    WHERE listener.tenant_id = :tenant
      AND (listener.site_id, listener.network, listener.address, listener.port)
        = (wanted.site_id, wanted.network, wanted.address, wanted.port)
      AND NOT EXISTS (
        SELECT FROM listener_claims AS claim
        WHERE claim.tenant_id = listener.tenant_id
          AND (claim.site_id, claim.network, claim.address, claim.port)
            = (listener.site_id, listener.network, listener.address, listener.port)
      )
""")

_OWNERS = text(f"""
    SELECT DISTINCT claim.site_id, claim.network, claim.address, claim.port, claim.protocol, claim.domain,
           claim.kind, claim.namespace, claim.name
    FROM listener_claims AS claim JOIN {_WANTED} USING (site_id, network, address, port)
    WHERE claim.tenant_id = :tenant ORDER BY 1, 2, 3, 4, 6
""")

_OWNED = text("""
    SELECT claim.site_id, claim.network, claim.address, claim.port, claim.protocol, claim.domain, claim.kind, claim.namespace, claim.name
    FROM listener_claims AS claim
    JOIN unnest(CAST(:namespaces AS text[]), CAST(:names AS text[])) AS wanted (namespace, name) USING (namespace, name)
    WHERE claim.tenant_id = :tenant AND claim.kind = :kind
""")


_ELSEWHERE = text("""
    SELECT DISTINCT kind, namespace, name FROM listener_claims AS claim
    WHERE tenant_id = :tenant AND NOT EXISTS (
        SELECT FROM resources AS site WHERE site.tenant_id = claim.tenant_id AND site.kind = 'site' AND site.uid = claim.site_id
    )
""")

_FOLLOW = text("UPDATE tenants SET claimed_edges = :edges WHERE id = :tenant AND claimed_edges <> :edges RETURNING id")

_EVERYWHERE = text("""
    SELECT kind, namespace, name FROM resources
    WHERE tenant_id = :tenant AND kind IN ('http_loadbalancer', 'tcp_loadbalancer') AND spec -> 'advertise_on_public_default_vip' <> 'null'
""")


@dataclass(frozen=True)
class Holding:
    """What a load balancer has, or wants."""

    kind: str
    key: Key
    claims: frozenset[Claim]


@dataclass(frozen=True)
class Owner:
    """Of something on a listener."""

    claim: Claim
    kind: str
    key: Key


async def owned(session: AsyncSession, tenant_id: UUID, kind: str, keys: Collection[Key]) -> dict[Key, frozenset[Claim]]:
    """By load balancer, what it has; those with nothing are missing."""
    wanted = {"namespaces": [key.namespace for key in keys], "names": [key.name for key in keys]}
    rows = await session.execute(_OWNED, {"tenant": tenant_id, "kind": kind, **wanted})
    found: dict[Key, set[Claim]] = {}
    for owner in map(_owner, rows):
        found.setdefault(owner.key, set()).add(owner.claim)
    return {key: frozenset(claims) for key, claims in found.items()}


async def release(session: AsyncSession, tenant_id: UUID, given_up: Sequence[Holding]) -> None:
    """Give up some of what load balancers have; a place loses its listener, and so its protocol, with the last claim on it."""
    if any(holding.claims for holding in given_up):
        await session.execute(_RELEASE, _parameters(tenant_id, given_up))
        await session.execute(_CLOSE, _parameters(tenant_id, given_up))


async def follows_edges(session: AsyncSession, tenant_id: UUID, edges: str) -> bool:
    """Whether the tenant's claims were not brought up to date with these regional edges yet; the caller does, in this transaction."""
    return (await session.execute(_FOLLOW, {"tenant": tenant_id, "edges": edges})).first() is not None


async def public(session: AsyncSession, tenant_id: UUID) -> frozenset[tuple[str, Key]]:
    """Kind and key of the load balancers that are advertised on all regional edges, or have claims at sites of somebody else."""
    rows = [row for query in (_ELSEWHERE, _EVERYWHERE) for row in await session.execute(query, {"tenant": tenant_id})]
    return frozenset((row.kind, Key(row.namespace, row.name)) for row in rows)


async def release_site(session: AsyncSession, tenant_id: UUID, site_id: UUID) -> None:
    """Nobody listens at a site that is gone."""
    for row in (ListenerClaimRow, ListenerRow):
        await session.execute(delete(row).filter_by(tenant_id=tenant_id, site_id=site_id).execution_options(synchronize_session=False))


async def take(session: AsyncSession, tenant_id: UUID, wanted: Sequence[Holding]) -> None:
    """Claim what is free, the first of `wanted` first. What is not stays with its owner; `owners` tells whose it is."""
    if any(holding.claims for holding in wanted):
        await session.execute(_OPEN, _parameters(tenant_id, wanted))
        await session.execute(_TAKE, _parameters(tenant_id, wanted))


async def waiting(session: AsyncSession, tenant_id: UUID) -> frozenset[tuple[str, Key]]:
    """Kind and key of the load balancers that have not all that they claim."""
    columns = (ListenerWaitRow.kind, ListenerWaitRow.namespace, ListenerWaitRow.name)
    rows = await session.execute(select(*columns).filter_by(tenant_id=tenant_id))
    return frozenset((row.kind, Key(row.namespace, row.name)) for row in rows)


async def note_waiting(session: AsyncSession, tenant_id: UUID, lacks: Mapping[tuple[str, Key], bool]) -> None:
    """Which of these load balancers have not all that they claim. Few ever do, and few change."""
    known = await waiting(session, tenant_id)
    for kind, key in (each for each, lacking in lacks.items() if lacking != (each in known)):
        row = {"tenant_id": tenant_id, "kind": kind, "namespace": key.namespace, "name": key.name}
        if lacks[kind, key]:
            await session.execute(insert(ListenerWaitRow).values(row))
        else:
            await session.execute(delete(ListenerWaitRow).filter_by(**row).execution_options(synchronize_session=False))


async def owners(session: AsyncSession, tenant_id: UUID, wanted: Holding) -> tuple[Owner, ...]:
    """Who has something on the listeners of these claims, sorted by place and domain."""
    return tuple(map(_owner, await session.execute(_OWNERS, _parameters(tenant_id, [wanted]))))


def _parameters(tenant_id: UUID, holdings: Sequence[Holding]) -> dict[str, Any]:
    flat = [(holding, claim) for holding in holdings for claim in sorted(holding.claims)]
    return {
        "tenant": tenant_id,
        "site_ids": [UUID(claim.site_id) for _, claim in flat],
        "networks": [claim.network for _, claim in flat],
        "addresses": [claim.address for _, claim in flat],
        "ports": [claim.port for _, claim in flat],
        "protocols": [claim.protocol for _, claim in flat],
        "domains": [claim.domain for _, claim in flat],
        "kinds": [holding.kind for holding, _ in flat],
        "namespaces": [holding.key.namespace for holding, _ in flat],
        "names": [holding.key.name for holding, _ in flat],
    }


def _owner(row: Any) -> Owner:
    claim = Claim._make((str(row.site_id), row.network, row.address, row.port, row.protocol, row.domain))
    return Owner(claim, row.kind, Key(row.namespace, row.name))
