"""What happened to a tenant's intent since a revision: how caches catch up."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from agent.protocol.items import EDGES
from controlplane.errors import NotFound
from controlplane.resources.base import Key
from controlplane.store.nodes import Node
from controlplane.store.session import INTENT_CHANNEL, STATUS_CHANNEL, Database
from controlplane.store.tables import Json, TenantRow


@dataclass(frozen=True)
class StoredJson:
    """An object as the database has it."""

    kind: str
    namespace: str
    name: str
    uid: UUID
    meta: dict[str, Any]
    spec: dict[str, Any]
    version: int
    revision: int
    created_revision: int
    created_at: datetime
    modified_at: datetime
    creator_id: str = ""
    """Name of the credential that made it."""
    creator_class: str = ""

    @property
    def key(self) -> Key:
        return Key(self.namespace, self.name)


@dataclass(frozen=True)
class Anchors:
    """What is trusted as authority for one role: every version that is in use or soon will be, newest first."""

    pem: str
    issuers: Mapping[str, str]
    """State of each version (`added`, `active`, `retiring`), by its certificate in PEM."""
    crl_pem: str
    """What they revoked; empty: nothing."""


@dataclass(frozen=True)
class Changes:
    """Everything after one revision and up to another."""

    tenant: str
    """Its name."""
    revision: int
    written: tuple[StoredJson, ...]
    deleted: tuple[tuple[str, Key, UUID], ...]
    """Kind, key and uid; the key may have been taken again by an object of another uid, which is in `written`."""
    nodes: tuple[Node, ...]
    """Those whose key, gateways, their listener, IPsec, exports, revocation or loss changed."""
    revocations: Mapping[str, int]
    """See `Site.revocations` of the items."""
    anchors: Mapping[str, Anchors] | None
    """By role, if one of them changed."""
    homes: Mapping[str, tuple[str, ...]]
    """Ids of regional edges, by customer edge; of those where they changed."""
    names: frozenset[str]
    """All public names of the tenant."""

    @property
    def targets(self) -> frozenset[tuple[str, Key]]:
        """Kind and key of what was written or deleted."""
        return frozenset((each.kind, each.key) for each in self.written) | {(kind, key) for kind, key, _ in self.deleted}


_SINCE = text("""
    SELECT t.name, t.revision, t.revocations,
        CASE WHEN t.anchors_revision > :since THEN (
            SELECT jsonb_agg(jsonb_build_object('role', role, 'state', state, 'pem', certificate_pem, 'crl', crl_pem) ORDER BY version DESC)
            FROM authorities a WHERE (a.tenant_id = t.id OR a.tenant_id IS NULL) AND a.state <> 'removed'
        ) END AS anchors,
        (SELECT jsonb_agg(r) FROM resources r WHERE r.tenant_id = t.id AND r.revision > :since) AS written,
        (SELECT jsonb_agg(d ORDER BY d.revision) FROM deletions d WHERE d.tenant_id = t.id AND d.revision > :since AND :since >= 0) AS deleted,
        (SELECT jsonb_agg(to_jsonb(n) - 'certificate_pem' - 'leaves') FROM nodes n WHERE n.tenant_id = t.id AND n.revision > :since) AS nodes,
        (SELECT jsonb_object_agg(h.site_id, h.edges) FROM home_edges h WHERE h.tenant_id = t.id AND h.revision > :since) AS homes,
        (SELECT jsonb_agg(c.name) FROM public_claims c WHERE c.tenant_id = t.id) AS names
    FROM tenants t WHERE t.id = :tenant_id
