"""Items: what one site needs to know, each compiled once for all sites that need it.

References between items are keys: `namespace/name` for objects that users wrote, the immutable id for sites.
Durations are milliseconds unless the name says otherwise. Secrets are never here, only `SecretRef`s.
"""

from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field

from agent.protocol.base import Body, content_hash

SecretRef = Annotated[str, Field(pattern=r"^secret:[0-9a-f-]{36}:[0-9]+$")]
"""`secret:<uid>:<version>`; the body is fetched in an authenticated call of its own."""

Network = Literal["inside", "outside", "service"]


LostSites = Literal["deprioritise", "evict", "keep"]
"""How a site serves of which the control plane hears nothing: where no other one does, not at all, or as ever."""


class ItemKind(StrEnum):
    """Kinds in the order in which a reader wants to see them."""

    SITE = "site"
    LISTENER = "listener"
    HTTP_LOADBALANCER = "http_loadbalancer"
    TCP_LOADBALANCER = "tcp_loadbalancer"
    ORIGIN_POOL = "origin_pool"
    EXPORT = "export"
    PEER = "peer"
    POLICY = "policy"
    DISCOVERY = "discovery"
    EDGE = "edge"
    RELAY = "relay"
    PUBLISH = "publish"
    SERVICE_EXPORT = "service_export"


LOAD_BALANCERS: Mapping[str, ItemKind] = {
    "http": ItemKind.HTTP_LOADBALANCER,
    "https": ItemKind.HTTP_LOADBALANCER,
    "tcp": ItemKind.TCP_LOADBALANCER,
}
"""By protocol of a listener, of what is published, and of metrics."""

AnyKind = Annotated[ItemKind | Annotated[str, Field(max_length=64)], Field(union_mode="left_to_right")]
"""A kind that this version does not know is a plain string."""

NAMESPACE_LABEL = "ves.io/namespace"
"""A label that every pod has by itself, whatever else it claims: its namespace."""

EDGES = "edges"
"""Stands for the tenant in the names of regional edges' certificates."""

SHARDS = "0123456789abcdef"


def shard(site_id: str) -> str:
    """Which of `SHARDS` the site is in: the first digit of its id, so that the URI of a certificate begins with it."""
    return site_id[0]


class Site(Body):
    """The site itself; exactly one per snapshot, keyed by its id."""

    tenant_id: str
    tenant: str
    site_id: str
    name: str
    kind: Literal["customer_edge", "regional_edge"] = "customer_edge"
    labels: dict[str, str] = {}
    trust_domain: str
    peer_anchor_pem: str
    """The tenant's intermediate: the only anchor for certificates of peers. Empty on a regional edge, where each relay brings its tenant's."""
    edge_anchor_pem: str = ""
    """The intermediate of regional edges: the only anchor for theirs."""
    control_plane_anchor_pem: str = ""
    """The roots (a bundle) under which control planes are trusted."""
    root_anchor_pem: str = ""
    """The fabric's roots (a bundle). IKE trusts nothing else as an anchor, and is told besides which intermediate must have signed."""
    tunnel_dead_timeout: int = 10_000
    peer_crl_pem: str = ""
    """Certificates of peers that were revoked before they expired: lists, one for each anchor. Empty: none."""
    edge_crl_pem: str = ""
    """The same of regional edges."""
    revocations: dict[str, int] = {}
    """By `shard`, or `EDGES`: the revision at which a node of such a site was revoked last; then open streams from and to all of them end.

    On a regional edge by `<tenant id>/<shard>`.
    """


class Listener(Body):
    """Where load balancers listen on this site; key `<network>/<address or *>/<port>`."""

    network: Network
    address: str | None = None
    """A specific VIP; otherwise the node's own address on that network."""
    port: int
    protocol: Literal["http", "https", "tcp"]
    load_balancers: tuple[str, ...]
    """`namespace/name`, lowest (created revision, key) first. Exactly one for `tcp`."""


