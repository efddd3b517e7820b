"""The loop with a fake Envoy and virtual time: what it applies, concludes, and says."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

from agent.envoy.inputs import Addresses, AgentSnapshot, Endpoint, ItemId, LocalState, NodeIdentity, OriginId, PeerView
from agent.envoy.paths import DIRECT, IPSEC, REVERSE
from agent.envoy.render import render
from agent.envoy.resources import CLUSTER, ROUTES, Resources
from agent.intake import Intake, Wanted, restored
from agent.paths import Route, Watch
from agent.pods import SitePods
from agent.protocol.items import Export, ExportUse, ItemKind, Policy, PolicyRule
from agent.protocol.manifest import Manifest
from agent.reconcile import Reconciler
from agent.state import Saved
from agent.xds import Nack, Outcome
from tests.agent.wanted import SITE, FakeControlPlane, peer, pool

pytestmark = pytest.mark.looptime
POOL = ItemKind.ORIGIN_POOL
NODE = NodeIdentity("n1", "a-1", "here", "a", certificate_pem="certificate", private_key_pem="key")


@dataclass
class FakeEnvoy:
    """Refuses clusters that `refuses` says; `names` tells whether its message names them, as it does for clusters but not for routes.

    Routes with the word `unheard-of` it refuses all.
    """

    refuses: Callable[[str], bool] = lambda _: False
    names: bool = True
    warming_clusters: int = 0
    away: bool = False
    applied: list[Resources] = field(default_factory=list)

    async def apply(self, resources: Resources) -> Outcome:
        self.applied.append(resources)
        if self.away:
            return Outcome(complete=False)
        clusters = resources.by_type[CLUSTER]
        refused = [name for name in clusters if self.refuses(name)]
        message = f"bad cluster {refused}" if self.names else "something is bad"
        nacks = [Nack(CLUSTER, tuple(clusters), message)] if refused else []
        routes = [name for name, route in resources.by_type[ROUTES].items() if b"unheard-of" in route.value]
        nacks += [Nack(ROUTES, tuple(routes), "a path is bad")] if routes else []
        return Outcome(complete=True, nacks=tuple(nacks))

    async def warming(self) -> int:
        return self.warming_clusters

    @property
    def clusters(self) -> set[str]:
        return {name for name in self.applied[-1].by_type[CLUSTER] if name.startswith("pool|")}


@dataclass
class FakeOrigins:
    found: dict[OriginId, tuple[Endpoint, ...]] = field(default_factory=dict)
    read: bool = True
    settled: bool = True

    def follow(self, snapshot: AgentSnapshot) -> None:
        pass

    def endpoints(
        self, snapshot: AgentSnapshot, before: Mapping[OriginId, tuple[Endpoint, ...]]
    ) -> Mapping[OriginId, tuple[Endpoint, ...]]:
        return dict(self.found if self.read else before)


@dataclass
class FakePeers:
    views: Mapping[str, PeerView] = field(default_factory=dict)
    draining: frozenset[str] = frozenset()
    dials: frozenset[str] = frozenset()
    settled: bool = True
    watched: Mapping[str, Watch] = field(default_factory=dict)

    def watch(self, peers: Mapping[str, Watch]) -> None:
        self.watched = peers


class Node:
    """A reconciler with everything around it."""

    def __init__(self, saved: Saved | None = None, version: str = "1") -> None:
        self.control = FakeControlPlane()
        self.envoy, self.origins, self.peers = FakeEnvoy(), FakeOrigins(), FakePeers()
        self.changes = 0
        start = saved or Saved()
        self.intake = Intake(self.control, restored(start), self._nudge)
        self.reconciler = Reconciler(
            node=NODE,
            addresses=Addresses("0.0.0.0", 15443, inside="10.0.0.1"),
            run_dir="/run/x",
            trusted_ca_file="/ca",
            wanted=lambda: self.intake.current,
            proxy=self.envoy,
            origins=self.origins,
            pods=SitePods(None, dict, lambda: None),
            peers=self.peers,
            own=PeerView,
            passed=lambda: None,
            changed=self._changed,
            start=start,
            version=version,
        )

    def _nudge(self) -> None:
        self.reconciler.nudge()

    def _changed(self) -> None:
        self.changes += 1

    def export(self, key: str, address: str = "10.0.0.1", policies: tuple[str, ...] | None = None) -> None:
        """A pool of this site that peers use, so that it has a cluster."""
        self.control.put(POOL, key, pool(address=address))
        use = ExportUse(load_balancer="n/lb", protocol="http", peers=("there",), policies=policies)
        self.control.put(ItemKind.EXPORT, key, Export(pool=key, uses=(use,)))

    def policy(self, path: str) -> None:
        rule = PolicyRule(name="r", action="DENY", path_prefixes=(path,))
        self.control.put(ItemKind.POLICY, "n/paths", Policy(rules=(rule,), default="ALLOW"))

    async def pull(self) -> None:
        await self.intake.step()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.reconciler.run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@dataclass
class UnreadPods:
    settled: bool = False

    def follow(self, snapshot: AgentSnapshot) -> None:
        pass

    def addresses(self, snapshot: AgentSnapshot, before: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[str, ...] | None]:
        return {**before, "forbidden": None}


async def test_pods_that_were_known_before_a_restart_count_until_they_are_read() -> None:
    restarted = Node(Saved(pods={"web": ("10.1.0.1",)}))
    restarted.reconciler.pods = UnreadPods()
    assert restarted.reconciler._local(AgentSnapshot()).pods == {"web": ("10.1.0.1",), "forbidden": None}
    assert restarted.reconciler.to_save().pods == {"web": ("10.1.0.1",)}


@pytest.fixture
def node() -> Node:
    node = Node()
    node.control.put(ItemKind.SITE, "here", SITE)
    node.export("n/p")
    return node


async def test_what_is_wanted_is_applied_and_said_once(node: Node) -> None:
    async with node.running():
        await node.pull()
        await asyncio.sleep(1)
        assert node.envoy.clusters == {"pool|n/p"}
        assert node.reconciler.verdict.applied_hash == node.control.now.hash
        assert node.reconciler.verdict.applied_revision == node.control.revision
        await asyncio.sleep(3600)
    assert node.changes == 1
    assert len(node.envoy.applied) == 1


async def test_before_the_first_manifest_a_running_envoy_keeps_what_it_has(node: Node) -> None:
    async with node.running():
        await asyncio.sleep(60)
    assert node.envoy.applied == []


async def test_what_is_warming_is_not_applied_yet(node: Node) -> None:
    node.envoy.warming_clusters = 1
    async with node.running():
        await node.pull()
        await asyncio.sleep(5)
        assert node.reconciler.verdict.applied_hash is None
        node.envoy.warming_clusters = 0
        await asyncio.sleep(0.5)
        assert node.reconciler.verdict.applied_hash == node.control.now.hash


async def test_what_leads_to_origins_that_are_still_looked_up_is_not_applied_yet(node: Node) -> None:
    node.origins.settled = False
    async with node.running():
        await node.pull()
        await asyncio.sleep(3)
        assert node.reconciler.verdict.applied_hash is None
        node.origins.found = {OriginId("n/p", "o"): (Endpoint("10.1.0.1", 80),)}
        node.origins.settled = True
        await asyncio.sleep(1)
        assert node.reconciler.endpoints_of("n/p") == {Endpoint("10.1.0.1", 80)}
        assert node.reconciler.verdict.applied_hash == node.control.now.hash


async def test_a_burst_of_changes_becomes_two_passes(node: Node) -> None:
    async with node.running():
        await node.pull()
        await asyncio.sleep(1)
        before = len(node.envoy.applied)
        for _ in range(100):
            node.reconciler.nudge()
            await asyncio.sleep(0.0004)
        await asyncio.sleep(1)
    assert len(node.envoy.applied) - before == 2


@pytest.mark.parametrize("names", [True, False])
async def test_one_poisoned_item_of_many_holds_back_no_other(node: Node, names: bool) -> None:
    node.envoy.refuses, node.envoy.names = lambda name: name == "pool|n/bad", names
    for index in range(20):
        node.export(f"n/{index:02}")
    node.export("n/bad")
    async with node.running():
        await node.pull()
        await asyncio.sleep(5)
    verdict = node.reconciler.verdict
    assert "pool|n/bad" not in node.envoy.clusters
    assert len(node.envoy.clusters) == 21
    assert verdict.applied_hash == node.control.now.hash
    assert "n/bad" in {rejection.key for rejection in verdict.rejected}
    assert "bad" in verdict.rejected[0].reason


async def test_an_item_of_which_no_config_can_be_made_holds_back_no_other(node: Node) -> None:
    node.control.put(ItemKind.POLICY, "n/masked", Policy(rules=(PolicyRule(name="r", action="DENY", prefixes=("10.0.0.0/255.0.0.0",)),)))
    node.export("n/other")
    node.export("n/q", policies=("n/masked",))
    async with node.running():
        await node.pull()
        await asyncio.sleep(5)
    verdict = node.reconciler.verdict
    assert node.envoy.clusters == {"pool|n/p", "pool|n/other"}
    assert verdict.applied_hash == node.control.now.hash
    assert [(it.kind, it.key) for it in verdict.rejected] == [(ItemKind.EXPORT, "n/q")]
    assert "255.0.0.0" in verdict.rejected[0].reason


async def test_a_site_of_which_no_config_can_be_made_ends_the_pass_and_blames_no_item(node: Node) -> None:
    node.reconciler.addresses = Addresses("0.0.0.0", gateway_port=-1)
    await node.pull()
    with pytest.raises(ValueError, match="-1"):
        await node.reconciler.converge()
    assert node.envoy.applied == []
    assert node.reconciler.to_save().rejected == ()


async def test_a_rejected_change_leaves_the_last_good_version(node: Node) -> None:
    async with node.running():
        await node.pull()
        await asyncio.sleep(1)
        good = node.reconciler.good.items[ItemId(POOL, "n/p")]
        node.control.put(POOL, "n/p", b'{"origins": [], "invented_later": true}')
        await node.pull()
        await asyncio.sleep(1)
        assert node.reconciler.good.items[ItemId(POOL, "n/p")] is good
        assert [rejection.key for rejection in node.reconciler.verdict.rejected] == ["n/p"]
        node.control.put(POOL, "n/p", pool(address="10.0.0.2"))
        await node.pull()
        await asyncio.sleep(1)
    assert node.reconciler.verdict.rejected == ()


async def test_a_rejection_is_not_tried_again_until_the_item_changes(node: Node) -> None:
    node.envoy.refuses = lambda name: name == "pool|n/bad"
    node.export("n/bad")
    async with node.running():
        await node.pull()
        await asyncio.sleep(5)
        before = len(node.envoy.applied)
        node.reconciler.nudge()
        await asyncio.sleep(5)
        assert len(node.envoy.applied) - before == 1
        node.envoy.refuses = lambda _: False
        node.export("n/bad", address="10.0.0.7")
        await node.pull()
        await asyncio.sleep(5)
    assert "pool|n/bad" in node.envoy.clusters
    assert node.reconciler.verdict.rejected == ()


async def test_what_was_rejected_for_something_that_it_refers_to_is_tried_again_when_that_changes(node: Node) -> None:
    node.policy("/unheard-of")
    node.export("n/q", policies=("n/paths",))
    async with node.running():
        await node.pull()
        await asyncio.sleep(5)
        assert [(it.kind, it.key) for it in node.reconciler.verdict.rejected] == [(ItemKind.EXPORT, "n/q")]
        node.policy("/heard-of")
        await node.pull()
        saved = node.reconciler.to_save()
        await asyncio.sleep(5)
        assert node.reconciler.verdict.rejected == ()
        assert node.envoy.clusters == {"pool|n/p", "pool|n/q"}
    assert saved.rejected == (), "it would not be tried again after a restart just then"


async def test_a_rejected_change_of_what_an_item_refers_to_leaves_both_as_they_were(node: Node) -> None:
    node.policy("/heard-of")
    node.export("n/q", policies=("n/paths",))
    async with node.running():
        await node.pull()
        await asyncio.sleep(1)
        node.policy("/unheard-of")
        await node.pull()
        await asyncio.sleep(5)
    assert [(it.kind, it.key) for it in node.reconciler.verdict.rejected] == [(ItemKind.POLICY, "n/paths")]
    assert node.envoy.clusters == {"pool|n/p", "pool|n/q"}
    assert b"/heard-of" in node.envoy.applied[-1].by_type[ROUTES]["exports"].value


@pytest.mark.parametrize(("version", "kept"), [("1", {"pool|n/p"}), ("2", {"pool|n/p", "pool|n/bad"})])
async def test_another_version_of_the_agent_tries_what_was_rejected_again(node: Node, version: str, kept: set[str]) -> None:
    node.envoy.refuses = lambda name: name == "pool|n/bad"
    node.export("n/bad")
    async with node.running():
        await node.pull()
        await asyncio.sleep(5)
    again = Node(node.reconciler.to_save(), version)
    async with again.running():
        await asyncio.sleep(1)
    assert again.envoy.clusters == kept
    assert bool(again.reconciler.verdict.rejected) == (version == "1")


async def test_a_restart_remembers_what_was_good_and_what_was_rejected(node: Node) -> None:
    node.envoy.refuses = lambda name: name == "pool|n/bad"
    node.export("n/bad")
    async with node.running():
        await node.pull()
        await asyncio.sleep(5)
    again = Node(Saved.model_validate_json(node.reconciler.to_save().model_dump_json()))
    again.envoy.refuses = node.envoy.refuses
    again.control.away = True
    async with again.running():
        await asyncio.sleep(1)
    assert len(again.envoy.applied) == 1, "what is known to be bad is not tried"
    assert again.envoy.clusters == node.envoy.clusters
    assert again.reconciler.verdict.applied_hash == node.control.now.hash
    assert again.reconciler.verdict.rejected == node.reconciler.verdict.rejected


async def test_a_restart_serves_known_endpoints_until_the_cluster_was_read(node: Node) -> None:
    origin = OriginId("n/p", "o")
    node.origins.found = {origin: (Endpoint("10.1.1.1", 80),)}
    async with node.running():
        await node.pull()
        await asyncio.sleep(1)
    again = Node(node.reconciler.to_save())
    again.origins.read = False
    async with again.running():
        await asyncio.sleep(1)
        assert again.reconciler.endpoints_of("n/p") == {Endpoint("10.1.1.1", 80)}
        again.origins.read = True
        again.reconciler.nudge()
        await asyncio.sleep(1)
        assert again.reconciler.endpoints_of("n/p") == frozenset()


async def test_an_absent_envoy_is_waited_for(node: Node) -> None:
    node.envoy.away = True
    async with node.running():
        await node.pull()
        await asyncio.sleep(60)
        assert node.reconciler.verdict.applied_hash is None
        assert len(node.envoy.applied) < 60
        node.envoy.away = False
        node.reconciler.nudge()
        await asyncio.sleep(1)
        assert node.reconciler.verdict.applied_hash == node.control.now.hash


async def test_peers_that_have_origins_of_pools_are_probed(node: Node) -> None:
    node.control.put(ItemKind.PEER, "there", peer("there"))
    node.control.put(ItemKind.PEER, "stranger", peer("stranger"))
    node.control.put(POOL, "n/remote", pool("there", "unreachable"))
    async with node.running():
        await node.pull()
        await asyncio.sleep(1)
    assert node.peers.watched == {"there": Watch(Route((DIRECT,)))}


async def test_the_peers_that_a_node_dials_are_rendered_and_saved(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[LocalState] = []

    def remembered(snapshot: AgentSnapshot, local: LocalState) -> Resources:
        rendered.append(local)
        return render(snapshot, local)

    monkeypatch.setattr("agent.reconcile.render", remembered)
    node.peers.dials = frozenset({"there"})
    async with node.running():
        await node.pull()
        await asyncio.sleep(1)
    assert rendered[-1].dials == {"there"}
    assert node.reconciler.to_save().dials == ("there",)


async def test_the_paths_are_saved_that_another_agent_would_take_for_something_else(node: Node) -> None:
    node.peers.views = {
        "there": PeerView(True, {}, {DIRECT: False, "e1": True}),
        "elsewhere": PeerView(True, {}, {DIRECT: True}),
        "nowhere": PeerView(True, {}, {REVERSE: True}),
        "close": PeerView(True, {}, {IPSEC: True}),
    }
    assert node.reconciler.to_save().paths == {"there": {DIRECT: False, "e1": True}, "nowhere": {REVERSE: True}, "close": {IPSEC: True}}


async def test_what_no_item_made_is_the_nodes_fault_and_holds_back_no_item(node: Node) -> None:
    node.envoy.refuses = lambda name: name == "exports"
    async with node.running():
        await node.pull()
        await asyncio.sleep(1)
        verdict = node.reconciler.verdict
        assert "exports" in verdict.fault
        assert verdict.applied_hash is None
        assert verdict.rejected == ()
        assert node.envoy.clusters == {"pool|n/p"}
        node.envoy.refuses = lambda _: False
        await asyncio.sleep(60)
    assert node.reconciler.verdict.fault == ""
    assert node.reconciler.verdict.applied_hash == node.control.now.hash


def test_nothing_saved_is_nothing_wanted() -> None:
    assert restored(Saved()) == Wanted(Manifest(entries=()))