""")
"""One statement sees one moment, so nothing that it reads can be from another revision; and it is one round trip."""


async def since(session: AsyncSession, tenant_id: UUID, revision: int) -> Changes | None:
    """None if the tenant is gone; -1 gives everything there is."""
    found = (await session.execute(_SINCE, {"tenant_id": tenant_id, "since": revision})).first()
    if found is None:
        return None
    return Changes(
        tenant=found.name,
        revision=found.revision,
        written=tuple(map(written, found.written or ())),
        deleted=tuple((row["kind"], Key(row["namespace"], row["name"]), UUID(row["uid"])) for row in found.deleted or ()),
        nodes=tuple(map(_node, found.nodes or ())),
        revocations=found.revocations,
        anchors=_anchors(found.anchors) if found.anchors else None,
        homes={site_id: tuple(edges) for site_id, edges in (found.homes or {}).items()},
        names=frozenset(found.names or ()),
    )


def _anchors(rows: list[Json]) -> Mapping[str, Anchors]:
    by_role: dict[str, list[Json]] = {}
    for row in rows:
        by_role.setdefault(row["role"], []).append(row)
    return {
        role: Anchors(
            pem="".join(row["pem"] for row in own),
            issuers={row["pem"]: row["state"] for row in own},
            crl_pem="".join(row["crl"] for row in own),
        )
        for role, own in by_role.items()
    }


def written(row: Json) -> StoredJson:
    """A row of `resources` as JSON."""
    return StoredJson(
        kind=row["kind"],
        namespace=row["namespace"],
        name=row["name"],
        uid=UUID(row["uid"]),
        meta=row["metadata"],
        spec=row["spec"],
        version=row["version"],
        revision=row["revision"],
        created_revision=row["created_revision"],
        created_at=datetime.fromisoformat(row["created_at"]),
        modified_at=datetime.fromisoformat(row["modified_at"]),
        creator_id=row["creator_id"],
        creator_class=row["creator_class"],
    )


def _node(row: Json) -> Node:
    return Node(
        id=UUID(row["id"]),
        site_id=UUID(row["site_id"]),
        name=row["name"],
        public_key_pem=row["public_key_pem"],
        revision=row["revision"],
        created_at=datetime.fromisoformat(row["created_at"]),
        gateways=row["gateways"],
        gateway_listener=row["gateway_listener"],
        ipsec=row["ipsec"],
        revoked_at=datetime.fromisoformat(row["revoked_at"]) if row["revoked_at"] else None,
        lost_at=datetime.fromisoformat(row["lost_at"]) if row["lost_at"] else None,
        exports=row["exports"],
        exports_revision=row["exports_revision"],
    )


async def revisions(database: Database) -> dict[UUID, int]:
    """Of every tenant: what a cache compares itself with when it may have missed a notification."""
    async with database.definer() as connection:
        rows = await connection.execute(text("SELECT id, revision FROM tenant_list()"))
        return {row.id: row.revision for row in rows}


_RAISE = text("""
    UPDATE tenants SET revision = revision + 1 WHERE id = :tenant_id
    RETURNING revision, pg_notify(:channel, id || ':' || revision)
""")


async def raise_revision(session: AsyncSession, tenant_id: UUID) -> int:
    """Something that compilers look at changes in this transaction: the tenant's next revision, announced when it commits.

    Raises `NotFound` if the tenant was deleted a moment ago.
    """
    revision: int | None = (await session.execute(_RAISE, {"tenant_id": tenant_id, "channel": INTENT_CHANNEL})).scalar()
    if revision is None:
        raise NotFound("the tenant was deleted")
    return revision


_ANCHORS = text("""
    UPDATE tenants SET revision = revision + 1, anchors_revision = revision + 1,
        revocations = CASE WHEN :edge_revoked THEN revocations || jsonb_build_object(CAST(:edges AS text), revision + 1) ELSE revocations END
    WHERE id = :tenant_id
    RETURNING revision, pg_notify(:channel, id || ':' || revision)
""")


async def raise_anchors_revision(session: AsyncSession, tenant_id: UUID, *, edge_revoked: bool) -> int:
    """As `raise_revision`: what sites of the tenant trust changes in this transaction, maybe because a node of a regional edge was revoked."""
    given = {"tenant_id": tenant_id, "channel": INTENT_CHANNEL, "edges": EDGES, "edge_revoked": edge_revoked}
    revision: int = (await session.execute(_ANCHORS, given)).scalar_one()
    return revision


async def anchors_revision(session: AsyncSession, tenant_id: UUID) -> int:
    """At which what sites of the tenant trust last changed."""
    return await session.scalar(select(TenantRow.anchors_revision).where(TenantRow.id == tenant_id)) or 0


async def announce_status(session: AsyncSession, tenant_id: UUID) -> None:
    """Who waits for the tenant's sites may look again, once this transaction commits."""
    await session.execute(select(func.pg_notify(STATUS_CHANNEL, str(tenant_id))))