class HeaderMatch(Body):
    name: str
    exact: str | None = None
    regex: str | None = None
    present: bool | None = None
    invert: bool = False


class QueryMatch(Body):
    name: str
    exact: str | None = None
    regex: str | None = None
    present: bool | None = None


class RouteMatch(Body):
    """Exactly one of prefix, path and regex."""

    prefix: str | None = None
    path: str | None = None
    regex: str | None = None
    methods: tuple[str, ...] = ()
    """Empty means any."""
    headers: tuple[HeaderMatch, ...] = ()
    query: tuple[QueryMatch, ...] = ()
    incoming_ports: tuple[tuple[int, int], ...] = ()
    """Inclusive ranges; empty means any."""


class WeightedPool(Body):
    pool: str
    weight: int = 1
    """0 takes the pool out of use."""
    priority: int = 1
    """1 is used first, then 2, 3 …, and 0 last."""


class HeaderValue(Body):
    name: str
    value: str = ""
    secret: SecretRef | None = None
    append: bool = False


class HeaderEdits(Body):
    request_add: tuple[HeaderValue, ...] = ()
    request_remove: tuple[str, ...] = ()
    response_add: tuple[HeaderValue, ...] = ()
    response_remove: tuple[str, ...] = ()


class RetryPolicy(Body):
    num_retries: int = 2
    """0 switches retries off."""
    conditions: tuple[str, ...] = ()
    """Envoy's words. Empty means the default: whatever cannot have reached an origin, and `reset` where the method is idempotent."""
    status_codes: tuple[int, ...] = ()
    per_try_timeout: int = 0
    back_off_base: int = 25
    back_off_max: int = 250


class HashPolicy(Body):
    """One term of consistent hashing; exactly one of the three."""

    header: str | None = None
    cookie: str | None = None
    cookie_ttl: int | None = None
    cookie_path: str = ""
    source_ip: bool = False
    terminal: bool = False


class RegexRewrite(Body):
    pattern: str
    substitution: str


class Forward(Body):
    pools: tuple[WeightedPool, ...]
    timeout: int = 30_000
    """Of the whole request; 0 means none."""
    retry: RetryPolicy = RetryPolicy()
    host_rewrite: str | None = None
    auto_host_rewrite: bool = False
    prefix_rewrite: str | None = None
    regex_rewrite: RegexRewrite | None = None
    web_socket: bool = False
    web_socket_idle_timeout: int = 0
    hash_policies: tuple[HashPolicy, ...] = ()
    """Empty means the load balancer's."""


class Redirect(Body):
    host: str | None = None
    path: str | None = None
    prefix_rewrite: str | None = None
    scheme: Literal["http", "https"] | None = None
    response_code: int = 301
    query: Literal["retain", "remove"] | str = "retain"
    """`retain`, `remove`, or `replace:<new query string>`."""


class DirectResponse(Body):
    status: int
    body: str = ""


class Route(Body):
    """First match wins. Exactly one of forward, redirect and response."""

    match: RouteMatch
    forward: Forward | None = None
    redirect: Redirect | None = None
    response: DirectResponse | None = None
    headers: HeaderEdits = HeaderEdits()
    policy_disabled: bool = False


class TlsCertificate(Body):
    certificate_pem: str
    """Leaf first, then its chain."""
    private_key: SecretRef


class ServerTls(Body):
    certificates: tuple[TlsCertificate, ...]
    min_version: Literal["TLSv1_2", "TLSv1_3"] = "TLSv1_2"
    max_version: Literal["TLSv1_2", "TLSv1_3"] = "TLSv1_3"
    cipher_suites: tuple[str, ...] = ()


class HttpLoadBalancer(Body):
    """Keyed `namespace/name`. The default pools are the last route, with prefix `/`."""

    domains: tuple[str, ...]
    """Exact names, `*.suffix`, or `*`."""
    tls: ServerTls | None = None
    https_redirect: bool = False
    """With `tls`: on listeners of protocol `http` this load balancer only redirects to https."""
    hsts: bool = False
    routes: tuple[Route, ...]
    hash_policies: tuple[HashPolicy, ...] = ()
    headers: HeaderEdits = HeaderEdits()
    policies: tuple[str, ...] | None = None
    """Keys of policies, evaluated in order, deny if none decides. None: no policy applies."""
    idle_timeout: int = 0
    max_request_header_kib: int = 60


