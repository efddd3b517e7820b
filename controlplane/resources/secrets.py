"""Secrets in objects: clear in a body that was just parsed, a reference to a sealed one in everything that is stored or answered."""

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Annotated, Self, TypeVar

from pydantic import AfterValidator, Field, SecretStr, field_serializer, model_validator

from controlplane.resources.base import Choice, Unless, Value, values_in

PREFIX = "string:///"
V = TypeVar("V", bound=Value)


def decode_inline(url: str) -> bytes:
    """What `string:///<base64>` carries; raises ValueError."""
    if not url.startswith(PREFIX):
        raise ValueError(f"should be {PREFIX}<base64>")
    try:
        return base64.b64decode(url[len(PREFIX) :], validate=True)
    except binascii.Error as error:
        raise ValueError(f"should be {PREFIX}<base64>, but what follows is not base64") from error


def encode_inline(data: bytes) -> str:
    return PREFIX + base64.b64encode(data).decode()


def _is_inline(url: str) -> str:
    decode_inline(url)
    return url


Inline = Annotated[str, Field(max_length=131_072), AfterValidator(_is_inline)]
"""`string:///<base64>`; `decode_inline` gives the bytes."""


class ClearSecretInfo(Value):
    unsupported = {"provider": "secret providers are not supported"}

    url: SecretStr = Field(max_length=131_072)

    @model_validator(mode="after")
    def url_is_inline(self) -> Self:
        decode_inline(self.url.get_secret_value())
        return self

    @field_serializer("url")
    def _never(self, url: SecretStr) -> str:
        raise ValueError("a clear secret is never written: seal it first")


class BlindfoldSecretInfo(Value):
    """A secret that this control plane sealed; those of F5's Blindfold cannot be opened here."""

    unsupported = {
        "decryption_provider": "secret providers are not supported",
        "store_provider": "secret providers are not supported",
    }

    location: str = Field(pattern=r"^secret:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}:[0-9]{1,10}$")


class Secret(Value):
    choices = (
        Choice(
            "secret_info_oneof",
            ("clear_secret_info", "blindfold_secret_info"),
            required=True,
            refused={
                "vault_secret_info": "secrets in Vault are not supported",
                "wingman_secret_info": "Wingman secrets are not supported",
            },
        ),
    )
    unsupported = {
        "secret_encoding_type": Unless("only EncodingNone is supported", ("EncodingNone",)),
        "blindfold_secret_info_internal": "is not supported",
    }

    clear_secret_info: ClearSecretInfo | None = None
    blindfold_secret_info: BlindfoldSecretInfo | None = None

    @property
    def clear(self) -> bytes | None:
        """The secret itself, in an object that was just parsed."""
        return decode_inline(self.clear_secret_info.url.get_secret_value()) if self.clear_secret_info else None

    @property
    def ref(self) -> str | None:
        """`secret:<uid>:<version>`, in an object that was stored, or when a client sends back what it read."""
        return self.blindfold_secret_info.location if self.blindfold_secret_info else None

    @classmethod
    def sealed(cls, ref: str) -> "Secret":
        return cls(blindfold_secret_info=BlindfoldSecretInfo(location=ref))


def secrets_in(spec: Value) -> tuple[tuple[str, Secret], ...]:
    """All secrets with their JSON paths, e.g. `spec.https.tls_parameters.tls_certificates[0].private_key`."""
    return tuple((path, value) for path, value in values_in(spec, "spec") if isinstance(value, Secret))


def with_refs(spec: V, refs: Mapping[str, str]) -> V:
    """The same with the secrets at these paths replaced by references."""
    return _replaced(spec, "spec", lambda path: Secret.sealed(refs[path]) if path in refs else None)


def _replaced(value: V, path: str, replacement: Callable[[str], Value | None]) -> V:
    changes = {}
    for name in type(value).model_fields:
        old = getattr(value, name)
        new = _replaced_member(old, f"{path}.{name}", replacement)
        if new is not old:
            changes[name] = new
    return value.model_copy(update=changes) if changes else value


def _replaced_member(old: object, path: str, replacement: Callable[[str], Value | None]) -> object:
    if isinstance(old, tuple):
        new = tuple(_replaced_member(item, f"{path}[{index}]", replacement) for index, item in enumerate(old))
        return new if any(a is not b for a, b in zip(old, new, strict=True)) else old
    if isinstance(old, Value):
        return replacement(path) or _replaced(old, path, replacement)
    return old
