"""Bodies as they are published for the F5 XC API, and what is made of them."""

from typing import Any

import pytest

from controlplane.resources.base import Key
from controlplane.resources.registry import KINDS, dump, load, parse, refs
from tests.unit.resources.resource_specs import SMALLEST, read

BODIES = {
    "namespace": ("namespace", "", {"metadata": {"name": "foo", "description": ""}, "spec": {}}, {}),
    "virtual site": (
        "virtual_site",
        "shared",
        {
            "metadata": {"name": "x-k0s-clusters", "namespace": "shared"},
            "spec": {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["vsite in (x-k0s-clusters)"]}},
        },
        {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["vsite in (x-k0s-clusters)"]}},
    ),
    "site mesh group": (
        "site_mesh_group",
        "system",
        {
            "metadata": {"name": "x-k0s-clusters", "namespace": "system"},
            "spec": {
                "full_mesh": {"control_and_data_plane_mesh": {}},
                "disable_re_fallback": {},
                "virtual_site": [{"kind": "virtual_site", "namespace": "shared", "name": "x-k0s-clusters"}],
            },
        },
        {
            "full_mesh": {"control_and_data_plane_mesh": {}},
            "disable_re_fallback": {},
            "disable_multi_cluster_services": {},
            "tunnel_type": "SITE_TO_SITE_TUNNEL_IPSEC_OR_SSL",
            "virtual_site": [{"namespace": "shared", "name": "x-k0s-clusters"}],
        },
    ),
    "site mesh group in the deprecated encoding": (
        "site_mesh_group",
        "system",
        {
            "metadata": {"name": "mesh"},
            "spec": {
                "type": "SITE_MESH_GROUP_TYPE_FULL_MESH",
                "hub": [],
                "virtual_site": [{"namespace": "shared", "name": "all", "uid": "", "tenant": ""}],
            },
        },
        {
            "full_mesh": {"data_plane_mesh": {}},
            "disable_re_fallback": {},
            "disable_multi_cluster_services": {},
            "tunnel_type": "SITE_TO_SITE_TUNNEL_IPSEC_OR_SSL",
            "virtual_site": [{"namespace": "shared", "name": "all"}],
        },
    ),
    "spokes": (
        "site_mesh_group",
        "system",
        {
            "metadata": {"name": "spokes"},
            "spec": {
                "spoke_mesh": {"control_and_data_plane_mesh": {}, "hub_mesh_group": {"namespace": "system", "name": "hubs"}},
                "enable_re_fallback": {},
                "tunnel_type": "SITE_TO_SITE_TUNNEL_SSL",
                "virtual_site": [{"namespace": "shared", "name": "all"}],
            },
        },
        {
            "spoke_mesh": {"control_and_data_plane_mesh": {}, "hub_mesh_group": {"namespace": "system", "name": "hubs"}},
            "enable_re_fallback": {},
            "disable_multi_cluster_services": {},
            "tunnel_type": "SITE_TO_SITE_TUNNEL_SSL",
            "virtual_site": [{"namespace": "shared", "name": "all"}],
        },
    ),
    "spokes in the deprecated encoding": (
        "site_mesh_group",
        "system",
        {
            "metadata": {"name": "spokes"},
            "spec": {
                "type": 2,
                "hub": [{"kind": "site_mesh_group", "name": "hubs"}],
                "virtual_site": [{"namespace": "shared", "name": "all"}],
            },
        },
        {
            "spoke_mesh": {"data_plane_mesh": {}, "hub_mesh_group": {"namespace": "system", "name": "hubs"}},
            "disable_re_fallback": {},
            "disable_multi_cluster_services": {},
            "tunnel_type": "SITE_TO_SITE_TUNNEL_IPSEC_OR_SSL",
            "virtual_site": [{"namespace": "shared", "name": "all"}],
        },
    ),
    "hubs in the deprecated encoding": (
        "site_mesh_group",
        "system",
        {"metadata": {"name": "hubs"}, "spec": {"type": "SITE_MESH_GROUP_TYPE_HUB_FULL_MESH"}},
        {
            "hub_mesh": {"data_plane_mesh": {}},
            "disable_re_fallback": {},
            "disable_multi_cluster_services": {},
            "tunnel_type": "SITE_TO_SITE_TUNNEL_IPSEC_OR_SSL",
            "virtual_site": [],
        },
    ),
    "discovery": (
        "discovery",
        "system",
        {
            "metadata": {"name": "site-a", "namespace": "system"},
            "spec": {
                "where": {
                    "site": {
                        "ref": [{"kind": "site", "namespace": "system", "name": "site-a"}],
                        "network_type": "VIRTUAL_NETWORK_SITE_LOCAL_INSIDE",
                    }
                },
                "discovery_k8s": {
                    "access_info": {"in_cluster": True, "isolated": {}},
                    "publish_info": {"disable": {}},
                },
            },
        },
        {
            "where": {
                "site": {
                    "ref": [{"namespace": "system", "name": "site-a"}],
                    "network_type": "VIRTUAL_NETWORK_SITE_LOCAL_INSIDE",
                }
            },
            "discovery_k8s": {
                "access_info": {"in_cluster": True, "isolated": {}},
                "publish_info": {"disable": {}},
                "default_all": {},
            },
            "no_cluster_id": {},
        },
    ),
    "origin pool": (
        "origin_pool",
        "foo",
        {
            "metadata": {"name": "httpd", "namespace": "foo"},
            "spec": {
                "origin_servers": [
                    {
                        "k8s_service": {
                            "service_name": "f5-demo-httpd.foo",
                            "vk8s_networks": {},
                            "site_locator": {"site": {"namespace": "system", "name": "x-beta"}},
                        }
                    }
                ],
                "port": 8080,
                "no_tls": {},
                "loadbalancer_algorithm": "LB_OVERRIDE",
                "endpoint_selection": "LOCAL_PREFERRED",
                "healthcheck": [{"name": "httpd"}],
            },
        },
        {
            "origin_servers": [
                {
                    "k8s_service": {
                        "service_name": "f5-demo-httpd.foo",
                        "site_locator": {"site": {"namespace": "system", "name": "x-beta"}},
                        "vk8s_networks": {},
                    },
                    "labels": {},
                }
            ],
            "port": 8080,
            "loadbalancer_algorithm": "LB_OVERRIDE",
            "endpoint_selection": "LOCAL_PREFERRED",
            "healthcheck": [{"namespace": "foo", "name": "httpd"}],
            "same_as_endpoint_port": {},
            "no_tls": {},
        },
    ),
    "healthcheck": (
        "healthcheck",
        "foo",
        {
            "metadata": {"name": "httpd", "namespace": "foo"},
            "spec": {
                "http_health_check": {"path": "/txt", "use_origin_server_name": {}},
                "interval": 15,
                "timeout": 2,
                "healthy_threshold": 2,
                "unhealthy_threshold": 5,
            },
        },
        {
            "http_health_check": {
                "path": "/txt",
                "use_origin_server_name": {},
                "headers": {},
                "request_headers_to_remove": [],
                "use_http2": False,
                "expected_status_codes": [],
            },
            "interval": 15,
            "timeout": 2,
            "healthy_threshold": 2,
            "unhealthy_threshold": 5,
            "jitter_percent": 0,
        },
    ),
    "HTTP load balancer": (
        "http_loadbalancer",
        "foo",
        {
            "metadata": {"name": "httpd", "namespace": "foo"},
            "spec": {
                "domains": ["f5-httpd-demo"],
                "http": {"dns_volterra_managed": False, "port": 80},
                "advertise_custom": {
                    "advertise_where": [
                        {
                            "site": {"network": "SITE_NETWORK_OUTSIDE", "site": {"namespace": "system", "name": "x-alpha"}},
                            "use_default_port": {},
                        }
                    ]
                },
                "default_route_pools": [
                    {"pool": {"namespace": "foo", "name": "httpd"}, "weight": 1, "priority": 1, "endpoint_subsets": {}}
                ],
                "routes": [
                    {
                        "simple_route": {
                            "http_method": "ANY",
                            "path": {"prefix": "/api/"},
                            "headers": [],
                            "auto_host_rewrite": {},
                            "origin_pools": [{"pool": {"namespace": "foo", "name": "api"}, "weight": 1, "priority": 1}],
                        }
                    }
                ],
                "disable_waf": {},
                "no_challenge": {},
                "disable_rate_limit": {},
                "user_id_client_ip": {},
                "service_policies_from_namespace": {},
                "round_robin": {},
            },
        },
        {
            "domains": ["f5-httpd-demo"],
            "http": {"port": 80},
            "advertise_custom": {
                "advertise_where": [
                    {
                        "site": {"site": {"namespace": "system", "name": "x-alpha"}, "network": "SITE_NETWORK_OUTSIDE"},
                        "use_default_port": {},
                    }
                ]
            },
            "default_route_pools": [{"pool": {"namespace": "foo", "name": "httpd"}, "weight": 1, "priority": 1}],
            "routes": [
                {
                    "simple_route": {
                        "path": {"prefix": "/api/"},
                        "http_method": "ANY",
                        "headers": [],
                        "origin_pools": [{"pool": {"namespace": "foo", "name": "api"}, "weight": 1, "priority": 1}],
                        "auto_host_rewrite": {},
                    }
                }
            ],
            "round_robin": {},
            "service_policies_from_namespace": {},
            "deprioritize_lost_sites": {},
        },
    ),
    "TCP load balancer": (
        "tcp_loadbalancer",
        "foo",
        {
            "metadata": {"name": "brews-mongodb-tcp-lb", "namespace": "foo"},
            "spec": {
                "domains": ["mongodb.foo.svc"],
                "listen_port": 27017,
                "no_sni": {},
                "tcp": {},
                "retract_cluster": {},
                "origin_pools_weights": [
                    {
                        "pool": {"namespace": "foo", "name": "brews-mongodb-pool", "kind": "origin_pool"},
                        "weight": 1,
                        "priority": 1,
                        "endpoint_subsets": {},
                    }
                ],
                "advertise_custom": {
                    "advertise_where": [
                        {
                            "virtual_site": {
                                "network": "SITE_NETWORK_SERVICE",
                                "virtual_site": {"namespace": "foo", "name": "aws-vsite"},
                            },
                            "use_default_port": {},
                        }
                    ]
                },
                "hash_policy_choice_round_robin": {},
                "idle_timeout": 3600000,
                "dns_volterra_managed": False,
            },
        },
        {
            "domains": ["mongodb.foo.svc"],
            "listen_port": 27017,
            "no_sni": {},
            "tcp": {},
            "advertise_custom": {
                "advertise_where": [
                    {
                        "virtual_site": {
                            "virtual_site": {"namespace": "foo", "name": "aws-vsite"},
                            "network": "SITE_NETWORK_SERVICE",
                        },
                        "use_default_port": {},
                    }
                ]
            },
            "origin_pools_weights": [{"pool": {"namespace": "foo", "name": "brews-mongodb-pool"}, "weight": 1, "priority": 1}],
            "hash_policy_choice_round_robin": {},
            "retract_cluster": {},
            "service_policies_from_namespace": {},
            "deprioritize_lost_sites": {},
            "idle_timeout": 3600000,
        },
    ),
    "service policy": (
        "service_policy",
        "foo",
        {
            "metadata": {"name": "only-foo", "namespace": "foo"},
            "spec": {
                "any_server": {},
                "rule_list": {
                    "rules": [
                        {
                            "metadata": {"name": "allow-get"},
                            "spec": {
                                "action": "ALLOW",
                                "any_client": {},
                                "any_ip": {},
                                "any_asn": {},
                                "http_method": {"methods": ["GET"]},
                                "path": {"prefix_values": ["/api/"]},
                                "waf_action": {"none": {}},
                            },
                        }
                    ]
                },
            },
        },
        {
            "algo": "FIRST_MATCH",
            "rule_list": {
                "rules": [
                    {
                        "metadata": {"name": "allow-get", "description": "", "disable": False},
                        "spec": {
                            "action": "ALLOW",
                            "any_client": {},
                            "any_ip": {},
                            "path": {
                                "prefix_values": ["/api/"],
                                "exact_values": [],
                                "suffix_values": [],
                                "regex_values": [],
                                "invert_matcher": False,
                            },
                            "headers": [],
                            "query_params": [],
                            "http_method": {"methods": ["GET"], "invert_matcher": False},
                        },
                    }
                ]
            },
            "any_server": {},
        },
    ),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_published_body_reads_back_with_documented_defaults(case: str) -> None:
    kind, namespace, body, expected = BODIES[case]
    assert dump(parse(kind, body, namespace=namespace).spec) == expected