class TcpLoadBalancer(Body):
    """Keyed `namespace/name`."""

    pools: tuple[WeightedPool, ...]
    idle_timeout: int = 3_600_000
    """0 means none."""
    hash_source_ip: bool = False
    policies: tuple[str, ...] | None = None


class Origin(Body):
    """One origin server of a pool."""

    key: str
    """Unique in its pool and derived from what it says, never from its position."""
    type: Literal["k8s_service", "ip", "dns"]
    service: str | None = None
    """`name.namespace` or `name.namespace:cluster-id`."""
    address: str | None = None
    """IP address or DNS name."""
    refresh_interval_s: int = 0
    port: int
    """The service's port, or the port itself."""
    sites: tuple[str, ...] | None = None
    """Ids of the sites that can reach it, sorted; None: any site dials it itself (a public address)."""
    network: Network = "inside"


class HealthCheck(Body):
    """Exactly one of http and tcp."""

    interval_s: int
    timeout_s: int
    healthy_threshold: int
    unhealthy_threshold: int
    jitter_percent: int = 0
    http_path: str | None = None
    http_host: str = ""
    """Empty: the name of the origin."""
    http_headers: tuple[HeaderValue, ...] = ()
    http_headers_remove: tuple[str, ...] = ()
    http2: bool = False
    expected_statuses: tuple[tuple[int, int], ...] = ()
    """Inclusive ranges; empty means 200."""
    tcp: bool = False
    tcp_send: str = ""
    tcp_receive: str = ""
    """Hexadecimal, as is `tcp_send`; empty means that connecting suffices."""


class OutlierDetection(Body):
    consecutive_5xx: int = 5
    consecutive_gateway_failure: int = 5
    interval: int = 10_000
    base_ejection_time: int = 30_000
    max_ejection_percent: int = 10


class CircuitBreaker(Body):
    """None leaves Envoy's default for that limit."""

    connection_limit: int | None = None
    max_requests: int | None = None
    pending_requests: int | None = None
    retries: int | None = None
    priority: Literal["DEFAULT", "HIGH"] = "DEFAULT"


class OriginTls(Body):
    sni: str | None = None
    sni_from_host: bool = False
    verify: Literal["none", "public", "custom"] = "public"
    trusted_ca_pem: str = ""
    min_version: Literal["TLSv1_0", "TLSv1_1", "TLSv1_2", "TLSv1_3"] = "TLSv1_2"
    max_version: Literal["TLSv1_0", "TLSv1_1", "TLSv1_2", "TLSv1_3"] = "TLSv1_3"
    cipher_suites: tuple[str, ...] = ()
    client_certificate: TlsCertificate | None = None


class OriginPool(Body):
    """Keyed `namespace/name`; the same item for the sites that call it and those that serve it."""

    origins: tuple[Origin, ...]
    algorithm: Literal["ROUND_ROBIN", "LEAST_REQUEST", "RING_HASH", "RANDOM", "LB_OVERRIDE"] = "ROUND_ROBIN"
    selection: Literal["DISTRIBUTED", "LOCAL_ONLY", "LOCAL_PREFERRED"] = "DISTRIBUTED"
    health_checks: tuple[HealthCheck, ...] = ()
    health_check_port: int | None = None
    tls: OriginTls | None = None
    http: Literal["auto", "http1", "http2"] = "http1"
    connection_timeout: int = 2_000
    http_idle_timeout: int = 300_000
    outlier_detection: OutlierDetection | None = None
    circuit_breaker: CircuitBreaker | None = None
    circuit_breaker_disabled: bool = False
    panic_threshold_percent: int = 0
    connection_reuse: bool = True
    lost_sites: LostSites = "deprioritise"


