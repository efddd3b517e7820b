"""Names of everything that render makes, from keys alone. Site ids, `namespace/name` and `|` cannot be confused with each other."""

from collections.abc import Sequence
from typing import Literal

from agent.envoy import messages

Protocol = Literal["http", "tcp"]

TUNNEL = "tunnel"
"""Internal listener: bytes in, one CONNECT stream to another site out."""
EXPORTS = "exports"
"""Internal listener and cluster: CONNECT streams to HTTP exports end here."""
GATEWAY = "gateway"
HERE = "here"
"""Internal listener and cluster: CONNECT streams to origins of this very site, which stands among others."""
PROBE = "probe"
PEERS = "peers"
"""Cluster of the agent's own server for peers."""

NODE_SECRET = "node"  # noqa: S105  # a name
PEER_ANCHOR_SECRET = "peer-anchor"  # noqa: S105  # a name

MARKER = "x-isthmus-failed"
"""On answers that a destination gives in place of an origin."""
UNREACHED = "unreached"
"""Its value when no origin has seen the request, so that it may be tried elsewhere whatever its method."""
BROKEN = "broken"
"""Its value when an origin may have seen the request: what `reset` would say if there were no site between."""
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
COPIED_HEADERS = "x-isthmus-h-"
_COPIED_QUERY = "x-isthmus-q-"

PEER_STATE = "isthmus.peer"
"""Filter state: URI of the peer's certificate."""
EXPORT_STATE = "isthmus.export"
"""Filter state: authority of the export that the gateway opened."""


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


def first_of(clusters: Sequence[str]) -> str:
    """Cluster: the first of these with a usable endpoint."""
    return clusters[0] if len(clusters) == 1 else ">".join(clusters)


def export_authority(protocol: Protocol, pool_key: str) -> str:
    """`:authority` of CONNECT streams to an export."""
    namespace, name = pool_key.split("/")
    return f"{name}.{namespace}.{protocol}"


def site_uri(trust_domain: str, tenant_id: str, site_id: str) -> str:
    """What the URI SAN of every node of the site begins with."""
    return f"{tenant_uri(trust_domain, tenant_id)}{site_id}/"


def tenant_uri(trust_domain: str, tenant_id: str) -> str:
    """What the URI SAN of every node of the tenant begins with."""
    return f"spiffe://{trust_domain}/tenant/{tenant_id}/site/"


def metadata(field: str) -> str:
    """Command: a field of the host through which a connection came to an internal listener."""
    return f"%DYNAMIC_METADATA({messages.METADATA}:{field})%"
