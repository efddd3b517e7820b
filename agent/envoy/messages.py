"""Small parts of Envoy messages. Nested messages are written as dicts; protobuf checks them when the outer one is built."""

from datetime import timedelta
from typing import Any, TypeVar

from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

M = TypeVar("M", bound=Message)

Fields = dict[str, Any]
"""Of a nested message."""

METADATA = "isthmus"
"""Namespace of the metadata that we put on hosts."""
TYPE_PREFIX = "type.googleapis.com/"
ADS: Fields = {"ads": {}, "resource_api_version": "V3"}
UNLIMITED = 1_000_000
"""For circuit breakers of clusters that carry other clusters' traffic; those have their own limits."""
MIB = 1024 * 1024


def serialized(message: Message) -> bytes:
    """Equal messages give equal bytes."""
    return bytes(message.SerializeToString(deterministic=True))


def packed(message: Message) -> any_pb2.Any:
    return any_pb2.Any(type_url=TYPE_PREFIX + message.DESCRIPTOR.full_name, value=serialized(message))


def extension(name: str, message: Message) -> Fields:
    """A filter, transport socket or other extension."""
    return {"name": name, "typed_config": packed(message)}


def milliseconds(value: float) -> timedelta:
    return timedelta(milliseconds=value)


def number(value: int) -> Fields:
    """A wrapped integer."""
    return {"value": value}


def flag(value: bool) -> Fields:
    """A wrapped bool."""
    return {"value": value}


def literal(text: str) -> str:
    """Text in a place where Envoy substitutes `%…%`."""
    return text.replace("%", "%%")


def socket_address(host: str, port: int) -> Fields:
    return {"socket_address": {"address": host, "port_value": port}}


def internal_address(listener: str, endpoint_id: str = "") -> Fields:
    return {"envoy_internal_address": {"server_listener_name": listener, "endpoint_id": endpoint_id}}


def unlimited() -> Fields:
    """Circuit breakers that never open."""
    limits = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests", "max_retries"), number(UNLIMITED))
    return {"thresholds": [{"priority": priority, **limits} for priority in ("DEFAULT", "HIGH")]}


def header(name: str, value: str, *, append: bool = False) -> Fields:
    """A HeaderValueOption; `value` may hold `%…%` commands, and nothing is added when it comes out empty."""
    action = "APPEND_IF_EXISTS_OR_ADD" if append else "OVERWRITE_IF_EXISTS_OR_ADD"
    return {"header": {"key": name, "value": value}, "append_action": action}


def state(key: str, value: str, *, shared: bool = False) -> Fields:
    """A FilterStateValue. Hashable, so that connections which carry different values are never pooled together."""
    shared_fields = {"shared_with_upstream": "ONCE"} if shared else {}
    return {
        "object_key": key,
        "factory_key": "envoy.hashable_string",
        "format_string": {"text_format_source": {"inline_string": value}, "omit_empty_values": True},
        "skip_if_empty": True,
        **shared_fields,
    }


def amended(message: M, fields: bytes) -> M:
    """With fields, as they go over the wire, that our Envoy knows and the protobufs that we have do not."""
    amended: M = type(message).FromString(serialized(message) + fields)
    return amended


def wired(field: int, value: str) -> bytes:
    """A string in that field; field numbers below 16, at most 127 bytes."""
    data = value.encode()
    return bytes([field << 3 | 2, len(data)]) + data


def struct(fields: dict[str, str]) -> Struct:
    return Struct(fields={name: {"string_value": value} for name, value in fields.items()})


def about(fields: dict[str, str]) -> Fields:
    """Metadata of ours on a host."""
    return {"filter_metadata": {METADATA: struct(fields)}}
