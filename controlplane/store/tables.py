"""Every table. Those that belong to a tenant lead their primary key with it, and row-level security shows them only to it.

Models for queries and for the comparison with the migrations; the migrations are what makes the tables. Timestamps are UTC.
"""

from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Boolean,
    DateTime,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING = {
    "pk": "%(table_name)s_pkey",
    "uq": "%(table_name)s_%(column_0_N_name)s_key",
    "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
}

Json = dict[str, Any]


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: Text(),
        int: BigInteger(),
        float: Double(),
        bool: Boolean(),
        bytes: LargeBinary(),
        datetime: DateTime(timezone=True),
        UUID: Uuid(),
        dict[str, Any]: JSONB(),
        list[Any]: JSONB(),
        dict[str, str]: JSONB(),
        dict[str, int]: JSONB(),
        list[str]: JSONB(),
    }


class OfTenant:
    """Rows that only their tenant sees."""

    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True, sort_order=-2)


class TenantRow(Base):
    __tablename__ = "tenants"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    revision: Mapped[int] = mapped_column(server_default=text("0"))
    """Raised by one in every transaction that changes intent; its row lock puts a tenant's writers in line."""
    anchors_revision: Mapped[int] = mapped_column(server_default=text("0"))
    """That at which the anchors of its sites, or what they revoke, last changed."""
    revocations: Mapped[dict[str, int]] = mapped_column(server_default=text("'{}'"))
    """See `Site.revocations` of the items."""
    claimed_edges: Mapped[str] = mapped_column(server_default="")
    """Hash of the regional edges with which the tenant's claims were last brought up to date."""
    created_at: Mapped[datetime]


# What users want


class ResourceRow(OfTenant, Base):
    """An accepted object of a kind of `controlplane.resources.registry`."""

    __tablename__ = "resources"
    __table_args__ = (
        UniqueConstraint("tenant_id", "uid"),
        Index(None, "tenant_id", "revision"),
        Index(None, "tenant_id", "namespace", "kind"),
    )

    kind: Mapped[str] = mapped_column(primary_key=True)
    namespace: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    uid: Mapped[UUID]
    version: Mapped[int]
    revision: Mapped[int]
    created_revision: Mapped[int]
    created_at: Mapped[datetime]
    modified_at: Mapped[datetime]
    creator_id: Mapped[str] = mapped_column(server_default=text("''"))
    creator_class: Mapped[str] = mapped_column(server_default=text("''"))
    meta: Mapped[Json] = mapped_column("metadata")
    spec: Mapped[Json]


class DeletionRow(OfTenant, Base):
    """Tombstone: lets a cache catch up from any revision; kept for longer than a cache goes without reading everything anew."""

    __tablename__ = "deletions"

    revision: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    uid: Mapped[UUID] = mapped_column(primary_key=True)
    namespace: Mapped[str]
    name: Mapped[str]
    deleted_at: Mapped[datetime]


def _resource_key() -> ForeignKeyConstraint:
    own = ("tenant_id", "kind", "namespace", "name")
    return ForeignKeyConstraint(own, [f"resources.{column}" for column in own], ondelete="CASCADE")


class RefRow(OfTenant, Base):
    """That one object needs another; `path` is the first place where it says so."""

    __tablename__ = "refs"
    __table_args__ = (
        _resource_key(),
        Index(None, "tenant_id", "to_kind", "to_namespace", "to_name"),
    )

    kind: Mapped[str] = mapped_column(primary_key=True)
    namespace: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    to_kind: Mapped[str] = mapped_column(primary_key=True)
    to_namespace: Mapped[str] = mapped_column(primary_key=True)
    to_name: Mapped[str] = mapped_column(primary_key=True)
    path: Mapped[str]


class ListenerRow(OfTenant, Base):
    """A place where a site listens. It has one protocol, and the claims on it must agree with that."""

    __tablename__ = "listeners"
    __table_args__ = (UniqueConstraint("tenant_id", "site_id", "network", "address", "port", "protocol", name="listeners_protocol_key"),)

    site_id: Mapped[UUID] = mapped_column(primary_key=True)
    network: Mapped[str] = mapped_column(primary_key=True)
    address: Mapped[str] = mapped_column(primary_key=True)
    port: Mapped[int] = mapped_column(Integer, primary_key=True)
    protocol: Mapped[str]


