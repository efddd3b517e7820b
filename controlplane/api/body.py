"""Reading request bodies: bounded, and strict about what JSON leaves open."""

import json
import zlib
from collections.abc import Iterator
from math import isfinite
from typing import Annotated, Any, NoReturn

from fastapi import Depends, Request

from controlplane.errors import FieldError, Invalid

LARGEST = 1 << 20
"""Bytes."""


async def read_bytes(request: Request, largest: int = LARGEST) -> bytes:
    """The body as it was sent; raises `Invalid` as soon as it is known to be larger than `largest` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > largest:
        raise _too_large(largest)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > largest:
            raise _too_large(largest)
    return bytes(body)


def inflate(body: bytes, encoding: str | None, largest: int) -> bytes:
    """What was compressed, if it was; never more than `largest` bytes of it."""
    if encoding in (None, "", "identity"):
        return body
    if encoding != "gzip":
        raise Invalid(f"content encoding {encoding!r} is not supported, gzip is")
    stream = zlib.decompressobj(wbits=31)
    try:
        inflated = stream.decompress(body, largest + 1)
    except zlib.error:
        raise Invalid("the body is not gzip, though Content-Encoding says so") from None
    if len(inflated) > largest:
        raise _too_large(largest)
    return inflated


def parse(body: bytes) -> Any:
    """JSON, whatever `Content-Type` says. Duplicate keys and what Postgres cannot hold are `Invalid`."""
    try:
        value = json.loads(body, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise Invalid(f"the body is not UTF-8, at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise Invalid(f"the body is not JSON: {error.msg}, at line {error.lineno} column {error.colno} (character {error.pos})") from None
    except ValueError:
        raise Invalid("the body has a number of more digits than can be read") from None
    except RecursionError:
        raise Invalid("the body is nested too deeply") from None
    for path, leaf in _leaves(value, ""):
        if isinstance(leaf, float) and not isfinite(leaf):
            raise Invalid(f"{path}: is too large a number", [FieldError(path, "is too large a number")])
        if isinstance(leaf, str) and not _storable(leaf):
            raise Invalid(f"{path}: has a character that is not text", [FieldError(path, "has a character that is not text")])
    return value


async def _json(request: Request) -> Any:
    return parse(await read_bytes(request))


async def _optional_json(request: Request) -> Any:
    body = await read_bytes(request)
    return parse(body) if body.strip() else {}


JsonBody = Annotated[Any, Depends(_json)]
OptionalJsonBody = Annotated[Any, Depends(_optional_json)]
"""{} if there is none."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Invalid(f"the body has the key {twice!r} twice in one object", [FieldError(twice, "is there twice")])
    return made


def _refuse_constant(word: str) -> NoReturn:
    raise Invalid(f"the body is not JSON: {word} is not a number")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str | float]]:
    """Keys, texts and fractions: what JSON can say and Postgres cannot always hold."""
    if isinstance(value, (str, float)):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield path, key
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")


def _storable(text: str) -> bool:
    """No NUL, which Postgres has no place for, and no half of a surrogate pair."""
    return "\x00" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _too_large(largest: int) -> Invalid:
    return Invalid(f"the body is larger than {largest} bytes")
