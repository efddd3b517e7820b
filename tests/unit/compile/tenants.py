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
EDGES = ("e", "f")
"""Regional edges, which are there in any case: tenants cannot change them."""
PLACES = (*SITES, "gone", "e", *(f"*{name}" for name in VIRTUAL_SITES))

places = st.lists(st.sampled_from(PLACES), min_size=1, max_size=3, unique=True)
pool_names = st.lists(st.sampled_from((*POOLS, "lost")), min_size=1, max_size=2, unique=True)
service_policies: st.SearchStrategy[Body] = st.one_of(
    st.just({}),
    st.lists(st.sampled_from((*POLICIES, "lost")), min_size=1, max_size=2, unique=True).map(
        lambda names: {"active_service_policies": {"policies": [{"name": name} for name in names]}}
    ),
)
domains = st.lists(st.sampled_from(("x.test", "y.test", "*.test")), min_size=1, max_size=2, unique=True)
names = st.sampled_from((frozenset[str](), frozenset({"x.test"}), frozenset({"test", ":81", ":82"})))
"""Public ones, of the tenant."""
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
def listened_at(draw: st.DrawFn) -> Body:
    """By site or label on the inside network, which edges do not have; or from the public."""
    public = {"site": {"network": "SITE_NETWORK_OUTSIDE", "site": {"namespace": "system", "name": "f"}}}
    somewhere = advertised(*draw(places), **draw(PORTS))
    return draw(
        st.sampled_from(
            (somewhere, somewhere, {"advertise_custom": {"advertise_where": [public]}}, {"advertise_on_public_default_vip": {}})
        )
    )


@st.composite
def https(draw: st.DrawFn, name: str) -> Body:
    listening = draw(listened_at())
    made = http(
        name,
        draw(pool_names),
        [],
        domains=draw(domains),
        **listening,
        **draw(service_policies),
        **draw(st.sampled_from(HTTP_HASHES)),
        **draw(LOST_SITES),
    )
    if "advertise_custom" not in listening:
        del made["spec"]["advertise_custom"]
    return made


@st.composite
def tcps(draw: st.DrawFn, name: str) -> Body:
    return tcp(name, draw(pool_names), draw(places), draw(st.sampled_from((80, 81, 5432))), **draw(service_policies), **draw(LOST_SITES))


@st.composite
def policies(draw: st.DrawFn, name: str) -> Body:
    rule = {"action": draw(st.sampled_from(("ALLOW", "DENY"))), "client_selector": {"expressions": [draw(selectors)]}}
    header = {"headers": [{"name": "X-Key", "check_present": {}}]} if draw(st.booleans()) else {}
    pods = {"client_pod_selector": {"expressions": ["app = web"]}} if draw(st.booleans()) else {}
    return policy(name, rule_list={"rules": [{"metadata": {"name": "rule"}, "spec": {**rule, **header, **pods}}]})


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
    found = draw(st.tuples(*(objects(number, strategy) for number, strategy in enumerate(slots()))))
    return intent_of(_filled(found), draw(names))


@st.composite
def changed_tenants(draw: st.DrawFn) -> tuple[Intent, Intent, Stored[Any] | None]:
    """A tenant, the same with another content of one slot, and an object of that slot; None if it stayed empty."""
    strategies = slots()
    before = list(draw(st.tuples(*(objects(number, strategy) for number, strategy in enumerate(strategies)))))
    number = draw(st.integers(0, len(strategies) - 1))
    after = [*before]
    after[number] = draw(objects(number, strategies[number]))
    owned = draw(names)
    return intent_of(_filled(before), owned), intent_of(_filled(after), owned), after[number] or before[number]


def _filled(slots: Sequence[Stored[Any] | None]) -> list[Stored[Any]]:
    edges = (stored(site(name, {"k": "1"}, site_type="REGIONAL_EDGE")) for name in EDGES)
    return [*(found for found in slots if found), *edges]
