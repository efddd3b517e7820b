"""What Envoy's admin interface says, put into words for peers and the control plane."""

from dataclasses import dataclass, field

import pytest

from agent.envoy import stats
from agent.errors import ProxyFailed
from agent.protocol.report import EdgeMetrics, OriginHealth
from agent.proxy import ProxyState
from agent.scrape import COUNT_EVERY_S, Scrape

pytestmark = pytest.mark.looptime
MEMBERS = """cluster.pool|shop/cart.membership_healthy: 3
cluster.pool|shop/cart.membership_total: 4
cluster.pool|shop/none.membership_healthy: 0
cluster.pool|shop/none.membership_total: 2
cluster.site|b.membership_total: 1
"""


def counted(requests: int, uptime: int) -> str:
    return f"""envoy_server_uptime{{}} {uptime}
envoy_isthmus_http_requests{{lb="shop/cart",site="b",class="2"}} {requests}
"""


@dataclass
class FakeProxy:
    """Its own admin interface as well."""

    now: ProxyState = "live"
    adopted: bool = False
    texts: dict[str, str] = field(default_factory=lambda: {"members": MEMBERS, "counters": counted(0, 1)})

    @property
    def admin(self) -> "FakeProxy":
        return self

    async def state(self) -> ProxyState:
        return self.now

    async def get(self, path: str) -> str:
        if self.now != "live":
            raise ProxyFailed("gone")
        return self.texts["counters" if path == stats.PATH else "members"]


class Watch:
    def __init__(self, proxy: FakeProxy) -> None:
        self.changes = 0
        self.edges: list[EdgeMetrics] = []
        self.scrape = Scrape(proxy, self._changed, self.edges.extend)

    def _changed(self) -> None:
        self.changes += 1


async def test_members_are_counted_by_pool() -> None:
    watch = Watch(FakeProxy())
    assert watch.scrape.origins is None
    await watch.scrape.step()
    assert watch.scrape.state == "live"
    assert watch.scrape.origins == (OriginHealth(pool="shop/cart", healthy=3, total=4), OriginHealth(pool="shop/none", healthy=0, total=2))


async def test_the_sites_own_view_is_bucketed_and_told_when_it_changes() -> None:
    proxy = FakeProxy()
    watch = Watch(proxy)
    await watch.scrape.step()
    assert watch.scrape.own.exports == {"shop/cart": 2, "shop/none": 0}
    await watch.scrape.step()
    assert watch.changes == 1
    proxy.texts["members"] = MEMBERS.replace("healthy: 3", "healthy: 0")
    await watch.scrape.step()
    assert watch.changes == 2
    assert watch.scrape.own.exports["shop/cart"] == 0


async def test_an_envoy_that_went_away_leaves_what_was_known() -> None:
    proxy = FakeProxy()
    watch = Watch(proxy)
    await watch.scrape.step()
    proxy.now = "down"
    await watch.scrape.step()
    assert watch.scrape.state == "down"
    assert watch.scrape.health["shop/cart"].healthy == 3


@pytest.mark.parametrize(("adopted", "first"), [(False, [5]), (True, [])])
async def test_an_adopted_envoy_counts_from_the_first_reading(adopted: bool, first: list[int]) -> None:
    """What was before has been reported by the agent that started it."""
    proxy = FakeProxy(adopted=adopted)
    watch = Watch(proxy)
    proxy.texts["counters"] = counted(5, 10)
    await watch.scrape.step()
    assert [edge.requests["2xx"] for edge in watch.edges] == first
    watch.scrape._count_at -= COUNT_EVERY_S
    proxy.texts["counters"] = counted(9, 15)
    await watch.scrape.step()
    assert [edge.requests["2xx"] for edge in watch.edges] == [*first, 4]
