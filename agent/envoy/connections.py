"""HTTP connection managers: what they have in common, and what each kind of client is allowed."""

from collections.abc import Sequence
from typing import Any

from envoy.extensions.filters.http.router.v3.router_pb2 import Router
from envoy.extensions.filters.network.http_connection_manager.v3.http_connection_manager_pb2 import HttpConnectionManager
from envoy.extensions.http.early_header_mutation.header_mutation.v3.header_mutation_pb2 import HeaderMutation

from agent.envoy.inputs import Scope
from agent.envoy.messages import ADS, Fields, about, extension, flag, header, milliseconds

REQUEST_HEADERS_TIMEOUT_MS = 10_000
HANDSHAKE_TIMEOUT_MS = 5_000
_KEEPALIVE_MS = 5_000
KEEPALIVE_AT_GATEWAYS_MS = 30_000
"""Seldom: where only the way to a gateway is cut, its ping looks like an answer to whoever waits for one, and has them wait once more.
So a peer that is gone is noticed after 35 s."""
ENVOY_HEADERS = "x-envoy-"
"""Prefix of headers by which a client could steer timeouts and retries."""


def manager(*, http_filters: Sequence[Fields] = (), route_config_name: str, to_origins: bool = False, **fields: Any) -> Fields:
    """The filter; its routes come over ADS.

    `to_origins`: for requests of applications, of which there are many. Envoy would count each answer by code and by zone for its cluster, to throw that away,
    since statistics of these clusters are not kept (see `bootstrap`); the access log counts them by load balancer and site.
    """
    counting: Fields = {"dynamic_stats": flag(value=False)} if to_origins else {}
    router = extension("envoy.filters.http.router", Router(suppress_envoy_headers=True, **counting))
    message = HttpConnectionManager(
        rds={"config_source": ADS, "route_config_name": route_config_name},
        http_filters=[*http_filters, router],
        request_headers_timeout=milliseconds(REQUEST_HEADERS_TIMEOUT_MS),
        **fields,
    )
    return extension("envoy.filters.network.http_connection_manager", message)


def keepalive(every_ms: int = _KEEPALIVE_MS) -> Fields:
    """Of HTTP/2, on the side that accepts."""
    return {"interval": milliseconds(every_ms), "timeout": milliseconds(_KEEPALIVE_MS)}


def connect_route(cluster: str, *, terminated: bool = True, **match: object) -> Fields:
    """For CONNECT streams, which last as long as what they carry. `terminated`: their bytes go on, not the stream."""
    upgrade = {"upgrade_type": "CONNECT", **({"connect_config": {}} if terminated else {})}
    action = {"cluster": cluster, "timeout": milliseconds(0), "idle_timeout": milliseconds(0), "upgrade_configs": [upgrade]}
    return {"match": {"connect_matcher": {}, **match}, "route": action}


def of_shard(shard: str, scope: Scope) -> Fields | None:
    """Metadata of filter chains and clusters for connections with sites of the shard.

    Nothing reads it. With another revision it is another filter chain, and Envoy ends the connections of the one before, those of the revoked too;
    or another cluster, and Envoy opens no more streams on the connections of the one before.
    """
    revision = scope.revocations.get(shard)
    return None if revision is None else about({"revoked": str(revision)})


def early_mutations(*mutations: Fields) -> list[Fields]:
    """Changes of request headers before anything else looks at them."""
    return [extension("envoy.http.early_header_mutation.header_mutation", HeaderMutation(mutations=mutations))]


def without_prefix(prefix: str) -> Fields:
    """Mutation: headers that begin like this are not taken from the client."""
    return {"remove_on_match": {"key_matcher": {"prefix": prefix}}}


def overwritten(name: str, value: str) -> tuple[Fields, Fields]:
    """Mutations: the header has this value, or is not there when it comes out empty; never what the client sent."""
    return {"remove": name}, {"append": header(name, value)}
