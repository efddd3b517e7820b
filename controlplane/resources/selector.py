"""Label selectors in the syntax of Kubernetes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from agent.protocol.items import LabelRequirement

_KEY = r"(?:(?=[a-z0-9])[-a-z0-9.]{0,252}[a-z0-9]/)?[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_VALUE = r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?"
_REQUIREMENT = re.compile(
    rf"\s*(?:(?P<absent>!)\s*(?P<no>{_KEY})"
    rf"|(?P<key>{_KEY})(?:\s*(?P<equal>==|=|!=)\s*(?P<value>{_VALUE})|\s+(?P<set>in|notin)\s*\((?P<values>[^()]*)\))?)\s*"
)


@dataclass(frozen=True)
class Selector:
    """All requirements must hold; without any, everything matches."""

    requirements: tuple[LabelRequirement, ...]

    @staticmethod
    def parse(text: str) -> "Selector":
        """`key`, `!key`, `key = value` (`==`, `!=`), `key in (a, b)`, `key notin (…)`, joined by commas; raises ValueError."""
        return _parse(text)

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(requirement.holds(labels) for requirement in self.requirements)


@lru_cache(maxsize=4096)
def _parse(text: str) -> Selector:
    requirements = []
    at = 0
    while match := _REQUIREMENT.match(text, at):
        requirements.append(_requirement(match))
        at = match.end()
        if at == len(text):
            return Selector(tuple(requirements))
        if text[at] != ",":
            break
        at += 1
    raise ValueError(f"is not a label selector: cannot read {text[at : at + 32]!r} at position {at}")


def _requirement(match: re.Match[str]) -> LabelRequirement:
    if match["absent"]:
        return LabelRequirement(key=match["no"], operator="absent")
    if match["equal"]:
        return LabelRequirement(key=match["key"], operator="notin" if match["equal"] == "!=" else "in", values=(match["value"],))
    if match["set"]:
        return LabelRequirement.model_validate({"key": match["key"], "operator": match["set"], "values": _values(match["values"])})
    return LabelRequirement(key=match["key"], operator="exists")


def _values(text: str) -> tuple[str, ...]:
    values = tuple(sorted({value.strip() for value in text.split(",")}))
    for value in values:
        if not re.fullmatch(_VALUE, value):
            raise ValueError(f"is not a label selector: {value[:32]!r} cannot be the value of a label")
    return values
