"""Names of everything that render makes, from keys alone. Site ids, `namespace/name` and `|` cannot be confused with each other."""

from collections.abc import Sequence
from typing import Literal

from agent.envoy import messages
from agent.protocol.items import EDGES

Protocol = Literal["http", "tcp"]

EXPORTS = "exports"
"""Internal listener and cluster: CONNECT streams to HTTP exports end here."""
GATEWAY = "gateway"
OVERLAY = "overlay"
"""Listener: the gateway at the node's address inside IPsec tunnels."""
HERE = "here"
"""Internal listener and cluster: CONNECT streams to origins of this very site, which stands among others."""
RELAY = "relay"
"""Internal listener: the bytes of a session with another site in, one CONNECT stream with that site's id out."""
DIRECT = "direct"
"""Internal listener: the bytes of a session with another site in, a connection to its gateway out."""
REVERSE = "reverse"
"""Internal listener and cluster: CONNECT streams to sites that keep reverse tunnels to this node."""
RELAYED = "relayed"
"""Internal listener and cluster: this node's gateway, for sessions that come out of its reverse tunnels."""
PROBE = "probe"
PEERS = "peers"
"""Cluster of the agent's own server for peers."""

NODE_SECRET = "node"  # noqa: S105  # a name
PEER_ANCHOR_SECRET = "peer-anchor"  # noqa: S105  # a name
EDGE_ANCHOR_SECRET = "edge-anchor"  # noqa: S105  # a name

INGRESS_SERVER_NAME = "edges.isthmus"
"""In a session that a regional edge opens to a site, for load balancers of its own: the filter chain whose only anchor is that of edges."""

MARKER = "x-isthmus-failed"
"""On answers that a destination gives in place of an origin."""
UNREACHED = "unreached"
"""Its value when no origin has seen the request, so that it may be tried elsewhere whatever its method."""
REPLAYABLE = "replayable"
"""Its value when an origin may have seen the request, whose method is idempotent."""
BROKEN = "broken"
"""Its value when an origin may have seen another request: what `reset` would say if there were no site between."""
WITNESSED = f"%RESP({MARKER})%@%METADATA(UPSTREAM_HOST:{messages.METADATA}:export)%"
"""Its value where origins of this site are among others: what the answer says, and by which kind of export it came, which only other sites have."""
PRIVATE_HEADERS = "x-isthmus-"
"""Prefix of what nodes tell each other; clients cannot send it and origins do not see it."""
LB_HEADER = "x-isthmus-lb"
PATH_HEADER = "x-isthmus-path"
HOST_HEADER = "x-isthmus-host"
HASH_HEADER = "x-isthmus-hash"
ORIGIN_HOST_HEADER = "x-isthmus-origin-host"
EXEMPT_HEADER = "x-isthmus-exempt"
EXPORT_HEADER = "x-isthmus-export"
PEER_HEADER = "x-isthmus-peer"
CLIENT_HEADER = "x-isthmus-client"
PODS_HEADER = "x-isthmus-pods"
COPIED_HEADERS = "x-isthmus-h-"
_COPIED_QUERY = "x-isthmus-q-"

PEER_STATE = "isthmus.peer"
"""Filter state: URI of the peer's certificate."""
EXPORT_STATE = "isthmus.export"
"""Filter state: authority of the export that the gateway opened."""
PODS_STATE = "isthmus.pods"
"""Filter state: the selectors of policies that hold for the pod at the other end of a TCP connection."""


def query_header(parameter: str) -> str:
    """Header: a parameter of the query string, whose name may hold what a header's cannot."""
    return _COPIED_QUERY + parameter.encode().hex()


def pool(key: str) -> str:
    """Cluster: the pool's origins that this site dials itself."""
    return f"pool|{key}"


def is_local(cluster: str) -> bool:
    """Whether `pool` made the name."""
    return cluster.startswith("pool|")


def remote(key: str) -> str:
    """Cluster: the other sites that serve an HTTP pool."""
    return f"http|{key}"


def site(site_id: str) -> str:
    """Cluster: gateways of another site."""
    return f"site|{site_id}"


def gateway(site_id: str) -> str:
    """Cluster: gateways of another site that are known by name, where they are one of several ways to it."""
    return f"gateway|{site_id}"


def path(site_id: str, name: str) -> str:
    """Cluster: another site by one way only, for probes."""
    return f"path|{site_id}|{name}"


def tunnel(shard: str) -> str:
    """Internal listener: bytes in, one CONNECT stream to another site of the shard out."""
    return f"tunnel|{shard}"


def edge(site_id: str) -> str:
    """Cluster: gateways of a regional edge."""
    return f"edge|{site_id}"


def tunnels(site_id: str) -> str:
    """Listener of the reverse tunnels to a regional edge or peer, and the cluster through which it dials them."""
    return f"tunnels|{site_id}"


def reverse(tenant_id: str) -> str:
    """Cluster: reverse tunnels that sites of the tenant keep to this node."""
    return f"reverse|{tenant_id}"


def anchor(tenant_id: str) -> str:
    """Secret: the anchor of a tenant's nodes, on a regional edge."""
    return f"anchor|{tenant_id}"


def peers_server_name(shard: str) -> str:
    """SNI at a gateway: sessions that sites of the shard open."""
    return f"{shard}.peers.isthmus"


def relay_server_name(tenant_id: str) -> str:
    """SNI at a regional edge, and the routes behind it: CONNECT streams of the tenant's sites."""
    return f"{tenant_id}.relay.isthmus"


def tunnels_server_name(tenant_id: str) -> str:
    """SNI at a gateway: handshakes of reverse tunnels of the tenant's sites."""
    return f"{tenant_id}.tunnels.isthmus"


def first_of(clusters: Sequence[str]) -> str:
    """Cluster: the first of these with a usable endpoint."""
    return clusters[0] if len(clusters) == 1 else ">".join(clusters)


def export_authority(protocol: Protocol, pool_key: str) -> str:
    """`:authority` of CONNECT streams to an export. On a regional edge the key begins with the tenant."""
    namespace, name = own_key(pool_key).split("/")
    return f"{name}.{namespace}.{protocol}"


def own_key(key: str) -> str:
    """`namespace/name`, as the object's own tenant calls it."""
    return "/".join(key.split("/")[-2:])


def site_uri(trust_domain: str, tenant_id: str, site_id: str) -> str:
    """What the URI SAN of every node of the site begins with."""
    return f"{tenant_uri(trust_domain, tenant_id)}{site_id}/"


def tenant_uri(trust_domain: str, tenant_id: str) -> str:
    """What the URI SAN of every node of the tenant begins with."""
    return f"spiffe://{trust_domain}/tenant/{tenant_id}/site/"


def edge_uri(trust_domain: str, site_id: str) -> str:
    """What the URI SAN of every node of the regional edge begins with."""
    return site_uri(trust_domain, EDGES, site_id)


def metadata(field: str) -> str:
    """Command: a field of the host through which a connection came to an internal listener."""
    return f"%DYNAMIC_METADATA({messages.METADATA}:{field})%"
