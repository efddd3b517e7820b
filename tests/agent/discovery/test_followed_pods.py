"""Pods that policies look at, against a running API."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from agent.discovery.kubeconfig import from_kubeconfig
from agent.envoy.inputs import AgentSnapshot, Item, ItemId
from agent.pods import SitePods
from agent.protocol.base import content_hash
from agent.protocol.items import NAMESPACE_LABEL, Discovery, ItemKind, LabelRequirement, PodSelector, Policy, PolicyRule
from lab.kubernetes import objects
from lab.kubernetes.client import Client
from lab.kubernetes.resource import POD
from lab.kubernetes.running import Emulator
from lab.kubernetes.server import ApiServer
from lab.wait import until

SHOP = PodSelector(requirements=(LabelRequirement(key=NAMESPACE_LABEL, operator="in", values=("shop",)),))
WEB = PodSelector(requirements=(LabelRequirement(key="app", operator="in", values=("web",)),))
NOT_WEB = PodSelector(requirements=(LabelRequirement(key="app", operator="notin", values=("web",)),))


def item(kind: ItemKind, key: str, body: Any) -> Item:
    return Item(ItemId(kind, key), content_hash(body.canonical()), body)


def policy(*selectors: PodSelector) -> Item:
    rules = tuple(PolicyRule(name="r", action="ALLOW", pods=selector) for selector in selectors)
    return item(ItemKind.POLICY, "shop/p", Policy(rules=rules))


SNAPSHOT = AgentSnapshot.of([policy(SHOP, WEB, NOT_WEB), item(ItemKind.POLICY, "shop/other", Policy(rules=()))])


@asynccontextmanager
async def followed(emulator: Emulator, snapshot: AgentSnapshot = SNAPSHOT) -> AsyncIterator[SitePods]:
    pods = SitePods(lambda: from_kubeconfig(emulator.kubeconfig.read_bytes()), dict, lambda: None)
    pods.follow(snapshot)
    try:
        yield pods
    finally:
        await pods.close()


def addresses(pods: SitePods, snapshot: AgentSnapshot = SNAPSHOT) -> dict[PodSelector, tuple[str, ...] | None]:
    found = pods.addresses(snapshot, {})
    return {selector: found[selector.id] for selector in (SHOP, WEB, NOT_WEB) if selector.id in found}


async def until_addresses(pods: SitePods, wanted: Mapping[PodSelector, tuple[str, ...] | None]) -> None:
    async def there() -> bool:
        return addresses(pods) == wanted

    await until(there, f"addresses {wanted}")


async def test_pods_are_known_by_address_while_they_have_it(api: Client, emulator: Emulator) -> None:
    await api.create(objects.pod("web", "shop", "10.1.0.1", {"app": "web"}))
    await api.create(objects.pod("batch", "shop", "10.1.0.2", {"app": "batch", NAMESPACE_LABEL: "elsewhere"}))
    await api.create(objects.pod("web", "default", "10.1.0.3", {"app": "web"}))
    await api.create(objects.pod("done", "shop", "10.1.0.4", {"app": "web"}, phase="Succeeded"))
    await api.create(objects.pod("agent", "shop", "10.1.0.5", {"app": "web"}, hostNetwork=True))
    await api.create(objects.pod("new", "shop", "", {"app": "web"}, phase="Pending"))
    async with followed(emulator) as pods:
        everybody = {SHOP: ("10.1.0.1", "10.1.0.2"), WEB: ("10.1.0.1", "10.1.0.3"), NOT_WEB: ("10.1.0.2",)}
        await until_addresses(pods, everybody)
        assert pods.refused(SNAPSHOT) == {}
        await api.patch("Pod", "batch", {"metadata": {"labels": {"app": "web"}}}, "shop")
        await api.delete("Pod", "web", "default")
        both = ("10.1.0.1", "10.1.0.2")
        await until_addresses(pods, {SHOP: both, WEB: both, NOT_WEB: ()})


async def test_an_address_is_that_of_the_newest_pod_that_claims_it(api: Client, emulator: Emulator, server: ApiServer) -> None:
    for name, app, made in (("old", "web", "2026-01-01T00:00:00Z"), ("new", "batch", "2026-01-02T00:00:00Z")):
        await api.create(objects.pod(name, "shop", "10.1.0.1", {"app": app}))
        stored = next(found for key, found in server.writer.store.collections[POD].objects.items() if key.name == name)
        stored.body["metadata"]["creationTimestamp"] = made
    async with followed(emulator) as pods:
        await until_addresses(pods, {SHOP: ("10.1.0.1",), WEB: (), NOT_WEB: ("10.1.0.1",)})


async def test_where_pods_may_not_be_read_the_policy_says_so_and_nobody_is_known(api: Client, emulator: Emulator) -> None:
    await api.create(objects.pod("web", "shop", "10.1.0.1", {"app": "web"}))
    async with followed(emulator) as pods:
        await until_addresses(pods, {SHOP: ("10.1.0.1",), WEB: ("10.1.0.1",), NOT_WEB: ()})
        await api.fault("rules", forbidden=["pods@shop"])
        await api.fault("disconnect")
        await until_addresses(pods, {SHOP: None, WEB: None, NOT_WEB: None})
        assert pods.settled
        (refused,) = pods.refused(SNAPSHOT).items()
        assert refused[0] == ItemId(ItemKind.POLICY, "shop/p")
        assert "pods is forbidden" in refused[1]
        await api.fault("rules", forbidden=[])
        await until_addresses(pods, {SHOP: ("10.1.0.1",), WEB: ("10.1.0.1",), NOT_WEB: ()})
        assert pods.refused(SNAPSHOT) == {}


async def test_an_api_that_is_away_leaves_what_was_known(api: Client, emulator: Emulator) -> None:
    async with followed(emulator) as pods:
        before = {SHOP.id: ("10.1.0.9",)}
        assert pods.addresses(SNAPSHOT, before) == {SHOP.id: ("10.1.0.9",), WEB.id: None, NOT_WEB.id: None}
        assert not pods.settled
        await until_addresses(pods, {SHOP: (), WEB: (), NOT_WEB: ()})
        assert pods.settled


async def test_nobody_reads_pods_while_no_policy_looks_at_them(api: Client, emulator: Emulator, server: ApiServer) -> None:
    async with followed(emulator, AgentSnapshot.of([policy()])) as pods:
        assert not watched(pods)
        pods.follow(SNAPSHOT)
        assert watched(pods)
        await until_addresses(pods, {SHOP: (), WEB: (), NOT_WEB: ()})
        pods.follow(AgentSnapshot())
        assert not watched(pods)
        assert pods.addresses(AgentSnapshot(), {}) == {}


async def test_only_clusters_whose_pods_call_from_their_own_addresses_count(api: Client, emulator: Emulator) -> None:
    discoveries = [
        item(ItemKind.DISCOVERY, f"system/{delivery}", Discovery(api_server="127.0.0.1:1", delivery=delivery))
        for delivery in ("reachable", "isolated")
    ]
    snapshot = AgentSnapshot.of([policy(SHOP), *discoveries])
    pods = SitePods(None, dict, lambda: None)
    assert pods.addresses(SNAPSHOT, {}) == {selector.id: () for selector in (SHOP, WEB, NOT_WEB)}, "here are no pods at all"
    pods.follow(snapshot)
    try:
        assert watched(pods) == {"system/reachable"}

        async def said() -> bool:
            return "pods cannot be read" in str(pods.refused(snapshot))

        await until(said, "the cluster to be reported")
        assert addresses(pods, snapshot) == {SHOP: None}
    finally:
        await pods.close()


def watched(pods: SitePods) -> set[str]:
    return {task.get_name().removeprefix("pods ") for task in asyncio.all_tasks() if task.get_name().startswith("pods ")} & {
        *pods._followed
    }
