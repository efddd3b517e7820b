"""The kinds of objects, and the way from JSON to their types and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from controlplane.resources.base import Metadata, ObjectRef, Ref, Resource, values_in
from controlplane.resources.discovery import Discovery
from controlplane.resources.envelope import read, read_envelope, refuse_all
from controlplane.resources.healthcheck import Healthcheck
from controlplane.resources.http_loadbalancer import HttpLoadBalancer
from controlplane.resources.namespace import Namespace
from controlplane.resources.normal import Reading
from controlplane.resources.origin_pool import OriginPool
from controlplane.resources.service_policy import ServicePolicy
from controlplane.resources.site import Site
from controlplane.resources.site_mesh_group import SiteMeshGroup
from controlplane.resources.tcp_loadbalancer import TcpLoadBalancer
from controlplane.resources.virtual_site import VirtualSite


@dataclass(frozen=True)
class Kind:
    """What the API needs to know about a kind."""

    type: type[Resource]
    slug: Literal["config", "web"] = "config"
    """First segment of the path after `/api`."""
    lives_in: Literal["none", "system", "any", "not system"] = "not system"
    can_be_disabled: bool = True

    @property
    def kind(self) -> str:
        return self.type.kind

    @property
    def plural(self) -> str:
        """Segment of the path; naive, as the API has it."""
        return f"{self.kind}s"

    def allows(self, namespace: str) -> bool:
        """Whether objects of the kind may be in a namespace."""
        match self.lives_in:
            case "none":
                return namespace == ""
            case "system":
                return namespace == "system"
            case "any":
                return namespace != ""
            case "not system":
                return namespace not in ("", "system")


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        kind.kind: kind
        for kind in (
            Kind(Namespace, slug="web", lives_in="none", can_be_disabled=False),
            Kind(Site, lives_in="system"),
            Kind(VirtualSite),
            Kind(SiteMeshGroup, lives_in="system"),
            Kind(Discovery, lives_in="any"),
            Kind(Healthcheck),
            Kind(OriginPool),
            Kind(HttpLoadBalancer),
            Kind(TcpLoadBalancer),
            Kind(ServicePolicy),
        )
    }
)


class Parsed(NamedTuple):
    metadata: Metadata
    spec: Resource


def parse(kind: str, body: Any, *, namespace: str, name: str | None = None, tenant: str | None = None) -> Parsed:
    """What a create or replace body asks for; raises `Invalid` with everything that is wrong and its JSON path.

    `namespace`, and `name` where it has one, are those of the path. `tenant` is the caller's: a reference may name it, and no other.
    """
    known = KINDS[kind]
    reading = Reading(namespace, tenant)
    if not known.allows(namespace):
        reading.refuse("metadata.namespace", f"a {kind} cannot be in namespace {namespace}")
    metadata, raw_spec = read_envelope(body, name, reading)
    if metadata and metadata.disable and not known.can_be_disabled:
        reading.refuse("metadata.disable", f"a {kind} cannot be disabled")
    spec = read(known.type, raw_spec, "spec", reading)
    refuse_all(reading.errors)
    assert metadata
    assert spec is not None
    return Parsed(metadata, spec)


def dump(spec: Resource) -> dict[str, Any]:
    """The JSON that is stored and that GET answers; `load` and `parse` give the same spec again. A clear secret in it is a ValueError."""
    return spec.model_dump(mode="json", exclude_none=True)


def load(kind: str, stored: Mapping[str, Any]) -> Resource:
    """The inverse of `dump`, without the lenience that users get."""
    return KINDS[kind].type.model_validate(stored)


def refs(kind: str, metadata: Metadata, spec: Resource) -> tuple[Ref, ...]:
    """Every object that the spec names, in field order."""
    return tuple(Ref(value.refers_to, value.key, path) for path, value in values_in(spec, "spec") if isinstance(value, ObjectRef))
