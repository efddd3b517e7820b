"""What a node says back. Heartbeats are small and frequent; reports carry what changed."""

from typing import Annotated, Literal

from pydantic import Field

from agent.protocol.base import Message
from agent.protocol.items import AnyKind, Gateway, Network

Count = Annotated[int, Field(gt=-(1 << 53), lt=1 << 53)]
"""What JSON, Postgres and Prometheus all can hold, sums included."""
Moment = Annotated[float, Field(ge=0, lt=1e10)]
"""Unix seconds; before the year 2286, so that what is added up or taken off is a time as well."""
Id = Annotated[str, Field(max_length=64)]
Word = Annotated[str, Field(max_length=256)]
"""A name, a version."""
DnsLabel = Annotated[str, Field(max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
"""A name in Kubernetes."""
LabelKey = Annotated[str, Field(max_length=320)]
"""`prefix/name`, as Kubernetes has it."""
Text = Annotated[str, Field(max_length=4096)]
"""For people."""
ItemKey = Annotated[str, Field(max_length=300)]
"""`namespace/name`, or a name of ours."""

MOST_WARNINGS = 16
MOST_HOSTS = 16
MOST_REJECTED = 256
"""More than these a node cannot tell; it then says that nothing is applied."""
MOST_PORTS = 64
MOST_LABELS = 64
MOST_SERVICES = 5_000
"""Of one cluster."""
MOST_EXPORTS = 1_000
"""Services that one cluster exports."""
MOST_ENDPOINTS = 100
"""Of one port, that are named."""
MOST_ENDPOINTS_NAMED = 20_000
"""Of one cluster."""

HEARTBEAT_PATH = "/api/agent/v1/heartbeat"
REPORT_PATH = "/api/agent/v1/report"


class Rejection(Message):
    """An item that Envoy or the agent refused; the last good version of it stays in force."""

    kind: AnyKind
    key: ItemKey
    hash: Id
    reason: Text


class Heartbeat(Message):
    """The first one goes out at once, and one whenever `applied_hash` or `rejected` changes."""

    boot_id: Id
    """New at every start of the agent."""
    sequence: Count
    """Rises within a boot id; anything not newer than the last is dropped."""
    sent_at: Moment
    """The node's clock, Unix seconds."""
    applied_hash: Id | None = None
    """Of the manifest that Envoy has ACKed completely, rejected items aside, with nothing warming."""
    applied_revision: Count = 0
    """The highest revision at which that manifest was known to hold."""
    rejected: tuple[Rejection, ...] = Field((), max_length=MOST_REJECTED)
    proxy: Literal["starting", "live", "down"] = "starting"
    warnings: tuple[Text, ...] = Field((), max_length=MOST_WARNINGS)
    """In words: disk full, another node with this name, certificate about to expire …"""
    version: Word = ""
    issuer: Id = ""
    """Hex key identifier of the authority that signed the certificate in use."""


class HeartbeatAnswer(Message):
    pace_s: float
    now: float
    """The server's clock, Unix seconds."""
    resend: bool = False
    """The server has no report of this boot: send a full one."""
    renew: bool = False
    """The authority that signed the certificate in use is retiring: have it renewed now."""


class ServicePort(Message):
    name: Word = ""
    port: Count
    protocol: Word = "TCP"
    endpoints: tuple[Word, ...] = Field((), max_length=MOST_ENDPOINTS)
    """`address:port`, as this site dials them; the first ones."""


class DiscoveredService(Message):
    name: Word
    namespace: Word
    cluster_id: Word = ""
    type: Word = "ClusterIP"
    cluster_ip: Word = ""
    labels: dict[LabelKey, Word] = Field({}, max_length=MOST_LABELS)
    ports: tuple[ServicePort, ...] = Field((), max_length=MOST_PORTS)
    endpoints: Count = 0
    """Ready ones."""
    delivery: Word = "reachable"
    """How it is reached: `reachable`, `isolated`, `cluster_ip`, `ingress_controller` as discoveries have it, `external_name`, or `none`."""
    hosts: tuple[Word, ...] = Field((), max_length=MOST_HOSTS)
    """Under which an ingress controller leads to it, `*` for any; the first ones."""
    reason: Word = ""
    """Why it is not."""


class DiscoveryReport(Message):
    discovery: ItemKey
    """Key of the discovery item, or `in-cluster`."""
    connected: bool
    reason: Text = ""
    services: tuple[DiscoveredService, ...] | None = Field(None, max_length=MOST_SERVICES)
    """None: another node of the site tells them."""


class ExportedPort(Message):
    """Of TCP."""

    name: Word = ""
    port: int = Field(ge=1, le=65_535)


class ServiceExport(Message):
    """A service that its cluster exports by a ServiceExport of its name."""

    namespace: DnsLabel
    name: DnsLabel
    created_at: Moment
    """Of the ServiceExport: of two that differ, the older one prevails."""
    ports: tuple[ExportedPort, ...] = Field(max_length=MOST_PORTS)


class MultiClusterServices(Message):
    """Whether the node's cluster takes part in the Multi-Cluster Services API, and what it exports."""

    offered: bool
    reason: Text = ""
    """Why it does not."""
    exports: tuple[ServiceExport, ...] = Field((), max_length=MOST_EXPORTS)
    """Those that can be exported, by namespace and name."""


class OriginHealth(Message):
    """Endpoints of one pool at this site, as this node's Envoy sees them."""

    pool: ItemKey
    healthy: Count
    total: Count


class PathHealth(Message):
    """What was last seen of a path."""

    state: Literal["UP", "DOWN", "UNKNOWN"]
    since: Moment
    last_evidence: Moment | None = None
    rtt_ms: float | None = None
    error: Text = ""
    tls: Text = ""
    """Version, cipher and key exchange where known."""


class GatewayListener(Message):
    """Where the node itself accepts tunnels, so that no load balancer can listen there."""

    address: Word
    """An IP address; `0.0.0.0` or `::`: every one that the node has."""
    port: Annotated[int, Field(gt=0, lt=65536)]
    networks: tuple[Network, ...] = Field((), max_length=3)
    """On which the address of the node is, or is covered by, that one."""


class IpsecAbility(Message):
    """Whether a node can be an end of IPsec tunnels, and where IKE reaches it."""

    able: bool
    reason: Text = ""
    """Why it cannot."""
    host: Word = ""
    """IP address or DNS name; empty: others cannot begin."""
    port: Annotated[int, Field(gt=0, lt=65536)] = 4500
    """UDP."""


class IpsecTunnel(Message):
    """What this node has with one node of a peer."""

    node_id: Id
    """Of the peer."""
    up: bool
    initiator: bool = False
    """Whether this node began it."""
    remote: Word = ""
    """`address:port` of the other end of IKE."""
    ike: Word = ""
    """Cipher, pseudo-random function and key exchange of the IKE SA, in strongSwan's names."""
    esp: Word = ""
    """Cipher of the child SA."""
    ike_age_s: Count = 0
    spi_in: Word = ""
    spi_out: Word = ""
    spi_age_s: Count = 0
    """Both SPIs are as old as the child SA."""
    bytes_in: Count = 0
    """Of this child SA, as `bytes_out`: a new one begins at zero."""
    bytes_out: Count = 0
    last_flap: Moment | None = None
    """When it last went down."""
    flap_reason: Text = ""


MOST_IPSEC_TUNNELS = 64


class PeerHealth(PathHealth):
    """One path to a peer, by the last probe that was answered; every path of every peer is there."""

    site_id: Id
    path: Id = "direct"
    """`ipsec`: direct, inside IPsec; `direct`; `reverse`: direct, over tunnels that the peer dialled; or the id of the regional edge
    that it leads through."""
    in_use: bool = False
    reason: Text = ""
    """Why it is in use or not, in words."""
    ipsec: tuple[IpsecTunnel, ...] = Field((), max_length=MOST_IPSEC_TUNNELS)
    """Of the path `ipsec`."""


class EdgeHealth(PathHealth):
    """This node's reverse tunnels to a regional edge."""

    site_id: Id
    """Of the edge."""
    tunnels: Count = 0
    """Open ones."""


class EdgeMetrics(Message):
    """Differences since the last report of this node, for one (load balancer, destination)."""

    load_balancer: ItemKey
    """`namespace/name`."""
    protocol: Literal["http", "tcp"]
    destination: Id
    """Id of the site that served; empty when none did."""
    requests: dict[str, Count] = {}
    """By class: `2xx`, `3xx`, `4xx`, `5xx`; for TCP connections `ok` and `failed`."""
    latency_ms: dict[str, Count] = {}
    """Cumulative histogram: upper bound (`le`, in ms; `inf` last) to count."""
    latency_sum_ms: float = 0
    bytes_sent: Count = 0
    """To the client."""
    bytes_received: Count = 0


class MetricsReport(Message):
    """Duplicates are harmless: the server accepts each (boot id, sequence) once."""

    sequence: Count
    edges: tuple[EdgeMetrics, ...] = Field(max_length=20_000)


class Report(Message):
    """Sections that are None have not changed. Every section is the whole truth of its kind, but for metrics."""

    boot_id: Id
    gateways: tuple[Gateway, ...] | None = None
    """Addresses at which peers may dial this node; usually one."""
    gateway_listener: GatewayListener | None = None
    ipsec: IpsecAbility | None = None
    discoveries: tuple[DiscoveryReport, ...] | None = None
    multi_cluster_services: MultiClusterServices | None = None
    origins: tuple[OriginHealth, ...] | None = None
    peers: tuple[PeerHealth, ...] | None = None
    edges: tuple[EdgeHealth, ...] | None = None
    metrics: MetricsReport | None = None
