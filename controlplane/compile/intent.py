"""What the compilers read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any
from weakref import ref

from agent.protocol.items import Gateway, IpsecNode
from controlplane.compile.imports import Import
from controlplane.resources.base import Key, Stored

CACHE = 20_000
"""Entries of each memo of the compilers: several versions of everything in a large tenant, or small ones of many tenants."""
Target = tuple[str, Key]
"""An object, by kind and key."""


@dataclass(frozen=True)
class Tenant:
    """Who the intent belongs to, and the trust that its sites share."""

    id: str
    name: str
    trust_domain: str
    peer_anchor_pem: str
    """The tenant's intermediate."""
    edge_anchor_pem: str = ""
    """That of regional edges."""
    control_plane_anchor_pem: str = ""
    root_anchor_pem: str = ""
    """The fabric's roots."""
    peer_crl_pem: str = ""
    edge_crl_pem: str = ""
    revocations: tuple[tuple[str, int], ...] = ()
    """As in `items.Site`, sorted."""


@dataclass(frozen=True, eq=False)
class Intent:
    """All accepted objects of one tenant: kind → key → object.

    Never changed in place: a write makes a new Intent that shares what stayed. Two are the same only if they are the same object, which
    makes an intent a cheap key of caches.
    """

    tenant: Tenant
    objects: Mapping[str, Mapping[Key, Stored[Any]]]
    edges: Mapping[Key, Stored[Any]] = field(default_factory=dict)
    """The fabric's regional edges, which are among the objects of the operator's tenant as well."""
    names: frozenset[str] = frozenset()
    """Public names that belong to the tenant."""
    imports: tuple[Import, ...] = ()
    """What clusters export to each other. The objects that this makes are among the others."""
    before: "ref[Intent] | None" = field(default=None, repr=False)
    """One that shares much with this one, while somebody has it: what was worked out of that one need not be worked out again."""
    touched: frozenset[Target] = frozenset()
    """Objects that may be others than in `before`; the rest are the very same."""

    def of(self, kind: str) -> Mapping[Key, Stored[Any]]:
        """Objects of a kind; empty if there are none."""
        return self.objects.get(kind, {})

    def enabled(self, kind: str) -> tuple[Stored[Any], ...]:
        """Objects of a kind that are not disabled, sorted by key."""
        return tuple(stored for _, stored in sorted(self.of(kind).items(), key=itemgetter(0)) if not stored.metadata.disable)

    def find(self, kind: str, key: Key) -> Stored[Any] | None:
        """An object that is there and not disabled."""
        stored = self.of(kind).get(key) or (self.edges.get(key) if kind == "site" else None)
        return None if stored is None or stored.metadata.disable else stored


@dataclass(frozen=True)
class Observations:
    """What sites reported and compilers may use."""

    gateways: Mapping[str, tuple[Gateway, ...]] = field(default_factory=dict)
    """By site id, sorted by node id; of regional edges too."""
    homes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By customer edge: ids of the regional edges to which it keeps reverse tunnels, in the order of use."""
    ipsec: Mapping[str, tuple[IpsecNode, ...]] = field(default_factory=dict)
    """By site id, sorted by node id: the nodes that can be an end of IPsec tunnels."""
    lost: frozenset[str] = frozenset()
    """Ids of sites of which nothing was heard for a lease."""