@pytest.mark.parametrize("case", BODIES)
def test_what_was_read_back_can_be_sent_again_and_loaded(case: str) -> None:
    kind, namespace, body, _ = BODIES[case]
    parsed = parse(kind, body, namespace=namespace)
    answer = {
        "metadata": parsed.metadata.model_dump(),
        "system_metadata": {"uid": "1"},
        "spec": dump(parsed.spec),
        "status": [],
        "resource_version": "1",
        "revision": 7,
    }
    assert parse(kind, answer, namespace=namespace, name=parsed.metadata.name) == parsed
    assert load(kind, dump(parsed.spec)) == parsed.spec


@pytest.mark.parametrize("kind", SMALLEST)
def test_nulls_are_absent_fields(kind: str) -> None:
    spec_type = KINDS[kind].type
    nulls = dict.fromkeys(spec_type.model_fields) | dict.fromkeys(spec_type.unsupported) | dict.fromkeys(spec_type.ignored)
    assert read(kind, nulls | SMALLEST[kind]) == read(kind, SMALLEST[kind])


EMPTY_TEXTS: dict[str, dict[str, Any]] = {
    "site": {"inside_vip": "", "outside_vip": ""},
    "http_loadbalancer": {
        "domains": ["a.b"],
        "http": {"port": 80},
        "advertise_custom": {"advertise_where": [{"site": {"site": {"name": "a"}, "ip": ""}}]},
        "routes": [{"redirect_route": {"path": {"prefix": "/"}, "route_redirect": {"path_redirect": "/x", "host_redirect": ""}}}],
    },
}


