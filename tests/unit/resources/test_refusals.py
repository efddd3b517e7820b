"""What is refused, where, and in which words."""

from collections.abc import Sequence
from typing import Any

import pytest

from controlplane.errors import Invalid
from controlplane.resources.normal import NIL
from controlplane.resources.registry import parse
from tests.unit.resources.resource_specs import PLACE, POOL, SMALLEST, changed, read, refusals


def balancer(**changes: Any) -> dict[str, Any]:
    return changed("http_loadbalancer", **changes)


def route(**changes: Any) -> dict[str, Any]:
    return balancer(routes=[{"simple_route": {"path": {"prefix": "/"}, "origin_pools": [POOL], **changes}}])


def pool(**changes: Any) -> dict[str, Any]:
    return changed("origin_pool", **changes)


def policy(**conditions: Any) -> dict[str, Any]:
    return {"rule_list": {"rules": [{"metadata": {"name": "r"}, "spec": conditions}]}}


def published(domains: Sequence[str] = ("backend.shop",), **where: Any) -> dict[str, Any]:
    entry = {"publish": {"service": "backend", "namespace": "shop"}, **where}
    return {"domains": list(domains), "http": {}, "advertise_custom": {"advertise_where": [entry]}}


PUBLIC_IPS = "public_ip objects are not supported: give advertise_on_public_default_vip, or a site or virtual_site of regional edges"
RULE = "spec.rule_list.rules[0].spec"

CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "an unknown field": ("site", {"adress": "x"}, "spec.adress", "is not a field of the API: did you mean address?"),
    "a field of another kind": ("site", {"listen_port": []}, "spec.listen_port", "is not a field of the API"),
    "a missing choice": ("http_loadbalancer", {"domains": ["a"], "do_not_advertise": {}}, "spec.loadbalancer_type", NIL),
    "a missing list": ("http_loadbalancer", {"http": {}, "do_not_advertise": {}}, "spec.domains", NIL),
    "two of a choice": (
        "http_loadbalancer",
        balancer(https={"tls_parameters": {}}),
        "spec.loadbalancer_type",
        "http and https exclude each other, give one of them",
    ),
    "WAF": ("http_loadbalancer", balancer(app_firewall={"name": "x"}), "spec.app_firewall", "WAF is not supported"),
    "an empty choice that is on": (
        "http_loadbalancer",
        balancer(enable_ip_reputation={}),
        "spec.enable_ip_reputation",
        "IP reputation is not supported",
    ),
    "automatic certificates": (
        "http_loadbalancer",
        {"domains": ["a"], "https_auto_cert": {}, "do_not_advertise": {}},
        "spec.https_auto_cert",
        "automatic certificates are not supported: give https with tls_parameters",
    ),
    "publishing from another network": (
        "http_loadbalancer",
        published(site={"site": {"name": "a"}}),
        "spec.advertise_custom.advertise_where[0]",
        "publish needs SITE_NETWORK_SERVICE without an ip, or vk8s_service",
    ),
    "publishing what Kubernetes would not accept": (
        "http_loadbalancer",
        published(publish={"service": "9lives", "namespace": "shop"}, vk8s_service={"site": {"name": "a"}}),
        "spec.advertise_custom.advertise_where[0].publish.service",
        "should match pattern '^[a-z]([-a-z0-9]*[a-z0-9])?$'",
    ),
    "publishing under a name that no domain has": (
        "http_loadbalancer",
        published(["backend.example"], vk8s_service={"site": {"name": "a"}}),
        "spec",
        "domains has no name by which pods call what is published, such as backend.shop or backend.shop.svc.cluster.local",
    ),
    "a public VIP": (
        "http_loadbalancer",
        {"domains": ["a"], "http": {}, "advertise_on_public": {"public_ip": {"name": "vip"}}},
        "spec.advertise_on_public",
        PUBLIC_IPS,
    ),
    "managed DNS": (
        "http_loadbalancer",
        balancer(http={"dns_volterra_managed": True}),
        "spec.http.dns_volterra_managed",
        "DNS is not managed from here",
    ),
    "a domain twice": ("http_loadbalancer", balancer(domains=["a.b", "A.b"]), "spec", "domains lists the same name twice"),
    "a domain with a port": ("http_loadbalancer", balancer(domains=["a:80"]), "spec.domains[0]", "should be a DNS name"),
    "an inner wildcard": ("http_loadbalancer", balancer(domains=["a.*.b"]), "spec.domains[0]", "should be a DNS name"),
    "edges for an edge": (
        "site",
        {"site_type": "REGIONAL_EDGE", "re_select": {"geo_proximity": {}}},
        "spec",
        "re_select is for customer edges: this is a regional edge",
    ),
    "an edge without a name": ("site", {"re_select": {"specific_re": {}}}, "spec.re_select.specific_re.primary_re", NIL),
    "a bad selector": (
        "virtual_site",
        {"site_type": 2, "site_selector": {"expressions": ["a in b"]}},
        "spec.site_selector.expressions[0]",
        "is not a label selector: cannot read 'in b' at position 2",
    ),
    "two expressions": (
        "virtual_site",
        {"site_type": 2, "site_selector": {"expressions": ["a", "b"]}},
        "spec.site_selector.expressions",
        "should have at most 1 item after validation, not 2",
    ),
    "UDP health checks": (
        "healthcheck",
        {"udp_icmp_health_check": {}, "interval": 1, "timeout": 1, "healthy_threshold": 1, "unhealthy_threshold": 1},
        "spec.udp_icmp_health_check",
        "UDP health checks are not supported",
    ),
    "an odd payload": (
        "healthcheck",
        changed("healthcheck", tcp_health_check={"send_payload": "abc"}),
        "spec.tcp_health_check.send_payload",
        "should be pairs of hexadecimal digits",
    ),
    "a bad status range": (
        "healthcheck",
        changed("healthcheck", tcp_health_check=None, http_health_check={"path": "/", "expected_status_codes": ["200", "299-200"]}),
        "spec.http_health_check.expected_status_codes[1]",
        "should be a status code or a range of them, such as 200 or 200-299",
    ),
    "a missing site": (
        "origin_pool",
        pool(origin_servers=[{"private_ip": {"ip": "10.0.0.1"}}]),
        "spec.origin_servers[0].private_ip.site_locator",
        NIL,
    ),
    "a misspelt enum": (
        "origin_pool",
        pool(endpoint_selection="LOCAL_PREFERED"),
        "spec.endpoint_selection",
        "LOCAL_PREFERED: did you mean LOCAL_PREFERRED?",
    ),
    "an enum far off": (
        "origin_pool",
        pool(endpoint_selection="x"),
        "spec.endpoint_selection",
        "x: should be one of DISTRIBUTED, LOCAL_ONLY, LOCAL_PREFERRED",
    ),
    "a number beyond the enum": (
        "origin_pool",
        pool(endpoint_selection=3),
        "spec.endpoint_selection",
        "should be one of DISTRIBUTED, LOCAL_ONLY, LOCAL_PREFERRED",
    ),
    "Consul": (
        "origin_pool",
        pool(origin_servers=[{"consul_service": {"service_name": "x"}}]),
        "spec.origin_servers[0].consul_service",
        "Consul is not supported",
    ),
    "the PROXY protocol": (
        "origin_pool",
        pool(advanced_options={"proxy_protocol_v1": {}}),
        "spec.advanced_options.proxy_protocol_v1",
        "the PROXY protocol is not supported",
    ),
    "subsets": (
        "origin_pool",
        pool(advanced_options={"enable_subsets": {}}),
        "spec.advanced_options.enable_subsets",
        "endpoint subsets are not supported",
    ),
    "an origin server twice": (
        "origin_pool",
        pool(origin_servers=[{"public_ip": {"ip": "192.0.2.1"}}, {"public_ip": {"ip": "192.0.2.1"}, "labels": {"a": "b"}}]),
        "spec",
        "origin_servers lists the same one twice",
    ),
    "a service without namespace": (
        "origin_pool",
        pool(origin_servers=[{"k8s_service": {"service_name": "cart", "site_locator": {"site": {"name": "a"}}}}]),
        "spec.origin_servers[0].k8s_service.service_name",
        "should be <service>.<namespace> or <service>.<namespace>:<cluster id>",
    ),
    "a port out of range": ("origin_pool", pool(port=65536), "spec.port", "should be less than or equal to 65535"),
    "a port that is true": ("origin_pool", pool(port=True), "spec.port", "should be a number"),
    "someone else's tenant": (
        "origin_pool",
        pool(healthcheck=[{"name": "h", "tenant": "other"}]),
        "spec.healthcheck[0].tenant",
        "objects of another tenant cannot be referred to",
    ),
    "an invisible namespace": (
        "origin_pool",
        pool(healthcheck=[{"name": "h", "namespace": "bank"}]),
        "spec.healthcheck[0].namespace",
        "should be shared or shop for a healthcheck",
    ),
    "a reference to another kind": (
        "origin_pool",
        pool(healthcheck=[{"name": "h", "kind": "site"}]),
        "spec.healthcheck[0].kind",
        "should be healthcheck",
    ),
    "look-around": (
        "http_loadbalancer",
        route(path={"regex": "a(?!b)"}),
        "spec.routes[0].simple_route.path.regex",
        "is not an RE2 expression: (?… that RE2 lacks, such as look-around or an atomic group, at position 2",
    ),
    "a relative path": (
        "http_loadbalancer",
        route(path={"prefix": "api"}),
        "spec.routes[0].simple_route.path.prefix",
        "should start with /",
    ),
    "a header injection": (
        "http_loadbalancer",
        route(advanced_options={"request_headers_to_add": [{"name": "a", "value": "b\r\nc: d"}]}),
        "spec.routes[0].simple_route.advanced_options.request_headers_to_add[0].value",
        "should not have control characters",
    ),
    "the host header": (
        "http_loadbalancer",
        route(advanced_options={"request_headers_to_add": [{"name": "Host", "value": "b"}]}),
        "spec.routes[0].simple_route.advanced_options.request_headers_to_add[0].name",
        "Host belongs to the connection and cannot be edited",
    ),
    "our own headers": (
        "http_loadbalancer",
        route(advanced_options={"request_headers_to_remove": ["X-Isthmus-Lb"]}),
        "spec.routes[0].simple_route.advanced_options.request_headers_to_remove[0]",
        "headers x-isthmus-* are reserved",
    ),
    "a group that the pattern lacks": (
        "http_loadbalancer",
        route(advanced_options={"regex_rewrite": {"pattern": "/(a)", "substitution": "/\\2"}}),
        "spec.routes[0].simple_route.advanced_options.regex_rewrite",
        "substitution: \\2 is none of the 1 groups of the pattern",
    ),
    "a misspelt retry condition": (
        "http_loadbalancer",
        route(advanced_options={"retry_policy": {"retry_condition": ["5xx", "connect-fail"]}}),
        "spec.routes[0].simple_route.advanced_options.retry_policy.retry_condition[1]",
        "connect-fail is not a retry condition: did you mean connect-failure?",
    ),
    "mirroring": (
        "http_loadbalancer",
        route(advanced_options={"mirror_policy": {"percent": {}}}),
        "spec.routes[0].simple_route.advanced_options.mirror_policy",
        "mirroring is not supported",
    ),
    "a redirect to nowhere": (
        "http_loadbalancer",
        balancer(routes=[{"redirect_route": {"path": {"prefix": "/"}}}]),
        "spec.routes[0].redirect_route.route_redirect",
        NIL,
    ),
    "a redirect that rewrites a part of the path and the whole query string": (
        "http_loadbalancer",
        balancer(
            routes=[{"redirect_route": {"path": {"prefix": "/"}, "route_redirect": {"prefix_rewrite": "/new", "replace_params": "a=1"}}}]
        ),
        "spec.routes[0].redirect_route.route_redirect",
        "prefix_rewrite and replace_params do not go together: give path_redirect, or leave the query string",
    ),
    "a response that redirects": (
        "http_loadbalancer",
        balancer(routes=[{"redirect_route": {"path": {"prefix": "/"}, "route_redirect": {"response_code": 200}}}]),
        "spec.routes[0].redirect_route.route_redirect.response_code",
        "should be 301, 302, 303, 307 or 308",
    ),
    "a body that is not inline": (
        "http_loadbalancer",
        balancer(
            routes=[
                {
                    "direct_response_route": {
                        "path": {"prefix": "/"},
                        "route_direct_response": {"response_code": 200, "response_body_encoded": "hello"},
                    }
                }
            ]
        ),
        "spec.routes[0].direct_response_route.route_direct_response.response_body_encoded",
        "should be string:///<base64>",
    ),
    "an IP fabric": (
        "http_loadbalancer",
        balancer(do_not_advertise=None, advertise_custom={"advertise_where": [{"site": {"site": {"name": "a"}, "network": 6}}]}),
        "spec.advertise_custom.advertise_where[0].site.network",
        "SITE_NETWORK_IP_FABRIC is not supported",
    ),
    "two ports": (
        "http_loadbalancer",
        balancer(do_not_advertise=None, advertise_custom={"advertise_where": [{**PLACE, "port": 80, "port_ranges": "81"}]}),
        "spec.advertise_custom.advertise_where[0].port_choice",
        "port and port_ranges exclude each other, give one of them",
    ),
    "ports that overlap": (
        "tcp_loadbalancer",
        changed("tcp_loadbalancer", listen_port=None, port_ranges="80,70-90"),
        "spec.port_ranges",
        "names a port twice",
    ),
    "too many ports": (
        "tcp_loadbalancer",
        changed("tcp_loadbalancer", listen_port=None, port_ranges="1-65535"),
        "spec.port_ranges",
        "names more than 256 ports",
    ),
    "SNI": ("tcp_loadbalancer", changed("tcp_loadbalancer", sni={}), "spec.sni", "SNI is not supported for TCP load balancers"),
    "no pool": ("tcp_loadbalancer", {"listen_port": 1, "do_not_advertise": {}}, "spec.origin_pools_weights", NIL),
    "countries": ("service_policy", policy(country_list={"country_codes": ["A"]}), f"{RULE}.country_list", "countries are not supported"),
    "autonomous systems": (
        "service_policy",
        policy(asn_list={"as_numbers": [1]}),
        f"{RULE}.asn_list",
        "autonomous systems are not supported",
    ),
    "a WAF action": ("service_policy", policy(waf_action={"waf_skip_processing": {}}), f"{RULE}.waf_action", "WAF is not supported"),
    "JWT": ("service_policy", policy(jwt_claims=[{"name": "a"}]), f"{RULE}.jwt_claims", "JWT validation is not supported"),
    "an address without length": (
        "service_policy",
        policy(ip_prefix_list={"ip_prefixes": ["10.0.0.1"]}),
        f"{RULE}.ip_prefix_list.ip_prefixes[0]",
        "should be a prefix, such as 10.0.0.0/8",
    ),
    "a header that Envoy cannot look up": (
        "service_policy",
        policy(headers=[{"name": "x-%", "check_present": {}}]),
        f"{RULE}.headers[0].name",
        "should not have any of % ( ), which Envoy could not look up",
    ),
    "a parameter that Envoy cannot look up": (
        "service_policy",
        policy(query_params=[{"key": "a(b)", "check_present": {}}]),
        f"{RULE}.query_params[0].key",
        "should not have any of % ( ), which Envoy could not look up",
    ),
    "a rule twice": (
        "service_policy",
        {"rule_list": {"rules": [{"metadata": {"name": "r"}, "spec": {}}, {"metadata": {"name": "r"}, "spec": {}}]}},
        "spec.rule_list",
        "two rules are named r",
    ),
    "a matcher of nothing": (
        "service_policy",
        policy(path={"invert_matcher": True}),
        f"{RULE}.path",
        "should have prefix_values, exact_values, suffix_values or regex_values",
    ),
    "publishing": (
        "discovery",
        changed("discovery", discovery_k8s={"access_info": {"in_cluster": True}, "publish_info": {"publish": {"namespace": "x"}}}),
        "spec.discovery_k8s.publish_info.publish",
        "publishing is not supported yet",
    ),
    "an ingress controller of another cluster": (
        "discovery",
        changed(
            "discovery", discovery_k8s={"access_info": {"in_cluster": True, "ingress_controller": {"service_name": "nginx.ingress:far"}}}
        ),
        "spec.discovery_k8s.access_info.ingress_controller.service_name",
        "should be <service>.<namespace>: it is in the cluster that is discovered",
    ),
    "two deliveries": (
        "discovery",
        changed(
            "discovery",
            discovery_k8s={"access_info": {"in_cluster": True, "isolated": {}, "ingress_controller": {"service_name": "nginx.ingress"}}},
        ),
        "spec.discovery_k8s.access_info.pod_network",
        "ingress_controller and isolated exclude each other, give one of them",
    ),
    "Consul discovery": (
        "discovery",
        {"where": SMALLEST["discovery"]["where"], "discovery_consul": {}},
        "spec.discovery_consul",
        "Consul is not supported",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_field_and_the_reason_are_named(case: str) -> None:
    kind, spec, path, description = CASES[case]
    assert refusals(kind, spec) == {path: description}


def test_a_choice_that_is_off_and_on_is_refused_and_both_are_named() -> None:
    refused = refusals("http_loadbalancer", balancer(disable_waf={}, app_firewall={"name": "x"}))
    assert refused["spec.waf_choice"] == "app_firewall and disable_waf exclude each other, give one of them"


def test_a_spoke_group_has_one_group_of_hubs() -> None:
    refused = refusals("site_mesh_group", {"type": 2, "hub": [{"name": "one"}, {"name": "two"}]})
    assert refused["spec.hub"] == "belongs to a spoke, which names one group of hubs; make a group for each"


def test_a_spoke_without_hubs_is_refused_in_the_deprecated_encoding_too() -> None:
    assert refusals("site_mesh_group", {"type": "SITE_MESH_GROUP_TYPE_SPOKE"}) == {"spec.spoke_mesh.hub_mesh_group": NIL}
    assert "spec.mesh_choice" in refusals("site_mesh_group", {"type": "SITE_MESH_GROUP_TYPE_SPOKE", "full_mesh": {}})


def test_the_message_of_a_missing_choice_is_that_of_the_api() -> None:
    with pytest.raises(Invalid) as refused:
        read("http_loadbalancer", {"domains": ["a"], "do_not_advertise": {}})
    assert refused.value.message == "Field spec.loadbalancer_type should be not nil, got nil in request."


def test_everything_wrong_is_told_at_once() -> None:
    spec = {"domains": ["*.*"], "htpp": {}, "app_firewall": {}, "advertise_on_public": {}, "routes": [{}, {"simple_route": {}}]}
    assert set(refusals("http_loadbalancer", spec)) == {
        "spec.htpp",
        "spec.app_firewall",
        "spec.advertise_on_public",
        "spec.loadbalancer_type",
        "spec.domains[0]",
        "spec.routes[0].choice",
        "spec.routes[1].simple_route.path",
        "spec.routes[1].simple_route.origin_pools",
    }


def test_a_list_of_wrong_elements_is_not_called_too_short() -> None:
    spec = changed("origin_pool", origin_servers=[{"public_ip": {"ip": "x"}}])
    assert list(refusals("origin_pool", spec)) == ["spec.origin_servers[0].public_ip.ip"]


@pytest.mark.parametrize("kind", SMALLEST)
@pytest.mark.parametrize("spec", [[], "x", 7, True, {"": {}}, {"a": {"b": []}}])
def test_a_spec_of_the_wrong_shape_is_refused_and_never_a_crash(kind: str, spec: object) -> None:
    assert refusals(kind, spec)


@pytest.mark.parametrize("body", [None, [], "x", 7, {"spec": {}}, {"metadata": [], "spec": {}}, {"metadata": {"name": 7}}])
def test_a_body_of_the_wrong_shape_is_refused(body: object) -> None:
    with pytest.raises(Invalid):
        parse("site", body, namespace="system")


@pytest.mark.parametrize(
    ("kind", "namespace"), [("site", "shop"), ("http_loadbalancer", "system"), ("namespace", "shop"), ("virtual_site", "")]
)
def test_kinds_have_their_namespaces(kind: str, namespace: str) -> None:
    assert "metadata.namespace" in refusals(kind, SMALLEST[kind], namespace=namespace)


def test_details_are_bounded() -> None:
    assert len(refusals("site", {f"x{number}": 1 for number in range(500)})) == 100
