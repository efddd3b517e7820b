"""Metrics: an access log that counts, per load balancer and site that served. `stats.py` reads them back."""

from envoy.config.accesslog.v3.accesslog_pb2 import AccessLog
from envoy.extensions.access_loggers.stats.v3.stats_pb2 import Config

from agent.envoy.messages import METADATA, Fields, literal, packed

PREFIX = "isthmus"
_DESTINATION = f"%METADATA(UPSTREAM_HOST:{METADATA}:site)%"


def http_log() -> AccessLog:
    """One for all load balancers of a listener: routes carry the load balancer's key as their name."""
    who = _tags(lb="%ROUTE_NAME%", site=_DESTINATION)
    config = Config(
        stat_prefix=PREFIX,
        counters=[
            _counter("http_requests", [*who, {"name": "class", "value_format": "%RESP(:STATUS):1%"}]),
            _counter("http_sent", who, "%BYTES_SENT%"),
            _counter("http_received", who, "%BYTES_RECEIVED%"),
        ],
        histograms=[_duration("http_ms", who)],
    )
    return AccessLog(name="envoy.access_loggers.stats", typed_config=packed(config))


def tcp_logs(load_balancer: str) -> list[AccessLog]:
    """Written when a connection ends."""
    who = _tags(lb=literal(load_balancer), site=_DESTINATION)
    ended = Config(
        stat_prefix=PREFIX,
        counters=[
            _counter("tcp_connections", who),
            _counter("tcp_sent", who, "%BYTES_SENT%"),
            _counter("tcp_received", who, "%BYTES_RECEIVED%"),
        ],
        histograms=[_duration("tcp_ms", who)],
    )
    failed = Config(stat_prefix=PREFIX, counters=[_counter("tcp_failed", who)])
    flags = {"response_flag_filter": {"flags": ["UF", "UH", "UO", "NC", "URX"]}}
    return [
        AccessLog(name="envoy.access_loggers.stats", typed_config=packed(ended)),
        AccessLog(name="envoy.access_loggers.stats", typed_config=packed(failed), filter=flags),
    ]


def _tags(**formats: str) -> list[Fields]:
    return [{"name": name, "value_format": value} for name, value in formats.items()]


def _counter(name: str, tags: list[Fields], value: str | None = None) -> Fields:
    amount: Fields = {"value_fixed": {"value": 1}} if value is None else {"value_format": value}
    return {"stat": {"name": name, "tags": tags}, **amount}


def _duration(name: str, tags: list[Fields]) -> Fields:
    return {"stat": {"name": name, "tags": tags}, "unit": "Milliseconds", "value_format": "%DURATION%"}
