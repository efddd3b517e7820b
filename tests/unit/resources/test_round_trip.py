"""Whatever is accepted reads back as it was understood, can be sent again, and loads."""

import copy
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.errors import Invalid
from controlplane.resources.registry import KINDS, dump, load, parse
from tests.unit.resources.resource_specs import HOMES, SMALLEST, read

names = st.from_regex(r"[a-z]([-a-z0-9]{0,10}[a-z0-9])?", fullmatch=True)
paths = st.from_regex(r"/[a-z0-9/.-]{0,20}", fullmatch=True)
empties: st.SearchStrategy[dict[str, Any]] = st.just({})
header_names = st.from_regex(r"x-[a-h][a-z-]{0,10}", fullmatch=True)
values = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_characters="\x7f"), max_size=20)


def objects(required: dict[str, Any] | None = None, **optional: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(required or {}, optional=optional)


def one_of(**members: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """An object in which exactly one member is present."""
    return st.one_of(*(st.fixed_dictionaries({name: member}) for name, member in members.items()))


def merged(*parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts).map(lambda found: {name: value for part in found for name, value in part.items()})


refs = objects({"name": names}, namespace=st.just("shared"), uid=st.just(""))
sites = objects({"name": names})
weighted = st.lists(objects({"pool": refs}, weight=st.integers(0, 10), priority=st.integers(0, 32)), min_size=1, max_size=3)
places = merged(
    one_of(
        site=objects({"site": sites}, network=st.integers(0, 3), ip=st.none()),
        virtual_site=objects({"virtual_site": refs}, network=st.just("SITE_NETWORK_INSIDE")),
        vk8s_service=one_of(site=sites, virtual_site=refs),
    ),
    one_of(use_default_port=empties, port=st.integers(1, 65535), port_ranges=st.just("80,443"), nothing=empties).map(
        lambda choice: {} if "nothing" in choice else choice
    ),
)
advertised = one_of(
    do_not_advertise=empties,
    advertise_custom=st.fixed_dictionaries({"advertise_where": st.lists(places, min_size=1, max_size=3)}),
)
matches = objects(
    {"path": one_of(prefix=paths, path=paths, regex=st.just("/v[0-9]+/.*"))},
    http_method=st.integers(0, 4),
    headers=st.lists(merged(objects({"name": header_names}), one_of(exact=values, presence=st.just(True))), max_size=2),
)
options = merged(
    objects(
        timeout=st.integers(0, 600_000),
        request_headers_to_add=st.lists(objects({"name": header_names, "value": values}, append=st.booleans()), max_size=2),
        priority=st.sampled_from(["DEFAULT", 0, None]),
    ),
    one_of(prefix_rewrite=paths, disable_prefix_rewrite=empties),
    one_of(no_retry_policy=empties, retry_policy=st.just({"retry_condition": ["5xx"]}), default_retry_policy=empties),
    one_of(web_socket_config=empties, disable_web_socket_config=empties),
)
routes = one_of(
    simple_route=merged(matches, objects({"origin_pools": weighted}, advanced_options=options)),
    redirect_route=merged(matches, objects({"route_redirect": objects(path_redirect=paths, response_code=st.sampled_from([0, 301, 302]))})),
    direct_response_route=merged(matches, objects({"route_direct_response": objects({"response_code": st.integers(200, 599)})})),
)
http_loadbalancers = merged(
    objects(
        {"domains": st.lists(names.map(lambda name: f"*.{name}.example"), min_size=1, max_size=3, unique=True)},
        default_route_pools=weighted,
        routes=st.lists(routes, max_size=3),
        more_option=objects(idle_timeout=st.integers(0, 1000)),
        disable_waf=empties,
        state=st.just("VIRTUAL_HOST_READY"),
    ),
    one_of(http=objects(port=st.integers(0, 65535), dns_volterra_managed=st.just(False))),
    advertised,
    one_of(round_robin=empties, ring_hash=st.just({"hash_policy": [{"source_ip": True}]}), least_active=empties),
)
located = {"site_locator": one_of(site=sites, virtual_site=refs)}
origins = one_of(
    k8s_service=merged(
        st.fixed_dictionaries({"service_name": st.just("cart.shop:east"), **located}), one_of(vk8s_networks=empties, inside_network=empties)
    ),
    private_name=st.fixed_dictionaries({"dns_name": names, "refresh_interval": st.sampled_from([0, 10]), **located}),
    public_ip=st.fixed_dictionaries({"ip": st.ip_addresses().map(str)}),
)
origin_pools = merged(
    objects(
        {"origin_servers": st.lists(origins, min_size=1, max_size=3, unique_by=str), "port": st.integers(1, 65535)},
        loadbalancer_algorithm=st.integers(0, 4),
        endpoint_selection=st.integers(0, 2),
        healthcheck=st.lists(refs, max_size=4),
        advanced_options=merged(
            objects(connection_timeout=st.integers(0, 1000)),
            one_of(outlier_detection=empties, disable_outlier_detection=empties),
            one_of(panic_threshold=st.integers(0, 100)),
        ),
    ),
    one_of(no_tls=empties, use_tls=st.just({"tls_config": {}, "sni": "cart"})),
)
policies = one_of(
    deny_all_requests=empties,
    allow_list=objects(prefix_list=st.just({"prefixes": ["10.0.0.0/8"]}), default_action_deny=empties),
    rule_list=st.fixed_dictionaries(
        {
            "rules": st.lists(
                st.fixed_dictionaries(
                    {
                        "metadata": objects({"name": names}),
                        "spec": merged(
                            objects(action=st.integers(0, 2), waf_action=st.just({"none": {}})),
                            one_of(client_name=names, any_client=empties, client_selector=st.just({"expressions": ["a=b"]})),
                            objects(client_pod_selector=st.just({"expressions": ["ves.io/namespace=shop"]})),
                        ),
                    }
                ),
                max_size=3,
                unique_by=lambda rule: rule["metadata"]["name"],
            )
        }
    ),
)
STRATEGIES = {"http_loadbalancer": http_loadbalancers, "origin_pool": origin_pools, "service_policy": policies}
specs = st.one_of(*(st.tuples(st.just(kind), strategy) for kind, strategy in STRATEGIES.items()))


@given(specs)
def test_what_is_accepted_reads_back_and_can_be_sent_again(kind_and_spec: tuple[str, dict[str, Any]]) -> None:
    kind, sent = kind_and_spec
    spec = read(kind, sent)
    assert read(kind, dump(spec)) == load(kind, dump(spec)) == spec
    assert dump(read(kind, dump(spec))) == dump(spec)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def refused_fields(kind: str, spec: Any) -> list[str] | None:
    """Where it is wrong; None if it is accepted."""
    try:
        parse(kind, {"metadata": {"name": "x"}, "spec": spec}, namespace=HOMES.get(kind, "shop"))
    except Invalid as refused:
        return [detail.field for detail in refused.details]
    return None


@given(st.sampled_from(sorted(SMALLEST)), st.data())
def test_any_json_is_accepted_or_refused_and_never_a_crash(kind: str, data: st.DataObject) -> None:
    members = st.sampled_from(sorted(KINDS[kind].type.model_fields) or ["spec"])
    fields = refused_fields(kind, data.draw(st.dictionaries(members, json_values, max_size=4)))
    assert fields is None or (fields and all(field.startswith("spec") for field in fields))


def spoiled(value: Any, data: st.DataObject) -> Any:
    """The same with something else in one place."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 5)):
        place = data.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        changed = copy.copy(value)
        changed[place] = spoiled(value[place], data)
        return changed
    return data.draw(json_values)


@given(specs, st.data())
def test_one_wrong_place_is_accepted_or_refused_and_never_a_crash(kind_and_spec: tuple[str, dict[str, Any]], data: st.DataObject) -> None:
    kind, spec = kind_and_spec
    fields = refused_fields(kind, spoiled(spec, data))
    assert fields is None or (fields and all(field.startswith("spec") for field in fields))


@pytest.mark.parametrize("kind", SMALLEST)
def test_the_smallest_specs_round_trip(kind: str) -> None:
    spec = read(kind, SMALLEST[kind])
    assert read(kind, dump(spec)) == load(kind, dump(spec)) == spec


def test_a_thousand_load_balancers_are_parsed_in_a_fraction_of_a_second() -> None:
    body = {
        "metadata": {"name": "cart"},
        "spec": {
            "domains": ["cart.example"],
            "http": {"port": 80},
            "advertise_custom": {"advertise_where": [{"site": {"site": {"name": "a"}, "network": "SITE_NETWORK_OUTSIDE"}}]},
            "default_route_pools": [{"pool": {"name": "cart"}, "weight": 1, "priority": 1}],
            "routes": [{"simple_route": {"path": {"prefix": "/api/"}, "origin_pools": [{"pool": {"name": "api"}}]}}],
            "disable_waf": {},
        },
    }
    parse("http_loadbalancer", body, namespace="shop")
    start = time.process_time()
    for _ in range(1000):
        parse("http_loadbalancer", body, namespace="shop")
    # about 0.1 s on two cores; the bound only catches a change of order
    assert time.process_time() - start < 1.0