class ListenerClaimRow(OfTenant, Base):
    """Who owns a domain on a listener; the domain of TCP load balancers is empty, so there is room for one."""

    __tablename__ = "listener_claims"
    __table_args__ = (
        ForeignKeyConstraint(
            ["tenant_id", "site_id", "network", "address", "port", "protocol"],
            [f"listeners.{column}" for column in ("tenant_id", "site_id", "network", "address", "port", "protocol")],
            name="listener_claims_protocol_fkey",
        ),
        _resource_key(),
        Index(None, "tenant_id", "kind", "namespace", "name"),
    )

    site_id: Mapped[UUID] = mapped_column(primary_key=True)
    network: Mapped[str] = mapped_column(primary_key=True)
    address: Mapped[str] = mapped_column(primary_key=True)
    port: Mapped[int] = mapped_column(Integer, primary_key=True)
    domain: Mapped[str] = mapped_column(primary_key=True)
    protocol: Mapped[str]
    kind: Mapped[str]
    namespace: Mapped[str]
    name: Mapped[str]


class ListenerWaitRow(OfTenant, Base):
    """A load balancer that has not all that it claims, since somebody else was there when a site joined."""

    __tablename__ = "listener_waits"
    __table_args__ = (_resource_key(),)

    kind: Mapped[str] = mapped_column(primary_key=True)
    namespace: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)


class SecretRow(OfTenant, Base):
    """A secret of an object, sealed under the key-encryption key; it goes with the object."""

    __tablename__ = "secrets"
    __table_args__ = (
        _resource_key(),
        Index(None, "tenant_id", "kind", "namespace", "name"),
    )

    uid: Mapped[UUID] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    sealed: Mapped[bytes]
    kind: Mapped[str]
    namespace: Mapped[str]
    name: Mapped[str]


class AuditRow(OfTenant, Base):
    """Who changed what. The application may add rows and read them, nothing else."""

    __tablename__ = "audit_log"
    __table_args__ = (Index(None, "tenant_id", "at"),)

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    at: Mapped[datetime]
    credential: Mapped[str]
    credential_id: Mapped[UUID | None]
    operator: Mapped[bool]
    rpc: Mapped[str]
    """As in F5 XC: `ves.io.schema.<kind>.API.Create`."""
    namespace: Mapped[str]
    name: Mapped[str]
    uid: Mapped[UUID | None]
    revision: Mapped[int | None]
    object: Mapped[Json | None]


