"""The first start of a fabric, and what every later start reads of it. Replicas may start together: one does it, under a lock."""

import os
import secrets
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.auth import new_token, token_hash
from controlplane.pki import KeyRing, Unsealable
from controlplane.services import authorities, credentials, tenants
from controlplane.services.authorities import Fabric, control_plane_anchor
from controlplane.store import credentials as credential_store
from controlplane.store import facts, sealed
from controlplane.store import tenants as tenant_store
from controlplane.store.locks import Lock, take
from controlplane.store.schema import Refused
from controlplane.store.session import Database, enter

log = structlog.get_logger()

DEFAULT_TRUST_DOMAIN = "isthmus.internal"
FABRIC_FACT = "fabric"
CA_FILE = "ca.pem"


@dataclass(frozen=True)
class Given:
    """What the operator chose."""

    state_dir: Path
    ring: KeyRing | None
    """None: made at the first start, and kept in the state directory."""
    trust_domain: str
    """Empty: the one that is there, or the default."""
    operator_token: str | None
    """None: made at the first start, and kept in the state directory."""

    @property
    def key_file(self) -> Path:
        return self.state_dir / "key-encryption-key"

    @property
    def token_file(self) -> Path:
        return self.state_dir / "operator.token"

    @property
    def ca_file(self) -> Path:
        return self.state_dir / CA_FILE


async def start(database: Database, given: Given, now: datetime) -> Fabric:
    """Raises `Refused` if what was chosen does not fit what is there."""
    async with database.transaction() as session:
        await take(session, Lock.START)
        known = await facts.get(session, FABRIC_FACT)
        fabric = await (_open(session, given, known["trust_domain"]) if known else _found(session, given, now))
        await _set_operator(session, given, await _default_tenant(session, fabric, now), now)
        roots = await control_plane_anchor(session, fabric)
    write(given.ca_file, roots, mode=0o644)
    return fabric


async def _found(session: AsyncSession, given: Given, now: datetime) -> Fabric:
    ring = given.ring or _new_ring(given.key_file)
    trust_domain = given.trust_domain or DEFAULT_TRUST_DOMAIN
    await authorities.create_fabric(session, ring, trust_domain, now)
    await facts.put(session, FABRIC_FACT, {"trust_domain": trust_domain})
    log.info("fabric founded", trust_domain=trust_domain)
    return await authorities.load_fabric(session, ring, trust_domain)


async def _open(session: AsyncSession, given: Given, trust_domain: str) -> Fabric:
    if given.trust_domain not in ("", trust_domain):
        raise Refused(f"the trust domain of this fabric is {trust_domain}; it cannot become {given.trust_domain}")
    ring = given.ring or kept_ring(given.key_file)
    await _check_ring(session, ring)
    try:
        return await authorities.load_fabric(session, ring, trust_domain)
    except Unsealable as error:
        raise Refused(f"the key-encryption key is not the one of this database: {error}") from None


async def _default_tenant(session: AsyncSession, fabric: Fabric, now: datetime) -> UUID:
    tenant_id = await tenant_store.find(session, tenants.DEFAULT)
    if tenant_id is None:
        return await tenants.found(session, fabric, tenants.DEFAULT, now)
    await enter(session, tenant_id)
    return tenant_id


async def _set_operator(session: AsyncSession, given: Given, tenant_id: UUID, now: datetime) -> None:
    known = await credential_store.find(session, tenant_id, credentials.OPERATOR, service=True)
    token = given.operator_token or (given.token_file.read_text().strip() if given.token_file.exists() else None)
    if token is None and known is None:
        token = new_token()
        write(given.token_file, token + "\n", mode=0o600)
        log.info("operator token created", file=str(given.token_file))
    if token is not None and (known is None or not secrets.compare_digest(known.hash, token_hash(token))):
        await credentials.set_operator(session, tenant_id, token, now)


async def _check_ring(session: AsyncSession, ring: KeyRing) -> None:
    """Nothing may turn out later to be sealed under a version that is not there."""
    missing = {version: amount for version, amount in (await sealed.under(session)).items() if version not in ring.keys}
    if missing:
        what = ", ".join(f"version {version} ({amount} secrets and keys)" for version, amount in missing.items())
        raise Refused(f"the key-encryption key lacks {what}: give it back, and run `isthmus-controlplane rekey` before it goes")


def kept_ring(file: Path) -> KeyRing:
    """From the state directory."""
    if not file.exists():
        raise Refused(f"the key-encryption key of this database is not in {file}: without it nothing can be unsealed")
    return KeyRing.parse(file.read_text())


def _new_ring(file: Path) -> KeyRing:
    ring = KeyRing.generate()
    write(file, ring.dump(), mode=0o600)
    log.info("key-encryption key created", file=str(file))
    return ring


def write(file: Path, text: str, *, mode: int) -> None:
    """Whole or not at all, there after a crash, and never readable by more than `mode` allows."""
    new = file.with_name(f".{file.name}.{os.getpid()}")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    new.replace(file)
    directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
