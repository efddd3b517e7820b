"""Requests that are not about objects: read with the same lenience and the same errors."""

from typing import Any, TypeVar

from pydantic import ValidationError

from agent.protocol.base import Message
from controlplane.errors import FieldError, Invalid
from controlplane.resources import envelope
from controlplane.resources.base import Value
from controlplane.resources.normal import Reading
from controlplane.resources.selector import Selector

V = TypeVar("V", bound=Value)
M = TypeVar("M", bound=Message)

MOST_DETAILS = 100


def read(of: type[V], body: Any, namespace: str = "", **path: str) -> V:
    """Raises `Invalid` with everything that is wrong and its JSON path. `namespace` and `path` are as for `agree`."""
    if not isinstance(body, dict):
        raise Invalid("the body should be an object")
    reading = Reading(namespace, None)
    value = envelope.read(of, body, "", reading)
    errors = [FieldError(error.field.lstrip("."), error.description) for error in reading.errors]
    envelope.refuse_all([*errors, *_disagreements(body, namespace=namespace, **path)])
    assert value is not None
    return value


def agree(body: Any, **path: str) -> None:
    """Raises `Invalid` unless the body is an object that says what the path says, as far as both say it."""
    if not isinstance(body, dict):
        raise Invalid("the body should be an object")
    envelope.refuse_all(_disagreements(body, **path))


def _disagreements(body: dict[str, Any], **path: str) -> list[FieldError]:
    return [
        FieldError(word, f"should be {value}, as in the path")
        for word, value in path.items()
        if value and body.get(word) not in (None, "", value)
    ]


def message(of: type[M], body: Any) -> M:
    """What agents send. Raises `Invalid` with what is wrong and where."""
    try:
        return of.model_validate(body)
    except ValidationError as error:
        details = [FieldError(".".join(map(str, refusal["loc"])), refusal["msg"]) for refusal in error.errors(include_input=False)]
        raise Invalid(f"{details[0].field}: {details[0].description}", details[:MOST_DETAILS]) from None


def selector(text: str) -> Selector | None:
    """Of `label_filter`; None if it is empty."""
    try:
        return Selector.parse(text) if text else None
    except ValueError as error:
        raise Invalid(f"label_filter: {error}", [FieldError("label_filter", str(error))]) from None
