"""Origins of a site as they become known."""

import asyncio

from agent.envoy.inputs import AgentSnapshot, Endpoint, Item, ItemId, OriginId
from agent.origins import SiteOrigins
from agent.protocol.base import content_hash
from agent.protocol.items import Discovery, ItemKind, Origin, OriginPool


async def test_what_was_asked_for_anew_is_settled_when_it_is_answered() -> None:
    changed = asyncio.Event()
    origins = SiteOrigins("here", None, dict, changed.set)
    pool = OriginPool(origins=(Origin(key="o", type="dns", address="localhost", port=80, sites=("here",)),))
    snapshot = AgentSnapshot.of([Item(ItemId(ItemKind.ORIGIN_POOL, "n/p"), content_hash(pool.canonical()), pool)])
    try:
        known = [origins.settled]
        origins.follow(snapshot)
        known.append(origins.settled)
        await asyncio.wait_for(changed.wait(), 10)
        known.append(origins.settled)
        assert known == [True, False, True]
        assert Endpoint("127.0.0.1", 80) in origins.endpoints(snapshot, {})[OriginId("n/p", "o")]
    finally:
        await origins.close()


async def test_endpoints_stay_only_where_their_own_cluster_has_not_been_read_yet() -> None:
    """One cluster that cannot be reached says nothing of others."""
    origins = SiteOrigins("here", None, dict, lambda: None)
    discovery = Discovery(api_server="127.0.0.1:1", cluster_id="east")
    keys = ("cart.shop", "cart.shop:east", "cart.shop:west")
    pool = OriginPool(origins=tuple(Origin(key=key, type="k8s_service", service=key, port=80) for key in keys))
    items = [
        Item(ItemId(kind, key), content_hash(body.canonical()), body)
        for kind, key, body in ((ItemKind.ORIGIN_POOL, "n/p", pool), (ItemKind.DISCOVERY, "n/d", discovery))
    ]
    snapshot = AgentSnapshot.of(items)
    before = {OriginId("n/p", key): (Endpoint("10.1.0.1", 80),) for key in keys}
    try:
        origins.follow(snapshot)
        found = origins.endpoints(snapshot, before)
        assert [key for key in keys if found[OriginId("n/p", key)]] == ["cart.shop:east"]
    finally:
        await origins.close()
