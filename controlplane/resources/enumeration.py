"""Enums of the F5 XC API: accepted by name or by number, refused with a suggestion when misspelt."""

import difflib
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


def did_you_mean(word: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    """`: did you mean X?`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word[:128], known, n=1)
    return f": did you mean {near[0]}?" if near else ""


class Names:
    """Annotates a `Literal` of the supported names with all names of the enum in the API's numeric order."""

    def __init__(self, *order: str, refused: Mapping[str, str] | None = None) -> None:
        self.order = order
        self.refused = refused or {}
        """Names of `order` that are not in the Literal → why."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        supported = frozenset(get_args(source))

        def read(value: object) -> object:
            return value if isinstance(value, str) and value in supported else self._read(value, supported)

        return core_schema.no_info_before_validator_function(read, handler(source))

    def _read(self, value: object, supported: frozenset[str]) -> str:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(self.order):
            value = self.order[value]
        wanted = f"should be one of {', '.join(name for name in self.order if name in supported)}"
        if not isinstance(value, str):
            raise _refusal(wanted)
        if value in supported:
            return value
        if value in self.order:
            raise _refusal(self.refused.get(value, f"{value} is not supported"))
        raise _refusal(f"{value[:64]}{did_you_mean(value, self.order) or f': {wanted}'}")


def _refusal(why: str) -> PydanticCustomError:
    # the sentence is handed over as a value, as braces in a template have a meaning
    return PydanticCustomError("enum_name", "{why}", {"why": why})
