"""Single decisions of the compilers that whole tenants show badly."""

from dataclasses import replace
from typing import Any

import pytest

from agent.protocol import items
from agent.protocol.items import TYPES, ItemKind
from controlplane.compile.intent import Intent, Observations
from controlplane.compile.site import compile_site, conditions
from controlplane.resources.base import Key
from tests.unit.compile.intents import Body, body, http, id_of, intent, intent_of, observations_of, policy, pool, site, stored, tcp

A, B = id_of("a"), id_of("b")


def item(intent: Intent, kind: ItemKind, key: str, site_id: str = A) -> Any:
    return TYPES[kind].read(compile_site(site_id, intent, Observations()).items[kind, key].body)


def applied(*policies: Body, asks: tuple[str, ...] = ("p",)) -> tuple[str, ...] | None:
    asked = {"active_service_policies": {"policies": [{"name": name} for name in asks]}}
    load_balancer = item(intent(site("a"), *policies, http("lb", [], ["a"], **asked)), ItemKind.HTTP_LOADBALANCER, "shop/lb")
    assert isinstance(load_balancer, items.HttpLoadBalancer)
    return load_balancer.policies


def rules(*specs: Body, **more: Any) -> items.Policy:
    listed = [{"metadata": {"name": f"r{number}"}, "spec": spec} for number, spec in enumerate(specs)]
    given = policy("p", **(more or {"rule_list": {"rules": listed}}))
    asked = {"active_service_policies": {"policies": [{"name": "p"}]}}
    compiled = item(intent(site("a"), given, http("lb", [], ["a"], **asked)), ItemKind.POLICY, "shop/p")
    assert isinstance(compiled, items.Policy)
    return compiled


def disabled(made: Body) -> Body:
    return {**made, "metadata": {**made["metadata"], "disable": True}}


@pytest.mark.parametrize(
    ("said", "delivery", "controller"),
    [
        ({}, "isolated", None),
        ({"reachable": {}}, "reachable", None),
        ({"cluster_ip": {}}, "cluster_ip", None),
        (
            {"ingress_controller": {"service_name": "nginx.ingress"}},
            "ingress_controller",
            items.IngressController(service="nginx.ingress", port=80),
        ),
        (
            {"ingress_controller": {"service_name": "nginx.ingress", "port": 443, "ingress_class": "nginx"}},
            "ingress_controller",
            items.IngressController(service="nginx.ingress", port=443, ingress_class="nginx"),
        ),
    ],
)
def test_each_discovery_says_how_its_services_are_delivered(said: Body, delivery: str, controller: items.IngressController | None) -> None:
    where = {"site": {"ref": [{"namespace": "system", "name": "a"}]}}
    spec = {"where": where, "discovery_k8s": {"access_info": {"in_cluster": True, **said}}}
    found = item(intent(site("a"), body("discovery", "d", spec)), ItemKind.DISCOVERY, "shop/d")
    assert (found.delivery, found.ingress_controller) == (delivery, controller)


def test_a_disabled_policy_does_not_apply() -> None:
    on, off = policy("p", allow_all_requests={}), disabled(policy("q", deny_all_requests={}))
    assert applied(on, off, asks=("q", "p")) == ("shop/p",)
    assert applied(off, asks=("q",)) is None


def test_a_policy_that_is_not_there_opens_no_door() -> None:
    assert applied(asks=("lost",)) == ()


def test_a_list_without_prefixes_matches_nobody() -> None:
    assert rules(deny_list={"default_action_allow": {}}) == items.Policy(rules=(), default="ALLOW")


def test_a_rule_for_sites_that_are_not_there_is_left_out_instead_of_matching_all() -> None:
    assert rules({"action": "ALLOW", "client_name": "lost"}).rules == ()
    assert rules({"action": "ALLOW", "client_name_matcher": {"exact_values": ["a", "lost"]}}).rules[0].sites == (A,)


