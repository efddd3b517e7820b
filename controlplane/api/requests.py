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


def read(of: type[V], body: Any, namespace: str = "") -> V:
    """Raises `Invalid` with everything that is wrong and its JSON path."""
    if not isinstance(body, dict):
        raise Invalid("the body should be an object")
    reading = Reading(namespace, None)
    value = envelope.read(of, body, "", reading)
    envelope.refuse_all([FieldError(error.field.lstrip("."), error.description) for error in reading.errors])
    assert value is not None
    return value


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
