"""Active health checks of origins."""

from collections.abc import Sequence

from envoy.config.core.v3.health_check_pb2 import HealthCheck as Message

from agent.envoy.messages import Fields, literal, milliseconds, number, serialized
from agent.envoy.messages import header as header_option
from agent.protocol.base import content_hash
from agent.protocol.items import HealthCheck

_NAME_TAG = b"\xda\x01"
"""Field 27, a string: `HealthCheck.name` of Envoy 1.40, which wants it when there are several, and which the protobufs that we have do not know."""


def health_checks(checks: Sequence[HealthCheck]) -> list[Message]:
    """Named by what they say, so that a check that goes takes no other one's state along."""
    messages = [_health_check(check) for check in checks]
    return messages if len(messages) < 2 else [_named(message) for message in messages]


def _named(message: Message) -> Message:
    name = content_hash(serialized(message)).encode()
    return Message.FromString(serialized(message) + _NAME_TAG + bytes([len(name)]) + name)


def _health_check(check: HealthCheck) -> Message:
    """Without traffic Envoy checks only once a minute unless told otherwise."""
    interval = milliseconds(1_000 * check.interval_s)
    return Message(
        interval=interval,
        no_traffic_interval=interval,
        no_traffic_healthy_interval=interval,
        timeout=milliseconds(1_000 * check.timeout_s),
        interval_jitter_percent=check.jitter_percent,
        healthy_threshold=number(check.healthy_threshold),
        unhealthy_threshold=number(check.unhealthy_threshold),
        **(_tcp(check) if check.tcp else _http(check)),
    )


def _http(check: HealthCheck) -> Fields:
    return {
        "http_health_check": {
            "path": check.http_path,
            "host": check.http_host,
            "request_headers_to_add": [header_option(header.name, literal(header.value)) for header in check.http_headers],
            "request_headers_to_remove": check.http_headers_remove,
            "codec_client_type": "HTTP2" if check.http2 else "HTTP1",
            "expected_statuses": [{"start": first, "end": last + 1} for first, last in check.expected_statuses],
        }
    }


def _tcp(check: HealthCheck) -> Fields:
    send = {"send": {"text": check.tcp_send}} if check.tcp_send else {}
    receive = {"receive": [{"text": check.tcp_receive}]} if check.tcp_receive else {}
    return {"tcp_health_check": {**send, **receive}}
