"""All tables, what tenants may see of them, and the few reads across tenants.

The owner of the tables runs this; the application connects as another role, to which `controlplane.store.schema` grants what it needs.
Policies compare with `current_tenant()`, which is null outside a tenant's transaction: then there are no rows.
"""

from alembic import op

revision = "0001"
down_revision = None

TENANT = "tenant_id uuid NOT NULL REFERENCES tenants ON DELETE CASCADE"
OF_RESOURCE = "FOREIGN KEY (tenant_id, kind, namespace, name) REFERENCES resources ON DELETE CASCADE"
OF_NODE = "FOREIGN KEY (tenant_id, node_id) REFERENCES nodes ON DELETE CASCADE"

TABLES = f"""
CREATE TABLE tenants (
    id uuid PRIMARY KEY,
    name text NOT NULL UNIQUE,
    revision bigint NOT NULL DEFAULT 0,
    anchors_revision bigint NOT NULL DEFAULT 0,
    revocations jsonb NOT NULL DEFAULT '{{}}',
    claimed_edges text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL
);

CREATE TABLE resources (
    {TENANT},
    kind text,
    namespace text,
    name text,
    uid uuid NOT NULL,
    version bigint NOT NULL,
    revision bigint NOT NULL,
    created_revision bigint NOT NULL,
    created_at timestamptz NOT NULL,
    modified_at timestamptz NOT NULL,
    creator_id text NOT NULL DEFAULT '',
    creator_class text NOT NULL DEFAULT '',
    metadata jsonb NOT NULL,
    spec jsonb NOT NULL,
    PRIMARY KEY (tenant_id, kind, namespace, name),
    UNIQUE (tenant_id, uid)
);
CREATE INDEX ON resources (tenant_id, revision);
CREATE INDEX ON resources (tenant_id, namespace, kind);

CREATE TABLE deletions (
    {TENANT},
    revision bigint,
    kind text,
    uid uuid,
    namespace text NOT NULL,
    name text NOT NULL,
    deleted_at timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, revision, kind, uid)
);

CREATE TABLE refs (
    {TENANT},
    kind text,
    namespace text,
    name text,
    to_kind text,
    to_namespace text,
    to_name text,
    path text NOT NULL,
    PRIMARY KEY (tenant_id, kind, namespace, name, to_kind, to_namespace, to_name),
    {OF_RESOURCE}
);
CREATE INDEX ON refs (tenant_id, to_kind, to_namespace, to_name);

CREATE TABLE listeners (
    {TENANT},
    site_id uuid,
    network text,
    address text,
    port integer,
    protocol text NOT NULL,
    PRIMARY KEY (tenant_id, site_id, network, address, port),
    CONSTRAINT listeners_protocol_key UNIQUE (tenant_id, site_id, network, address, port, protocol)
);

CREATE TABLE listener_claims (
    {TENANT},
    site_id uuid,
    network text,
    address text,
    port integer,
    domain text,
    protocol text NOT NULL,
    kind text NOT NULL,
    namespace text NOT NULL,
    name text NOT NULL,
    PRIMARY KEY (tenant_id, site_id, network, address, port, domain),
    CONSTRAINT listener_claims_protocol_fkey FOREIGN KEY (tenant_id, site_id, network, address, port, protocol)
        REFERENCES listeners (tenant_id, site_id, network, address, port, protocol),
    {OF_RESOURCE}
);
CREATE INDEX ON listener_claims (tenant_id, kind, namespace, name);

CREATE TABLE listener_waits (
    {TENANT},
    kind text,
    namespace text,
    name text,
    PRIMARY KEY (tenant_id, kind, namespace, name),
    {OF_RESOURCE}
);

CREATE TABLE secrets (
    {TENANT},
    uid uuid,
    version bigint,
    sealed bytea NOT NULL,
    kind text NOT NULL,
    namespace text NOT NULL,
    name text NOT NULL,
    PRIMARY KEY (tenant_id, uid, version),
    {OF_RESOURCE}
);
CREATE INDEX ON secrets (tenant_id, kind, namespace, name);

CREATE TABLE audit_log (
    {TENANT},
    id bigint GENERATED ALWAYS AS IDENTITY,
    at timestamptz NOT NULL,
    credential text NOT NULL,
    credential_id uuid,
    operator boolean NOT NULL,
    rpc text NOT NULL,
    namespace text NOT NULL,
    name text NOT NULL,
    uid uuid,
    revision bigint,
    object jsonb,
    PRIMARY KEY (tenant_id, id)
);
CREATE INDEX ON audit_log (tenant_id, at);

CREATE TABLE credentials (
    {TENANT},
    id uuid,
    name text NOT NULL,
    namespace text NOT NULL,
    service boolean NOT NULL,
    type text NOT NULL,
    hash bytea NOT NULL UNIQUE,
    operator boolean NOT NULL,
    active boolean NOT NULL,
    created_at timestamptz NOT NULL,
    expires_at timestamptz,
    PRIMARY KEY (tenant_id, id),
    UNIQUE (tenant_id, service, name)
);

CREATE TABLE tokens (
    {TENANT},
    id uuid,
    name text NOT NULL,
    metadata jsonb NOT NULL,
    site_name text,
    approve boolean NOT NULL,
    edge boolean NOT NULL,
    uses bigint NOT NULL,
    max_uses bigint NOT NULL,
    created_at timestamptz NOT NULL,
    creator_id text NOT NULL DEFAULT '',
    creator_class text NOT NULL DEFAULT '',
    expires_at timestamptz NOT NULL,
    revoked_at timestamptz,
    PRIMARY KEY (tenant_id, id),
    UNIQUE (tenant_id, name)
);

CREATE TABLE registrations (
    {TENANT},
    name text,
    uid uuid NOT NULL,
    token_id uuid NOT NULL,
    key_hash bytea NOT NULL,
    csr_pem text NOT NULL,
    state text NOT NULL,
    site_name text NOT NULL,
    site_id uuid,
    node_id uuid,
    node_name text NOT NULL,
    passport jsonb NOT NULL,
    infra jsonb NOT NULL,
    labels jsonb NOT NULL,
    annotations jsonb NOT NULL,
    tunnel_type text,
    clock_skew_s double precision,
    created_at timestamptz NOT NULL,
    state_at timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, name),
    UNIQUE (tenant_id, key_hash)
);
CREATE INDEX ON registrations (tenant_id, state);
CREATE INDEX ON registrations (tenant_id, site_name);

CREATE TABLE nodes (
    {TENANT},
    id uuid,
    site_id uuid NOT NULL,
    name text NOT NULL,
    public_key_pem text NOT NULL,
    certificate_pem text NOT NULL,
    certificate_expires_at timestamptz NOT NULL,
    leaves jsonb NOT NULL DEFAULT '[]',
    gateways jsonb NOT NULL,
    gateway_listener jsonb,
    ipsec jsonb,
    exports jsonb,
    exports_revision bigint NOT NULL DEFAULT 0,
    revision bigint NOT NULL,
    created_at timestamptz NOT NULL,
    revoked_at timestamptz,
    lost_at timestamptz,
    PRIMARY KEY (tenant_id, id)
);
CREATE INDEX ON nodes (tenant_id, revision);
CREATE UNIQUE INDEX nodes_id_idx ON nodes (id);
CREATE UNIQUE INDEX nodes_live_name_key ON nodes (tenant_id, site_id, name) WHERE revoked_at IS NULL;

CREATE TABLE home_edges (
    {TENANT},
    site_id uuid,
    edges jsonb NOT NULL,
    basis jsonb NOT NULL,
    revision bigint NOT NULL,
    PRIMARY KEY (tenant_id, site_id)
);
CREATE INDEX ON home_edges (tenant_id, revision);

CREATE TABLE public_claims (
    {TENANT},
    name text,
    granted boolean NOT NULL,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, name),
    UNIQUE (name)
);

CREATE TABLE node_status (
    {TENANT},
    node_id uuid,
    boot_id text NOT NULL,
    sequence bigint NOT NULL,
    last_heartbeat_at timestamptz NOT NULL,
    applied_hash text,
    applied_revision bigint NOT NULL,
    rejected jsonb NOT NULL,
    proxy text NOT NULL,
    warnings jsonb NOT NULL,
    clock_skew_s double precision NOT NULL,
    version text NOT NULL,
    issuer text NOT NULL DEFAULT '',
    twin_at timestamptz,
    replaced jsonb NOT NULL DEFAULT '{{}}',
    PRIMARY KEY (tenant_id, node_id),
    {OF_NODE}
);

CREATE TABLE discovery_reports (
    {TENANT},
    node_id uuid,
    discovery text,
    connected boolean NOT NULL,
    reason text NOT NULL,
    services jsonb,
    reported_at timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, node_id, discovery),
    {OF_NODE}
);

CREATE TABLE origin_reports (
    {TENANT},
    node_id uuid,
    pool text,
    healthy bigint NOT NULL,
    total bigint NOT NULL,
    reported_at timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, node_id, pool),
    {OF_NODE}
);

CREATE TABLE peer_reports (
    {TENANT},
    node_id uuid,
    site_id text,
    path text,
    report jsonb NOT NULL,
    reported_at timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, node_id, site_id, path),
    {OF_NODE}
);

CREATE TABLE edge_reports (
    {TENANT},
    node_id uuid,
    site_id text,
    report jsonb NOT NULL,
    reported_at timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, node_id, site_id),
    {OF_NODE}
);

CREATE TABLE metric_rollups (
    {TENANT},
    bucket timestamptz,
    load_balancer text,
    protocol text,
    source_site text,
    destination_site text,
    requests jsonb NOT NULL,
    latency_ms jsonb NOT NULL,
    latency_sum_ms double precision NOT NULL,
    bytes_sent bigint NOT NULL,
    bytes_received bigint NOT NULL,
    PRIMARY KEY (tenant_id, bucket, load_balancer, protocol, source_site, destination_site)
);
CREATE INDEX ON metric_rollups (bucket);

CREATE TABLE metric_sequences (
    {TENANT},
    node_id uuid,
    boot_id text,
    sequence bigint NOT NULL,
    PRIMARY KEY (tenant_id, node_id, boot_id),
    {OF_NODE}
);

CREATE UNLOGGED TABLE proofs (
    {TENANT},
    node_id uuid,
    jti text,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, node_id, jti)
);
CREATE INDEX ON proofs (expires_at);

CREATE TABLE authorities (
    id uuid PRIMARY KEY,
    role text NOT NULL,
    tenant_id uuid REFERENCES tenants ON DELETE CASCADE,
    version bigint NOT NULL,
    state text NOT NULL,
    state_at timestamptz NOT NULL,
    certificate_pem text NOT NULL,
    crl_pem text NOT NULL DEFAULT '',
    sealed_key bytea NOT NULL,
    created_at timestamptz NOT NULL,
    CONSTRAINT authorities_role_key UNIQUE NULLS NOT DISTINCT (role, tenant_id, version)
);

CREATE TABLE settings (
    key text PRIMARY KEY,
    value jsonb NOT NULL
);
"""