class ExportUse(Body):
    """A load balancer through which peers may call an export."""

    load_balancer: str
    protocol: Literal["http", "tcp"]
    peers: tuple[str, ...]
    """Ids of the sites where it is advertised, sorted."""
    edges: tuple[str, ...] = ()
    """Ids of the regional edges where it is advertised, sorted."""
    policies: tuple[str, ...] | None = None
    policy_headers: tuple[str, ...] = ()
    """Lower-case names of the headers that those policies look at, sorted."""
    exempt_routes: bool = False
    """Whether some route of the load balancer has its policies disabled; only then is a peer believed that says so of a request."""


class Export(Body):
    """A pool whose origins at this site are served to peers; keyed by the pool's key."""

    pool: str
    uses: tuple[ExportUse, ...]


MOST_WORKERS = 128


class Gateway(Body):
    node_id: str
    host: str
    """IP address or DNS name."""
    port: int
    workers: int = Field(1, ge=1, le=MOST_WORKERS)
    """Of its Envoy. Whoever keeps reverse tunnels to an edge needs one more than these."""


class IpsecNode(Body):
    """A node that can be the other end of an IPsec tunnel. Its address inside follows from its id."""

    node_id: str
    host: str = ""
    """IP address or DNS name at which IKE reaches it; empty: it can only begin itself."""
    port: int = 4500
    """UDP."""


class Edge(Body):
    """A regional edge that this site keeps reverse tunnels to, or reaches peers through; keyed by its id."""

    site_id: str
    name: str
    gateways: tuple[Gateway, ...]
    home: bool = False
    """Whether this site keeps reverse tunnels to it."""
    draining: bool = False
    """Used only where nothing else leads."""


class Relay(Body):
    """What a regional edge may do for one tenant; keyed by the tenant's id."""

    tenant_id: str
    anchor_pem: str
    """The tenant's intermediate: the only anchor for certificates of its nodes."""
    crl_pem: str = ""
    """As `Site.peer_crl_pem`."""
    sites: tuple[str, ...]
    """Ids of the sites that may keep reverse tunnels here and open streams to each other, sorted."""


class Peer(Body):
    """Another site that this one calls or serves; keyed by its id."""

    site_id: str
    name: str
    tenant_id: str = ""
    """Empty: this site's own tenant. Regional edges have peers in many."""
    gateways: tuple[Gateway, ...] = ()
    """Empty when the peer cannot be dialled directly from here."""
    direct: bool = True
    """Whether a site mesh group joins both sites directly; without it, there is no direct path."""
    ipsec: tuple[IpsecNode, ...] = ()
    """Nodes of the peer to which IPsec tunnels may be kept; none where the tunnel types of both sites do not allow it."""
    ssl: bool = True
    """Whether they allow a direct path without IPsec."""
    edges: tuple[str, ...] = ()
    """Ids of the regional edges where the peer keeps reverse tunnels, in the order of use; empty when no edge may be used."""
    draining: bool = False
    """Its exports are used only where no other site serves."""
    lost: bool = False
    """Whether the control plane has heard of none of its nodes for a whole lease. What that means is for each pool to say."""


class LabelRequirement(Body):
    """`in` needs one of the values, `notin` none of them (or no such label); `exists` and `absent` look at the key alone."""

    key: str
    operator: Literal["in", "notin", "exists", "absent"]
    values: tuple[str, ...] = ()
    """Sorted."""

    def holds(self, labels: Mapping[str, str]) -> bool:
        if self.operator == "in":
            return labels.get(self.key) in self.values
        if self.operator == "notin":
            return labels.get(self.key) not in self.values
        return (self.key in labels) == (self.operator == "exists")


class PodSelector(Body):
    """Over the labels of pods, and `NAMESPACE_LABEL`. All requirements must hold."""

    requirements: tuple[LabelRequirement, ...]

    @cached_property
    def id(self) -> str:
        """The same for the same requirements, at every site."""
        return content_hash(self.canonical())[:16]

    def holds(self, labels: Mapping[str, str]) -> bool:
        return all(requirement.holds(labels) for requirement in self.requirements)


