"""The state directory: who this node is, and the last known good config, so that it can serve without the control plane.

    lock           held while an agent runs
    node.key       the node's private key (P-256); made here, never leaves
    storage.key    the key under which `snapshot` is encrypted
    credentials    certificate, ids and anchors, as the control plane answered
    snapshot       manifest, items, secrets and endpoints
    retired        what the control plane said when it let this node out for good

Every file is 0600 in a directory that is 0700, and is replaced as a whole: a reader sees the old one or the new one.
"""

import asyncio
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import ValidationError

from agent.errors import DirectoryInUse, StorageFailed
from agent.log import log
from agent.protocol.base import Message
from agent.protocol.enrolment import Credentials
from agent.protocol.manifest import Entry
from agent.protocol.report import Rejection

_SAVE_AFTER_S = 0.5
"""So that telling the control plane of a change does not wait for its disk."""
_SAVE_EVERY_S = 2.0
_SAVE_AGAIN_S = 15.0
_NONCE_BYTES = 12
_KEY_BYTES = 32


class SavedEndpoint(Message):
    pool: str
    origin: str
    address: str
    port: int
    zone: str = ""


class Saved(Message):
    """The last known good config. `bodies` has every hash that `wanted` or `good` names, as far as it was fetched."""

    version: str = ""
    """Of the agent that saved it."""
    revision: int = 0
    wanted: tuple[Entry, ...] = ()
    """The control plane's manifest."""
    good: tuple[Entry, ...] = ()
    """What Envoy has accepted; differs from `wanted` by the rejections."""
    bodies: dict[str, str] = {}
    rejected: tuple[Rejection, ...] = ()
    secrets: dict[str, str] = {}
    """By reference; base64."""
    endpoints: tuple[SavedEndpoint, ...] = ()
    pods: dict[str, tuple[str, ...]] = {}
    """By id of a policy's selector, addresses for which it held."""
    dials: tuple[str, ...] = ()
    """Peers to which this node keeps tunnels for their calls."""
    paths: dict[str, dict[str, bool]] = {}
    """By site and path: whether it was used; those to which nothing is missing are left out."""


class StateDirectory:
    """Use as a context manager: entering takes the lock, and raises `DirectoryInUse` if another agent has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def __enter__(self) -> Self:
        with _failures_named():
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise DirectoryInUse(f"another agent uses {self.path}; every agent needs a state directory of its own") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def node_key(self) -> ec.EllipticCurvePrivateKey:
        """The node's key; made on first use."""
        path = self.path / "node.key"
        if not path.exists():
            made = ec.generate_private_key(ec.SECP256R1())
            write(path, private_key_pem(made))
        key = serialization.load_pem_private_key(_read(path), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise StorageFailed(f"{path} is not an elliptic curve key")
        return key

    def credentials(self) -> Credentials | None:
        with suppress(FileNotFoundError, ValidationError):
            return Credentials.model_validate_json((self.path / "credentials").read_bytes())
        return None

    def save_credentials(self, credentials: Credentials) -> None:
        write(self.path / "credentials", credentials.model_dump_json(indent=1).encode())

    def retirement(self) -> str | None:
        """What was said when this node was retired, if it was."""
        with suppress(FileNotFoundError):
            return (self.path / "retired").read_text()
        return None

    def retire(self, said: str) -> None:
        """Remember it: the next agent does not serve, not even until it has asked again."""
        write(self.path / "retired", said.encode())

    def snapshot(self) -> Saved:
        """What was saved last; empty if there is nothing, or nothing that this key opens."""
        path = self.path / "snapshot"
        try:
            sealed = path.read_bytes()
            clear = self._cipher().decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], b"snapshot")
            return Saved.model_validate_json(clear)
        except (FileNotFoundError, InvalidTag, ValidationError, ValueError):
            return Saved()

    def save_snapshot(self, saved: Saved) -> None:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        clear = saved.model_dump_json(exclude_defaults=True).encode()
        write(self.path / "snapshot", nonce + self._cipher().encrypt(nonce, clear, b"snapshot"))

    def _cipher(self) -> AESGCM:
        path = self.path / "storage.key"
        if not path.exists():
            write(path, secrets.token_bytes(_KEY_BYTES))
        return AESGCM(_read(path))


class Keeper:
    """Writes the last known good config to disk, without anyone waiting for it."""

    def __init__(self, directory: StateDirectory, latest: Callable[[], Saved]) -> None:
        self._directory = directory
        self._latest = latest
        self._written: Saved | None = None
        self._due = asyncio.Event()
        self.warning: str | None = None
        """Why the disk is behind, if it is."""

    def keep(self) -> None:
        """Write soon what is the latest then."""
        self._due.set()

    async def run(self) -> NoReturn:
        while True:
            await self._due.wait()
            await asyncio.sleep(_SAVE_AFTER_S)
            self._due.clear()
            await self.flush()
            if self.warning is not None:
                self._due.set()
            await asyncio.sleep(_SAVE_EVERY_S if self.warning is None else _SAVE_AGAIN_S)

    async def flush(self) -> None:
        latest = self._latest()
        if latest == self._written:
            return
        try:
            await asyncio.to_thread(self._directory.save_snapshot, latest)
        except StorageFailed as error:
            if self.warning is None:
                log.error("the config cannot be saved; serving on", error=str(error))  # expected, and said once
            self.warning = f"the config cannot be saved: {error}"
        else:
            self.warning, self._written = None, latest


def private_key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def write(path: Path, data: bytes) -> None:
    """Replace a file as a whole and durably, mode 0600; raises `StorageFailed` and leaves the old one if it cannot."""
    beside = path.with_name(f".{path.name}.new")
    with _failures_named():
        try:
            _write_through(beside, data)
            beside.replace(path)
            _sync_directory(path.parent)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


def _write_through(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    with _failures_named():
        return path.read_bytes()


@contextmanager
def _failures_named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageFailed(f"{error.filename or 'state directory'}: {error.strerror or error}") from error
