"""What the control plane wants here: follows the manifest by long poll and fetches the items and secrets it lacks."""

import asyncio
import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn, Protocol, cast

from cryptography import x509
from pydantic import ValidationError

from agent.backoff import backoff
from agent.envoy.inputs import AgentSnapshot, Item, ItemId
from agent.errors import AgentError, NotRecognised, Refused, Retired, Unreachable
from agent.log import log
from agent.protocol.base import content_hash
from agent.protocol.items import TYPES, ItemKind, Site
from agent.protocol.manifest import Entry, ItemBody, Manifest, ManifestAnswer
from agent.protocol.report import Rejection
from agent.state import Saved

_SECRET = re.compile(r"secret:[0-9a-f-]{36}:[0-9]+")
_REASON_LENGTH = 4096
_PAUSE_S = 0.005
"""After a change: it comes into force before the next poll is built and signed."""
_LEAST_POLL_S = 1.0
"""A server that has nothing new and does not wait is asked no more often."""
_QUIET_S = 60.0
"""While an outage lasts, it is logged so often."""


class Source(Protocol):
    """The part of `control.ControlPlane` that is needed here."""

    async def manifest(self, known: str | None, *, wait: bool) -> ManifestAnswer: ...
    async def items(self, hashes: Sequence[str]) -> tuple[ItemBody, ...]: ...
    async def secrets(self, refs: Sequence[str]) -> dict[str, bytes]: ...


@dataclass(frozen=True)
class Wanted:
    """One manifest with everything behind it. Never changed in place."""

    manifest: Manifest
    revision: int = 0
    snapshot: AgentSnapshot = field(default_factory=AgentSnapshot)
    """The items that this agent understands."""
    broken: tuple[Rejection, ...] = ()
    """The items that it does not."""
    bodies: Mapping[str, str] = field(default_factory=dict)
    """Canonical JSON by hash."""
    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)


class Intake:
    """`current` is what was fetched last; `changed` is called after it was replaced."""

    def __init__(self, source: Source, start: Wanted, changed: Callable[[], None]) -> None:
        self._source = source
        self._changed = changed
        self._known: str | None = start.manifest.hash if start.manifest.entries else None
        self.current = start
        self.connected = False

    async def run(self) -> NoReturn:
        """Follow forever; while the control plane is away, `current` stays. Raises `Retired` once it says that this node is."""
        delays, quiet_until = backoff(0.5, 15.0), 0.0
        clock = asyncio.get_running_loop().time
        while True:
            began, before = clock(), self.current
            try:
                await self.step()
            except Retired:
                raise
            except (Unreachable, Refused) as error:
                if self.connected or clock() >= quiet_until:
                    log.warning(f"control plane {_lack(error)}, serving on", reason=str(error))
                    quiet_until = clock() + _QUIET_S
                self.connected = False
                await asyncio.sleep(max(next(delays), error.retry_after_s))
            else:
                if not self.connected:
                    log.info("control plane is there", revision=self.current.revision)
                self.connected, delays = True, backoff(0.5, 15.0)
                if self.current is not before:
                    await asyncio.sleep(_PAUSE_S)
                if self.current is before and clock() - began < _LEAST_POLL_S:
                    await asyncio.sleep(_LEAST_POLL_S)

    async def step(self) -> None:
        """One poll; the first one after an outage is answered at once. An answer that does not add up makes the next one ask for the whole manifest."""
        known, self._known = self._known, None
        answer = await self._source.manifest(known, wait=self.connected)
        manifest = _merged(self.current.manifest, answer, known)
        if manifest is None:
            raise Unreachable("the manifest does not have the hash it claims")
        if manifest.hash != self.current.manifest.hash or known is None:
            self.current = await self._fetch(manifest, answer)
            self._changed()
        elif answer.revision > self.current.revision:
            self.current = replace(self.current, revision=answer.revision)
            self._changed()
        self._known = manifest.hash

    async def _fetch(self, manifest: Manifest, answer: ManifestAnswer) -> Wanted:
        bodies = await self._bodies(manifest.entries, _sound(answer.items))
        items, broken = _parsed(manifest.entries, bodies, self.current.snapshot)
        secrets = await self._secrets(bodies.values())
        return Wanted(manifest, answer.revision, AgentSnapshot.of(items), broken, bodies, secrets)

    async def _bodies(self, entries: Iterable[Entry], brought: Mapping[str, str]) -> dict[str, str]:
        """Of entries whose kinds are known; `brought` came with them. Raises `Unreachable` if the server does not have one (any more)."""
        entries = [entry for entry in entries if entry.kind in TYPES]
        have = {**self.current.bodies, **brought}
        bodies = {entry.hash: have[entry.hash] for entry in entries if entry.hash in have}
        missing = list(dict.fromkeys(entry.hash for entry in entries if entry.hash not in bodies))
        while missing:
            answered = _sound(await self._source.items(missing))
            if not answered.keys() & set(missing):
                raise Unreachable(f"the control plane does not have {len(missing)} items of its own manifest")
            bodies |= answered
            missing = [hash for hash in missing if hash not in bodies]
        return bodies

    async def _secrets(self, bodies: Iterable[str]) -> dict[str, bytes]:
        """As far as the server gives them; an item whose secret is missing is a problem of that item alone."""
        refs = {ref for body in bodies for ref in _SECRET.findall(body)}
        secrets = {ref: self.current.secrets[ref] for ref in refs if ref in self.current.secrets}
        missing = sorted(refs - secrets.keys())
        while missing:
            try:
                answered = await self._source.secrets(missing)
            except NotRecognised:
                raise
            except Refused as refusal:
                log.warning("secrets are refused", reason=str(refusal), count=len(missing))
                break
            if not answered.keys() & set(missing):
                break
            secrets |= answered
            missing = [ref for ref in missing if ref not in secrets]
        return secrets


