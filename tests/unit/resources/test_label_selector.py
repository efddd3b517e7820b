"""Selectors mean what they mean in Kubernetes."""

import pytest

from controlplane.resources.selector import Selector

LABELS = {"env": "prod", "tier": "", "ves.io/siteName": "a"}


@pytest.mark.parametrize(
    "text",
    [
        "env",
        "!zone",
        "! zone",
        "env=prod",
        "env == prod",
        "env != test",
        "zone != eu",
        "tier=",
        "env in (prod, test)",
        " env in ( test,prod ) ",
        "env notin (test)",
        "zone notin (eu)",
        "ves.io/siteName in (a, b)",
        "env = prod, !zone,tier",
    ],
)
def test_it_matches(text: str) -> None:
    assert Selector.parse(text).matches(LABELS)


@pytest.mark.parametrize(
    "text", ["zone", "!env", "env=test", "zone = eu", "env != prod", "env in (test)", "zone in ()", "env notin (prod)", "env, zone"]
)
def test_it_does_not_match(text: str) -> None:
    assert not Selector.parse(text).matches(LABELS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ",",
        "env,",
        ",env",
        "env prod",
        "env in prod",
        "env in (prod",
        "env = a b",
        "-env",
        "env in (a b)",
        "!",
        "env >",
        "a/b/c",
        "env=prod)",
        "in (a)",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a label selector"):
        Selector.parse(text)


def test_a_label_may_be_named_like_an_operator() -> None:
    assert Selector.parse("in in (x)").matches({"in": "x"})
    assert Selector.parse("notin").matches({"notin": ""})
