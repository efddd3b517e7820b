"""What JSON leaves open, and how much of it is taken."""

import json

import pytest

from controlplane.api.body import DEEPEST, LARGEST, parse
from controlplane.errors import Invalid


def refusal(body: str) -> tuple[str, str]:
    with pytest.raises(Invalid) as error:
        parse(body.encode())
    detail = error.value.details[0]
    return detail.field, detail.description


def nested(depth: int, inside: str = "0") -> str:
    return "[" * depth + inside + "]" * depth


def test_a_large_body_of_many_small_things_is_taken() -> None:
    body = json.dumps({f"key-{number}": ["a", "é"] for number in range(LARGEST // 30)})
    assert len(parse(body.encode())) == LARGEST // 30


def test_a_key_that_is_there_twice_is_found_among_many() -> None:
    keys = [f"key-{number}" for number in range(50_000)]
    assert refusal("{" + ",".join(f'"{key}":0' for key in [*keys, "key-7"]) + "}") == ("key-7", "is there twice")


def test_nesting_has_a_limit() -> None:
    assert parse(nested(DEEPEST).encode())
    assert refusal(nested(DEEPEST + 1)) == ("[0]" * DEEPEST, "is nested too deeply")
    many = ",".join(['""'] * 10_000)
    assert refusal(nested(900, many))[1] == "is nested too deeply"


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (r'{"a": [1, {"b": "\u0000"}]}', "a[1].b"),
        (r'{"a": {"\ud800": 1}}', "a"),
        ('{"a": [[0], [0, 1e999]]}', "a[1][1]"),
        (r'["\u0000"]', "[0]"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_its_path(body: str, path: str) -> None:
    assert refusal(body)[0] == path
