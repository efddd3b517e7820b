"""Bodies: metadata and spec, and around them what only answers have."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from controlplane.errors import FieldError, Invalid
from controlplane.resources.base import Metadata, Value
from controlplane.resources.normal import MAX_DETAILS, NIL, Reading, normalise

_READ = frozenset({"metadata", "spec", "resource_version"})
_IN_ANSWERS = frozenset(
    {
        "create_form",
        "deleted_referred_objects",
        "disabled_referred_objects",
        "object",
        "referring_objects",
        "replace_form",
        "revision",
        "status",
        "system_metadata",
    }
)

_DESCRIPTIONS = {"missing": NIL, "model_type": "should be an object", "tuple_type": "should be a list"}
_SUBJECT = re.compile(r"^(Value error, |(Input|Tuple|Dictionary|String|Value) (?=should ))")
"""Of pydantic's sentences; ours have the path for it."""

V = TypeVar("V", bound=Value)


def read_envelope(body: Any, name: str | None, reading: Reading) -> tuple[Metadata | None, Any]:
    """Metadata, and the spec as it was sent; `name` is the one in the path, if there is one."""
    if not isinstance(body, Mapping):
        raise Invalid("the body should be an object with metadata and spec")
    for word in body:
        if word not in _READ and word not in _IN_ANSWERS:
            reading.refuse_unknown(str(word), str(word), (*_READ, *_IN_ANSWERS))
    if not isinstance(body.get("resource_version"), str | int | None):
        reading.refuse("resource_version", "should be a string")
    metadata = read(Metadata, _placed(body.get("metadata"), name, reading), "metadata", reading)
    spec = body.get("spec")
    return metadata, {} if spec is None else spec


def _placed(raw: Any, name: str | None, reading: Reading) -> Any:
    """Metadata with the name and namespace of the path, with which its own have to agree."""
    raw = {} if raw is None else raw
    if not isinstance(raw, Mapping):
        return raw
    if name and raw.get("name") and raw["name"] != name:
        reading.refuse("metadata.name", f"should be {name}, as in the path")
    if raw.get("namespace") and raw["namespace"] != reading.namespace:
        reading.refuse("metadata.namespace", f"should be {reading.namespace or 'empty'}, as in the path")
    return {**raw, "name": name or raw.get("name"), "namespace": reading.namespace}


def read(of: type[V], raw: Any, path: str, reading: Reading) -> V | None:
    """The value, or None after saying in `reading` why there is none."""
    clean = normalise(of, raw, path, reading)
    try:
        return of.model_validate(clean)
    except ValidationError as refusal:
        reading.errors.extend(_field_errors(path, refusal))
        return None


def _field_errors(root: str, refusal: ValidationError) -> Iterable[FieldError]:
    """Pydantic's verdict with JSON paths; what was sent is never quoted, as it may be secret."""
    errors = refusal.errors(include_url=False, include_context=False, include_input=False)
    for error in errors:
        if error["type"] == "too_short" and any(_is_inside(other["loc"], error["loc"]) for other in errors):
            continue  # pydantic counts only the elements that are right
        yield FieldError(root + "".join(map(_step, error["loc"])), _DESCRIPTIONS.get(error["type"]) or _SUBJECT.sub("", error["msg"]))


def _is_inside(place: tuple[int | str, ...], container: tuple[int | str, ...]) -> bool:
    return len(place) > len(container) and place[: len(container)] == container


def _step(place: int | str) -> str:
    if isinstance(place, int):
        return f"[{place}]"
    return "" if place == "[key]" else f".{place}"


def refuse_all(errors: list[FieldError]) -> None:
    """Raises Invalid if there are any, with all of them as details and the first one as its message."""
    if errors:
        more = f" (and {len(errors) - 1} more, see details)" if len(errors) > 1 else ""
        raise Invalid(_sentence(errors[0]) + more, errors[:MAX_DETAILS])


def _sentence(error: FieldError) -> str:
    return f"Field {error.field} {NIL}." if error.description == NIL else f"{error.field}: {error.description}"
