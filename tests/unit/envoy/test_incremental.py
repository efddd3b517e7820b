"""Whatever was rendered before, a config is that of its snapshot and local state alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.envoy.inputs import AgentSnapshot, Endpoint, Item, LocalState, PeerView
from agent.envoy.render import render
from agent.envoy.resources import Resources
from agent.protocol.base import content_hash
from agent.protocol.items import HttpLoadBalancer, OriginPool
from tests.unit.envoy.golden_cases import CASES, local_of, snapshot_of

T = TypeVar("T")
State = tuple[AgentSnapshot, LocalState]
NODES: list[State] = [(snapshot_of((case / "snapshot.json").read_text()), local_of((case / "local.json").read_text())) for case in CASES]
STEPS = 8


@st.composite
def histories(draw: st.DrawFn) -> list[State]:
    """States of one node, each a change or two away from the one before; items and secrets go and come back."""
    whole, known = draw(st.sampled_from(NODES))
    states = [(whole, known)]
    for _ in range(draw(st.integers(1, STEPS))):
        snapshot, local = states[-1]
        snapshot = draw(changed_items(whole, snapshot)) if draw(st.booleans()) else snapshot
        local = draw(changed_surroundings(known, local)) if draw(st.booleans()) else local
        states.append((snapshot, local))
    return states


@st.composite
def changed_items(draw: st.DrawFn, whole: AgentSnapshot, snapshot: AgentSnapshot) -> AgentSnapshot:
    id = draw(st.sampled_from(sorted(whole.items)))
    if id in snapshot.items and draw(st.booleans()):
        return snapshot.without([id])
    item = draw(st.sampled_from([whole.items[id], other_version(whole.items[id])]))
    return snapshot.with_items([item])


def other_version(item: Item) -> Item:
    match item.body:
        case HttpLoadBalancer(routes=routes):
            changes: dict[str, object] = {"idle_timeout": 1234, "routes": routes[:-1]}
        case OriginPool(origins=origins):
            changes = {"connection_timeout": 1234, "origins": origins[:1]}
        case _:
            return item
    body = item.body.model_copy(update=changes)
    return Item(item.id, content_hash(body.canonical()), body)


@st.composite
def changed_surroundings(draw: st.DrawFn, known: LocalState, local: LocalState) -> LocalState:
    endpoints, secrets = dict(local.endpoints), dict(local.secrets)
    for origin in draw(some(sorted(known.endpoints))):
        endpoints[origin] = tuple(Endpoint(f"10.3.0.{number}", 80) for number in range(draw(st.integers(0, 3))))
    for ref in draw(some(sorted(known.secrets))):
        if secrets.pop(ref, None) is None:
            secrets[ref] = known.secrets[ref]
    reachable = {site: draw(st.sampled_from([view, PeerView(reachable=False)])) for site, view in sorted(known.peers.items())}
    return replace(local, endpoints=endpoints, secrets=secrets, peers=reachable, workers=draw(st.integers(1, 2)))


def some(among: Sequence[T]) -> st.SearchStrategy[list[T]]:
    return st.lists(st.sampled_from(among), max_size=2) if among else st.just([])


def from_scratch(snapshot: AgentSnapshot, local: LocalState) -> Resources:
    """By an agent whose last config was another node's."""
    render(*next(state for state in NODES if state[0] != snapshot))
    return render(snapshot, local)


@settings(max_examples=60)
@given(histories())
def test_what_came_before_does_not_matter(history: list[State]) -> None:
    one_after_the_other = [render(snapshot, local) for snapshot, local in history]
    assert one_after_the_other == [from_scratch(snapshot, local) for snapshot, local in history]
