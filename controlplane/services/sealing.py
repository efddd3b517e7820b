"""Secrets in objects: sealed on the way in, references from then on."""

from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.errors import FieldError, Invalid
from controlplane.pki import KeyRing
from controlplane.resources.base import Resource, Stored, values_in
from controlplane.resources.envelope import refuse_all
from controlplane.resources.secrets import secrets_in, with_refs
from controlplane.resources.tls import TlsCertificate
from controlplane.store import secrets as store
from controlplane.store.secrets import SealedSecret


class Sealed:
    """The outcome for one object: its spec without secrets, and what its holdings become."""

    def __init__(self, held: dict[str, SealedSecret]) -> None:
        self.held = held
        self.refs: dict[str, str] = {}
        """By JSON path."""
        self.added: list[SealedSecret] = []

    @property
    def dropped(self) -> tuple[SealedSecret, ...]:
        return tuple(secret for ref, secret in self.held.items() if ref not in self.refs.values())


async def seal(
    session: AsyncSession, tenant_id: UUID, ring: KeyRing, spec: Resource, before: Stored[Any] | None
) -> tuple[Resource, Sealed]:
    """Replace every secret by a reference. A secret that did not change keeps its own, so that nothing is sent anew."""
    found = secrets_in(spec)
    old = {path: secret.ref for path, secret in secrets_in(before.spec)} if before else {}
    sealed = Sealed(await store.held(session, tenant_id, before.kind, before.key) if before and old else {})
    foreign = [FieldError(path, "is not a secret of this object") for path, secret in found if secret.ref and secret.ref not in sealed.held]
    if foreign:
        raise Invalid(f"{foreign[0].field} {foreign[0].description}: send its clear_secret_info", foreign)
    refuse_all(list(_unfit(sealed, tenant_id, ring, spec, before)))
    for path, secret in found:
        sealed.refs[path] = secret.ref or _put_away(sealed, tenant_id, ring, secret.clear or b"", old.get(path))
    return with_refs(spec, sealed.refs), sealed


def _unfit(sealed: Sealed, tenant_id: UUID, ring: KeyRing, spec: Resource, before: Stored[Any] | None) -> Iterator[FieldError]:
    """Certificates that are new, and come with a reference to a key that is another one's: those of clear keys were looked at before."""
    known = {(held.certificate_url, held.private_key.ref) for _, held in _certificates(before.spec)} if before else set()
    for path, certificate in _certificates(spec):
        ref = certificate.private_key.ref
        if ref and (certificate.certificate_url, ref) not in known:
            try:
                certificate.check_key(ring.unseal(sealed.held[ref].sealed, store.purpose(tenant_id, ref)))
            except ValueError as error:
                yield FieldError(path, f"{error}: send the clear_secret_info of its own")


def _certificates(spec: Resource) -> Iterator[tuple[str, TlsCertificate]]:
    return ((path, value) for path, value in values_in(spec, "spec") if isinstance(value, TlsCertificate))


def _put_away(sealed: Sealed, tenant_id: UUID, ring: KeyRing, clear: bytes, old: str | None) -> str:
    previous = sealed.held.get(old or "")
    if previous and ring.unseal(previous.sealed, store.purpose(tenant_id, previous.ref)) == clear:
        return previous.ref
    uid, version = (previous.uid, previous.version + 1) if previous else (uuid4(), 1)
    if any(secret.uid == uid and secret.version >= version for secret in (*sealed.held.values(), *sealed.added)):
        uid, version = uuid4(), 1  # another secret of the object went on from the same one, and sites know versions by reference
    ref = SealedSecret(uid, version, b"").ref
    sealed.added.append(SealedSecret(uid, version, ring.seal(clear, store.purpose(tenant_id, ref))))
    return ref
