"""A control plane that is a value: manifests, items and secrets to be asked for, and its outages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agent.envoy.ingress import Bind
from agent.envoy.inputs import AgentSnapshot, ItemId, body
from agent.envoy.resources import LISTENER, Output, Resource, Resources
from agent.errors import Unreachable
from agent.protocol.base import Body, content_hash
from agent.protocol.items import LOAD_BALANCERS, Gateway, ItemKind, Origin, OriginPool, Peer, Publish, Site
from agent.protocol.manifest import Entry, ItemBody, Manifest, ManifestAnswer

SITE = Site(tenant_id="t", tenant="default", site_id="here", name="a", trust_domain="td", peer_anchor_pem="pem")
Key = tuple[str, str]


def pool(*sites: str, address: str = "10.0.0.1") -> OriginPool:
    return OriginPool(origins=(Origin(key="o", type="ip", address=address, port=80, sites=sites or ("here",)),))


def peer(site_id: str) -> Peer:
    return Peer(site_id=site_id, name=site_id, gateways=(Gateway(node_id="n", host="10.9.9.9", port=15443),))


def listening(snapshot: AgentSnapshot | None, address: str | None) -> Resources:
    """What an Envoy has that serves at this address what the snapshot publishes."""
    items = snapshot.by_kind[ItemKind.PUBLISH] if snapshot else ()
    ports = [port for item in items for port in body(item, Publish).ports]
    output = Output()
    for port in ports:
        name = Bind(address or "", port.target_port, port.protocol).name
        output.put(Resource(LISTENER, name, "", b"", (ItemId(LOAD_BALANCERS[port.protocol], port.load_balancer),)))
    return output.resources()


@dataclass
class FakeControlPlane:
    """`source.items` may be changed at will; every change is a new revision."""

    held: dict[Key, bytes] = field(default_factory=dict)
    revision: int = 1
    bodies: dict[str, tuple[ItemKind, str]] = field(default_factory=dict)
    secret_bodies: dict[str, bytes] = field(default_factory=dict)
    away: bool = False
    asked: list[str | None] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    most_items: int = 1000
    knows: Manifest = field(default_factory=lambda: Manifest(entries=()))
    """The one that differences refer to."""

    def put(self, kind: ItemKind, key: str, body: Body | bytes) -> None:
        data = body if isinstance(body, bytes) else body.canonical()
        self.held[kind, key] = data
        self.bodies[content_hash(data)] = (kind, data.decode())
        self.revision += 1

    def drop(self, kind: ItemKind, key: str) -> None:
        del self.held[kind, key]
        self.revision += 1

    @property
    def now(self) -> Manifest:
        return Manifest(
            entries=tuple(Entry(kind=kind, key=key, hash=content_hash(data)) for (kind, key), data in sorted(self.held.items()))
        )

    async def manifest(self, known: str | None, *, wait: bool) -> ManifestAnswer:
        self._fail_if_away()
        self.asked.append(known)
        before, self.knows = self.knows, self.now
        if known is None or known != before.hash:
            return ManifestAnswer(hash=self.now.hash, revision=self.revision, entries=self.now.entries)
        old, new = _by_key(before), _by_key(self.now)
        return ManifestAnswer(
            hash=self.now.hash,
            revision=self.revision,
            since=known,
            entries=tuple(entry for key, entry in new.items() if old.get(key) != entry),
            removed=tuple(key for key in old if key not in new),
        )

    async def items(self, hashes: Sequence[str]) -> tuple[ItemBody, ...]:
        self._fail_if_away()
        self.fetched += hashes[: self.most_items]
        known = [hash for hash in hashes if hash in self.bodies]
        return tuple(ItemBody(hash=hash, kind=self.bodies[hash][0], body=self.bodies[hash][1]) for hash in known[: self.most_items])

    async def secrets(self, refs: Sequence[str]) -> dict[str, bytes]:
        self._fail_if_away()
        return {ref: self.secret_bodies[ref] for ref in refs if ref in self.secret_bodies}

    def _fail_if_away(self) -> None:
        if self.away:
            raise Unreachable("no control plane answers")


def _by_key(manifest: Manifest) -> Mapping[Key, Entry]:
    return {(entry.kind, entry.key): entry for entry in manifest.entries}
