"""What the pieces of one config are made from."""

from collections.abc import Mapping
from functools import lru_cache

from agent.envoy.inputs import AgentSnapshot, Item, LocalState, Scope, body
from agent.envoy.paths import DIRECT, Path, paths
from agent.envoy.pools import CACHE, PoolView, bucket, dials, view
from agent.envoy.problems import Unrenderable
from agent.protocol.items import Export, ItemKind, Peer, TcpLoadBalancer


class Sources:
    """What pieces are made from, looked up once per render."""

    def __init__(self, snapshot: AgentSnapshot, local: LocalState, scope: Scope) -> None:
        self.snapshot, self.local, self.scope = snapshot, local, scope
        self.peers = snapshot.by_kind[ItemKind.PEER]
        if scope.regional:
            tenants = snapshot.by_key[ItemKind.RELAY]
            self.peers = tuple([item for item in self.peers if body(item, Peer).tenant_id in tenants])
        self.edges = snapshot.by_key[ItemKind.EDGE] if scope.edge_anchor_pem else {}
        found = [(item, paths(item, self.edges, local.peers.get(item.id.key), scope)) for item in self.peers]
        self.reached = tuple([(item, ways) for item, ways in found if ways])
        """Peers that there are paths to."""
        dialable = frozenset([item.id.key for item, _ in self.reached])
        draining = frozenset([item.id.key for item, _ in self.reached if body(item, Peer).draining])
        lost = frozenset([item.id.key for item, _ in self.reached if body(item, Peer).lost])
        via = {item.id.key: path for item, ways in self.reached if (path := _around(ways)) is not None}
        pools = snapshot.by_kind[ItemKind.ORIGIN_POOL]
        if scope.regional:
            pools = tuple([item for item in pools if not dials(item, scope.site_id)])
        self.pools: Mapping[str, PoolView] = {item.id.key: view(item, scope, local, dialable, draining, lost, via) for item in pools}
        users = (*snapshot.by_kind[ItemKind.TCP_LOADBALANCER], *snapshot.by_kind[ItemKind.EXPORT])
        self.connected = frozenset([pool for item in users for pool in _connected(item)])
        """Keys of the pools that get connections which are no HTTP."""
        self.policies = snapshot.by_key[ItemKind.POLICY]

    def policies_of(self, keys: tuple[str, ...]) -> tuple[Item, ...]:
        if not keys:
            return ()
        try:
            return tuple([self.policies[key] for key in keys])
        except KeyError as error:
            raise Unrenderable(f"service policy {error.args[0]} is not here") from None

    def secrets_of(self, refs: tuple[str, ...]) -> tuple[tuple[str, bytes], ...]:
        if not refs:
            return ()
        held = self.local.secrets
        return tuple([(ref, held[ref]) for ref in refs if ref in held])

    def healthy_here(self, pool: PoolView) -> int:
        """Usable origins of this site, bucketed; as they were found healthy, if the site's view of itself says so."""
        found = sum(map(len, pool.local or ()))
        itself = self.local.peers.get(self.scope.site_id)
        return bucket(found if itself is None else min(found, itself.exports.get(pool.key, found)))


@lru_cache(CACHE)
def _connected(item: Item) -> tuple[str, ...]:
    if isinstance(item.body, TcpLoadBalancer):
        return tuple([pool.pool for pool in item.body.pools])
    export = body(item, Export)
    return (export.pool,) if any(use.protocol == "tcp" for use in export.uses) else ()


def _around(paths: tuple[Path, ...]) -> str | None:
    """The path in use, if it is not the direct one."""
    used = next((path for path in paths if path.usable), paths[0])
    return None if used.way.path == DIRECT else used.way.path
