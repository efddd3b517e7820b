"""What every message has in common."""

import hashlib
from typing import Self

from pydantic import BaseModel, ConfigDict


class Message(BaseModel):
    """An envelope: immutable, and tolerant of fields that a newer peer added."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Body(BaseModel):
    """Config that must be honoured completely: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def canonical(self) -> bytes:
        """The bytes that are hashed, sent and stored: JSON in field order, defaults left out.

        Producers sort what has no order of its own, so equal values have equal bytes.
        """
        return self.model_dump_json(exclude_defaults=True).encode()

    @classmethod
    def read(cls, data: bytes) -> Self:
        """The inverse of `canonical`; raises `pydantic.ValidationError`."""
        return cls.model_validate_json(data)


def content_hash(data: bytes) -> str:
    """32 hex digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:32]