def without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_empty(item) for name, item in value.items() if item != ""}
    return [without_empty(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("kind", EMPTY_TEXTS)
def test_an_empty_text_is_none_where_one_may_be_missing(kind: str) -> None:
    assert read(kind, EMPTY_TEXTS[kind]) == read(kind, without_empty(EMPTY_TEXTS[kind]))


@pytest.mark.parametrize("kind", SMALLEST)
def test_everything_unsupported_is_dropped_while_empty_and_everything_off_while_chosen(kind: str) -> None:
    spec_type = KINDS[kind].type
    empty = dict(zip(spec_type.unsupported, [[], {}, "", 0, False] * 40, strict=False))
    off: dict[str, Any] = {choice.off[0]: {} for choice in spec_type.choices if choice.off}
    assert read(kind, empty | off | SMALLEST[kind]) == read(kind, SMALLEST[kind])


def test_a_live_answer_of_the_service_can_be_sent_back() -> None:
    spec = SMALLEST["http_loadbalancer"] | {
        "origin_server_subset_rule_list": None,
        "waf_exclusion_rules": [],
        "add_location": True,
        "state": "VIRTUAL_HOST_READY",
        "cert_state": "AutoCertDisabled",
        "dns_info": [{"ip_address": ""}],
        "downstream_tls_certificate_expiration_timestamps": [],
        "host_name": "ves-io-x.ac.vh.ves.io",
        "https": None,
    }
    assert read("http_loadbalancer", spec) == read("http_loadbalancer", SMALLEST["http_loadbalancer"])


def test_refs_names_every_object_with_its_path() -> None:
    kind, namespace, body, _ = BODIES["HTTP load balancer"]
    parsed = parse(kind, body, namespace=namespace)
    assert [(ref.kind, ref.key, ref.path) for ref in refs(kind, *parsed)] == [
        ("site", Key("system", "x-alpha"), "spec.advertise_custom.advertise_where[0].site.site"),
        ("origin_pool", Key("foo", "httpd"), "spec.default_route_pools[0].pool"),
        ("origin_pool", Key("foo", "api"), "spec.routes[0].simple_route.origin_pools[0].pool"),
    ]


def test_a_reference_without_namespace_means_the_referrers_or_system_for_sites() -> None:
    spec = read("discovery", SMALLEST["discovery"])
    assert spec.where.site.ref[0].key == Key("system", "a")
    pool = read("origin_pool", SMALLEST["origin_pool"] | {"healthcheck": [{"name": "h"}]}, namespace="shop")
    assert pool.healthcheck[0].key == Key("shop", "h")


def test_the_own_tenant_may_be_named_in_a_reference() -> None:
    pool = SMALLEST["origin_pool"] | {"healthcheck": [{"name": "h", "tenant": "acme", "uid": "", "kind": "healthcheck"}]}
    assert read("origin_pool", pool, tenant="acme").healthcheck[0].name == "h"


def test_enums_may_be_numbers() -> None:
    pool = read("origin_pool", SMALLEST["origin_pool"] | {"loadbalancer_algorithm": 1, "endpoint_selection": 2})
    assert (pool.loadbalancer_algorithm, pool.endpoint_selection) == ("LEAST_REQUEST", "LOCAL_PREFERRED")


def test_the_zero_of_another_member_does_not_make_a_choice_but_an_empty_value_to_match_does() -> None:
    headers = [{"name": "a", "exact": "", "regex": ""}, {"name": "b", "exact": None, "presence": True, "regex": ""}]
    route = {"path": {"prefix": "/", "regex": ""}, "headers": headers, "origin_pools": [{"pool": {"name": "p"}}]}
    spec = read(
        "http_loadbalancer", SMALLEST["http_loadbalancer"] | {"http": {"port": 80, "port_ranges": ""}, "routes": [{"simple_route": route}]}
    )
    first, second = spec.routes[0].simple_route.headers
    assert (first.exact, first.presence) == ("", None)
    assert (second.exact, second.presence) == (None, True)
    assert spec.http.port == 80
