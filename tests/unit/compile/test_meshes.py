"""Which sites meshes join."""

from dataclasses import replace
from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.protocol.items import IpsecNode, ItemKind, Peer
from controlplane.compile.concern import concerned_sites
from controlplane.compile.members import Topology, topology
from controlplane.compile.site import compile_site, conditions
from controlplane.resources.base import Key
from tests.unit.compile.intents import (
    Body,
    body,
    full_mesh,
    http,
    id_of,
    intent,
    observations_of,
    pool,
    site,
    virtual_site,
)

A, B, C, D = (id_of(name) for name in "abcd")


def group(name: str, virtual: str, **spec: Body) -> Body:
    return body("site_mesh_group", name, {"virtual_site": [{"namespace": "shared", "name": virtual}], **spec}, "system")


def hubs(name: str, virtual: str, **spec: Body) -> Body:
    return group(name, virtual, hub_mesh={}, **spec)


def spokes(name: str, virtual: str, of: str, **spec: Body) -> Body:
    return group(name, virtual, spoke_mesh={"hub_mesh_group": {"name": of}}, **spec)


def of(*bodies: Body) -> Topology:
    return topology(intent(*bodies))


def joined(made: Topology) -> set[str]:
    """Pairs of names, such as `ab`."""
    names = {site_id: site.metadata.name for site_id, site in made.sites.items()}
    return {names[one] + names[other] for one, other in combinations(made.sites, 2) if made.joined(one, other)}


SITES = (site("a", {"hub": "1"}), site("b", {"hub": "1"}), site("c", {"spoke": "1"}), site("d", {"spoke": "1"}))
SELECTED = (virtual_site("hubs", "hub"), virtual_site("spokes", "spoke"))
STAR = (*SITES, *SELECTED, hubs("h", "hubs"), spokes("s", "spokes", "h"))


def test_spokes_reach_hubs_and_hubs_each_other() -> None:
    assert joined(of(*STAR)) == {"ab", "ac", "ad", "bc", "bd"}


def test_a_group_of_hubs_may_be_spokes_of_another() -> None:
    above = (virtual_site("top", "top"), hubs("t", "top"), spokes("st", "hubs", "t"))
    assert joined(of(*STAR, site("e", {"top": "1"}), *above)) == {"ab", "ac", "ad", "bc", "bd", "ae", "be"}


def test_a_spoke_may_have_hubs_of_many_groups() -> None:
    more = (virtual_site("top", "top"), hubs("t", "top"), spokes("st", "spokes", "t"))
    assert joined(of(*STAR, site("e", {"top": "1"}), *more)) == {"ab", "ac", "ad", "bc", "bd", "ce", "de"}


@pytest.mark.parametrize(
    ("one", "other", "mesh", "allowed"),
    [
        ("IPSEC_OR_SSL", "IPSEC_OR_SSL", "IPSEC_OR_SSL", {"ipsec", "ssl"}),
        ("IPSEC", "IPSEC_OR_SSL", "IPSEC_OR_SSL", {"ipsec"}),
        ("SSL", "IPSEC_OR_SSL", "IPSEC_OR_SSL", {"ssl"}),
        ("IPSEC", "SSL", "IPSEC_OR_SSL", set()),
        ("IPSEC_OR_SSL", "IPSEC_OR_SSL", "IPSEC", {"ipsec"}),
    ],
)
def test_a_tunnel_is_what_both_sites_and_their_mesh_allow(one: str, other: str, mesh: str, allowed: set[str]) -> None:
    a, b, m = (f"SITE_TO_SITE_TUNNEL_{each}" for each in (one, other, mesh))
    sites = site("a", {"x": "1"}, tunnel_type=a), site("b", {"x": "1"}, tunnel_type=b)
    joining = group("m", "all", full_mesh={})
    joining["spec"]["tunnel_type"] = m
    made = intent(*sites, virtual_site("all", "x"), joining, pool("p", "b"), http("h", ["p"], ["a"]))
    assert topology(made).encapsulations(A, B) == allowed
    seen = replace(observations_of(made), ipsec={B: (IpsecNode(node_id="n", host="10.0.0.1"),)})
    (peer,) = (Peer.read(item.body) for (kind, key), item in compile_site(A, made, seen).items.items() if (kind, key) == (ItemKind.PEER, B))
    assert bool(peer.ipsec) == ("ipsec" in allowed)
    assert peer.ssl == bool(peer.gateways) == ("ssl" in allowed)