class PolicyRule(Body):
    """All conditions must hold; an empty condition holds always."""

    name: str
    action: Literal["ALLOW", "DENY", "NEXT_POLICY"]
    sites: tuple[str, ...] | None = None
    """Ids of source sites; None means any."""
    pods: PodSelector | None = None
    """Source pods, of whichever cluster the request comes from; None means any client."""
    prefixes: tuple[str, ...] = ()
    prefixes_invert: bool = False
    path_prefixes: tuple[str, ...] = ()
    path_exact: tuple[str, ...] = ()
    path_suffixes: tuple[str, ...] = ()
    path_regexes: tuple[str, ...] = ()
    path_invert: bool = False
    methods: tuple[str, ...] = ()
    methods_invert: bool = False
    headers: tuple[HeaderMatch, ...] = ()
    query: tuple[QueryMatch, ...] = ()
    domains_exact: tuple[str, ...] = ()
    domains_regex: tuple[str, ...] = ()


class Policy(Body):
    """Keyed `namespace/name`. Rules are in evaluation order; `default` decides when none matched (None: the next policy)."""

    rules: tuple[PolicyRule, ...]
    default: Literal["ALLOW", "DENY"] | None = None


class NamespaceMapping(Body):
    namespace_regex: str
    namespace: str


class IngressController(Body):
    service: str
    """`name.namespace`."""
    port: int
    ingress_class: str = ""
    """Empty: any Ingress is one of its."""


class Discovery(Body):
    """One cluster that this site watches; keyed `namespace/name`. A node inside a cluster watches that one without being told."""

    kubeconfig: SecretRef | None = None
    api_server: str | None = None
    """`host:port`, with the three below, when there is no kubeconfig."""
    server_name: str = ""
    certificate_pem: str = ""
    client_key: SecretRef | None = None
    trusted_ca_pem: str = ""
    in_cluster: bool = False
    cluster_id: str = ""
    delivery: Literal["isolated", "reachable", "cluster_ip", "ingress_controller"] = "reachable"
    ingress_controller: IngressController | None = None
    """Where it is, if services are delivered through it."""
    namespace_mapping: tuple[NamespaceMapping, ...] = ()
    """Empty: every namespace is discovered."""


class PublishedPort(Body):
    name: str
    port: int
    target_port: int
    """Where the load balancer listens."""
    load_balancer: str
    protocol: Literal["http", "tcp"]
    """Which kind of load balancer."""


class Publish(Body):
    """A Service of the site's own cluster that leads to load balancers on the service network; keyed `namespace/name`, as the cluster has it."""

    ports: tuple[PublishedPort, ...]
    """By number."""
    service_import: str = ""
    """Name of the ServiceImport that it gives its address, in the same namespace."""
    clusters: tuple[str, ...] = ()
    """Names of the sites that export that one, sorted."""


class ServiceExport(Body):
    """An export of the site's own cluster that is imported in its mesh groups; keyed `namespace/name`, as the cluster has it."""

    conflict: str = ""
    """In what it differs from an older export, which prevails."""


TYPES: dict[ItemKind, type[Body]] = {
    ItemKind.SITE: Site,
    ItemKind.LISTENER: Listener,
    ItemKind.HTTP_LOADBALANCER: HttpLoadBalancer,
    ItemKind.TCP_LOADBALANCER: TcpLoadBalancer,
    ItemKind.ORIGIN_POOL: OriginPool,
    ItemKind.EXPORT: Export,
    ItemKind.PEER: Peer,
    ItemKind.POLICY: Policy,
    ItemKind.DISCOVERY: Discovery,
    ItemKind.EDGE: Edge,
    ItemKind.RELAY: Relay,
    ItemKind.PUBLISH: Publish,
    ItemKind.SERVICE_EXPORT: ServiceExport,
}