OF_TENANT = (
    "resources",
    "deletions",
    "refs",
    "listeners",
    "listener_claims",
    "listener_waits",
    "secrets",
    "audit_log",
    "credentials",
    "tokens",
    "registrations",
    "nodes",
    "home_edges",
    "public_claims",
    "node_status",
    "discovery_reports",
    "origin_reports",
    "peer_reports",
    "edge_reports",
    "metric_rollups",
    "metric_sequences",
    "proofs",
)

CURRENT_TENANT = """
CREATE FUNCTION current_tenant() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE
    AS $$ SELECT nullif(current_setting('isthmus.tenant', true), '')::uuid $$
"""

# Reads and sweeps across tenants. Each gives only what its caller needs, and runs as the owner.
DEFINER = "LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp"
FUNCTIONS = {
    "credential_by_hash(bytea)": f"""
        CREATE FUNCTION credential_by_hash(wanted bytea)
        RETURNS TABLE (tenant_id uuid, tenant text, id uuid, name text, operator boolean, active boolean, expires_at timestamptz)
        STABLE {DEFINER} AS $$
            SELECT c.tenant_id, t.name, c.id, c.name, c.operator, c.active, c.expires_at
            FROM credentials c JOIN tenants t ON t.id = c.tenant_id WHERE c.hash = wanted
        $$""",
    "node_by_id(uuid)": f"""
        CREATE FUNCTION node_by_id(wanted uuid)
        RETURNS TABLE (tenant_id uuid, tenant text, site_id uuid, name text, public_key_pem text, revoked_at timestamptz)
        STABLE {DEFINER} AS $$
            SELECT n.tenant_id, t.name, n.site_id, n.name, n.public_key_pem, n.revoked_at
            FROM nodes n JOIN tenants t ON t.id = n.tenant_id WHERE n.id = wanted
        $$""",
    "site_leases(uuid)": f"""
        CREATE FUNCTION site_leases(wanted uuid)
        RETURNS TABLE (tenant_id uuid, site_id uuid, nodes bigint, heard_at timestamptz, lost_at timestamptz, lost boolean)
        STABLE {DEFINER} AS $$
            SELECT n.tenant_id, n.site_id, count(*), max(s.last_heartbeat_at), max(n.lost_at), bool_and(n.lost_at IS NOT NULL)
            FROM nodes n LEFT JOIN node_status s ON s.tenant_id = n.tenant_id AND s.node_id = n.id
            WHERE n.revoked_at IS NULL AND (wanted IS NULL OR n.tenant_id = wanted) GROUP BY n.tenant_id, n.site_id
        $$""",
    "tenant_by_name(text)": f"""
        CREATE FUNCTION tenant_by_name(wanted text) RETURNS TABLE (id uuid)
        STABLE {DEFINER} AS $$ SELECT t.id FROM tenants t WHERE t.name = wanted $$""",
    "tenant_list()": f"""
        CREATE FUNCTION tenant_list() RETURNS TABLE (id uuid, name text, revision bigint, created_at timestamptz)
        STABLE {DEFINER} AS $$ SELECT t.id, t.name, t.revision, t.created_at FROM tenants t ORDER BY t.name $$""",
    "sealed_under()": f"""
        CREATE FUNCTION sealed_under() RETURNS TABLE (version bigint, amount bigint)
        STABLE {DEFINER} AS $$
            SELECT ('x' || encode(substring(sealed FOR 4), 'hex'))::bit(32)::bigint AS version, count(*)
            FROM (SELECT sealed FROM secrets UNION ALL SELECT sealed_key FROM authorities WHERE state <> 'removed') everything
            GROUP BY 1
        $$""",
    "edge_list()": f"""
        CREATE FUNCTION edge_list() RETURNS TABLE (tenant_id uuid, revision bigint, site jsonb, gateways jsonb)
        STABLE {DEFINER} AS $$
            SELECT t.id, t.revision, to_jsonb(r), (
                SELECT jsonb_agg(g ORDER BY n.id) FROM nodes n, jsonb_array_elements(n.gateways) g
                WHERE n.tenant_id = t.id AND n.site_id = r.uid AND n.revoked_at IS NULL
            )
            FROM tenants t LEFT JOIN resources r
                ON r.tenant_id = t.id AND r.kind = 'site' AND r.spec ->> 'site_type' = 'REGIONAL_EDGE'
            WHERE t.name = 'default'
        $$""",
    "edge_shares(uuid[])": f"""
        CREATE FUNCTION edge_shares(wanted uuid[])
        RETURNS TABLE (tenant_id uuid, revision bigint, anchor_pem text, crl_pem text, sites jsonb, public boolean, revocations jsonb)
        STABLE {DEFINER} AS $$
            SELECT t.id, t.revision, trusted.anchor_pem, trusted.crl_pem, (
                SELECT coalesce(jsonb_agg(r.uid ORDER BY r.uid), '[]') FROM resources r
                WHERE r.tenant_id = t.id AND r.kind = 'site' AND r.spec ->> 'site_type' = 'CUSTOMER_EDGE'
                  AND NOT (r.metadata ->> 'disable')::boolean
                  AND EXISTS (SELECT FROM nodes n WHERE n.tenant_id = t.id AND n.site_id = r.uid AND n.revoked_at IS NULL)
            ), EXISTS (SELECT FROM public_claims c WHERE c.tenant_id = t.id), t.revocations
            FROM tenants t CROSS JOIN LATERAL (
                SELECT coalesce(string_agg(a.certificate_pem, '' ORDER BY a.version DESC), '') AS anchor_pem,
                    coalesce(string_agg(a.crl_pem, '' ORDER BY a.version DESC), '') AS crl_pem
                FROM authorities a WHERE a.tenant_id = t.id AND a.role = 'tenant' AND a.state <> 'removed'
            ) trusted WHERE wanted IS NULL OR t.id = ANY (wanted)
        $$""",
    "edge_status_list()": f"""
        CREATE FUNCTION edge_status_list() RETURNS SETOF node_status
        STABLE {DEFINER} AS $$
            SELECT s.* FROM tenants t
            JOIN resources r ON r.tenant_id = t.id AND r.kind = 'site' AND r.spec ->> 'site_type' = 'REGIONAL_EDGE'
            JOIN nodes n ON n.tenant_id = t.id AND n.site_id = r.uid
            JOIN node_status s ON s.tenant_id = t.id AND s.node_id = n.id
            WHERE t.name = 'default'
        $$""",
    "public_claim_list()": f"""
        CREATE FUNCTION public_claim_list() RETURNS TABLE (name text, tenant text, granted boolean, created_at timestamptz)
        STABLE {DEFINER} AS $$
            SELECT c.name, t.name, c.granted, c.created_at FROM public_claims c JOIN tenants t ON t.id = c.tenant_id ORDER BY c.name
        $$""",
    "public_name_is_taken(text, uuid)": f"""
        CREATE FUNCTION public_name_is_taken(wanted text, by_another_than uuid) RETURNS boolean
        STABLE {DEFINER} AS $$
            SELECT EXISTS (
                SELECT FROM public_claims c WHERE c.tenant_id <> by_another_than AND (
                    c.name = wanted OR right(c.name, length(wanted) + 1) = '.' || wanted OR right(wanted, length(c.name) + 1) = '.' || c.name
                )
            )
        $$""",
    "retain(timestamptz, timestamptz, timestamptz)": f"""
        CREATE FUNCTION retain(rollups_since timestamptz, audit_since timestamptz, deletions_since timestamptz) RETURNS void
        VOLATILE {DEFINER} AS $$
            DELETE FROM proofs WHERE expires_at < now();
            DELETE FROM metric_rollups WHERE bucket < rollups_since;
            DELETE FROM audit_log WHERE at < audit_since;
            DELETE FROM deletions WHERE deleted_at < deletions_since
        $$""",
}


def upgrade() -> None:
    op.execute(TABLES)
    op.execute(CURRENT_TENANT)
    _show_only("tenants", "id = current_tenant()")
    _show_only("authorities", "tenant_id IS NULL OR tenant_id = current_tenant()")
    for table in OF_TENANT:
        _show_only(table, "tenant_id = current_tenant()")
    for signature, body in FUNCTIONS.items():
        op.execute(body)
        op.execute(f"REVOKE EXECUTE ON FUNCTION {signature} FROM PUBLIC")


def _show_only(table: str, condition: str) -> None:
    op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY tenant ON {table} USING ({condition})")


def downgrade() -> None:
    for signature in FUNCTIONS:
        op.execute(f"DROP FUNCTION {signature}")
    op.execute(f"DROP TABLE {', '.join(OF_TENANT)}, authorities, settings, tenants")
    op.execute("DROP FUNCTION current_tenant()")
