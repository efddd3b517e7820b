"""The key-encryption key is replaced while everybody reads."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from typer.testing import CliRunner

from controlplane.__main__ import app
from controlplane.pki import KeyRing
from controlplane.resources.base import Key, Metadata
from controlplane.services import rekeying, tenants
from controlplane.services.rekeying import BATCH, Counts, reseal
from controlplane.services.secrets import open_secrets
from controlplane.services.start import Given, start
from controlplane.store import resources, sealed
from controlplane.store import secrets as store
from controlplane.store.changes import StoredJson
from controlplane.store.embedded import Embedded
from controlplane.store.schema import Refused, migrate
from controlplane.store.secrets import SealedSecret
from controlplane.store.session import Database
from tests.backend import embedded, now

OLD = KeyRing.generate()
BOTH = KeyRing({**OLD.keys, 2: KeyRing.generate().keys[1]})
NEW = KeyRing({2: BOTH.keys[2]})
SECRETS = 2 * BATCH + 10


def given(directory: Path, ring: KeyRing) -> Given:
    return Given(directory, ring, "", None)


@pytest.fixture
async def database() -> AsyncIterator[Database]:
    """One of its own."""
    with embedded() as server:
        migrate(server.owner_url, server.app_url)
        database = Database(server.app_url)
        yield database
        await database.close()


@pytest.fixture
async def held(database: Database, tmp_path: Path) -> dict[UUID, tuple[str, ...]]:
    """References by tenant, sealed under the old version."""
    fabric = await start(database, given(tmp_path, OLD), now())
    found = {}
    for name in ("one", "two"):
        async with database.transaction() as session:
            tenant_id = await tenants.found(session, fabric, name, now())
            moment = now()
            holder = StoredJson(
                "origin_pool", "system", "p", uuid4(), Metadata(name="p").model_dump(mode="json"), {}, 1, 1, 1, moment, moment
            )
            assert await resources.create(session, tenant_id, holder)
            blank = [SealedSecret(uuid4(), 1, b"") for _ in range(SECRETS)]
            full = [SealedSecret(each.uid, 1, OLD.seal(each.ref.encode(), store.purpose(tenant_id, each.ref))) for each in blank]
            await store.keep(session, tenant_id, "origin_pool", Key("system", "p"), tuple(full), ())
        found[tenant_id] = tuple(each.ref for each in blank)
    return found


async def readable(database: Database, held: dict[UUID, tuple[str, ...]], ring: KeyRing) -> bool:
    for tenant_id, refs in held.items():
        async with database.sessions(tenant_id) as session:
            if await open_secrets(session, tenant_id, refs, ring) != {ref: ref.encode() for ref in refs}:
                return False
    return True


async def test_everything_is_sealed_anew(database: Database, held: dict[UUID, tuple[str, ...]], tmp_path: Path) -> None:
    before = await rekeying.count(database)
    assert before[1] > 2 * SECRETS
    with pytest.raises(Refused, match=rf"lacks version 1 \({before[1]} secrets and keys\)"):
        await start(database, given(tmp_path, NEW), now())
    assert (await start(database, given(tmp_path, BOTH), now())).ring == BOTH
    told: list[Counts] = []
    assert await reseal(database, BOTH, told.append) == {2: before[1]}
    assert [counts[1] for counts in told] == sorted((counts[1] for counts in told), reverse=True)
    assert len(told) >= 4
    assert (await start(database, given(tmp_path, NEW), now())).ring == NEW
    assert await readable(database, held, NEW)
    assert await reseal(database, NEW, told.append) == {2: before[1]}


async def test_it_may_be_interrupted_and_replicas_read_meanwhile(database: Database, held: dict[UUID, tuple[str, ...]]) -> None:
    total = sum((await rekeying.count(database)).values())

    def interrupt(counts: Counts) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await reseal(database, BOTH, interrupt)
    between = await rekeying.count(database)
    assert between[1] > SECRETS
    assert between[2] > BATCH
    assert await readable(database, held, BOTH)
    assert await reseal(database, BOTH, lambda _: None) == {2: total}


async def test_a_secret_is_moved_nowhere_else(database: Database, held: dict[UUID, tuple[str, ...]]) -> None:
    one, two = held
    async with database.sessions(one) as session:
        assert len(await sealed.secrets_not_under(session, one, 2, None, 1000)) == SECRETS
        assert await sealed.secrets_not_under(session, two, 2, None, 1000) == ()
        assert await sealed.secrets_not_under(session, one, 1, None, 1000) == ()


def test_the_command_tells_how_far_it_is(state_dir: Path) -> None:
    async def first_start(server: Embedded) -> None:
        database = Database(server.app_url)
        await start(database, Given(state_dir, None, "", None), now())
        await database.close()

    server = Embedded(state_dir)
    try:
        migrate(server.owner_url, server.app_url)
        with asyncio.Runner() as runner:
            runner.run(first_start(server))
        keys = state_dir / "key-encryption-key"
        keys.write_text(keys.read_text() + NEW.dump())
        outcome = CliRunner().invoke(app, ["rekey", "--state-dir", str(state_dir)])
    finally:
        server.stop()
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.splitlines() == ["sealed under version 1: 5, under version 2: 0", "sealed under version 2: 5"]