class CredentialRow(OfTenant, Base):
    """An API token, of which only the hash is kept."""

    __tablename__ = "credentials"
    __table_args__ = (UniqueConstraint("tenant_id", "service", "name"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    namespace: Mapped[str]
    service: Mapped[bool]
    """Whether it is a `service_credential`: bound to no person."""
    type: Mapped[str]
    hash: Mapped[bytes] = mapped_column(unique=True)
    """SHA-256 of the token."""
    operator: Mapped[bool]
    active: Mapped[bool]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]


# Sites and their nodes


class TokenRow(OfTenant, Base):
    """A registration token. The token itself is a signed JWT and is not kept."""

    __tablename__ = "tokens"
    __table_args__ = (UniqueConstraint("tenant_id", "name"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    meta: Mapped[Json] = mapped_column("metadata")
    site_name: Mapped[str | None]
    """None: the token may bring any new site."""
    approve: Mapped[bool]
    """Whether its bearers are admitted without a person's approval."""
    edge: Mapped[bool]
    """Whether the operator made it for a regional edge."""
    uses: Mapped[int]
    max_uses: Mapped[int]
    """0: unlimited."""
    created_at: Mapped[datetime]
    creator_id: Mapped[str] = mapped_column(server_default=text("''"))
    creator_class: Mapped[str] = mapped_column(server_default=text("''"))
    expires_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]


class RegistrationRow(OfTenant, Base):
    """A node that asked to become part of a site."""

    __tablename__ = "registrations"
    __table_args__ = (
        UniqueConstraint("tenant_id", "key_hash"),
        Index(None, "tenant_id", "state"),
        Index(None, "tenant_id", "site_name"),
    )

    name: Mapped[str] = mapped_column(primary_key=True)
    uid: Mapped[UUID]
    token_id: Mapped[UUID]
    key_hash: Mapped[bytes]
    """SHA-256 of the public key in the CSR: enrolment is idempotent per key."""
    csr_pem: Mapped[str]
    state: Mapped[str]
    site_name: Mapped[str]
    site_id: Mapped[UUID | None]
    node_id: Mapped[UUID | None]
    node_name: Mapped[str]
    passport: Mapped[Json]
    infra: Mapped[Json]
    labels: Mapped[dict[str, str]]
    annotations: Mapped[dict[str, str]]
    tunnel_type: Mapped[str | None]
    """What its site's is to be; empty: what it is."""
    clock_skew_s: Mapped[float | None]
    created_at: Mapped[datetime]
    state_at: Mapped[datetime]


class NodeRow(OfTenant, Base):
    """An admitted node: one agent and its Envoy."""

    __tablename__ = "nodes"
    __table_args__ = (
        Index("nodes_live_name_key", "tenant_id", "site_id", "name", unique=True, postgresql_where=text("revoked_at IS NULL")),
        Index("nodes_id_idx", "id", unique=True),
        Index(None, "tenant_id", "revision"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    site_id: Mapped[UUID]
    name: Mapped[str]
    public_key_pem: Mapped[str]
    certificate_pem: Mapped[str]
    certificate_expires_at: Mapped[datetime]
    leaves: Mapped[list[Any]] = mapped_column(server_default=text("'[]'"))
    """Serial (hex), end (Unix seconds) and issuer (key identifier) of each certificate that it was given and that has not expired."""
    gateways: Mapped[list[Any]]
    """Of `agent.protocol.items.Gateway`."""
    gateway_listener: Mapped[Json | None]
    """An `agent.protocol.report.GatewayListener`."""
    ipsec: Mapped[Json | None]
    """An `agent.protocol.report.IpsecAbility`."""
    exports: Mapped[Json | None]
    """An `agent.protocol.report.MultiClusterServices`."""
    exports_revision: Mapped[int] = mapped_column(server_default=text("0"))
    """The tenant's revision at which it last said so: of the nodes of a site, the last one is right."""
    revision: Mapped[int]
    """The tenant's revision at which key, gateways, their listener, IPsec, exports, revocation or loss last changed, so that caches can catch up."""
    created_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    lost_at: Mapped[datetime | None]
    """Since when its site counts as lost."""


class HomeEdgesRow(OfTenant, Base):
    """The regional edges to which a customer edge is connected."""

    __tablename__ = "home_edges"
    __table_args__ = (Index(None, "tenant_id", "revision"),)

    site_id: Mapped[UUID] = mapped_column(primary_key=True)
    edges: Mapped[list[str]]
    """Ids, in the order of use."""
    basis: Mapped[Json]
    """What of the site they were chosen by."""
    revision: Mapped[int]
    """The tenant's revision at which they were chosen."""


class PublicClaimRow(OfTenant, Base):
    """A public name, which belongs to one tenant of all."""

    __tablename__ = "public_claims"
    __table_args__ = (UniqueConstraint("name"),)

    name: Mapped[str] = mapped_column(primary_key=True)
    """A domain with all that is under it, or a port of the regional edges, written `:8443`."""
    granted: Mapped[bool]
    """Whether the operator gave it; otherwise its DNS proved it."""
    created_at: Mapped[datetime]


class OfNode(OfTenant):
    """Rows about a node, which go with it."""

    node_id: Mapped[UUID] = mapped_column(primary_key=True, sort_order=-1)


def _node_key() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(["tenant_id", "node_id"], ["nodes.tenant_id", "nodes.id"], ondelete="CASCADE")


class NodeStatusRow(OfNode, Base):
    """The last heartbeat of a node."""

    __tablename__ = "node_status"
    __table_args__ = (_node_key(),)

    boot_id: Mapped[str]
    sequence: Mapped[int]
    last_heartbeat_at: Mapped[datetime]
    applied_hash: Mapped[str | None]
    applied_revision: Mapped[int]
    rejected: Mapped[list[Any]]
    proxy: Mapped[str]
    warnings: Mapped[list[str]]
    clock_skew_s: Mapped[float]
    version: Mapped[str]
    issuer: Mapped[str] = mapped_column(server_default=text("''"))
    """Key identifier of the authority that signed the certificate which the node uses, as it says."""
    twin_at: Mapped[datetime | None]
    """When a boot was last heard of that another had replaced."""
    replaced: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    """Earlier boots whose proofs may still be repeated, and when each was replaced, in Unix seconds."""


class DiscoveryReportRow(OfNode, Base):
    __tablename__ = "discovery_reports"
    __table_args__ = (_node_key(),)

    discovery: Mapped[str] = mapped_column(primary_key=True)
    connected: Mapped[bool]
    reason: Mapped[str]
    services: Mapped[list[Any] | None]
    reported_at: Mapped[datetime]


class OriginReportRow(OfNode, Base):
    __tablename__ = "origin_reports"
    __table_args__ = (_node_key(),)

    pool: Mapped[str] = mapped_column(primary_key=True)
    healthy: Mapped[int]
    total: Mapped[int]
    reported_at: Mapped[datetime]


class PeerReportRow(OfNode, Base):
    """One path from a node to a peer."""

    __tablename__ = "peer_reports"
    __table_args__ = (_node_key(),)

    site_id: Mapped[str] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(primary_key=True)
    report: Mapped[Json]
    """An `agent.protocol.report.PeerHealth`."""
    reported_at: Mapped[datetime]


class EdgeReportRow(OfNode, Base):
    """A node's reverse tunnels to one regional edge."""

    __tablename__ = "edge_reports"
    __table_args__ = (_node_key(),)

    site_id: Mapped[str] = mapped_column(primary_key=True)
    """Of the edge."""
    report: Mapped[Json]
    """An `agent.protocol.report.EdgeHealth`."""
    reported_at: Mapped[datetime]


class MetricRollupRow(OfTenant, Base):
    """What load balancers served from one site to another in ten seconds."""

    __tablename__ = "metric_rollups"
    __table_args__ = (Index(None, "bucket"),)

    bucket: Mapped[datetime] = mapped_column(primary_key=True)
    load_balancer: Mapped[str] = mapped_column(primary_key=True)
    protocol: Mapped[str] = mapped_column(primary_key=True)
    source_site: Mapped[str] = mapped_column(primary_key=True)
    destination_site: Mapped[str] = mapped_column(primary_key=True)
    requests: Mapped[dict[str, int]]
    latency_ms: Mapped[dict[str, int]]
    latency_sum_ms: Mapped[float]
    bytes_sent: Mapped[int]
    bytes_received: Mapped[int]


class MetricSequenceRow(OfNode, Base):
    """The last metrics report taken from a boot of a node: duplicates are dropped."""

    __tablename__ = "metric_sequences"
    __table_args__ = (_node_key(),)

    boot_id: Mapped[str] = mapped_column(primary_key=True)
    sequence: Mapped[int]


class ProofRow(OfTenant, Base):
    """Proofs of possession that were used, until they expire. Unlogged: a crash of Postgres may forget a minute of them."""

    __tablename__ = "proofs"
    __table_args__ = (Index(None, "expires_at"), {"prefixes": ["UNLOGGED"]})

    node_id: Mapped[UUID] = mapped_column(primary_key=True)
    jti: Mapped[str] = mapped_column(primary_key=True)
    expires_at: Mapped[datetime]


# The fabric


class AuthorityRow(Base):
    """A certificate authority. Those without a tenant are the fabric's; every tenant sees them, and none sees another's."""

    __tablename__ = "authorities"
    __table_args__ = (UniqueConstraint("role", "tenant_id", "version", name="authorities_role_key", postgresql_nulls_not_distinct=True),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    role: Mapped[str]
    """`root`, `servers`, `edges`, `tokens` (signs registration tokens) or `tenant`."""
    tenant_id: Mapped[UUID | None] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    version: Mapped[int]
    state: Mapped[str]
    """`added`, `active` (it signs; one of each role), `retiring` or `removed`. All but the last are trusted."""
    state_at: Mapped[datetime]
    certificate_pem: Mapped[str]
    crl_pem: Mapped[str] = mapped_column(server_default=text("''"))
    """Certificates of nodes that it signed and that were revoked before they expired; empty as long as its role has none."""
    sealed_key: Mapped[bytes]
    created_at: Mapped[datetime]


class SettingRow(Base):
    """Facts that all replicas share, such as the trust domain."""

    __tablename__ = "settings"

    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[Json]
