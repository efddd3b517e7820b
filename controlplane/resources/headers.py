"""Changes to headers of requests and responses, of a whole load balancer or of one route."""

from collections.abc import Mapping

from pydantic import Field

from controlplane.resources.base import Choice, Flag, Value
from controlplane.resources.scalars import EditableHeaderName, HeaderText
from controlplane.resources.secrets import Secret

COOKIES = "edits of cookies are not supported"

UNSUPPORTED_COOKIES: Mapping[str, str] = {
    "request_cookies_to_add": COOKIES,
    "request_cookies_to_remove": COOKIES,
    "response_cookies_to_add": COOKIES,
    "response_cookies_to_remove": COOKIES,
}


class HeaderToAdd(Value):
    choices = (Choice("value_choice", ("value", "secret_value")),)

    name: EditableHeaderName
    value: HeaderText | None = None
    """Literal; absent means the empty value."""
    secret_value: Secret | None = None
    append: Flag = False
    """Beside an existing header of that name, instead of in its place."""


class HeaderEdits(Value):
    request_headers_to_add: tuple[HeaderToAdd, ...] = Field((), max_length=32)
    request_headers_to_remove: tuple[EditableHeaderName, ...] = Field((), max_length=32)
    response_headers_to_add: tuple[HeaderToAdd, ...] = Field((), max_length=32)
    response_headers_to_remove: tuple[EditableHeaderName, ...] = Field((), max_length=32)
