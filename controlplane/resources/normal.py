"""From what users send to what the types accept: nulls, defaults, fields and choices of the F5 XC API that we do not support, references.

Everything specific is declared by the types (`Value.choices`, `unsupported`, `ignored`); this walks a body along them and collects
what is wrong instead of stopping at the first.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from controlplane.errors import FieldError
from controlplane.resources.base import Choice, ObjectRef, Unless, Value
from controlplane.resources.enumeration import did_you_mean

MAX_DETAILS = 100
"""In one answer; a body may be wrong in as many places as it has fields."""
NIL = "should be not nil, got nil in request"


@dataclass(frozen=True)
class Reading:
    """A body being read: where it belongs, and what was found wrong so far."""

    namespace: str
    tenant: str | None
    errors: list[FieldError] = field(default_factory=list)

    def refuse(self, path: str, description: str) -> None:
        self.errors.append(FieldError(path, description))

    def refuse_unknown(self, path: str, name: str, known: Mapping[str, object] | tuple[str, ...]) -> None:
        """What it may have been meant to be is looked for as long as it would be shown: that takes a while."""
        hint = did_you_mean(name, known) if len(self.errors) < MAX_DETAILS else ""
        self.refuse(path, f"is not a field of the API{hint}")


@dataclass(frozen=True)
class _Word:
    """What the API's name means in one place."""

    of: type[Value] | None = None
    """Type of the value, or of the elements of the list, where they are objects."""
    many: bool = False
    supported: bool = False
    optional: bool = False
    """Whether it may be absent, which an empty text says as well: protobuf has no other way."""
    choice: Choice | None = None
    reason: str = ""
    """Why it is refused; empty: dropped."""
    unless: tuple[object, ...] = ()
    """Values that are dropped all the same."""

    def ignores(self, name: str, value: object) -> bool:
        """Whether the value asks for nothing here. An empty object at a choice does ask: it makes the choice."""
        if self.choice:
            return not value and not isinstance(value, Mapping) and name not in self.choice.meant_empty
        if self.supported:
            return self.optional and value == ""
        return not value or _without_nulls(value) in self.unless


@cache
def _words(of: type[Value]) -> Mapping[str, _Word]:
    choice_of = {name: choice for choice in of.choices for name in (*choice.members, *choice.off, *choice.refused)}
    words = {name: _Word() for name in of.ignored}
    for name, why in of.unsupported.items():
        words[name] = _Word(reason=why.reason, unless=why.values) if isinstance(why, Unless) else _Word(reason=why)
    words |= {name: _Word(choice=choice, reason=choice.refused.get(name, "")) for name, choice in choice_of.items()}
    for name, info in of.model_fields.items():
        nested, many = _nested(info.annotation)
        optional = type(None) in get_args(info.annotation)
        words[name] = _Word(nested, many, supported=True, optional=optional, choice=choice_of.get(name))
    return words


def _nested(annotation: Any) -> tuple[type[Value] | None, bool]:
    """The Value type in `T`, `T | None` and `tuple[T, ...]`, and whether it is the last."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _nested(args[0])
    if origin in (Union, UnionType):
        return next((found for arg in args if (found := _nested(arg))[0]), (None, False))
    if origin is tuple:
        return _nested(args[0])[0], True
    return (annotation, False) if isinstance(annotation, type) and issubclass(annotation, Value) else (None, False)


def normalise(of: type[Value], raw: Any, path: str, reading: Reading) -> Any:
    """The body without what is dropped and with what is filled in; anything of a wrong type is left for pydantic to refuse."""
    if not isinstance(raw, Mapping):
        return raw
    raw = of.modernised(raw)
    words = _words(of)
    clean: dict[str, Any] = {}
    present: dict[str, list[str]] = defaultdict(list)
    for name, value in raw.items():
        word = words.get(name)
        if word is None:
            reading.refuse_unknown(f"{path}.{name}", str(name), words)
        elif value is not None and not word.ignores(name, value):
            if word.choice:
                present[word.choice.group].append(name)
            if word.supported:
                clean[name] = _inside(word, value, f"{path}.{name}", reading)
            else:
                _drop(word, value, f"{path}.{name}", reading)
    for choice in of.choices:
        _choose(choice, present.get(choice.group, []), clean, path, reading)
    if issubclass(of, ObjectRef):
        _complete(of, raw, clean, path, reading)
    return clean


def _without_nulls(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: item for name, item in value.items() if item is not None}
    return value


def _inside(word: _Word, value: Any, path: str, reading: Reading) -> Any:
    if word.of is None:
        return value
    if not word.many:
        return normalise(word.of, value, path, reading)
    if not isinstance(value, list | tuple):
        return value
    return tuple(normalise(word.of, item, f"{path}[{index}]", reading) for index, item in enumerate(value))


def _drop(word: _Word, value: Any, path: str, reading: Reading) -> None:
    if word.reason:
        reading.refuse(path, word.reason)
    elif word.choice and value != {}:
        reading.refuse(path, "should be an empty object")


def _choose(choice: Choice, present: list[str], clean: dict[str, Any], path: str, reading: Reading) -> None:
    if len(present) > 1:
        reading.refuse(f"{path}.{choice.group}", f"{' and '.join(sorted(present))} exclude each other, give one of them")
        for name in present:
            clean.pop(name, None)
    elif present:
        return
    elif choice.default:
        clean[choice.default] = choice.value
    elif choice.required:
        reading.refuse(f"{path}.{choice.group}", NIL)


def _complete(of: type[ObjectRef], raw: Mapping[str, Any], clean: dict[str, Any], path: str, reading: Reading) -> None:
    """A reference without a namespace means the referrer's, or `system` for sites; those and `shared` are all that can be seen."""
    if not clean.get("namespace"):
        clean["namespace"] = "system" if of.refers_to == "site" else reading.namespace
    visible = {"system"} if of.refers_to == "site" else {reading.namespace, "shared"}
    if isinstance(clean["namespace"], str) and clean["namespace"] not in visible:
        reading.refuse(f"{path}.namespace", f"should be {' or '.join(sorted(visible))} for a {of.refers_to}")
    if raw.get("tenant") and raw["tenant"] != reading.tenant:
        reading.refuse(f"{path}.tenant", "objects of another tenant cannot be referred to")
    if raw.get("kind") and raw["kind"] != of.refers_to:
        reading.refuse(f"{path}.kind", f"should be {of.refers_to}")
