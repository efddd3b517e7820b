"""First starts: together, again, and with the wrong key."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text

from controlplane.auth import token_hash
from controlplane.pki import KeyRing
from controlplane.services.start import Given, start
from controlplane.store.schema import Refused, migrate
from controlplane.store.session import Database
from tests.backend import Postgres, embedded, now


@pytest.fixture
async def empty() -> AsyncIterator[Database]:
    """A migrated database of its own, in which nothing was started."""
    with embedded() as server:
        migrate(server.owner_url, server.app_url)
        database = Database(server.app_url)
        yield database
        await database.close()


def given(directory: Path, *, ring: KeyRing | None = None, trust_domain: str = "", token: str | None = None) -> Given:
    return Given(directory, ring, trust_domain, token)


async def bearer(database: Database, token: str) -> str | None:
    async with database.definer() as definer:
        found = await definer.execute(text("SELECT name FROM credential_by_hash(:hash)"), {"hash": token_hash(token)})
        name: str | None = found.scalar()
        return name


async def test_replicas_may_start_together(empty: Database, tmp_path: Path) -> None:
    one, *others = await asyncio.gather(*(start(empty, given(tmp_path), now()) for _ in range(4)))
    assert {other.tokens.certificate_pem for other in others} == {one.tokens.certificate_pem}
    assert {other.ring.dump() for other in others} == {one.ring.dump()}
    assert await bearer(empty, (tmp_path / "operator.token").read_text().strip()) == "operator"
    async with empty.definer() as definer:
        assert (await definer.execute(text("SELECT name FROM tenant_list()"))).scalars().all() == ["default"]


async def test_what_is_secret_is_readable_by_its_owner_only(empty: Database, tmp_path: Path) -> None:
    await start(empty, given(tmp_path), now())
    for name in ("operator.token", "key-encryption-key"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "ca.pem").read_text().startswith("-----BEGIN CERTIFICATE-----")


async def test_a_later_start_changes_nothing(empty: Database, tmp_path: Path) -> None:
    first = await start(empty, given(tmp_path), now())
    token, roots = ((tmp_path / name).read_text() for name in ("operator.token", "ca.pem"))
    again = await start(empty, given(tmp_path), now())
    assert ((tmp_path / "ca.pem").read_text(), again.trust_domain) == (roots, first.trust_domain)
    assert (tmp_path / "operator.token").read_text() == token


async def test_a_given_token_replaces_the_one_before(empty: Database, tmp_path: Path) -> None:
    await start(empty, given(tmp_path), now())
    old = (tmp_path / "operator.token").read_text().strip()
    await start(empty, given(tmp_path, token="another-token-of-thirty-two-characters"), now())
    assert await bearer(empty, old) is None
    assert await bearer(empty, "another-token-of-thirty-two-characters") == "operator"


async def test_another_key_is_refused(empty: Database, tmp_path: Path) -> None:
    await start(empty, given(tmp_path), now())
    with pytest.raises(Refused, match="not the one of this database"):
        await start(empty, given(tmp_path, ring=KeyRing.generate()), now())


async def test_a_lost_key_is_said_and_not_replaced(empty: Database, tmp_path: Path) -> None:
    await start(empty, given(tmp_path), now())
    (tmp_path / "key-encryption-key").unlink()
    with pytest.raises(Refused, match="without it nothing can be unsealed"):
        await start(empty, given(tmp_path), now())
    assert not (tmp_path / "key-encryption-key").exists()


async def test_the_trust_domain_is_fixed(empty: Database, tmp_path: Path) -> None:
    assert (await start(empty, given(tmp_path, trust_domain="mesh.example"), now())).trust_domain == "mesh.example"
    with pytest.raises(Refused, match=r"mesh\.example"):
        await start(empty, given(tmp_path, trust_domain="other.example"), now())


async def test_the_database_that_the_other_tests_share_is_served_by_the_application_role(postgres: Postgres, database: Database) -> None:
    await database.check()
    assert postgres.app_url.username != postgres.owner_url.username
