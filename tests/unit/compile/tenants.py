"""Random tenants for property tests: few names, so that objects meet, compete and dangle."""

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from controlplane.compile.intent import Intent
from controlplane.resources.base import Stored
from tests.unit.compile.intents import Body, advertised, body, full_mesh, http, intent_of, policy, pool, site, stored, tcp, virtual_site

SITES = ("a", "b", "c")
VIRTUAL_SITES = ("v", "w")
POOLS = ("one", "two", "three")
POLICIES = ("p", "q")
GROUPS = ("m", "n")
PLACES = (*SITES, "gone", *(f"*{name}" for name in VIRTUAL_SITES))

places = st.lists(st.sampled_from(PLACES), min_size=1, max_size=3, unique=True)
pool_names = st.lists(st.sampled_from((*POOLS, "lost")), min_size=1, max_size=2, unique=True)
service_policies: st.SearchStrategy[Body] = st.one_of(
    st.just({}),
    st.lists(st.sampled_from((*POLICIES, "lost")), min_size=1, max_size=2, unique=True).map(
        lambda names: {"active_service_policies": {"policies": [{"name": name} for name in names]}}
    ),
)
domains = st.lists(st.sampled_from(("x.test", "y.test", "*.test")), min_size=1, max_size=2, unique=True)
labels = st.dictionaries(st.sampled_from(("k", "l")), st.sampled_from(("1", "2")))
selectors = st.sampled_from(("k", "k = 1", "l != 2", "k notin (1), l", "ves.io/siteName in (a, b)"))

VIPS: st.SearchStrategy[Body] = st.sampled_from(({}, {"inside_vip": "10.0.0.1"}))
PORTS: st.SearchStrategy[Body] = st.sampled_from(({}, {"port": 80}, {"port_ranges": "80-82"}))
LOST_SITES: st.SearchStrategy[Body] = st.sampled_from(({}, {"evict_lost_sites": {}}, {"keep_lost_sites": {}}))
HTTP_HASHES: tuple[Body, ...] = ({}, {"least_active": {}}, {"source_ip_stickiness": {}})


@st.composite
def sites(draw: st.DrawFn, name: str) -> Body:
    return site(name, draw(labels), **draw(VIPS))


@st.composite
def pools(draw: st.DrawFn, name: str) -> Body:
    made = pool(name, *draw(places), endpoint_selection=draw(st.sampled_from(("DISTRIBUTED", "LOCAL_ONLY", "LOCAL_PREFERRED"))))
    if draw(st.booleans()):
        made["spec"]["origin_servers"].append({"public_ip": {"ip": "192.0.2.1"}})
    made["spec"]["loadbalancer_algorithm"] = draw(st.sampled_from(("ROUND_ROBIN", "LB_OVERRIDE")))
    made["spec"]["healthcheck"] = draw(st.sampled_from(([], [{"name": "check"}], [{"name": "lost"}])))
    return made


@st.composite
def https(draw: st.DrawFn, name: str) -> Body:
    listening = advertised(*draw(places), **draw(PORTS))
    return http(
        name,
        draw(pool_names),
        [],
        domains=draw(domains),
        **listening,
        **draw(service_policies),
        **draw(st.sampled_from(HTTP_HASHES)),
        **draw(LOST_SITES),
    )


@st.composite
def tcps(draw: st.DrawFn, name: str) -> Body:
    return tcp(name, draw(pool_names), draw(places), draw(st.sampled_from((80, 81, 5432))), **draw(service_policies), **draw(LOST_SITES))


@st.composite
def policies(draw: st.DrawFn, name: str) -> Body:
    rule = {"action": draw(st.sampled_from(("ALLOW", "DENY"))), "client_selector": {"expressions": [draw(selectors)]}}
    header = {"headers": [{"name": "X-Key", "check_present": {}}]} if draw(st.booleans()) else {}
    return policy(name, rule_list={"rules": [{"metadata": {"name": "rule"}, "spec": {**rule, **header}}]})


@st.composite
def discoveries(draw: st.DrawFn, name: str) -> Body:
    where: dict[str, Any] = draw(
        st.sampled_from(
            (
                {"site": {"ref": [{"name": "a"}]}},
                {"site": {"ref": [{"name": "gone"}]}},
                {"virtual_site": {"ref": [{"namespace": "shared", "name": "v"}]}},
            )
        )
    )
    return body("discovery", name, {"where": where, "discovery_k8s": {"access_info": {"in_cluster": True}}})


@st.composite
def groups(draw: st.DrawFn, name: str) -> Body:
    """Full meshes, hubs, and spokes of what may be hubs."""
    mesh: Body = draw(
        st.sampled_from(({"full_mesh": {}}, {"hub_mesh": {}}, *({"spoke_mesh": {"hub_mesh_group": {"name": other}}} for other in GROUPS)))
    )
    made = full_mesh(name, draw(st.sampled_from(VIRTUAL_SITES)))
    del made["spec"]["full_mesh"]
    made["spec"] |= mesh | draw(st.sampled_from(({}, {"enable_re_fallback": {}})))
    return made


def healthchecks(name: str) -> st.SearchStrategy[Body]:
    paces = st.sampled_from((1, 2))
    return paces.map(
        lambda s: body(
            "healthcheck", name, {"tcp_health_check": {}, "interval": s, "timeout": 1, "healthy_threshold": 1, "unhealthy_threshold": 1}
        )
    )


def slots() -> Sequence[st.SearchStrategy[Body]]:
    """One strategy for each object that there may be."""
    return [
        *(sites(name) for name in SITES),
        *(st.builds(virtual_site, st.just(name), selectors) for name in VIRTUAL_SITES),
        *(groups(name) for name in GROUPS),
        healthchecks("check"),
        *(pools(name) for name in POOLS),
        *(https(name) for name in ("h", "i")),
        *(tcps(name) for name in ("h", "t")),
        *(policies(name) for name in POLICIES),
        discoveries("d"),
    ]


@st.composite
def objects(draw: st.DrawFn, slot: int, strategy: st.SearchStrategy[Body]) -> Stored[Any] | None:
    """What is in a slot: nothing, something disabled, or something."""
    state = draw(st.sampled_from(("there", "there", "there", "disabled", "absent")))
    made = draw(strategy)
    if state == "disabled":
        made = {**made, "metadata": {**made["metadata"], "disable": True}}
    return None if state == "absent" else stored(made, created_revision=1 + slot // 2)


@st.composite
def tenants(draw: st.DrawFn) -> Intent:
    return intent_of(_filled(draw(st.tuples(*(objects(number, strategy) for number, strategy in enumerate(slots()))))))


@st.composite
def changed_tenants(draw: st.DrawFn) -> tuple[Intent, Intent, Stored[Any] | None]:
    """A tenant, the same with another content of one slot, and an object of that slot; None if it stayed empty."""
    strategies = slots()
    before = list(draw(st.tuples(*(objects(number, strategy) for number, strategy in enumerate(strategies)))))
    number = draw(st.integers(0, len(strategies) - 1))
    after = [*before]
    after[number] = draw(objects(number, strategies[number]))
    return intent_of(_filled(before)), intent_of(_filled(after)), after[number] or before[number]


def _filled(slots: Sequence[Stored[Any] | None]) -> list[Stored[Any]]:
    return [found for found in slots if found]
