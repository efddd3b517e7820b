"""Following the manifest: only what is missing is fetched, and what does not add up is not believed."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import cast
from uuid import uuid4

import pytest

from agent.envoy.inputs import ItemId
from agent.errors import AgentError, NotRecognised, Refused, Retired, Unreachable
from agent.intake import Intake, Wanted, restored
from agent.protocol.items import Discovery, ItemKind
from agent.protocol.manifest import ItemBody, Manifest, ManifestAnswer
from agent.protocol.report import Rejection
from agent.state import Saved
from tests.agent.wanted import SITE, FakeControlPlane, pool

POOL = ItemKind.ORIGIN_POOL
NOTHING = Wanted(Manifest(entries=()))


@pytest.fixture
def source() -> FakeControlPlane:
    source = FakeControlPlane()
    source.put(ItemKind.SITE, "here", SITE)
    source.put(POOL, "n/p", pool())
    return source


@pytest.fixture
def changes() -> list[int]:
    return []


@pytest.fixture
def intake(source: FakeControlPlane, changes: list[int]) -> Intake:
    return Intake(source, NOTHING, lambda: changes.append(1))


async def test_the_first_answer_is_taken_whole(intake: Intake, source: FakeControlPlane, changes: list[int]) -> None:
    await intake.step()
    assert intake.current.manifest == source.now
    assert set(intake.current.snapshot.items) == {ItemId(ItemKind.SITE, "here"), ItemId(POOL, "n/p")}
    assert intake.current.revision == source.revision
    assert changes == [1]
    assert source.asked == [None]


async def test_afterwards_only_what_changed_is_fetched(intake: Intake, source: FakeControlPlane) -> None:
    await intake.step()
    site = intake.current.snapshot.items[ItemId(ItemKind.SITE, "here")]
    source.fetched.clear()
    source.put(POOL, "n/q", pool(address="10.0.0.2"))
    source.drop(POOL, "n/p")
    await intake.step()
    assert intake.current.manifest == source.now
    assert len(source.fetched) == 1
    assert intake.current.snapshot.items[ItemId(ItemKind.SITE, "here")] is site


async def test_the_same_manifest_at_a_later_revision_is_worth_telling(intake: Intake, source: FakeControlPlane, changes: list[int]) -> None:
    await intake.step()
    source.revision += 5
    await intake.step()
    assert intake.current.revision == source.revision
    assert changes == [1, 1]


async def test_an_answer_that_is_cut_short_is_asked_for_again(intake: Intake, source: FakeControlPlane) -> None:
    source.most_items = 1
    for index in range(5):
        source.put(POOL, f"n/{index}", pool(address=f"10.1.0.{index}"))
    await intake.step()
    assert len(intake.current.snapshot.items) == 7


async def test_a_kind_that_only_a_newer_agent_knows_holds_back_nothing_else(intake: Intake, source: FakeControlPlane) -> None:
    source.put(cast("ItemKind", "invented_later"), "n/new", b'{"x": 1}')
    await intake.step()
    (rejection,) = intake.current.broken
    assert (rejection.kind, rejection.key) == ("invented_later", "n/new")
    assert "'invented_later' is not a valid ItemKind" in rejection.reason
    assert len(intake.current.snapshot.items) == 2
    assert intake.current.manifest == source.now
    assert Rejection.model_validate_json(rejection.model_dump_json()) == rejection
    saved = Saved(wanted=intake.current.manifest.entries, bodies=intake.current.bodies)
    again = restored(Saved.model_validate_json(saved.model_dump_json()))
    assert (again.manifest, again.broken) == (intake.current.manifest, (rejection,))
    source.drop(cast("ItemKind", "invented_later"), "n/new")
    await intake.step()
    assert intake.current.broken == ()


async def test_roots_that_are_none_are_refused_with_the_site_as_it_was(intake: Intake, source: FakeControlPlane) -> None:
    source.put(ItemKind.SITE, "here", SITE.model_copy(update={"control_plane_anchor_pem": "nonsense"}))
    await intake.step()
    (rejection,) = intake.current.broken
    assert (rejection.kind, rejection.key) == (ItemKind.SITE, "here")
    assert "control_plane_anchor_pem" in rejection.reason


async def test_what_cannot_be_read_holds_back_nothing_else(intake: Intake, source: FakeControlPlane) -> None:
    source.put(POOL, "n/new", b'{"origins": [], "invented_later": 1}')
    await intake.step()
    (rejection,) = intake.current.broken
    assert (rejection.kind, rejection.key) == (POOL, "n/new")
    assert "invented_later" in rejection.reason
    assert len(intake.current.snapshot.items) == 2


async def test_an_item_the_server_has_lost_keeps_what_was_there(intake: Intake, source: FakeControlPlane) -> None:
    await intake.step()
    before = intake.current
    source.put(POOL, "n/q", pool(address="10.0.0.9"))
    source.bodies.clear()
    with pytest.raises(Unreachable, match="its own manifest"):
        await intake.step()
    assert intake.current is before


class Liar(FakeControlPlane):
    async def manifest(self, known: str | None, *, wait: bool) -> ManifestAnswer:
        answer = await super().manifest(known, wait=wait)
        return answer.model_copy(update={"hash": "0" * 32})


async def test_a_manifest_without_its_hash_is_not_believed_and_asked_for_whole(source: FakeControlPlane) -> None:
    intake = Intake(liar := Liar(held=source.held, bodies=source.bodies), NOTHING, lambda: None)
    for _ in range(2):
        with pytest.raises(Unreachable, match="hash"):
            await intake.step()
    assert liar.asked == [None, None]
    assert intake.current is NOTHING


class Tampering(FakeControlPlane):
    async def items(self, hashes: Sequence[str]) -> tuple[ItemBody, ...]:
        return tuple(item.model_copy(update={"body": item.body + " "}) for item in await super().items(hashes))


async def test_a_body_without_its_hash_is_not_believed(source: FakeControlPlane) -> None:
    intake = Intake(Tampering(held=source.held, bodies=source.bodies), NOTHING, lambda: None)
    with pytest.raises(Unreachable):
        await intake.step()


async def test_secrets_are_fetched_once(intake: Intake, source: FakeControlPlane) -> None:
    ref = f"secret:{uuid4()}:1"
    source.put(ItemKind.DISCOVERY, "system/d", Discovery(kubeconfig=ref))
    source.secret_bodies[ref] = b"hush"
    await intake.step()
    assert intake.current.secrets == {ref: b"hush"}
    source.secret_bodies.clear()
    source.put(POOL, "n/q", pool(address="10.0.0.2"))
    await intake.step()
    assert intake.current.secrets == {ref: b"hush"}
    source.drop(ItemKind.DISCOVERY, "system/d")
    await intake.step()
    assert intake.current.secrets == {}


class Secretive(FakeControlPlane):
    async def secrets(self, refs: Sequence[str]) -> dict[str, bytes]:
        raise Refused("403: not for you", 403)


async def test_refused_secrets_hold_back_nothing_else(source: FakeControlPlane) -> None:
    secretive = Secretive(held=source.held, bodies=source.bodies)
    secretive.put(ItemKind.DISCOVERY, "system/d", Discovery(kubeconfig=f"secret:{uuid4()}:1"))
    intake = Intake(secretive, NOTHING, lambda: None)
    await intake.step()
    assert len(intake.current.snapshot.items) == 3


class Refusing(FakeControlPlane):
    error: AgentError = Refused("", 401)

    async def manifest(self, known: str | None, *, wait: bool) -> ManifestAnswer:
        raise self.error


async def test_a_node_that_is_retired_follows_nobody_any_more() -> None:
    source = Refusing()
    source.error = Retired("401: node n was revoked", 401, ("Revoked",))
    with pytest.raises(Retired):
        await Intake(source, NOTHING, lambda: None).run()


@pytest.mark.looptime
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotRecognised("401: there is no node n", 401, ("UnknownNode",)), "does not know this node"),
        (Refused("401: log in first", 401), "refuses this node"),
        (Unreachable("no route"), "is away"),
    ],
)
async def test_whoever_else_refuses_is_asked_again(error: AgentError, said: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "isthmus")
    source = Refusing()
    source.error = error
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(Intake(source, NOTHING, lambda: None).run(), 3600)
    assert {record.getMessage().partition(" reason=")[0] for record in _said(caplog)} == {f"control plane {said}, serving on"}


def _said(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "isthmus"]


@pytest.mark.looptime
async def test_an_outage_of_an_hour_is_quiet_and_ends_soon_after_it_ends(
    intake: Intake, source: FakeControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "isthmus")
    source.away = True
    following = asyncio.create_task(intake.run())
    await asyncio.sleep(3600)
    assert 2 <= len(_said(caplog)) <= 62
    source.away = False
    await asyncio.sleep(16)
    assert intake.connected
    following.cancel()
    with suppress(asyncio.CancelledError):
        await following
    assert intake.current.manifest == source.now
