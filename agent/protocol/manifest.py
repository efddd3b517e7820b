"""A snapshot is a manifest: the list of (kind, key, hash) that concern a site, and the items behind the hashes."""

from functools import cached_property

from pydantic import Field

from agent.protocol.base import Message, content_hash
from agent.protocol.items import AnyKind

MANIFEST_PATH = "/api/agent/v1/manifest"
ITEMS_PATH = "/api/agent/v1/items"
SECRETS_PATH = "/api/agent/v1/secrets"

ITEMS_PER_CALL = 256
"""Agents ask for at most so many hashes in one call."""


class Entry(Message):
    kind: AnyKind
    key: str
    hash: str

    @cached_property
    def line(self) -> str:
        """What of it the manifest's hash is made of."""
        return f"{self.kind} {self.key} {self.hash}\n"


class Manifest(Message):
    """Entries are sorted by (kind, key)."""

    entries: tuple[Entry, ...]

    @cached_property
    def hash(self) -> str:
        """Equal for equal sets of items, whatever the revision."""
        return content_hash("".join([entry.line for entry in self.entries]).encode())


class ItemBody(Message):
    hash: str
    kind: AnyKind
    body: str
    """Canonical JSON: `content_hash(body) == hash`."""


class ManifestAnswer(Message):
    """`GET …/manifest?hash=H&wait=S`: the current manifest; all of it, or the difference from the one with hash `since`.

    `entries` is what was added or changed (all of it when `since` is None), `removed` what is gone. After a wait
    without a change the answer repeats `hash` with `since == hash` and nothing in it: the same manifest holds at `revision`.
    """

    hash: str
    revision: int
    since: str | None = None
    entries: tuple[Entry, ...] = ()
    removed: tuple[tuple[AnyKind, str], ...] = ()
    items: tuple[ItemBody, ...] = ()
    """Bodies of the first entries of a difference, so that a small change needs no second call; the others are to be fetched."""


class ItemsRequest(Message):
    hashes: tuple[str, ...] = Field(max_length=ITEMS_PER_CALL)


class ItemsAnswer(Message):
    """In the order asked; what the server no longer knows is missing, and the agent asks for the manifest again.

    The server cuts the answer short rather than exceed 4 MiB; the agent asks again for the rest.
    """

    items: tuple[ItemBody, ...]


class SecretsRequest(Message):
    refs: tuple[str, ...] = Field(max_length=ITEMS_PER_CALL)


class SecretsAnswer(Message):
    secrets: dict[str, str]
    """By reference; base64 of the body."""
