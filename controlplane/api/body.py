"""Reading request bodies: bounded, and strict about what JSON leaves open."""

import json
import re
import zlib
from collections import Counter
from math import isfinite
from typing import Any, NoReturn

from fastapi import Request

from controlplane.errors import FieldError, Invalid

LARGEST = 1 << 20
"""Bytes."""
DEEPEST = 64
"""Objects and lists inside each other; the deepest spec has a dozen."""

_NO_TEXT = re.compile("[\x00\ud800-\udfff]")
"""NUL, which Postgres has no place for, and half of a surrogate pair."""


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
    if flaw := _flaw(value, DEEPEST):
        path, description = flaw[0].removeprefix("."), flaw[1]
        raise Invalid(f"{path}: {description}", [FieldError(path, description)])
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise Invalid(f"the body has the key {twice!r} twice in one object", [FieldError(twice, "is there twice")])
    return made


def _refuse_constant(word: str) -> NoReturn:
    raise Invalid(f"the body is not JSON: {word} is not a number")


def _flaw(value: Any, room: int) -> tuple[str, str] | None:
    """The first key, text or fraction that JSON can say and Postgres cannot hold, or what is nested too deeply: its path, and words."""
    if isinstance(value, str):
        return ("", "has a character that is not text") if _NO_TEXT.search(value) else None
    if isinstance(value, float):
        return None if isfinite(value) else ("", "is too large a number")
    if not isinstance(value, dict | list):
        return None
    if not room:
        return "", "is nested too deeply"
    for step, item in value.items() if isinstance(value, dict) else enumerate(value):
        if flaw := _flaw(step, room):
            return flaw
        if flaw := _flaw(item, room - 1):
            return (f".{step}" if isinstance(step, str) else f"[{step}]") + flaw[0], flaw[1]
    return None


def _too_large(largest: int) -> Invalid:
    return Invalid(f"the body is larger than {largest} bytes")
