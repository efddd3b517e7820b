"""Origins of a site as they become known."""

import asyncio

from agent.envoy.inputs import AgentSnapshot, Endpoint, Item, ItemId, OriginId
from agent.origins import SiteOrigins
from agent.protocol.base import content_hash
from agent.protocol.items import ItemKind, Origin, OriginPool


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
        assert Endpoint("127.0.0.1", 80) in origins.endpoints(snapshot)[OriginId("n/p", "o")]
    finally:
        await origins.close()
