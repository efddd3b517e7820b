"""What a mesh group imports from the clusters of its sites."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from controlplane.resources.base import Key


class ImportedPort(NamedTuple):
    name: str
    port: int
    target_port: int
    """Where the load balancer listens at every site."""
    exporters: tuple[str, ...]
    """Ids of the sites that export this port, sorted."""


@dataclass(frozen=True)
class Import:
    """A service that clusters of a site mesh group export under one name. Sites are ids."""

    group: Key
    namespace: str
    name: str
    since: float
    """When the oldest export was made, in Unix seconds."""
    ports: tuple[ImportedPort, ...]
    """By number."""
    exporters: tuple[str, ...]
    """Oldest export first."""
    conflicts: tuple[tuple[str, str], ...]
    """Sites whose export differs from an older one, and in what."""
    importers: tuple[str, ...]
    """Sorted; exporters among them."""
    unplaced: tuple[int, ...] = ()
    """Ports for which there is no place left to listen."""

    @property
    def service(self) -> str:
        return f"{self.namespace}/{self.name}"

    @cached_property
    def keys(self) -> tuple[Key, ...]:
        """Of its pools and load balancers, by port."""
        return tuple(self.key(port.port) for port in self.ports)

    def key(self, port: int) -> Key:
        """No object of a user's has dots in its name."""
        return Key(self.group.namespace, f"{self.group.name}.{self.namespace}.{self.name}.{port}")

    def published_as(self, site_id: str) -> str:
        """The Service of the site's own cluster that leads to it. Where it is exported, its own name is taken."""
        return f"{self.service}-clusterset" if site_id in self.exporters else self.service