def test_without_its_hubs_a_group_of_spokes_joins_nobody() -> None:
    for hub in (full_mesh("h", "hubs"), {**hubs("h", "hubs"), "metadata": {"name": "h", "namespace": "system", "disable": True}}):
        made = of(*SITES, *SELECTED, hub, spokes("s", "spokes", "h"))
        assert not made.joined(A, C)
        assert not made.joined(C, D)


def test_edges_stand_in_where_no_mesh_joins_or_one_of_those_that_do_allows_it() -> None:
    open_mesh = group("open", "spokes", full_mesh={}, enable_re_fallback={})
    made = of(*STAR, open_mesh, full_mesh("closed", "spokes"))
    assert made.fallback(C, D)
    assert not made.fallback(A, C)
    assert of(*SITES, *SELECTED).fallback(A, C)
    assert of(*STAR).fallback(C, D)


def test_who_comes_to_be_hub_and_spoke_of_a_relation_is_what_the_older_group_says() -> None:
    both = site("x", {"hub": "1", "spoke": "1"})
    given = intent(*STAR, both)
    made = topology(given)
    assert made.joined(C, id_of("x"))
    (condition,) = conditions(given)
    assert (condition.kind, condition.key, condition.type) == ("site_mesh_group", Key("system", "s"), "Conflicted")
    assert condition.message == "site x is a hub of site_mesh_group system/h, which is older, and so no spoke of this one"


def test_a_changed_label_concerns_whoever_it_joins() -> None:
    services = (pool("pool", "a"), http("lb", ["pool"], ["c", "d"]))
    before = intent(*STAR, *services)
    after = intent(*(site("a") if each is SITES[0] else each for each in STAR), *services)
    observations = observations_of(before)
    touched = concerned_sites("site", Key("system", "a"), before) | concerned_sites("site", Key("system", "a"), after)
    for site_id in (A, B, C, D):
        same = compile_site(site_id, before, observations).manifest == compile_site(site_id, after, observations).manifest
        assert same == (site_id == B)
        assert same or site_id in touched


def test_hubs_concern_their_spokes() -> None:
    given = intent(*STAR)
    assert concerned_sites("site_mesh_group", Key("system", "h"), given) == {A, B, C, D}
    assert concerned_sites("virtual_site", Key("shared", "hubs"), given) == {A, B, C, D}


roles = st.lists(st.sampled_from(("hub", "spoke", "top", "full")), max_size=3, unique=True)


@given(labels=st.lists(roles, min_size=4, max_size=4), turned=st.booleans())
def test_any_topology_is_symmetric_and_in_no_relation_is_anybody_on_both_sides(labels: list[list[str]], *, turned: bool) -> None:
    sites = [site(name, dict.fromkeys(found, "1")) for name, found in zip("abcd", labels, strict=True)]
    selected = [virtual_site(name, name) for name in ("hub", "spoke", "top", "full")]
    groups = [hubs("h", "hub"), hubs("t", "top"), spokes("s", "spoke", "h"), spokes("ht", "hub", "t"), full_mesh("f", "full")]
    made = of(*sites, *selected, *(reversed(groups) if turned else groups))
    for mesh in made.meshes.values():
        assert not mesh.members & (mesh.hubs or frozenset())
    wanted = {id_of(name): set(found) for name, found in zip("abcd", labels, strict=True)}
    for one, other in permutations(made.sites, 2):
        assert made.joined(one, other) == made.joined(other, one)
        assert made.fallback(one, other) == made.fallback(other, one) == (not made.joined(one, other))
        for role in wanted[one] & wanted[other] & {"hub", "top", "full"}:
            assert made.joined(one, other), role
