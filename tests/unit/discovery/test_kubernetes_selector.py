import pytest

from lab.kubernetes.refusal import Refusal
from lab.kubernetes.selector import fields, labels

CART = {"metadata": {"name": "cart", "namespace": "shop", "labels": {"app": "cart", "example.com/tier": "front"}}}


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        ("", True),
        ("app", True),
        ("!app", False),
        ("app=cart", True),
        ("app==cart,example.com/tier=front", True),
        ("app!=cart", False),
        ("other!=cart", True),
        ("app in (a, cart)", True),
        ("app notin (a,cart)", False),
        ("other notin (a)", True),
        ("app in (cart),!other", True),
    ],
)
def test_labels_select(selector: str, matches: bool) -> None:
    assert labels(selector)(CART) is matches


def test_fields_select() -> None:
    assert fields("metadata.name=cart,metadata.namespace!=other")(CART)
    assert not fields("metadata.name=till")(CART)


@pytest.mark.parametrize("selector", ["app in cart", "a=b c", "=x", "app in (a"])
def test_nonsense_is_refused(selector: str) -> None:
    with pytest.raises(Refusal, match="unable to parse"):
        labels(selector)


def test_other_fields_are_refused() -> None:
    with pytest.raises(Refusal, match="not supported"):
        fields("spec.type=NodePort")
