"""The judgement about paths, on histories of probes."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.envoy.inputs import AgentSnapshot, Item, ItemId, PeerView
from agent.envoy.paths import DIRECT, IPSEC, REVERSE
from agent.paths import (
    GOOD_PROBES,
    ITSELF,
    REST_S,
    Choice,
    Dialling,
    Instant,
    Path,
    Route,
    Watch,
    choose,
    home_edges,
    relieved,
    settled,
    unproven,
    watches,
)
from agent.protocol.base import Body, content_hash
from agent.protocol.items import Edge, Export, ExportUse, Gateway, IpsecNode, ItemKind
from tests.agent.wanted import SITE, peer, pool

ROUTE = Route((DIRECT, "e1", "e2"), names={"e1": "lyon"})
EVENING = 1_700_000_000.0
END = IpsecNode(node_id="other", host="10.9.9.9")


def at(seconds: float) -> Instant:
    return Instant(1_000 + seconds, EVENING + seconds)


class History:
    """A peer whose paths are probed every second."""

    def __init__(self, route: Route = ROUTE) -> None:
        self.route, self.now = route, 0.0
        self.paths = {name: unproven(EVENING) if name == REVERSE else Path(EVENING) for name in route.paths}

    def second(self, **answers: bool) -> Choice:
        """One in which these paths answer or not; the others are not probed."""
        for name, answers_ in answers.items():
            path = self.paths[name]
            self.paths[name] = path.answered(1.0, at(self.now)) if answers_ else path.failed("timed out", at(self.now))
            self.paths = settled(self.route, self.paths, at(self.now))
        choice = choose(self.route, self.paths, at(self.now))
        self.now += 1
        return choice

    def seconds(self, count: int, **answers: bool) -> Choice:
        return [self.second(**answers) for _ in range(count)][-1]


def test_before_anything_answered_the_preferred_path_is_tried() -> None:
    choice = choose(ROUTE, History().paths, at(0))
    assert (choice.in_use, choice.usable) == (DIRECT, {})
    assert choice.reasons["e1"] == "has not answered yet"


def test_direct_is_preferred_and_the_others_stand_by() -> None:
    choice = History().second(direct=True, e1=True, e2=True)
    assert choice.in_use == DIRECT
    assert choice.usable == {DIRECT: True, "e1": True, "e2": True}
    assert choice.reasons == {DIRECT: "preferred", "e1": "stands by", "e2": "stands by"}


def test_one_lost_probe_is_no_outage_and_two_are() -> None:
    history = History()
    history.second(direct=True, e1=True)
    assert history.second(direct=False).in_use == DIRECT
    choice = history.second(direct=False)
    assert (choice.in_use, choice.usable[DIRECT]) == ("e1", False)
    assert choice.reasons["e1"] == "direct is down: timed out"


def test_losses_that_alternate_with_answers_are_an_outage_too() -> None:
    history = History()
    history.second(direct=True, e1=True)
    choices = [history.second(direct=answers) for answers in (False, True, True, False)]
    assert [choice.in_use for choice in choices] == [DIRECT, DIRECT, DIRECT, "e1"]


def test_losses_far_apart_are_none() -> None:
    history = History()
    history.second(direct=True, e1=True)
    for _ in range(5):
        history.second(direct=False)
        assert history.seconds(20, direct=True).in_use == DIRECT


def test_after_one_failure_a_path_is_used_again_when_it_has_answered_a_few_times() -> None:
    history = History()
    history.second(direct=True, e1=True)
    history.seconds(100, direct=True, e1=True)
    history.seconds(5, direct=False, e1=True)
    used = [history.second(direct=True, e1=True).in_use for _ in range(GOOD_PROBES)]
    assert used == ["e1"] * (GOOD_PROBES - 1) + [DIRECT]


def test_after_a_second_failure_within_a_minute_a_path_rests_for_a_minute() -> None:
    history = History()
    history.second(direct=True, e1=True)
    for _ in range(2):
        history.seconds(5, direct=True, e1=True)
        history.seconds(2, direct=False, e1=True)
    choice = history.seconds(10, direct=True, e1=True)
    assert choice.in_use == "e1"
    assert choice.reasons[DIRECT].startswith("held down after flapping until 22:14:")
    assert choice.reasons["e1"] == f"direct {choice.reasons[DIRECT]}"
    assert history.seconds(48, direct=True, e1=True).in_use == "e1"
    assert history.second(direct=True, e1=True).in_use == DIRECT


def test_a_path_that_rests_is_used_when_nothing_else_leads() -> None:
    history = History()
    history.second(direct=True, e1=True)
    for _ in range(3):
        history.seconds(5, direct=True, e1=True)
        history.seconds(2, direct=False, e1=True)
    assert history.second(direct=True, e1=True).in_use == "e1"
    history.seconds(2, direct=True, e1=False)
    assert history.second(direct=True, e1=False).in_use == DIRECT
    assert history.seconds(10, direct=True, e1=True).in_use == DIRECT, "once it is used it stays so"


def test_a_way_that_the_peer_opens_is_used_only_once_it_is_proven() -> None:
    history = History(Route((REVERSE, "e1"), no_direct="the peer has no gateway"))
    choice = history.second(e1=True)
    assert (choice.in_use, choice.usable[REVERSE]) == ("e1", False)
    assert choice.reasons["e1"] == "preferred; the peer has no gateway"
    assert history.seconds(GOOD_PROBES - 1, reverse=True).in_use == "e1"
    assert history.second(reverse=True).in_use == REVERSE


def test_tunnels_over_the_same_link_are_no_stand_in_for_it_where_there_are_edges() -> None:
    history = History(Route((DIRECT, REVERSE, "e1")))
    assert history.seconds(GOOD_PROBES, direct=True, reverse=True).usable == {DIRECT: True, REVERSE: True}
    choice = history.second(direct=True, reverse=True, e1=True)
    assert (choice.in_use, choice.usable) == (DIRECT, {DIRECT: True, REVERSE: False, "e1": True})


def test_a_draining_edge_is_left_only_for_one_that_answers() -> None:
    history = History(Route(("e1", "e2"), draining=frozenset({"e1"})))
    choice = history.second(e1=True)
    assert (choice.in_use, choice.usable) == ("e1", {"e1": True})
    choice = history.second(e2=True)
    assert (choice.in_use, choice.usable) == ("e2", {"e1": False, "e2": True})
    assert choice.reasons["e1"] == "is draining"
    assert history.seconds(2, e2=False).in_use == "e1"


def test_when_all_are_down_nothing_is_in_use() -> None:
    choice = History().seconds(2, direct=False, e1=False, e2=False)
    assert choice.in_use is None
    assert not any(choice.usable.values())


ANSWERS = st.lists(st.fixed_dictionaries({name: st.booleans() for name in ROUTE.paths}), max_size=120)
FLAPS = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), max_size=12)


@given(ANSWERS)
def test_as_long_as_a_path_is_up_one_that_is_up_is_in_use(answers: list[dict[str, bool]]) -> None:
    history = History()
    for answer in answers:
        choice = history.second(**answer)
        up = {name for name, path in history.paths.items() if path.state == "UP"}
        assert choice.in_use in up if up else choice.in_use is None or history.paths[choice.in_use].state == "UNKNOWN"
        if choice.in_use is not None:
            assert choice.usable.get(choice.in_use, True)
        assert choice.reasons.keys() == set(ROUTE.paths)


@given(ANSWERS)
def test_a_path_down_is_never_usable(answers: list[dict[str, bool]]) -> None:
    history = History()
    for answer in answers:
        choice = history.second(**answer)
        assert not any(choice.usable[name] for name, path in history.paths.items() if path.state == "DOWN")


@given(FLAPS)
def test_a_flapping_link_is_returned_to_at_most_once_a_minute(flaps: list[tuple[int, int]]) -> None:
    history = History()
    history.second(direct=True, e1=True, e2=True)
    answers = [{DIRECT: answers, "e1": True, "e2": True} for up, down in flaps for answers in [True] * up + [False] * down]
    assert all(later - earlier >= REST_S for earlier, later in pairwise(_changes(history, answers)))


@given(ANSWERS)
def test_no_path_that_works_is_left_twice_within_a_minute(answers: list[dict[str, bool]]) -> None:
    history = History(Route((DIRECT, REVERSE, "e1")))
    seconds = [{DIRECT: answer[DIRECT], REVERSE: answer["e1"], "e1": answer["e2"]} for answer in answers for _ in range(4)]
    assert all(later - earlier >= REST_S for earlier, later in pairwise(_changes(history, seconds)))


def _changes(history: History, answers: list[dict[str, bool]]) -> Iterator[float]:
    """When something else was used although what was used before still worked, and had worked before."""
    before, up = None, False
    for answer in answers:
        choice = history.second(**answer)
        if before is not None and up and choice.in_use != before and history.paths[before].leads:
            yield history.now
        before = choice.in_use
        up = before is not None and history.paths[before].leads


@given(FLAPS, st.integers(0, 3))
def test_a_link_that_has_become_steady_is_used_after_a_minute_at_the_latest(flaps: list[tuple[int, int]], spare: int) -> None:
    history = History()
    for up, down in flaps:
        history.seconds(up, direct=True, e1=True)
        history.seconds(down, direct=False, e1=True)
    assert history.seconds(int(REST_S) + GOOD_PROBES + spare, direct=True, e1=True).in_use == DIRECT


@pytest.mark.parametrize("silence", [None, True])
def test_a_peer_is_dialled_from_when_it_cannot_reach_us_until_it_could_for_a_minute(silence: bool | None) -> None:
    dialling = Dialling().told(silence, at(0))
    assert not dialling.dials
    assert dialling.told(False, at(1)).dials
    dialling = dialling.told(False, at(1)).told(silence, at(2))
    assert dialling.dials
    assert dialling.told(silence, at(61)).dials
    assert not dialling.told(silence, at(62)).dials
    assert dialling.told(False, at(30)).told(silence, at(62)).dials


def snapshot(*items: tuple[ItemKind, str, Body]) -> AgentSnapshot:
    site = ItemKind.SITE, "here", SITE.model_copy(update={"edge_anchor_pem": "pem"})
    return AgentSnapshot.of(Item(ItemId(kind, key), content_hash(body.canonical()), body) for kind, key, body in (site, *items))


def calling(*sites: str) -> tuple[ItemKind, str, Body]:
    return ItemKind.ORIGIN_POOL, "n/p", pool(*sites)


def a_peer(site: str = "there", /, **fields: object) -> tuple[ItemKind, str, Body]:
    return ItemKind.PEER, site, peer(site).model_copy(update=fields)


def edge(site: str, **fields: object) -> tuple[ItemKind, str, Body]:
    gateway = Gateway(node_id="n", host="10.8.8.8", port=15443)
    return ItemKind.EDGE, site, Edge(site_id=site, name=f"{site}-name", gateways=(gateway,)).model_copy(update=fields)


@pytest.mark.parametrize(
    ("fields", "paths", "no_direct"),
    [
        ({}, (DIRECT, REVERSE), ""),
        ({"edges": ("e1", "e2", "unknown")}, (DIRECT, REVERSE, "e1", "e2"), ""),
        ({"gateways": (), "edges": ("e1",)}, (REVERSE, "e1"), "nobody can dial the peer"),
        ({"direct": False, "edges": ("e2",)}, ("e2",), "no mesh joins both sites directly"),
        ({"ipsec": (END,)}, (IPSEC, DIRECT, REVERSE), ""),
        ({"ipsec": (END,), "ssl": False, "gateways": (), "edges": ("e1",)}, (IPSEC, "e1"), ""),
        ({"ssl": False, "gateways": ()}, (), "the tunnel must be IPsec, and the peer has none that this site may use"),
    ],
)
def test_the_paths_to_a_peer_follow_from_the_snapshot(fields: dict[str, object], paths: tuple[str, ...], no_direct: str) -> None:
    route = watches(snapshot(calling("there"), a_peer(**fields), edge("e1"), edge("e2")))["there"].route
    assert (route.paths, route.no_direct) == (paths, no_direct)


def test_without_ipsec_here_ssl_is_taken_where_it_may_be() -> None:
    def route(**fields: object) -> Route:
        return watches(snapshot(calling("there"), a_peer(ipsec=(END,), **fields)), "strongSwan is not installed")["there"].route

    assert route().paths == (DIRECT, REVERSE)
    choice = choose(route(), {DIRECT: Path(0).answered(1, at(0))}, at(0))
    assert choice.reasons[DIRECT] == "preferred; no IPsec: strongSwan is not installed"
    alone = route(ssl=False, gateways=())
    assert (alone.paths, alone.no_direct) == ((), "the tunnel must be IPsec")


def test_ipsec_gives_way_to_ssl_at_once_and_comes_back_after_it_has_rested() -> None:
    history = History(Route((IPSEC, DIRECT)))
    history.second(ipsec=True, direct=True)
    for _ in range(120):
        before = history.second(ipsec=True, direct=True)
    assert before.in_use == IPSEC
    history.second(ipsec=False, direct=True)
    assert history.second(ipsec=False, direct=True).in_use == DIRECT
    used = [history.second(ipsec=True, direct=True).in_use for _ in range(90)]
    assert used[0] == DIRECT
    assert used[-1] == IPSEC
    assert used.index(IPSEC) >= GOOD_PROBES - 1


def test_a_draining_edge_comes_last() -> None:
    route = watches(snapshot(calling("there"), a_peer(direct=False, edges=("e1", "e2")), edge("e1", draining=True), edge("e2")))[
        "there"
    ].route
    assert route.order == ("e2", "e1")


def test_an_edge_that_cannot_be_dialled_is_no_path() -> None:
    edges = edge("e1", gateways=()), edge("e2")
    assert watches(snapshot(calling("there"), a_peer(edges=("e1", "e2")), *edges))["there"].route.paths == (DIRECT, REVERSE, "e2")
    site = ItemKind.SITE, "here", SITE
    assert watches(snapshot(site, calling("there"), a_peer(edges=("e2",)), *edges))["there"].route.paths == (DIRECT,)


def test_a_peer_that_only_calls_is_asked_whether_it_can() -> None:
    export = Export(pool="n/p", uses=(ExportUse(load_balancer="n/lb", protocol="tcp", peers=("caller", "mute", "far")),))
    peers = (a_peer("caller"), a_peer("mute", gateways=()), a_peer("far", direct=False), a_peer("stranger"))
    found = watches(snapshot((ItemKind.EXPORT, "n/p", export), *peers))
    assert found == {"caller": Watch(Route((DIRECT,)), called=False)}


def test_a_regional_edge_reaches_sites_by_the_tunnels_that_they_keep_to_it() -> None:
    site = SITE.model_copy(update={"site_id": "e1", "kind": "regional_edge"})
    found = watches(snapshot((ItemKind.SITE, "here", site), calling("there"), a_peer(direct=False, edges=("e1",))))
    assert found["there"].route.paths == ("e1",)


def test_home_edges_are_asked_themselves() -> None:
    assert home_edges(snapshot(edge("e1", home=True), edge("e2"))) == {"e1": Watch(Route((ITSELF,)), meshed=False)}


def test_a_site_that_is_draining_exports_what_nobody_else_serves() -> None:
    views = {
        "leaving": PeerView(True, {"n/p": 4, "n/q": 2, "n/r": 1, "n/s": 1}),
        "staying": PeerView(True, {"n/p": 1, "n/q": 0}),
        "lost": PeerView(False, {"n/r": 8}),
        "leaving too": PeerView(True, {"n/s": 1}),
    }
    after = relieved(views, {"leaving", "leaving too"})
    assert after["leaving"].exports == {"n/p": 0, "n/q": 2, "n/r": 1, "n/s": 1}
    assert after["staying"] is views["staying"]
