"""Single values: what Envoy, or a reader of the F5 XC API, would refuse is refused when it is written."""

import ipaddress
import re
from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, Field

from controlplane.resources.base import Whole
from controlplane.resources.regex import check_re2

Port = Annotated[Whole, Field(ge=1, le=65535)]

MAX_PORTS = 256
"""In one `port_ranges`: each is a listener at every site where it is advertised."""

_LABEL = r"[a-z0-9](?:[-a-z0-9_]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NOT_EDITABLE = frozenset({"host", "connection", "content-length", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"})


def is_port(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,5}", text) is not None and 1 <= int(text) <= 65535


def port_ranges(text: str) -> tuple[tuple[int, int], ...]:
    """`80,443,8080-8191` → inclusive ranges, sorted; raises ValueError on anything else, and on overlaps."""
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,5})(?:\s*-\s*([0-9]{1,5}))?\s*", part)
        if not match:
            raise ValueError("should be ports and ranges, such as 80,443,8080-8191")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last <= 65535:
            raise ValueError(f"{part.strip()} is not a range of ports between 1 and 65535")
        ranges.append((first, last))
    ranges.sort()
    if any(before[1] >= after[0] for before, after in pairwise(ranges)):
        raise ValueError("names a port twice")
    return tuple(ranges)


def _port_ranges(text: str) -> str:
    if sum(last - first + 1 for first, last in port_ranges(text)) > MAX_PORTS:
        raise ValueError(f"names more than {MAX_PORTS} ports")
    return text


def _port_matches(text: str) -> str:
    port_ranges(text)
    return text


PortRanges = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_port_ranges)]
"""Ports to listen on."""
PortMatches = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_port_matches)]
"""Ports to compare with: as many as one likes."""


def _plain(text: str) -> str:
    if _CONTROL.search(text):
        raise ValueError("should not have control characters")
    return text


Text = Annotated[str, AfterValidator(_plain)]


def _host(text: str) -> str:
    name = text.lower().removesuffix(".")
    if len(name) > 253 or not _HOST.fullmatch(name):
        raise ValueError("should be a DNS name")
    return name


def _domain(text: str) -> str:
    name = text.lower()
    return name if name == "*" else "*." + _host(name[2:]) if name.startswith("*.") else _host(name)


DnsName = Annotated[str, Field(max_length=256), AfterValidator(_host)]
"""Lower case, without a dot at the end."""
Domain = Annotated[str, Field(max_length=256), AfterValidator(_domain)]
"""An exact name or `*.suffix`, lower case. `*` alone, which the F5 XC API refuses, stands for every name."""


def _host_header(text: str) -> str:
    host, colon, port = text.partition(":")
    if colon and not is_port(port):
        raise ValueError("should be a DNS name, with a port or without")
    return _host(host) + colon + port


HostHeader = Annotated[str, Field(min_length=1, max_length=262), AfterValidator(_host_header)]


def _ip(text: str) -> str:
    return str(ipaddress.ip_address(text))


def _ipv4(text: str) -> str:
    return str(ipaddress.IPv4Address(text))


def _cidr(text: str) -> str:
    if not re.fullmatch(r"[^/%]+/[0-9]{1,3}", text):
        raise ValueError("should be a prefix, such as 10.0.0.0/8")
    ipaddress.ip_network(text, strict=False)
    return text


Ip = Annotated[str, Field(max_length=45), AfterValidator(_ip)]
Ipv4 = Annotated[str, Field(max_length=15), AfterValidator(_ipv4)]
Cidr = Annotated[str, Field(max_length=49), AfterValidator(_cidr)]
"""Bits beyond the prefix length are allowed, and do not count."""


def _header_name(text: str) -> str:
    if not _TOKEN.fullmatch(text):
        raise ValueError("is not a header name")
    return text


def _editable_header(text: str) -> str:
    if _header_name(text).lower() in _NOT_EDITABLE:
        raise ValueError(f"{text} belongs to the connection and cannot be edited")
    if text.lower().startswith("x-isthmus-"):
        raise ValueError("headers x-isthmus-* are reserved")
    return text


def _argument(text: str) -> str:
    if set(text) & set("%()"):
        raise ValueError("should not have any of % ( ), which Envoy could not look up")
    return text


HeaderName = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_header_name)]
EditableHeaderName = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_editable_header)]
LookedUpHeaderName = Annotated[HeaderName, AfterValidator(_argument)]
LookedUpParameter = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_plain), AfterValidator(_argument)]
"""Names whose values are read by a `%…%` command."""
HeaderText = Annotated[str, Field(max_length=8096), AfterValidator(_plain)]
"""A literal value: `%` has no meaning, so who hands it to Envoy as a format must double it."""


def _path(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("should start with /")
    if re.search(r"[\x00-\x20\x7f?#]", text):
        raise ValueError("should be a path: no space, control character, ? or #")
    return text


Path = Annotated[str, Field(max_length=256), AfterValidator(_path)]


def _regex(text: str) -> str:
    check_re2(text)
    return text


Regex = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_regex)]
"""RE2 syntax, matched against the whole value."""


def _hexadecimal(text: str) -> str:
    if len(text) % 2 or not re.fullmatch(r"[0-9A-Fa-f]*", text):
        raise ValueError("should be pairs of hexadecimal digits")
    return text


Hexadecimal = Annotated[str, Field(max_length=2048), AfterValidator(_hexadecimal)]


def status_range(text: str) -> tuple[int, int]:
    """`200` or `200-299` → inclusive; raises ValueError."""
    match = re.fullmatch(r"([1-5][0-9]{2})(?:-([1-5][0-9]{2}))?", text)
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise ValueError("should be a status code or a range of them, such as 200 or 200-299")
    return int(match[1]), int(match[2] or match[1])


def _status_range(text: str) -> str:
    status_range(text)
    return text


StatusRange = Annotated[str, Field(max_length=7), AfterValidator(_status_range)]

_SERVICE = re.compile(rf"(?P<service>{_LABEL})\.(?P<namespace>{_LABEL})(?::(?P<cluster>[A-Za-z0-9][-A-Za-z0-9_.]{{0,62}}))?")


def service_name(text: str) -> tuple[str, str, str]:
    """`svc.ns` or `svc.ns:cluster-id` → service, namespace, cluster id ("" if none); raises ValueError."""
    match = _SERVICE.fullmatch(text)
    if not match:
        raise ValueError("should be <service>.<namespace> or <service>.<namespace>:<cluster id>")
    return match["service"], match["namespace"], match["cluster"] or ""


def _service_name(text: str) -> str:
    service_name(text)
    return text


ServiceName = Annotated[str, Field(max_length=256), AfterValidator(_service_name)]


def _refresh_interval(seconds: int) -> int:
    if 0 < seconds < 10:
        raise ValueError("should be 0, or 10 to 604800")
    return seconds


RefreshInterval = Annotated[Whole, Field(ge=0, le=604_800), AfterValidator(_refresh_interval)]
"""Seconds between look-ups of a name; 0 follows the name's TTL."""
