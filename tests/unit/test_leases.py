"""When a site counts as lost."""

from datetime import timedelta
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from controlplane.services.leases import MOST_LOST, WINDOW, judge
from controlplane.store.nodes import SiteLease
from tests.backend import now

NOW = now()
TENANT = UUID(int=0)


def site(number: int, silent_s: float | None, lost_s: float | None = None, nodes: int = 1) -> SiteLease:
    """Silent, and lost, for so long."""
    heard_at = None if silent_s is None else NOW - timedelta(seconds=silent_s)
    lost_at = None if lost_s is None else NOW - timedelta(seconds=lost_s)
    return SiteLease(TENANT, UUID(int=number), nodes, heard_at, lost_at, lost_s is not None)


def test_a_site_is_lost_after_a_lease_and_one_always_may_be() -> None:
    assert judge([site(1, 8), site(2, 1)], NOW).lost == frozenset()
    assert judge([site(1, 10), site(2, 1)], NOW).lost == {UUID(int=1)}


def test_what_was_never_heard_of_is_not_lost() -> None:
    assert judge([site(1, None), site(2, 1)], NOW).lost == frozenset()


def test_a_site_that_is_heard_again_is_back() -> None:
    assert judge([site(1, 1, lost_s=60), site(2, 1)], NOW).found == {UUID(int=1)}


def test_when_too_many_fall_silent_at_once_none_is_lost() -> None:
    judged = judge([*(site(number, 20) for number in range(4)), *(site(number, 1) for number in range(4, 10))], NOW)
    assert (judged.lost, len(judged.held)) == (frozenset(), 4)


def test_those_lost_before_count_as_long_as_the_window() -> None:
    def fleet(lost_s: float) -> list[SiteLease]:
        return [*(site(number, lost_s, lost_s=lost_s) for number in range(3)), site(3, 20), *(site(number, 1) for number in range(4, 10))]

    assert judge(fleet(60), NOW).held == {UUID(int=3)}
    assert judge(fleet(WINDOW.total_seconds() + 60), NOW).lost == {UUID(int=3)}


def test_the_lease_grows_with_the_fleet() -> None:
    assert judge([site(1, 20, nodes=3000), site(2, 1)], NOW).lost == frozenset()


sites = st.tuples(st.one_of(st.none(), st.floats(0, 1000)), st.one_of(st.none(), st.floats(0, 1000)))


@given(st.lists(sites, max_size=20))
def test_never_more_than_the_share_is_lost_within_the_window(drawn: list[tuple[float | None, float | None]]) -> None:
    fleet = [site(number, silent, lost) for number, (silent, lost) in enumerate(drawn)]
    judged = judge(fleet, NOW)
    heard = [each for each in fleet if each.heard_at]
    lately = [each for each in heard if each.lost_at and NOW - each.lost_at <= WINDOW and each.site_id not in judged.found]
    assert not judged.lost or len(judged.lost) + len(lately) <= max(1, MOST_LOST * len(heard))
    assert not (judged.lost and judged.held)
    assert not judged.found & (judged.lost | judged.held)