@pytest.mark.parametrize(("methods", "left"), [([], 0), (["ANY"], 0), (["GET"], 1)])
def test_a_rule_for_no_method_is_left_out(methods: list[str], left: int) -> None:
    assert len(rules({"action": "DENY", "http_method": {"methods": methods, "invert_matcher": True}}).rules) == left


def test_overriding_rules_come_first_in_their_own_order() -> None:
    listed = [{"metadata": {"name": name}, "spec": {"action": action}} for name, action in zip("abcd", ["DENY", "ALLOW"] * 2, strict=True)]
    ordered = rules(algo="ALLOW_OVERRIDES", rule_list={"rules": listed}).rules
    assert [rule.name for rule in ordered] == ["b", "d", "a", "c"]


@pytest.mark.parametrize(
    ("one", "other", "algorithm"),
    [
        ({}, {}, "ROUND_ROBIN"),
        ({"random": {}}, {"random": {}}, "RANDOM"),
        ({"least_active": {}}, {"random": {}}, "LB_OVERRIDE"),
        ({"source_ip_stickiness": {}}, {"source_ip_stickiness": {}}, "LB_OVERRIDE"),
    ],
)
def test_a_pool_balances_as_its_load_balancers_agree(one: Body, other: Body, algorithm: str) -> None:
    shared = pool("pool", "a", loadbalancer_algorithm="LB_OVERRIDE")
    given = intent(site("a"), shared, http("one", ["pool"], ["a"], **one), http("other", ["pool"], ["a"], **other))
    assert item(given, ItemKind.ORIGIN_POOL, "shop/pool").algorithm == algorithm


def test_origin_servers_that_differ_in_nothing_that_counts_are_one() -> None:
    def server(seconds: int) -> Body:
        return {"private_name": {"dns_name": "x.test", "refresh_interval": seconds, "site_locator": {"site": {"name": "a"}}}}

    twice = body("origin_pool", "pool", {"origin_servers": [server(10), server(20)], "port": 80})
    origins = item(intent(site("a"), twice, tcp("lb", ["pool"], ["a"])), ItemKind.ORIGIN_POOL, "shop/pool").origins
    assert [origin.refresh_interval_s for origin in origins] == [10]


def test_a_site_that_is_gone_or_disabled_is_told_nothing() -> None:
    given = intent(disabled(site("a")), http("lb", [], ["a"]))
    assert compile_site(A, given, Observations()).items == {}
    assert [(found.type, found.key) for found in conditions(given)] == [("SiteGone", Key("shop", "lb"))]


def test_gateways_follow_what_peers_report() -> None:
    joined = body("site_mesh_group", "m", {"full_mesh": {}, "virtual_site": [{"namespace": "shared", "name": "v"}]}, "system")
    everyone = body("virtual_site", "v", {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["ves.io/siteName"]}}, "shared")
    given = intent(site("a"), site("b"), everyone, joined, pool("pool", "b"), http("lb", ["pool"], ["a"]))
    told = compile_site(A, given, observations_of(given))
    assert items.Peer.read(told.items[ItemKind.PEER, B].body).gateways[0].host == "b.test"
    assert item(given, ItemKind.PEER, B).gateways == ()


def test_after_a_write_everything_else_is_what_it_was() -> None:
    before = intent(site("a"), pool("one", "a"), pool("two", "a"), http("one", ["one"], ["a"]), http("two", ["two"], ["a"]))
    objects = [each for of_kind in before.objects.values() for each in of_kind.values()]
    after = intent_of(
        stored(http("two", ["two"], ["a"], domains=["new.test"]), created_revision=5)
        if each.key.name == "two" and "load" in each.kind
        else each
        for each in (replace(each) for each in objects)
    )
    old, new = (compile_site(A, given, Observations()).items for given in (before, after))
    assert [key for key in old if old[key] is not new[key]] == [(ItemKind.HTTP_LOADBALANCER, "shop/two")]
