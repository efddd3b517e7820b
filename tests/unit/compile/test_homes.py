"""Which regional edges a customer edge is connected to."""

from dataclasses import replace
from math import pi
from typing import Any

import pytest

from controlplane.compile.homes import Candidate, basis, choose, great_circle, trusted

BERLIN = {"coordinates": {"latitude": 52.5, "longitude": 13.4}}
PARIS = Candidate("1", "paris", (48.9, 2.4), usable=True, lost=False)
OSLO = Candidate("2", "oslo", (59.9, 10.8), usable=True, lost=False)
TOKYO = Candidate("3", "tokyo", (35.7, 139.7), usable=True, lost=False)
EDGES = (PARIS, OSLO, TOKYO)


def chosen(*candidates: Candidate, site: dict[str, Any] = BERLIN, current: str = "", connected: str = "") -> str:
    return "".join(choose(basis(site), candidates, tuple(current), tuple(connected)))


@pytest.mark.parametrize(
    ("one", "other", "angle"), [((0, 0), (0, 90), pi / 2), ((90, 0), (-90, 17), pi), ((0, 179), (0, -179), pi / 90), ((1, 2), (1, 2), 0)]
)
def test_distances_go_around_the_globe(one: tuple[float, float], other: tuple[float, float], angle: float) -> None:
    assert great_circle(one, other) == pytest.approx(angle)


def test_the_two_nearest_are_taken_nearest_first() -> None:
    assert chosen(*EDGES) == "21"
    assert chosen(*EDGES, site={"coordinates": {"latitude": 40, "longitude": 130}}) == "32"


def test_a_site_that_is_nowhere_takes_what_there_is() -> None:
    assert chosen(*EDGES, site={}) == "12"
    assert chosen(replace(TOKYO, coordinates=None), PARIS) == "13"


def test_the_primary_comes_first_while_it_is_good() -> None:
    site = {**BERLIN, "re_select": {"specific_re": {"primary_re": "tokyo"}}}
    assert chosen(*EDGES, site=site) == "32"
    assert chosen(PARIS, OSLO, replace(TOKYO, lost=True), site=site) == "21"
    assert chosen(PARIS, OSLO, replace(TOKYO, draining=True), site=site) == "21"
    assert chosen(PARIS, OSLO, replace(TOKYO, usable=False), site=site) == "21"


def test_a_site_stays_where_it_is_though_a_nearer_one_appears() -> None:
    assert chosen(*EDGES, current="31") == "31"


def test_one_that_is_not_usable_for_a_moment_is_kept_but_not_taken() -> None:
    assert chosen(PARIS, replace(OSLO, usable=False), TOKYO, current="21") == "21"
    assert chosen(PARIS, replace(OSLO, usable=False), TOKYO) == "13"


def test_a_lost_one_is_replaced_at_once() -> None:
    assert chosen(PARIS, replace(OSLO, lost=True), TOKYO, current="21") == "13"


def test_a_drained_one_is_left_when_the_others_are_connected() -> None:
    drained = (PARIS, replace(OSLO, draining=True), TOKYO)
    assert chosen(*drained, current="21") == "132"
    assert chosen(*drained, current="132", connected="12") == "132"
    assert chosen(*drained, current="132", connected="13") == "13"


def test_where_there_are_too_few_good_ones_the_others_stay() -> None:
    assert chosen(PARIS, replace(OSLO, lost=True), current="21") == "12"
    assert chosen(PARIS, replace(OSLO, draining=True), current="21", connected="12") == "12"
    assert chosen(current="21") == ""


def test_a_site_whose_primary_came_back_has_it_at_once_and_leaves_the_other_later() -> None:
    site = {**BERLIN, "re_select": {"specific_re": {"primary_re": "tokyo"}}}
    assert chosen(*EDGES, site=site, current="21") == "321"
    assert chosen(*EDGES, site=site, current="321", connected="32") == "32"


def test_when_most_look_lost_none_is() -> None:
    gone = [replace(edge, lost=True) for edge in EDGES]
    assert not any(edge.lost for edge in trusted(gone))
    assert [edge.lost for edge in trusted([gone[0], OSLO, TOKYO])] == [True, False, False]
    assert [edge.lost for edge in trusted([gone[0], gone[1], TOKYO])] == [False, False, False]
