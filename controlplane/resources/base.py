"""What all kinds have in common: immutable values, choices among sibling keys, keys and references."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, TypeVar
from uuid import UUID

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, Strict
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")]
"""DNS-1035."""


def _not_a_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


Whole = Annotated[int, BeforeValidator(_not_a_bool)]
"""An integer; as in protobuf's JSON it may come quoted."""
Flag = Annotated[bool, Strict()]


@dataclass(frozen=True, eq=False)
class Choice:
    """Sibling keys of which at most one is present: a oneOf group of the F5 XC API.

    An empty string, 0, false or [] at one of them counts as absent, unless it means something; an empty object is how a choice
    without parameters is made.
    """

    group: str
    """The API's name of the group, for error messages."""
    members: tuple[str, ...] = ()
    """Fields of ours."""
    default: str = ""
    """The member that is filled in when none is given."""
    value: object = field(default_factory=dict)
    """What it is filled in with: an empty object, unless said."""
    required: bool = False
    meant_empty: tuple[str, ...] = ()
    """Members of which an empty string means something."""
    off: tuple[str, ...] = ()
    """Members that ask for nothing: accepted and dropped."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Members that we do not support → why."""

    def json_schema(self) -> dict[str, Any]:
        """Exactly one of the members, or at most one where the choice may be left open."""
        present: list[dict[str, Any]] = [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in self.members]
        absent = [] if self.required else [{"not": {"anyOf": present}}]
        return {"title": self.group, "oneOf": present + absent}


@dataclass(frozen=True)
class Unless:
    """Why a field is refused, unless it has one of the values that ask for nothing."""

    reason: str
    values: tuple[object, ...]


class Value(BaseModel):
    """Immutable, and an unknown field is an error.

    Attributes are named as the JSON fields of the F5 XC API, and its words are kept. What else that API has in this place is
    declared here rather than coded: `normal.normalise` reads these tables.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    choices: ClassVar[tuple[Choice, ...]] = ()
    unsupported: ClassVar[Mapping[str, str | Unless]] = {}
    """Fields that we do not support → why; accepted and dropped while empty or the value for nothing (null, [], {}, "", 0, false)."""
    ignored: ClassVar[frozenset[str]] = frozenset()
    """Fields that ask for nothing here, such as those that only answers have: accepted and dropped."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json_schema = handler(schema)
        if groups := [choice.json_schema() for choice in cls.choices if choice.members]:
            handler.resolve_ref_schema(json_schema)["allOf"] = groups
        return json_schema

    @classmethod
    def modernised(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """A body in which deprecated encodings are said in today's words."""
        return raw


class Empty(Value):
    """A choice without parameters: `{}`."""


EMPTY = Empty()


class Key(NamedTuple):
    """Of an object among those of its kind; written `namespace/name`."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


_LABEL_KEY = re.compile(r"(?:(?=.{1,253}/)[a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
COMPUTED_LABELS = frozenset({"ves.io/siteName", "ves.io/siteType"})


def _label_key(key: str) -> str:
    if not _LABEL_KEY.fullmatch(key):
        raise ValueError("is not the key of a label")
    if key in COMPUTED_LABELS:
        raise ValueError("is a label that sites have by themselves")
    return key


def _label_value(value: str) -> str:
    if not _LABEL_VALUE.fullmatch(value):
        raise ValueError("cannot be the value of a label: letters, digits, - _ . and at most 63 of them")
    return value


def _at_most_1200_bytes(text: str) -> str:
    if len(text.encode()) > 1200:
        raise ValueError("should be at most 1200 bytes long")
    return text


Labels = dict[Annotated[str, AfterValidator(_label_key)], Annotated[str, AfterValidator(_label_value)]]
"""As in Kubernetes, so that selectors can name them."""
Annotations = dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(min_length=1, max_length=1024)]]


class Metadata(Value):
    """The part of the envelope that users write."""

    name: Name
    namespace: str = ""
    labels: Labels = Field({}, max_length=64)
    annotations: Annotations = Field({}, max_length=64)
    description: Annotated[str, AfterValidator(_at_most_1200_bytes)] = ""
    disable: Flag = False


@dataclass(frozen=True)
class Ref:
    """That an object needs another one; `path` is where it says so, for error messages."""

    kind: str
    key: Key
    path: str


def _namespace_may_be_missing(schema: dict[str, Any]) -> None:
    schema["required"].remove("namespace")


class ObjectRef(Value):
    """Another object. In a body `namespace` may be missing, and `kind`, `uid` and the own `tenant` may be present."""

    model_config = ConfigDict(json_schema_extra=_namespace_may_be_missing)

    refers_to: ClassVar[str]
    """The kind."""
    ignored = frozenset({"kind", "uid", "tenant"})

    namespace: Name
    name: Name

    @property
    def key(self) -> Key:
        return Key(self.namespace, self.name)


class SiteRef(ObjectRef):
    refers_to = "site"


class VirtualSiteRef(ObjectRef):
    refers_to = "virtual_site"


class HealthcheckRef(ObjectRef):
    refers_to = "healthcheck"


class OriginPoolRef(ObjectRef):
    refers_to = "origin_pool"


class ServicePolicyRef(ObjectRef):
    refers_to = "service_policy"


class Resource(Value):
    """The spec of one kind, normalised: what is not supported but off is absent, choices are made."""

    kind: ClassVar[str]


R = TypeVar("R", bound=Resource)


@dataclass(frozen=True, eq=False)
class Stored(Generic[R]):
    """An accepted object, and a cheap key of caches: what is not the very same value is told apart by uid and version.

    Contents decide in the end: a write that was rolled back, after it was looked at, leaves its version to the next one.
    """

    kind: str
    uid: UUID
    metadata: Metadata
    spec: R
    version: int
    """Rises with every replacement; clients know it as `resource_version`."""
    revision: int
    """The tenant's revision at which this version was written."""
    created_revision: int
    created_at: datetime
    modified_at: datetime

    @property
    def key(self) -> Key:
        return Key(self.metadata.namespace, self.metadata.name)

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, Stored):
            return self is other
        return (self.uid, self.version) == (other.uid, other.version) and (self.metadata, self.spec) == (other.metadata, other.spec)

    def __hash__(self) -> int:
        return hash((self.uid.int, self.version))


def chosen(value: Value, group: str) -> tuple[str, Any]:
    """Name and value of the member that is present in a choice; ("", None) if none is."""
    choice = next(choice for choice in value.choices if choice.group == group)
    return next(((name, member) for name in choice.members if (member := getattr(value, name)) is not None), ("", None))


def values_in(value: object, path: str) -> Iterator[tuple[str, Value]]:
    """Every object inside an object, depth first in field order, with its JSON path."""
    if isinstance(value, Value):
        yield path, value
        for name in type(value).model_fields:
            yield from values_in(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from values_in(item, f"{path}[{index}]")
