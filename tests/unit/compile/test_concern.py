"""Which sites a write concerns."""

from controlplane.compile.concern import changed_sites, concerned_sites
from controlplane.compile.intent import Intent
from controlplane.compile.members import members, topology
from controlplane.compile.site import compile_site
from controlplane.resources.base import Key
from tests.unit.compile.intents import (
    Body,
    advertised,
    body,
    full_mesh,
    http,
    id_of,
    intent,
    observations_of,
    policy,
    pool,
    site,
    tcp,
    virtual_site,
)

A, B, C = id_of("a"), id_of("b"), id_of("c")
SITES = (site("a", {"k": "1"}), site("b", {"k": "1"}), site("c"))


def concerned(intent: Intent, kind: str, name: str, namespace: str = "shop") -> frozenset[str]:
    return concerned_sites(kind, Key(namespace, name), intent)


def changed(before: Intent, after: Intent) -> set[str]:
    observations = observations_of(after)
    return {
        site_id
        for site_id in (A, B, C)
        if compile_site(site_id, before, observations).manifest != compile_site(site_id, after, observations).manifest
    }


def check() -> Body:
    return body(
        "healthcheck", "check", {"tcp_health_check": {}, "interval": 1, "timeout": 1, "healthy_threshold": 1, "unhealthy_threshold": 1}
    )


def test_a_load_balancer_concerns_where_it_listens_and_where_it_calls() -> None:
    given = intent(*SITES, pool("pool", "b"), http("lb", ["pool"], ["a"]))
    assert concerned(given, "http_loadbalancer", "lb") == {A, B}


def test_a_pool_that_nothing_uses_concerns_nobody() -> None:
    assert concerned(intent(*SITES, pool("pool", "b")), "origin_pool", "pool") == frozenset()


def test_a_health_check_concerns_whoever_has_its_pools() -> None:
    given = intent(*SITES, check(), pool("pool", "b", healthcheck=[{"name": "check"}]), tcp("lb", ["pool"], ["a"]))
    assert concerned(given, "healthcheck", "check") == {A, B}


def test_a_policy_concerns_both_ends() -> None:
    use = {"active_service_policies": {"policies": [{"name": "p"}]}}
    given = intent(*SITES, policy("p", allow_all_requests={}), pool("pool", "b"), http("lb", ["pool"], ["a"], **use))
    assert concerned(given, "service_policy", "p") == {A, B}


def test_a_site_concerns_those_that_policies_tell_of_it() -> None:
    use = {"active_service_policies": {"policies": [{"name": "p"}]}}
    rule = {"metadata": {"name": "r"}, "spec": {"action": "ALLOW", "client_name": "c"}}
    given = intent(*SITES, policy("p", rule_list={"rules": [rule]}), pool("pool", "b"), http("lb", ["pool"], ["a"], **use))
    assert concerned(given, "site", "c", "system") == {A, B, C}


def test_a_virtual_site_concerns_whoever_is_concerned_by_what_uses_it() -> None:
    given = intent(*SITES, virtual_site("v", "k"), full_mesh("m", "v"), pool("pool", "c"), http("lb", ["pool"], ["*v"]))
    assert concerned(given, "virtual_site", "v", "shared") == {A, B, C}
    assert concerned(given, "site_mesh_group", "m", "system") == {A, B}
    assert concerned(given, "virtual_site", "unknown", "shared") == frozenset()


def test_members_are_those_that_the_selector_matches() -> None:
    given = intent(*SITES, virtual_site("v", "k = 1"), virtual_site("w", "ves.io/siteName in (c)"), full_mesh("m", "v"))
    assert members(given.of("virtual_site")[Key("shared", "v")], given) == {A, B}
    assert members(given.of("virtual_site")[Key("shared", "w")], given) == {C}
    assert topology(given).meshes[Key("system", "m")].members == {A, B}


def test_who_wins_a_place_concerns_where_the_loser_called() -> None:
    def tenant(*places: str) -> Intent:
        return intent(
            *SITES, pool("pool", "c"), http("old", [], [], **advertised(*places)), http("new", ["pool"], ["a"], domains=["old.test"])
        )

    before, after = tenant("b"), tenant("a")
    touched = concerned(before, "http_loadbalancer", "old") | concerned(after, "http_loadbalancer", "old")
    assert changed(before, after) == {A, B, C}
    assert touched == {A, B, C}


def test_what_a_load_balancer_balances_by_concerns_others_that_use_the_pool() -> None:
    def tenant(**hashing: Body) -> Intent:
        shared = pool("pool", "c", loadbalancer_algorithm="LB_OVERRIDE")
        return intent(*SITES, shared, http("one", ["pool"], ["a"], **hashing), http("two", ["pool"], ["b"]))

    before, after = tenant(), tenant(least_active={})
    assert changed(before, after) == {A, B, C}
    assert concerned(after, "http_loadbalancer", "one") == {A, B, C}


def test_what_a_site_has_nothing_to_do_with_does_not_change_it() -> None:
    before = intent(*SITES, pool("pool", "b"), http("lb", ["pool"], ["a"]))
    after = intent(*SITES, pool("pool", "b"), http("lb", ["pool"], ["a"], domains=["other.test"]))
    assert changed(before, after) == {A}
    assert changed_sites("http_loadbalancer", Key("shop", "lb"), before, after) == {A}


def test_a_load_balancer_that_calls_another_pool_changes_the_sites_of_both() -> None:
    pools = (pool("here", "b"), pool("there", "c"))
    before = intent(*SITES, *pools, http("lb", ["here"], ["a"]))
    after = intent(*SITES, *pools, http("lb", ["there"], ["a"]))
    assert changed(before, after) == {A, B, C}
    assert changed_sites("http_loadbalancer", Key("shop", "lb"), before, after) == {A, B, C}
