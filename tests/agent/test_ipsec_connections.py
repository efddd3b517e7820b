"""What strongSwan is told, and what its answers mean."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from threading import Event
from typing import Any, get_args

import pytest

from agent.charon import Charon, Esp
from agent.envoy.inputs import AgentSnapshot, Item, ItemId, NodeIdentity
from agent.ipsec import associations, connections, trust
from agent.overlay import Overlay
from agent.protocol.items import IpsecNode, ItemKind, Peer
from agent.protocol.overlay import OVERLAY, overlay_address
from tests.agent.real_envoy import until
from tests.agent.wanted import SITE

PEM = "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n"
LEAF, TENANT, NEXT, ROOT = (PEM.format(name) for name in ("leaf", "tenant", "next", "root"))
OWN = NodeIdentity("n5", "five", SITE.site_id, SITE.name, LEAF + TENANT, "key")
ABOUT = SITE.model_copy(update={"peer_anchor_pem": TENANT + NEXT, "root_anchor_pem": ROOT, "tunnel_dead_timeout": 10_000})


def snapshot(*ends: IpsecNode, timeout_ms: int = 10_000) -> AgentSnapshot:
    site = ABOUT.model_copy(update={"tunnel_dead_timeout": timeout_ms})
    peer = Peer(site_id="there", name="there", ipsec=ends)
    return AgentSnapshot.of([Item(ItemId(ItemKind.SITE, "s"), "s", site), Item(ItemId(ItemKind.PEER, "there"), "p", peer)])


@pytest.mark.parametrize(
    ("other", "host", "dialable", "begins"),
    [
        ("n6", "10.0.0.6", True, True),
        ("n4", "10.0.0.4", True, False),
        ("n4", "10.0.0.4", False, True),
        ("n6", "", True, False),
    ],
)
def test_one_end_begins_and_it_is_the_one_that_can(other: str, host: str, dialable: bool, begins: bool) -> None:
    (found,) = connections(snapshot(IpsecNode(node_id=other, host=host)), OWN, dialable=dialable).values()
    assert (found.begins, found.dialable) == (begins, bool(host))


def test_the_other_end_must_be_that_node_under_the_tenants_intermediate() -> None:
    found = connections(snapshot(IpsecNode(node_id="n6", host="10.0.0.6", port=30500)), OWN, dialable=True)["n6"].config
    assert found["remote"] == {
        "auth": "pubkey",
        "id": f"n6.there.{SITE.tenant_id}.{SITE.trust_domain}",
        "cacerts": [TENANT, NEXT],
    }
    assert found["local"]["certs"] == [LEAF]
    assert (found["remote_addrs"], found["remote_port"]) == (["10.0.0.6", "%any"], "30500")
    child = found["children"]["overlay"]
    assert (child["local_ts"], child["remote_ts"]) == ([f"{overlay_address('n5')}/128"], [f"{overlay_address('n6')}/128"])


def test_trust_is_the_roots_and_the_tenants_intermediates() -> None:
    assert trust(snapshot(), OWN).anchors == (ROOT, TENANT, NEXT)
    assert "key" not in repr(trust(snapshot(), OWN))


@pytest.mark.parametrize(("timeout_ms", "delay"), [(10_000, "5s"), (180_000, "175s"), (1_000, "1s")])
def test_a_silent_peer_is_asked_early_enough_for_the_dead_timeout(timeout_ms: int, delay: str) -> None:
    (found,) = connections(snapshot(IpsecNode(node_id="n6", host="h"), timeout_ms=timeout_ms), OWN, dialable=True).values()
    assert found.config["dpd_delay"] == delay


def test_overlay_addresses_differ_and_stay() -> None:
    assert len({overlay_address(str(number)) for number in range(1_000)}) == 1_000
    assert overlay_address("n") == overlay_address("n")
    assert all(OVERLAY.overlaps(type(OVERLAY)(overlay_address(str(number)))) for number in range(10))


def test_of_several_tunnels_the_newest_counts_and_one_without_child_is_none() -> None:
    child = {"state": b"INSTALLED", "spi-in": b"c1", "bytes-in": b"7", "install-time": b"3", "encr-alg": b"AES", "encr-keysize": b"128"}
    listed: list[dict[str, Any]] = [
        {"n6": {"state": b"ESTABLISHED", "established": b"9", "child-sas": {"overlay-1": {**child, "spi-in": b"old"}}}},
        {"n6": {"state": b"ESTABLISHED", "established": b"1", "child-sas": {"overlay-2": child}, "tasks-active": [b"IKE_DPD"]}},
        {"n7": {"state": b"CONNECTING"}},
        {"n8": {"state": b"ESTABLISHED", "established": b"1", "child-sas": {"overlay-3": {**child, "state": b"REKEYED"}}}},
    ]
    up, building = associations(listed)
    assert up.keys() == {"n6"}
    assert building == {"n7"}
    found = up["n6"]
    assert (found.tunnel.spi_in, found.tunnel.bytes_in, found.asks) == ("c1", 7, True)


def test_who_encrypts_makes_a_difference_to_the_daemons_plugins_alone() -> None:
    kernel, userspace = (
        Charon(Path("charon"), Path("run"), Path("log"), esp, overlay_address("n5"))._config().splitlines() for esp in get_args(Esp)
    )
    (differing,) = ((one, other) for one, other in zip(kernel, userspace, strict=True) if one != other)
    assert differing[0].startswith("load = ")
    assert differing[1] == differing[0].replace("kernel-netlink", "kernel-libipsec kernel-netlink")


class Strongswan:
    """A session with one that takes everything and has no tunnels."""

    def get_conns(self) -> dict[str, Any]:
        return {"conns": []}

    def list_sas(self) -> list[Any]:
        return []

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_: None


async def test_nodes_that_do_not_answer_keep_no_look_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, begun, answered = [IpsecNode(node_id=f"n6{number:02}", host="10.0.0.6") for number in range(20)], list[str](), Event()

    def silent(_: Charon, node_id: str) -> str:
        begun.append(node_id)
        answered.wait(60)
        return ""

    monkeypatch.setattr("agent.overlay._initiated", silent)
    monkeypatch.setattr(Charon, "session", lambda *_: nullcontext(Strongswan()))
    daemon = Charon(Path("charon"), tmp_path, tmp_path / "log", "userspace", "fd00::1")
    overlay = Overlay("", None, "userspace", lambda: True, tmp_path, tmp_path / "log", lambda: OWN, lambda: snapshot(*ends), lambda: None)
    try:
        await overlay._look(daemon)
        await until(lambda: len(begun) == 8)
        await overlay._look(daemon)
        assert len(begun) == 8, "the second look is over while the first nodes are still silent"
    finally:
        answered.set()
    await until(lambda: sorted(begun) == [end.node_id for end in ends])
