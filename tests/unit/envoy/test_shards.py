"""Which filter chains change, for these and no others lose their connections: with a revocation, and with the health of sites."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from envoy.config.core.v3.extension_pb2 import TypedExtensionConfig
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.extensions.filters.network.tcp_proxy.v3.tcp_proxy_pb2 import TcpProxy

from agent.envoy.clusters import LB_METADATA, USABLE
from agent.envoy.inputs import AgentSnapshot, Item, PeerView, body
from agent.envoy.render import render
from agent.envoy.resources import EXTENSION, LISTENER, Resources
from agent.protocol.base import content_hash
from agent.protocol.items import ItemKind, OriginPool, shard
from tests.golden_files import ROOT
from tests.unit.envoy.golden_cases import local_of, snapshot_of

CASE = ROOT / "envoy" / "tcp"
SNAPSHOT = snapshot_of((CASE / "snapshot.json").read_text())
LOCAL = local_of((CASE / "local.json").read_text())
B, C = "00000002-0000-4000-8000-000000000000", "30000003-0000-4000-8000-000000000000"
POSTGRES = "127.90.0.1|5432"
"""The listener of a load balancer over a pool at both."""


def listeners(resources: Resources) -> dict[str, Listener]:
    return {name: Listener.FromString(resource.value) for name, resource in resources.by_type[LISTENER].items()}


def chains(listener: Listener) -> Mapping[str, bytes]:
    """By name, or by the server name that they are for, if they have either."""
    found = {chain.name or "".join(chain.filter_chain_match.server_names): chain for chain in listener.filter_chains}
    return {name: chain.SerializeToString(deterministic=True) for name, chain in found.items()}


def with_item(old: Item, **changed: Any) -> AgentSnapshot:
    new = old.body.model_copy(update=changed)
    return SNAPSHOT.with_items([Item(old.id, content_hash(new.canonical()), new)])


def revoked(revocations: dict[str, int]) -> dict[str, Mapping[str, bytes]]:
    """The filter chains of every listener."""
    assert SNAPSHOT.site is not None
    found = listeners(render(with_item(SNAPSHOT.site, revocations=revocations), LOCAL))
    return {name: chains(listener) for name, listener in found.items()}


def test_a_revocation_changes_the_filter_chains_of_its_shard_alone() -> None:
    before, after = revoked({"0": 5, "3": 7}), revoked({"0": 5, "3": 8})
    changed = {(name, chain) for name, known in before.items() for chain, value in known.items() if after[name][chain] != value}
    assert {("gateway", "3.peers.isthmus"), ("tunnel|3", ""), (POSTGRES, "shop/db|3")} <= changed
    assert {name for name, chain in changed if not chain.startswith("shop/db|3")} == {"gateway", "tunnel|3"}


def test_the_health_of_sites_changes_the_choice_of_a_filter_chain_and_none_of_them() -> None:
    found = [
        listeners(render(SNAPSHOT, replace(LOCAL, peers={site: PeerView(reachable=True, exports={"shop/db": healthy}) for site in (B, C)})))
        for healthy in (0, 1)
    ]
    found.append(listeners(render(SNAPSHOT, replace(LOCAL, peers={C: PeerView(reachable=False)}))))
    known = [chains(each[POSTGRES]) for each in found]
    assert known[0].keys() == {"shop/db|0", "shop/db|3"}
    assert known[0] == known[1] == known[2]
    assert found[1][POSTGRES].filter_chain_matcher != found[2][POSTGRES].filter_chain_matcher


def test_a_site_that_is_gone_takes_its_filter_chains_with_it() -> None:
    pool = SNAPSHOT.by_key[ItemKind.ORIGIN_POOL]["shop/db"]
    (origin,) = body(pool, OriginPool).origins
    left = with_item(pool, origins=(origin.model_copy(update={"sites": (B,)}),))
    left = left.without(item.id for item in left.by_kind[ItemKind.PEER] if item.id.key == C)
    before, after = (chains(listeners(render(snapshot, LOCAL))[POSTGRES]) for snapshot in (SNAPSHOT, left))
    assert before.keys() - after.keys() == {"shop/db|3"}
    assert before["shop/db|0"] == after["shop/db|0"]


def test_connections_ask_for_usable_paths_alone_where_another_site_serves() -> None:
    one = replace(LOCAL, peers={C: PeerView(reachable=False)})
    asked = []
    for local in (LOCAL, one):
        extension = TypedExtensionConfig.FromString(render(SNAPSHOT, local).by_type[EXTENSION][f"tcp|shop/db|shop/db|{shard(B)}"].value)
        proxy = TcpProxy.FromString(extension.typed_config.value)
        asked.append({key: value.string_value for key, value in proxy.metadata_match.filter_metadata[LB_METADATA].fields.items()})
    assert asked == [USABLE, {}]
