"""What is on disk survives, stays secret, and is never half written."""

import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.errors import DirectoryInUse, StorageFailed
from agent.protocol.enrolment import Credentials
from agent.protocol.items import ItemKind
from agent.protocol.manifest import Entry
from agent.state import Keeper, Saved, StateDirectory, private_key_pem, write

CREDENTIALS = Credentials(
    certificate_pem="pem", tenant_id="t", site_id="s", site_name="a", node_id="n", node_name="a-1", trust_domain="td", peer_anchor_pem="pem"
)
SAVED = Saved(
    revision=7,
    wanted=(Entry(kind=ItemKind.SITE, key="s", hash="h"),),
    bodies={"h": '{"name":"a"}'},
    secrets={"secret:1:1": "aHVzaA=="},
)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[StateDirectory]:
    with StateDirectory(tmp_path / "state") as directory:
        yield directory


def test_everything_is_for_its_owner_alone(directory: StateDirectory) -> None:
    directory.node_key()
    directory.save_credentials(CREDENTIALS)
    directory.save_snapshot(SAVED)
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.path.iterdir()} == {0o600}


def test_what_was_saved_is_read_again(directory: StateDirectory) -> None:
    key = directory.node_key()
    directory.save_credentials(CREDENTIALS)
    directory.save_snapshot(SAVED)
    again = StateDirectory(directory.path)
    assert private_key_pem(again.node_key()) == private_key_pem(key)
    assert again.credentials() == CREDENTIALS
    assert again.snapshot() == SAVED


def test_a_new_directory_knows_nothing(directory: StateDirectory) -> None:
    assert directory.credentials() is None
    assert directory.snapshot() == Saved()
    assert directory.retirement() is None


def test_a_retirement_is_remembered(directory: StateDirectory) -> None:
    directory.save_credentials(CREDENTIALS)
    directory.retire("node a-1 was revoked")
    again = StateDirectory(directory.path)
    assert (again.retirement(), again.credentials()) == ("node a-1 was revoked", CREDENTIALS)


def test_items_and_secrets_are_not_readable_on_disk(directory: StateDirectory) -> None:
    directory.save_snapshot(SAVED)
    content = (directory.path / "snapshot").read_bytes()
    assert b"aHVzaA" not in content
    assert b"name" not in content


def test_a_snapshot_that_was_tampered_with_is_not_used(directory: StateDirectory) -> None:
    directory.save_snapshot(SAVED)
    path = directory.path / "snapshot"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert directory.snapshot() == Saved()
    path.write_bytes(b"short")
    assert directory.snapshot() == Saved()


def test_two_agents_cannot_share_a_directory(directory: StateDirectory) -> None:
    with pytest.raises(DirectoryInUse, match="another agent"), StateDirectory(directory.path):
        pass


def test_the_lock_goes_with_its_holder(tmp_path: Path) -> None:
    with StateDirectory(tmp_path):
        pass
    with StateDirectory(tmp_path):
        pass


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond 64 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"old")
    with pytest.raises(StorageFailed, match="File too large"), full_disk():
        write(path, b"x" * 1000)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


async def test_a_full_disk_is_a_warning_until_it_has_room_again(directory: StateDirectory, caplog: pytest.LogCaptureFixture) -> None:
    directory.save_snapshot(Saved())
    keeper = Keeper(directory, lambda: SAVED)
    with full_disk():
        await keeper.flush()
        await keeper.flush()
    assert [record.levelname for record in caplog.records if record.name == "isthmus"] == ["ERROR"], "said once"
    assert "cannot be saved" in str(keeper.warning)
    assert directory.snapshot() == Saved()
    await keeper.flush()
    assert not keeper.warning
    assert directory.snapshot() == SAVED
