"""Which items can be in force together, against an Envoy that is a function."""

from collections.abc import Callable, Iterable

import pytest

from agent.envoy.inputs import AgentSnapshot, Item, ItemId
from agent.isolate import Trial, accept
from agent.protocol.items import ItemKind, OriginPool

OK = Trial()


def item(key: str, hash: str = "1", kind: ItemKind = ItemKind.ORIGIN_POOL) -> Item:
    return Item(ItemId(kind, key), hash, OriginPool(origins=()))


def snapshot(items: Iterable[Item]) -> AgentSnapshot:
    return AgentSnapshot.of(items)


class Judge:
    """Refuses snapshots with a bad item. `tells`: whether it points at it, as Envoy does for clusters, or at everything, as for routes."""

    def __init__(self, bad: Callable[[Item], bool], *, tells: bool) -> None:
        self.bad = bad
        self.tells = tells
        self.tried: list[AgentSnapshot] = []

    async def __call__(self, snapshot: AgentSnapshot) -> Trial:
        self.tried.append(snapshot)
        guilty = frozenset(item.id for item in snapshot.items.values() if self.bad(item))
        return Trial("no", guilty if self.tells else frozenset(snapshot.items)) if guilty else OK


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("cold", [True, False])
async def test_one_bad_item_of_many_holds_back_no_other(tells: bool, cold: bool) -> None:
    many = [item(f"n/{index:03}") for index in range(100)]
    bad = item("n/042", "2")
    target = snapshot(many).with_items([bad])
    good = snapshot([] if cold else many)
    judge = Judge(lambda it: it == bad, tells=tells)
    accepted = await accept(good, target, judge)
    expected = snapshot(many).without([bad.id]) if cold else snapshot(many)
    assert accepted.snapshot == expected
    assert accepted.reasons == {bad: "no"}
    assert judge.tried[-1] == accepted.snapshot
    assert len(judge.tried) <= (3 if tells else 20)


@pytest.mark.parametrize("tells", [True, False])
async def test_several_bad_items_are_all_found(tells: bool) -> None:
    bad = [item(f"n/{index:02}") for index in (3, 4, 17)]
    target = snapshot(item(f"n/{index:02}") for index in range(20))
    accepted = await accept(snapshot([]), target, Judge(lambda it: it in bad, tells=tells))
    assert set(accepted.reasons) == set(bad)
    assert accepted.snapshot == target.without(it.id for it in bad)


async def test_without_a_refusal_there_is_one_attempt() -> None:
    judge = Judge(lambda _: False, tells=False)
    target = snapshot([item("n/a"), item("n/b")])
    assert (await accept(snapshot([item("n/a", "0")]), target, judge)).snapshot == target
    assert judge.tried == [target]


async def test_what_is_not_wanted_any_more_goes() -> None:
    accepted = await accept(snapshot([item("n/a"), item("n/b")]), snapshot([item("n/b")]), Judge(lambda _: False, tells=False))
    assert accepted.snapshot == snapshot([item("n/b")])


@pytest.mark.parametrize("tells", [True, False])
async def test_an_item_that_was_good_and_is_refused_now_goes_alone(tells: bool) -> None:
    """Its secret or address has changed."""
    bad, other = item("n/a"), item("n/b")

    async def judge(snapshot: AgentSnapshot) -> Trial:
        return Trial("no", frozenset([bad.id] if tells else [bad.id, other.id])) if bad.id in snapshot.items else OK

    both = snapshot([bad, other])
    accepted = await accept(both, both, judge)
    assert accepted.snapshot == snapshot([other])
    assert accepted.reasons == {bad: "no"}


async def test_a_refusal_that_comes_from_no_item_is_a_fault_of_the_node() -> None:
    tried = []

    async def judge(snapshot: AgentSnapshot) -> Trial:
        tried.append(snapshot)
        return Trial("port is taken")

    target = snapshot([item("n/a"), item("n/b")])
    accepted = await accept(snapshot([]), target, judge)
    assert accepted.fault == "port is taken"
    assert accepted.snapshot == target
    assert accepted.reasons == {}
    assert len(tried) == 1


async def test_the_search_ends_even_if_envoy_changes_its_mind() -> None:
    answers = iter(range(1000))

    async def judge(snapshot: AgentSnapshot) -> Trial:
        return Trial("no", frozenset(snapshot.items)) if next(answers) % 2 else OK

    target = snapshot(item(f"n/{index}") for index in range(8))
    await accept(target, target, judge)
    await accept(snapshot([]), target, judge)
    assert next(answers) < 200
