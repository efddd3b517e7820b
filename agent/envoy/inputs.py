"""What `render` reads: the parsed snapshot and what the node knows itself."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from ipaddress import ip_address
from typing import NamedTuple, TypeVar, get_args

from agent.protocol.base import Body
from agent.protocol.items import ItemKind, Network, Site, shard

B = TypeVar("B", bound=Body)


class ItemId(NamedTuple):
    """Of an item in a snapshot."""

    kind: ItemKind
    key: str


@dataclass(frozen=True, eq=False)
class Item:
    """A parsed item. Two are the same if id and content hash are, which makes it a cheap key of caches."""

    id: ItemId
    hash: str
    body: Body
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.hash, self.id)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Item) and (self.hash, self.id) == (other.hash, other.id)

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True)
class AgentSnapshot:
    """All items of the node's site. Never changed in place."""

    items: Mapping[ItemId, Item] = field(default_factory=dict)

    @classmethod
    def of(cls, items: Iterable[Item]) -> "AgentSnapshot":
        return cls({item.id: item for item in items})

    def with_items(self, items: Iterable[Item]) -> "AgentSnapshot":
        """The same snapshot with these added or replaced."""
        return AgentSnapshot({**self.items, **{item.id: item for item in items}})

    def without(self, ids: Iterable[ItemId]) -> "AgentSnapshot":
        """The same snapshot without these, whether or not they were there."""
        gone = frozenset(ids)
        return AgentSnapshot({id: item for id, item in self.items.items() if id not in gone})

    @cached_property
    def by_kind(self) -> Mapping[ItemKind, tuple[Item, ...]]:
        """Items of each kind, sorted by key."""
        kinds: dict[ItemKind, list[Item]] = {kind: [] for kind in ItemKind}
        for item in self.items.values():
            kinds[item.id.kind].append(item)
        return {kind: tuple(sorted(items, key=lambda item: item.id.key)) for kind, items in kinds.items()}

    @cached_property
    def by_key(self) -> Mapping[ItemKind, Mapping[str, Item]]:
        """Items of each kind by key, sorted."""
        return {kind: {item.id.key: item for item in items} for kind, items in self.by_kind.items()}

    def get(self, kind: ItemKind, key: str) -> Item | None:
        return self.by_key[kind].get(key)

    @property
    def site(self) -> Item | None:
        """The site's own item; None in a snapshot that is empty or broken."""
        return next(iter(self.by_kind[ItemKind.SITE]), None)


def body(item: Item, type_: type[B]) -> B:
    """The item's body as `type_`; raises TypeError if it is something else."""
    if not isinstance(item.body, type_):
        raise TypeError(f"{item.id.kind} {item.id.key} is not a {type_.__name__}")
    return item.body


@dataclass(frozen=True)
class NodeIdentity:
    """This node, and the certificate that proves it to peers."""

    node_id: str
    node_name: str
    site_id: str
    site_name: str
    certificate_pem: str
    """Leaf first, then the tenant's intermediate."""
    private_key_pem: str = field(repr=False)


@dataclass(frozen=True)
class Addresses:
    """IP addresses on which Envoy listens; None: the node is not on that network. `0.0.0.0` and `::` are allowed."""

    gateway_host: str
    gateway_port: int
    inside: str | None = None
    outside: str | None = None
    service: str | None = None

    def takes_from_gateway(self, address: str, port: int) -> bool:
        """Whether a listener there would get connections that are for the gateway: the kernel prefers the more specific address."""
        return port == self.gateway_port and (address == self.gateway_host or ip_address(self.gateway_host).is_unspecified)

    @property
    def gateway_networks(self) -> tuple[Network, ...]:
        """Those on which the gateway's port is not free."""
        networks = ((network, self.on(network)) for network in get_args(Network))
        return tuple(network for network, address in networks if address and self.takes_from_gateway(address, self.gateway_port))

    def on(self, network: Network) -> str | None:
        return {"inside": self.inside, "outside": self.outside, "service": self.service}[network]


class Endpoint(NamedTuple):
    """One ready pod, or one resolved address of an origin."""

    address: str
    port: int
    zone: str = ""


class OriginId(NamedTuple):
    """One origin server of a pool."""

    pool: str
    """Key of the pool."""
    origin: str
    """`items.Origin.key`."""


@dataclass(frozen=True)
class PeerView:
    """What the node knows of a peer without the control plane."""

    reachable: bool | None = None
    """None: not probed yet, so it is used as if it were reachable."""
    exports: Mapping[str, int] = field(default_factory=dict)
    """Pool key → healthy endpoints, bucketed; 0: do not use. A pool that is missing is unknown and gets weight 1."""
    paths: Mapping[str, bool] = field(default_factory=dict)
    """`ipsec`, `direct`, `reverse` or an edge's id → whether it may be used. A path that is missing was not judged yet and may."""


@dataclass(frozen=True)
class LocalState:
    """Everything that `render` needs and the control plane does not say."""

    node: NodeIdentity
    addresses: Addresses
    run_dir: str
    """Directory of the Unix sockets `xds.sock`, `admin.sock`, `probe.sock` and `peers.sock`; absolute, at most 90 bytes."""
    endpoints: Mapping[OriginId, tuple[Endpoint, ...]] = field(default_factory=dict)
    """By origin, sorted. Only origins of this site; a missing one has none."""
    peers: Mapping[str, PeerView] = field(default_factory=dict)
    """By site id. Under this site's own id: how its own origins were found, which TCP load balancers over several sites need."""
    dials: frozenset[str] = frozenset()
    """Ids of peers in a common mesh that cannot reach this site: this node keeps reverse tunnels to them."""
    pods: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    """By id of a policy's `PodSelector`: sorted addresses of this site's pods for which it holds; None: it is not known which pods there are."""
    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """By reference."""
    workers: int = 1
    """Of this node's Envoy, at least. Each keeps reverse tunnels of its own."""
    overlay: str = ""
    """This node's address inside IPsec tunnels; empty: it has none."""
    trusted_ca_file: str = "/etc/ssl/certs/ca-certificates.crt"
    """The public roots, for pools that verify origins by them."""


@dataclass(frozen=True, eq=False)
class Scope:
    """What every resource of a node may depend on; it changes hardly ever. `scope_of` makes one, the same for the same site."""

    tenant_id: str
    site_id: str
    trust_domain: str
    peer_anchor_pem: str
    trusted_ca_file: str
    run_dir: str
    edge_anchor_pem: str = ""
    regional: bool = False
    """Whether the site is a regional edge."""
    peer_crl_pem: str = ""
    edge_crl_pem: str = ""
    revocations: Mapping[str, int] = field(default_factory=dict)
    overlay: str = ""
    """The node's address inside IPsec tunnels, if it has any."""

    def shard(self, site_id: str, key: str) -> str:
        """Of a site, as in `revocations`: on a regional edge within the tenant, by whose id the key begins."""
        return f"{key.partition('/')[0]}/{shard(site_id)}" if self.regional else shard(site_id)


@lru_cache(64)
def scope_of(site: Item, run_dir: str, trusted_ca_file: str, overlay: str = "") -> Scope:
    about = body(site, Site)
    return Scope(
        about.tenant_id,
        about.site_id,
        about.trust_domain,
        about.peer_anchor_pem,
        trusted_ca_file,
        run_dir,
        about.edge_anchor_pem,
        about.kind == "regional_edge",
        about.peer_crl_pem,
        about.edge_crl_pem,
        about.revocations,
        overlay,
    )
