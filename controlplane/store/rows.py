"""Rows stay in this package; what leaves it are values."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar, overload

from controlplane.store.tables import Base

V = TypeVar("V")


@overload
def value(type_: type[V], row: Base) -> V: ...
@overload
def value(type_: type[V], row: Base | None) -> V | None: ...


def value(type_: type[V], row: Base | None) -> V | None:
    """A dataclass whose fields are named like the row's attributes."""
    if row is None:
        return None
    return type_(**{field.name: getattr(row, field.name) for field in _fields(type_)})


def values(type_: type[V], rows: Iterable[Base]) -> tuple[V, ...]:
    return tuple(value(type_, row) for row in rows)


def _fields(type_: Any) -> tuple[Any, ...]:
    return fields(type_)
