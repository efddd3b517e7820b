"""What `render` produces: serialized xDS resources with content versions, each knowing the items that it came from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from google.protobuf.message import Message

from agent.envoy.inputs import ItemId
from agent.envoy.messages import TYPE_PREFIX, serialized
from agent.protocol.base import content_hash

CLUSTER = TYPE_PREFIX + "envoy.config.cluster.v3.Cluster"
ENDPOINTS = TYPE_PREFIX + "envoy.config.endpoint.v3.ClusterLoadAssignment"
LISTENER = TYPE_PREFIX + "envoy.config.listener.v3.Listener"
ROUTES = TYPE_PREFIX + "envoy.config.route.v3.RouteConfiguration"
EXTENSION = TYPE_PREFIX + "envoy.config.core.v3.TypedExtensionConfig"
SECRET = TYPE_PREFIX + "envoy.extensions.transport_sockets.tls.v3.Secret"

DELIVERY_ORDER = (SECRET, CLUSTER, ENDPOINTS, LISTENER, ROUTES, EXTENSION)
"""Make before break: what is referred to goes out before what refers to it; removals in the reverse order."""


@dataclass(frozen=True, eq=False)
class Resource:
    """One xDS resource. Two are the same if type, name and version are."""

    type_url: str
    name: str
    version: str
    """A hash of `value`."""
    value: bytes
    """The serialized message: `Any(type_url=type_url, value=value)` is what goes over the wire."""
    items: tuple[ItemId, ...]
    """As `sources`, in any order and perhaps repeated."""

    @property
    def sources(self) -> frozenset[ItemId]:
        """Items that it was made from; empty for what depends on the node alone."""
        return frozenset(self.items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Resource) and (self.version, self.name, self.type_url) == (other.version, other.name, other.type_url)

    def __hash__(self) -> int:
        return hash((self.version, self.name, self.type_url))


def resource(message: Message, sources: Iterable[ItemId]) -> Resource:
    """The resource of any message that has a name, or that is a ClusterLoadAssignment."""
    name = message.cluster_name if message.DESCRIPTOR.name == "ClusterLoadAssignment" else message.name
    value = serialized(message)
    return Resource(TYPE_PREFIX + message.DESCRIPTOR.full_name, name, content_hash(value), value, tuple(sources))


class Part(NamedTuple):
    """Some fields of a message, serialized; messages concatenate."""

    value: bytes
    version: str
    """A hash of `value`."""


def part(message: Message) -> Part:
    value = serialized(message)
    return Part(value, content_hash(value))


def assembled(type_url: str, name: str, parts: Sequence[Part], sources: Iterable[ItemId]) -> Resource:
    """The resource of a large message: neither built nor hashed as a whole."""
    version = content_hash("".join([part.version for part in parts]).encode())
    return Resource(type_url, name, version, b"".join([part.value for part in parts]), tuple(sources))


@dataclass(frozen=True, order=True)
class Problem:
    """An item that cannot be rendered (completely), with the reason in words. What cannot be is left out; everything else is there."""

    item: ItemId
    reason: str


@dataclass(frozen=True)
class Resources:
    """Type URL → name → resource; every type of `DELIVERY_ORDER` is there."""

    by_type: Mapping[str, Mapping[str, Resource]]
    problems: tuple[Problem, ...] = ()


@dataclass
class Output:
    """Where the resources of one render are gathered."""

    by_type: dict[str, dict[str, Resource]] = field(default_factory=lambda: {type_url: {} for type_url in DELIVERY_ORDER})
    problems: list[Problem] = field(default_factory=list)

    def put(self, *resources: Resource) -> None:
        for resource in resources:
            self.by_type[resource.type_url][resource.name] = resource

    def take(self, other: "Output") -> None:
        """Everything that was gathered there."""
        for type_url, named in other.by_type.items():
            self.by_type[type_url] |= named
        self.problems += other.problems

    def problem(self, item: ItemId, reason: object) -> None:
        self.problems.append(Problem(item, str(reason)))

    def resources(self) -> Resources:
        return Resources(self.by_type, tuple(sorted(set(self.problems))))