def _sound(items: Iterable[ItemBody]) -> dict[str, str]:
    """Bodies by hash, without those that do not have theirs."""
    return {item.hash: item.body for item in items if content_hash(item.body.encode()) == item.hash}


def _merged(held: Manifest, answer: ManifestAnswer, known: str | None) -> Manifest | None:
    """The manifest that the answer means; None if it does not have the hash that it should have."""
    entries = {} if answer.since is None else _by_key(held.entries)
    if answer.since is not None and answer.since != known:
        return None
    for gone in answer.removed:
        entries.pop(gone, None)
    entries |= _by_key(answer.entries)
    manifest = Manifest.model_construct(entries=tuple([entries[key] for key in sorted(entries)]))
    return manifest if manifest.hash == answer.hash else None


def _by_key(entries: Iterable[Entry]) -> dict[tuple[str, str], Entry]:
    return {(entry.kind, entry.key): entry for entry in entries}


def _parsed(entries: Iterable[Entry], bodies: Mapping[str, str], known: AgentSnapshot) -> tuple[tuple[Item, ...], tuple[Rejection, ...]]:
    """The items, and what cannot be read. Items that are known by their hash are not read again."""
    held = cast("Mapping[tuple[str, str], Item]", known.items)
    items, broken = [], []
    for entry in entries:
        item = held.get((entry.kind, entry.key))
        if item is not None and item.hash == entry.hash:
            items.append(item)
            continue
        try:
            items.append(read(ItemId(ItemKind(entry.kind), entry.key), entry.hash, bodies[entry.hash]))
        except (KeyError, ValueError) as error:  # of a kind or with a field that a newer control plane knows
            broken.append(Rejection(kind=entry.kind, key=entry.key, hash=entry.hash, reason=_words(error)))
    return tuple(items), tuple(broken)


def read(id: ItemId, hash: str, body: str) -> Item:
    """Raises `ValueError`, of which `pydantic.ValidationError` is one."""
    item = Item(id, hash, TYPES[id.kind].read(body.encode()))
    if isinstance(item.body, Site) and item.body.control_plane_anchor_pem:
        _check_anchors(item.body.control_plane_anchor_pem)
    return item


def _check_anchors(pem: str) -> None:
    """Envoy judges the others."""
    try:
        x509.load_pem_x509_certificates(pem.encode())
    except ValueError as error:
        raise ValueError(f"control_plane_anchor_pem: {error}") from error


def readable(entries: Iterable[Entry], bodies: Mapping[str, str]) -> tuple[Item, ...]:
    """Items that are there and that this version of the agent can read."""
    return _parsed(entries, bodies, AgentSnapshot())[0]


def restored(saved: Saved) -> Wanted:
    """What was wanted when the state was saved."""
    items, broken = _parsed(saved.wanted, saved.bodies, AgentSnapshot())
    return Wanted(
        manifest=Manifest(entries=saved.wanted),
        revision=saved.revision,
        snapshot=AgentSnapshot.of(items),
        broken=broken,
        bodies=saved.bodies,
        secrets={ref: base64.b64decode(body) for ref, body in saved.secrets.items()},
    )


def _words(error: Exception) -> str:
    match error:
        case ValidationError():
            details = error.errors(include_url=False, include_input=False)
            said = "; ".join(f"{'.'.join(str(part) for part in detail['loc'])}: {detail['msg']}" for detail in details)
        case KeyError():
            said = "it was lost"
        case _:
            said = str(error)
    return f"this agent cannot read it: {said}"[:_REASON_LENGTH]


def _lack(error: AgentError) -> str:
    match error:
        case NotRecognised():
            return "does not know this node"
        case Refused():
            return "refuses this node"
        case _:
            return "is away"
