"""Label and field selectors of list and watch requests."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from lab.kubernetes.refusal import bad_request

Body = dict[str, Any]
Predicate = Callable[[Body], bool]

_KEY = r"[A-Za-z0-9][-A-Za-z0-9_./]*"
_TERM = re.compile(
    rf"\s*(?:(?P<absent>!\s*{_KEY})|(?P<key>{_KEY})\s*(?:(?P<op>==|=|!=)\s*(?P<value>[-A-Za-z0-9_.]*)|(?P<set>in|notin)\s*\((?P<values>[^()]*)\))?)\s*(?:,|$)"
)
_FIELDS: dict[str, Callable[[Body], str]] = {
    "metadata.name": lambda body: str(body["metadata"]["name"]),
    "metadata.namespace": lambda body: body["metadata"].get("namespace", ""),
}


def labels(text: str) -> Predicate:
    """`a=b,c!=d,e in (f,g),h notin (i),j,!k`; raises `Refusal`."""
    terms = _terms(text)
    return lambda body: all(_holds(term, body["metadata"].get("labels") or {}) for term in terms)


def fields(text: str) -> Predicate:
    """`metadata.name=x`, also with `!=` and on the namespace; raises `Refusal`."""
    terms = [_field(part) for part in text.split(",") if part]
    return lambda body: all((_FIELDS[name](body) == value) is wanted for name, value, wanted in terms)


def _terms(text: str) -> list[re.Match[str]]:
    terms, position = [], 0
    while position < len(text):
        term = _TERM.match(text, position)
        if term is None:
            raise bad_request(f"unable to parse requirement: {text[position:]!r}")
        terms.append(term)
        position = term.end()
    return terms


def _holds(term: re.Match[str], labels: Mapping[str, str]) -> bool:
    if term["absent"]:
        return term["absent"].lstrip("! ") not in labels
    actual = labels.get(term["key"])
    if term["op"]:
        return (actual == term["value"]) is (term["op"] != "!=")
    if term["set"]:
        return (actual in [value.strip() for value in term["values"].split(",")]) is (term["set"] == "in")
    return actual is not None


def _field(part: str) -> tuple[str, str, bool]:
    match = re.fullmatch(r"([^=!]+)(==|=|!=)(.*)", part)
    if match is None or match[1] not in _FIELDS:
        raise bad_request(f"field label not supported: {part}")
    return match[1], match[3], match[2] != "!="
