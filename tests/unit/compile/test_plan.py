"""A plan made from the one before it."""

from dataclasses import replace
from typing import Any

import pytest

from controlplane.compile.plan import Plan, plan
from controlplane.compile.site import compile_site, conditions
from controlplane.resources.base import Stored
from tests.unit.compile.intents import Body, http, id_of, intent_of, observations_of, pool, site, stored, tcp, written

SITES = ("a", "b")
FIRST = {
    body["metadata"]["name"]: stored(body, created_revision=number)
    for number, body in enumerate(
        (
            *map(site, SITES),
            pool("one", "b"),
            pool("two", "a"),
            http("older", ["one"], ["a"], domains=["x.test"]),
            http("younger", ["one", "two"], ["a", "b"], domains=["x.test"]),
            http("other", ["two"], ["b"]),
            tcp("raw", ["two", "lost"], ["a"]),
        )
    )
}


def made(**changes: Body | None) -> dict[str, Stored[Any]]:
    """The first objects with others in their places; what is new comes last."""
    found = {**FIRST, **{name: stored(body, created_revision=_age(name)) for name, body in changes.items() if body}}
    return {name: each for name, each in found.items() if changes.get(name, each)}


def _age(name: str) -> int:
    return FIRST[name].created_revision if name in FIRST else len(FIRST)


CHANGES: dict[str, dict[str, Body | None]] = {
    "nothing": {},
    "the winner of a conflict goes": {"older": None},
    "the winner of a conflict moves": {"older": http("older", ["one"], ["b"], domains=["x.test"])},
    "a pool goes": {"two": None},
    "a pool comes": {"lost": pool("lost", "b")},
    "a pool moves": {"one": pool("one", "a")},
    "a load balancer calls another pool": {"other": http("other", ["one"], ["b"])},
    "a load balancer is new": {"new": http("new", ["one"], ["a", "b"])},
    "nothing uses a pool any more": {"other": None, "younger": None, "raw": None},
    "a site goes": {"b": None},
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_the_one_that_would_be_made_from_nothing(name: str) -> None:
    before, after = intent_of(FIRST.values()), intent_of(made(**CHANGES[name]).values())
    for old, new in ((before, after), (after, before)):
        plan(old)
        later = written(old, new)
        _assert_same(plan(later), plan(new))
        assert conditions(later) == conditions(new)
        for site_id in map(id_of, SITES):
            assert compile_site(site_id, later, observations_of(new)) == compile_site(site_id, new, observations_of(new))


def test_what_a_write_does_not_touch_is_taken_over() -> None:
    before, after = intent_of(FIRST.values()), intent_of(made(other=http("other", ["two"], ["a"])).values())
    known = plan(before)
    later = plan(written(before, after))
    older, pool_one = FIRST["older"], FIRST["one"]
    assert later.placements[older.kind, older.key] is known.placements[older.kind, older.key]
    assert later.pools[pool_one.key] is known.pools[pool_one.key]


def test_what_a_load_balancer_does_with_requests_moves_nothing() -> None:
    """Its item is another one, and all else the very same: who listens where, who calls which pool, and what is served."""
    before = intent_of(FIRST.values())
    after = intent_of(made(other=http("other", ["two"], ["b"], more_option={"idle_timeout": 1000})).values())
    known, later = plan(before), plan(written(before, after))
    target = ("http_loadbalancer", FIRST["other"].key)
    placement = known.placements[target]
    assert later.placements[target] is placement
    assert later.load_balancers[placement].item != known.load_balancers[placement].item
    assert (later.wanted, later.listeners, later.pools, later.served) == (known.wanted, known.listeners, known.pools, known.served)


def test_an_object_that_was_written_as_it_was_is_planned_with_what_else_changed() -> None:
    """Its placement is the very same, and yet its pool may be another one."""
    before = intent_of(FIRST.values())
    plan(before)
    again = {**made(two=None, older=None), "other": replace(FIRST["other"])}
    after = intent_of(again.values())
    _assert_same(plan(written(before, after)), plan(after))


def _assert_same(ours: Plan, theirs: Plan) -> None:
    assert ours.placements == theirs.placements
    assert {key: each.item for key, each in ours.pools.items()} == {key: each.item for key, each in theirs.pools.items()}
    for one, other in ((ours.wanted, theirs.wanted), (ours.users, theirs.users), (ours.served, theirs.served)):
        assert {key: len(members) for key, members in one.items()} == {key: len(members) for key, members in other.items()}
    assert {each: found.item for each, found in ours.load_balancers.items()} == {
        each: found.item for each, found in theirs.load_balancers.items()
    }
