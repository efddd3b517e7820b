"""The five verbs, for kinds that stand for the others."""

import base64
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from controlplane.resources.registry import KINDS
from tests.unit.resources.conftest import key_pem, self_signed
from tests.unit.resources.resource_specs import inline

POOLS = "/api/config/namespaces/shop/origin_pools"
CHECKS = "/api/config/namespaces/shop/healthchecks"
BALANCERS = "/api/config/namespaces/shop/http_loadbalancers"
TCP_BALANCERS = "/api/config/namespaces/shop/tcp_loadbalancers"
SITES = "/api/config/namespaces/system/sites"
VIRTUAL_SITES = "/api/config/namespaces/shared/virtual_sites"

Json = dict[str, Any]


def check(name: str = "alive", **metadata: Any) -> Json:
    spec = {"http_health_check": {"path": "/"}, "timeout": 3, "interval": 15, "unhealthy_threshold": 1, "healthy_threshold": 3}
    return {"metadata": {"name": name, **metadata}, "spec": spec}


def pool(name: str = "cart", site: str = "a", **spec: Any) -> Json:
    server = {"k8s_service": {"service_name": f"{name}.shop", "site_locator": {"site": {"name": site}}, "inside_network": {}}}
    return {"metadata": {"name": name}, "spec": {"origin_servers": [server], "port": 80, **spec}}


def balancer(name: str = "cart", domain: str = "cart.test", *, port: int = 80, where: Json | None = None, **metadata: Any) -> Json:
    place = where or {"site": {"site": {"name": "a"}, "network": "SITE_NETWORK_INSIDE"}}
    spec = {
        "domains": [domain],
        "http": {"port": port},
        "advertise_custom": {"advertise_where": [place]},
        "default_route_pools": [{"pool": {"name": "cart"}}],
    }
    return {"metadata": {"name": name, **metadata}, "spec": spec}


async def put(client: httpx.AsyncClient, path: str, body: Json) -> Json:
    """Create, and it must work."""
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    made: Json = answer.json()
    return made


async def sites(client: httpx.AsyncClient, **labels: dict[str, str]) -> None:
    for name, given in labels.items():
        await put(client, SITES, {"metadata": {"name": name, "labels": given}})


@pytest.fixture
async def shop(user: httpx.AsyncClient) -> httpx.AsyncClient:
    """A tenant with the sites a and b and a pool."""
    await sites(user, a={"tier": "gold"}, b={})
    await put(user, POOLS, pool())
    return user


# Who may


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.kind)
async def test_nobody_gets_in_without_a_token(anonymous: httpx.AsyncClient, kind: Any) -> None:
    many = f"/api/{kind.slug}/{kind.plural}" if kind.lives_in == "none" else f"/api/{kind.slug}/namespaces/system/{kind.plural}"
    for method, path in (("GET", many), ("POST", many), ("GET", f"{many}/x"), ("PUT", f"{many}/x")):
        answer = await anonymous.request(method, path, content=b"{}")
        assert (answer.status_code, answer.json()["code"]) == (401, 16)


async def test_a_wrong_token_is_refused(user: httpx.AsyncClient) -> None:
    answer = await user.get(CHECKS, headers={"Authorization": "APIToken ist_guess"})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "APIToken"


async def test_a_bearer_token_is_as_good(user: httpx.AsyncClient) -> None:
    token = user.headers["authorization"].partition(" ")[2]
    assert (await user.get(CHECKS, headers={"Authorization": f"Bearer {token}"})).status_code == 200


async def test_what_belongs_to_another_tenant_does_not_exist(user: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    await put(user, CHECKS, check())
    await put(stranger, "/api/web/namespaces", {"metadata": {"name": "shop"}})
    for answer in (
        await stranger.get(f"{CHECKS}/alive"),
        await stranger.put(f"{CHECKS}/alive", json=check()),
        await stranger.delete(f"{CHECKS}/alive"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, 5)
    assert (await stranger.get(CHECKS)).json()["items"] == []


async def test_only_operators_may_name_another_tenant(user: httpx.AsyncClient, operator: httpx.AsyncClient) -> None:
    made = await put(user, CHECKS, check())
    tenant = {"x-volterra-apigw-tenant": made["system_metadata"]["tenant"]}
    assert (await user.get(CHECKS, headers={"x-volterra-apigw-tenant": "default"})).status_code == 403
    assert (await user.get(CHECKS, headers=tenant)).status_code == 200
    assert len((await operator.get(CHECKS, headers=tenant)).json()["items"]) == 1
    assert (await operator.get(CHECKS, headers={"x-volterra-apigw-tenant": "nobody"})).status_code == 404


# Create and read


async def test_what_was_created_can_be_read(user: httpx.AsyncClient) -> None:
    made = await put(user, CHECKS, check(labels={"team": "cart"}, description="is it alive"))
    read = (await user.get(f"{CHECKS}/alive")).json()
    assert read["metadata"] == made["metadata"]
    assert read["metadata"]["labels"] == {"team": "cart"}
    assert read["spec"] == made["spec"]
    assert read["resource_version"] == made["resource_version"] == "1"
    assert read["system_metadata"]["uid"] == made["system_metadata"]["uid"]


async def test_content_type_does_not_matter(user: httpx.AsyncClient) -> None:
    answer = await user.post(CHECKS, content=b'{"metadata":{"name":"x"},"spec":{"tcp_health_check":{},"timeout":1,"interval":1}}')
    assert answer.status_code in (200, 400)
    assert "content-type" not in answer.text.lower()


async def test_the_same_name_twice_is_refused(user: httpx.AsyncClient) -> None:
    await put(user, CHECKS, check())
    answer = await user.post(CHECKS, json=check())
    assert (answer.status_code, answer.json()["code"]) == (409, 6)
    assert "alive" in answer.json()["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"metadata": {"name": "x"}', "line 1 column 27"),
        (b"\xff", "UTF-8"),
        (b'{"metadata": {"name": "x", "name": "y"}}', "'name' twice"),
        (b'{"metadata": {"name": "x", "description": "\\u0000"}}', "metadata.description"),
        (b'{"metadata": {"name": "x", "description": "\\ud800"}}', "metadata.description"),
        (b'{"metadata": {"name": NaN}}', "NaN"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "should be an object"),
        (b"", "line 1"),
        (b"{}", "metadata.name"),
        (b'{"metadata": {"name": "No Name"}}', "metadata.name"),
        (b'{"metadata": {"name": "x"}, "spec": {"timeouts": 3}}', "did you mean timeout"),
        (b"x" * (1 << 20) + b"x", "larger than"),
    ],
)
async def test_a_bad_body_is_told_what_is_wrong(user: httpx.AsyncClient, body: bytes, says: str) -> None:
    answer = await user.post(CHECKS, content=body)
    assert (answer.status_code, answer.json()["code"]) == (400, 3)
    assert says in answer.text


async def test_a_body_without_length_is_bounded_too(user: httpx.AsyncClient) -> None:
    async def endless() -> Any:
        for _ in range(20):
            yield b" " * (1 << 17)

    answer = await user.post(CHECKS, content=endless())
    assert answer.status_code == 400
    assert "larger than" in answer.text


async def test_a_reference_to_nothing_is_refused_with_its_path(user: httpx.AsyncClient) -> None:
    answer = await user.post(POOLS, json=pool(site="nowhere"))
    assert answer.status_code == 400
    assert answer.json()["details"] == [
        {"field": "spec.origin_servers[0].k8s_service.site_locator.site", "description": "site system/nowhere does not exist"}
    ]


async def test_a_namespace_has_to_exist(user: httpx.AsyncClient) -> None:
    for answer in (
        await user.post("/api/config/namespaces/nowhere/healthchecks", json=check()),
        await user.get("/api/config/namespaces/nowhere/healthchecks"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, 5)


async def test_applications_stay_out_of_the_system_namespace(user: httpx.AsyncClient) -> None:
    answer = await user.post("/api/config/namespaces/system/healthchecks", json=check())
    assert answer.status_code == 400
    assert answer.json()["details"][0]["field"] == "metadata.namespace"


async def test_a_path_that_is_no_name_does_not_exist(user: httpx.AsyncClient) -> None:
    assert (await user.get(f"{CHECKS}/%00")).status_code == 404
    assert (await user.get(f"{CHECKS}/A%20B")).status_code == 404
    assert (await user.get("/api/config/namespaces/shop/nothings")).json()["code"] == 5
    assert (await user.patch(f"{CHECKS}/alive")).json()["code"] == 12


@pytest.mark.parametrize("number", range(7))
async def test_response_formats(shop: httpx.AsyncClient, number: int) -> None:
    await put(shop, BALANCERS, balancer())
    path = f"{POOLS}/cart?response_format={number}"
    read = (await shop.get(path)).json()
    present = {name for name, value in read.items() if value not in (None, [])}
    assert (
        present
        == [
            {"metadata", "system_metadata", "spec", "resource_version", "revision"},
            {"create_form"},
            {"replace_form", "resource_version"},
            {"metadata", "system_metadata", "status"},
            {"metadata", "system_metadata", "spec", "resource_version", "revision"},
            {"referring_objects"},
            set(),
        ][number]
    )


async def test_an_unknown_response_format_is_refused(user: httpx.AsyncClient) -> None:
    await put(user, CHECKS, check())
    for wrong in ("7", "FULL", "²", "9" * 5000):
        assert (await user.get(f"{CHECKS}/alive?response_format={wrong}")).status_code == 400


async def test_the_form_for_replacing_can_be_sent_back(shop: httpx.AsyncClient) -> None:
    form = (await shop.get(f"{POOLS}/cart?response_format=GET_RSP_FORMAT_FOR_REPLACE")).json()["replace_form"]
    again = await shop.put(f"{POOLS}/cart", json=form)
    assert again.status_code == 200
    assert again.json()["spec"] == form["spec"]


# Replace


async def test_replace_answers_with_the_object_and_its_revision(user: httpx.AsyncClient) -> None:
    made = await put(user, CHECKS, check(description="old"))
    answer = await user.put(f"{CHECKS}/alive", json=check())
    assert answer.status_code == 200
    assert answer.json()["metadata"]["description"] == ""
    assert answer.json()["resource_version"] == "2"
    assert answer.json()["revision"] == made["revision"] + 1


async def test_a_stale_write_is_refused(user: httpx.AsyncClient) -> None:
    await put(user, CHECKS, check())
    assert (await user.put(f"{CHECKS}/alive", json={**check(), "resource_version": "1"})).status_code == 200
    stale = await user.put(f"{CHECKS}/alive", json={**check(), "resource_version": "1"})
    assert (stale.status_code, stale.json()["code"]) == (409, 10)
    assert "someone wrote in between" in stale.json()["message"]
    for last_writer_wins in ("", None):
        assert (await user.put(f"{CHECKS}/alive", json={**check(), "resource_version": last_writer_wins})).status_code == 200


async def test_what_is_not_there_cannot_be_replaced(user: httpx.AsyncClient) -> None:
    assert (await user.put(f"{CHECKS}/alive", json=check())).status_code == 404


async def test_a_refused_write_changes_nothing(shop: httpx.AsyncClient) -> None:
    before = (await shop.get(f"{POOLS}/cart")).json()
    assert (await shop.put(f"{POOLS}/cart", json=pool(site="nowhere"))).status_code == 400
    assert (await shop.get(f"{POOLS}/cart")).json() == before
    made = await put(shop, CHECKS, check())
    assert made["revision"] == before["revision"] + 1


# List


async def test_lists_hide_specs_unless_asked(user: httpx.AsyncClient) -> None:
    await put(user, CHECKS, check(labels={"team": "cart"}))
    (plain,) = (await user.get(CHECKS)).json()["items"]
    (whole,) = (await user.get(f"{CHECKS}?report_fields")).json()["items"]
    assert "get_spec" not in plain
    assert plain["labels"] == {"team": "cart"}
    assert whole["get_spec"]["timeout"] == 3
    assert whole["metadata"]["name"] == "alive"


async def test_lists_are_filtered_by_labels(user: httpx.AsyncClient) -> None:
    for name, team in (("one", "cart"), ("two", "pay"), ("three", "cart")):
        await put(user, CHECKS, check(name, labels={"team": team}))
    found = (await user.get(CHECKS, params={"label_filter": "team in (cart)"})).json()["items"]
    assert [item["name"] for item in found] == ["one", "three"]
    assert (await user.get(CHECKS, params={"label_filter": "team in cart"})).json()["details"][0]["field"] == "label_filter"


async def test_sites_are_found_by_the_labels_of_the_system(shop: httpx.AsyncClient) -> None:
    found = (await shop.get(SITES, params={"label_filter": "ves.io/siteName in (b)", "report_fields": ""})).json()["items"]
    assert [item["name"] for item in found] == ["b"]
    assert found[0]["system_metadata"]["labels"]["ves.io/siteType"] == "ves-io-ce"
    assert found[0]["get_spec"]["site_state"] == "WAITING_FOR_REGISTRATION"


async def test_long_lists_come_in_pages(user: httpx.AsyncClient) -> None:
    names = sorted(f"check-{number}" for number in range(7))
    for name in names:
        await put(user, CHECKS, check(name, labels={"odd": "yes"} if int(name[-1]) % 2 else {}))
    seen: list[str] = []
    token = ""
    while True:
        page = (await user.get(CHECKS, params={"limit": 3, "continue": token})).json()
        seen += [item["name"] for item in page["items"]]
        token = page["continue"]
        if not token:
            break
        assert len(page["items"]) == 3
    assert seen == names
    odd = (await user.get(CHECKS, params={"limit": 3, "label_filter": "odd"})).json()
    assert ([item["name"] for item in odd["items"]], odd["continue"]) == (["check-1", "check-3", "check-5"], "")


@pytest.mark.parametrize(
    "query", [{"limit": "0"}, {"limit": "x"}, {"continue": "%%%"}, {"continue": "bm8"}, {"continue": "ä"}, {"continue": "AC8A"}]
)
async def test_a_bad_page_is_refused(user: httpx.AsyncClient, query: dict[str, str]) -> None:
    answer = await user.get(CHECKS, params=query)
    assert (answer.status_code, answer.json()["code"]) == (400, 3)


# Delete


async def test_deleting(user: httpx.AsyncClient) -> None:
    await put(user, CHECKS, check())
    answer = await user.request("DELETE", f"{CHECKS}/alive", json={"fail_if_referred": True, "namespace": "shop", "name": "alive"})
    assert (answer.status_code, answer.json()) == (200, {})
    assert (await user.get(f"{CHECKS}/alive")).status_code == 404
    assert (await user.delete(f"{CHECKS}/alive")).status_code == 404


async def test_what_is_referred_to_stays(shop: httpx.AsyncClient) -> None:
    await put(shop, BALANCERS, balancer())
    for body in ({}, {"fail_if_referred": False}):
        answer = await shop.request("DELETE", f"{POOLS}/cart", json=body)
        assert (answer.status_code, answer.json()["code"]) == (409, 9)
        (detail,) = answer.json()["details"]
        assert detail["field"] == "http_loadbalancer shop/cart"
        assert "default_route_pools[0]" in detail["description"]
    assert (await shop.delete(f"{BALANCERS}/cart")).status_code == 200
    assert (await shop.delete(f"{POOLS}/cart")).status_code == 200


async def test_a_refusal_is_short_however_many_refer_to_it(shop: httpx.AsyncClient) -> None:
    for number in range(12):
        await put(shop, BALANCERS, balancer(f"cart-{number:02}", f"cart-{number}.test"))
    refusal = (await shop.delete(f"{POOLS}/cart")).json()
    assert refusal["message"].endswith("http_loadbalancer shop/cart-09 and 2 more")
    assert len(refusal["details"]) == 12


async def test_a_site_can_always_go_and_those_who_need_it_are_told(shop: httpx.AsyncClient) -> None:
    assert (await shop.delete(f"{SITES}/a")).status_code == 200
    broken = (await shop.get(f"{POOLS}/cart?response_format=6")).json()
    assert [(ref["kind"], ref["name"]) for ref in broken["deleted_referred_objects"]] == [("site", "a")]


async def test_a_namespace_goes_with_everything_in_it(shop: httpx.AsyncClient) -> None:
    await put(shop, BALANCERS, balancer())
    answer = await shop.post("/api/web/namespaces/shop/cascade_delete", json={"name": "shop"})
    assert answer.status_code == 200
    assert [item["object_type"] for item in answer.json()["items"]] == ["http_loadbalancer", "origin_pool"]
    assert (await shop.get("/api/web/namespaces/shop")).status_code == 404
    assert (await shop.get(POOLS)).status_code == 404


async def test_built_in_namespaces_stay(user: httpx.AsyncClient) -> None:
    assert (await user.post("/api/web/namespaces/shared/cascade_delete", json={})).status_code == 403
    assert (await user.post("/api/web/namespaces/nowhere/cascade_delete")).status_code == 404


# Listeners


async def test_a_domain_on_a_listener_has_one_owner(shop: httpx.AsyncClient) -> None:
    await put(shop, BALANCERS, balancer())
    answer = await shop.post(BALANCERS, json=balancer("other"))
    assert (answer.status_code, answer.json()["code"]) == (409, 9)
    assert all(word in answer.json()["message"] for word in ("cart.test", "shop/cart", "site a", "80"))
    assert [detail["field"] for detail in answer.json()["details"]] == ["spec.domains[0]"]
    await put(shop, BALANCERS, balancer("other", "other.test"))


async def test_a_port_has_one_protocol(shop: httpx.AsyncClient) -> None:
    await put(shop, BALANCERS, balancer(port=5432))
    place = {"site": {"site": {"name": "a"}, "network": "SITE_NETWORK_INSIDE"}}
    spec = {"listen_port": 5432, "advertise_custom": {"advertise_where": [place]}, "origin_pools_weights": [{"pool": {"name": "cart"}}]}
    answer = await shop.post(TCP_BALANCERS, json={"metadata": {"name": "db"}, "spec": spec})
    assert answer.status_code == 409
    assert answer.json()["message"] == "inside port 5432 of site a belongs to http_loadbalancer shop/cart (http)"
    assert [detail["field"] for detail in answer.json()["details"]] == ["spec.advertise_custom.advertise_where[0]"]
    await shop.delete(f"{BALANCERS}/cart")
    await put(shop, TCP_BALANCERS, {"metadata": {"name": "db"}, "spec": spec})


async def test_moving_a_load_balancer_frees_its_place(shop: httpx.AsyncClient) -> None:
    await put(shop, BALANCERS, balancer())
    assert (await shop.put(f"{BALANCERS}/cart", json=balancer(port=81))).status_code == 200
    await put(shop, BALANCERS, balancer("other"))
    answer = await shop.put(f"{BALANCERS}/cart", json=balancer())
    assert answer.status_code == 409
    assert (await shop.get(f"{BALANCERS}/cart")).json()["spec"]["http"]["port"] == 81


async def test_a_disabled_load_balancer_needs_no_place(shop: httpx.AsyncClient) -> None:
    await put(shop, BALANCERS, balancer())
    await put(shop, BALANCERS, balancer("other", disable=True))
    assert (await shop.put(f"{BALANCERS}/other", json=balancer("other"))).status_code == 409


async def test_membership_never_refuses_and_the_loser_can_still_be_edited(shop: httpx.AsyncClient) -> None:
    selector = {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["tier in (gold)"]}}
    await put(shop, VIRTUAL_SITES, {"metadata": {"name": "gold"}, "spec": selector})
    on_gold = {"virtual_site": {"virtual_site": {"namespace": "shared", "name": "gold"}, "network": "SITE_NETWORK_INSIDE"}}
    on_b = {"site": {"site": {"name": "b"}, "network": "SITE_NETWORK_INSIDE"}}
    await put(shop, BALANCERS, balancer("on-b", where=on_b))
    await put(shop, BALANCERS, balancer("on-gold", where=on_gold))
    joined = await shop.put(f"{SITES}/b", json={"metadata": {"name": "b", "labels": {"tier": "gold"}}})
    assert joined.status_code == 200
    assert (await shop.put(f"{BALANCERS}/on-gold", json=balancer("on-gold", where=on_gold, description="edited"))).status_code == 200
    moved = await shop.put(f"{BALANCERS}/on-gold", json=balancer("on-gold", port=8080, where=on_gold))
    assert moved.status_code == 200
    assert (await shop.put(f"{BALANCERS}/on-gold", json=balancer("on-gold", where=on_gold))).status_code == 409


@pytest.mark.parametrize("leaves", ["is deleted", "moves", "is disabled"])
async def test_a_place_that_gets_free_belongs_to_whoever_waits_for_it(shop: httpx.AsyncClient, leaves: str) -> None:
    selector = {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["tier in (gold)"]}}
    await put(shop, VIRTUAL_SITES, {"metadata": {"name": "gold"}, "spec": selector})
    on_gold = {"virtual_site": {"virtual_site": {"namespace": "shared", "name": "gold"}, "network": "SITE_NETWORK_INSIDE"}}
    on_b = {"site": {"site": {"name": "b"}, "network": "SITE_NETWORK_INSIDE"}}
    await put(shop, BALANCERS, balancer("waits", where=on_gold))
    await put(shop, BALANCERS, balancer("owner", where=on_b))
    await shop.put(f"{SITES}/b", json={"metadata": {"name": "b", "labels": {"tier": "gold"}}})
    refused = await shop.post(BALANCERS, json=balancer("late", where=on_b))
    assert (refused.status_code, "shop/owner" in refused.text) == (409, True)
    if leaves == "is deleted":
        assert (await shop.delete(f"{BALANCERS}/owner")).status_code == 200
    else:
        gone = balancer("owner", where=on_b, disable=True) if leaves == "is disabled" else balancer("owner", port=81, where=on_b)
        assert (await shop.put(f"{BALANCERS}/owner", json=gone)).status_code == 200
    refused = await shop.post(BALANCERS, json=balancer("late", where=on_b))
    assert (refused.status_code, "shop/waits" in refused.text) == (409, True)
    await shop.delete(f"{BALANCERS}/waits")
    await put(shop, BALANCERS, balancer("late", where=on_b))


async def test_places_follow_selectors(shop: httpx.AsyncClient) -> None:
    path = f"{VIRTUAL_SITES}/chosen"
    body = {"metadata": {"name": "chosen"}, "spec": {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["tier in (gold)"]}}}
    await put(shop, VIRTUAL_SITES, body)
    chosen = {"virtual_site": {"virtual_site": {"namespace": "shared", "name": "chosen"}, "network": "SITE_NETWORK_INSIDE"}}
    await put(shop, BALANCERS, balancer(where=chosen))
    assert (await shop.post(BALANCERS, json=balancer("other"))).status_code == 409
    body["spec"] = {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["!tier"]}}
    assert (await shop.put(path, json=body)).status_code == 200
    await put(shop, BALANCERS, balancer("other"))
    on_b = {"site": {"site": {"name": "b"}, "network": "SITE_NETWORK_INSIDE"}}
    assert (await shop.post(BALANCERS, json=balancer("third", where=on_b))).status_code == 409


async def test_a_refused_write_leaves_nothing_behind_in_the_next_one(shop: httpx.AsyncClient) -> None:
    await put(shop, BALANCERS, balancer("one", "one.test"))
    await put(shop, BALANCERS, balancer("two", "two.test"))
    assert (await shop.put(f"{BALANCERS}/two", json=balancer("two", "one.test"))).status_code == 409
    accepted = await shop.put(f"{BALANCERS}/two", json=balancer("two", "three.test"))
    assert accepted.status_code == 200, accepted.text
    assert (await shop.post(BALANCERS, json=balancer("thief", "three.test"))).status_code == 409
    await put(shop, BALANCERS, balancer("heir", "two.test"))


@pytest.mark.parametrize("number", ["1" * 5000, "1e400", "-1e400"], ids=["more digits than Python reads", "infinite", "minus infinite"])
async def test_a_number_that_nothing_can_hold_is_refused(user: httpx.AsyncClient, number: str) -> None:
    body = '{"metadata": {"name": "x"}, "spec": {"coordinates": {"latitude": 1, "longitude": ' + number + "}}}"
    answer = await user.post(SITES, content=body)
    assert (answer.status_code, answer.json()["code"]) == (400, 3)


async def test_a_secret_changes_whatever_has_come_before_it_in_its_list(shop: httpx.AsyncClient) -> None:
    def header(name: str, value: str) -> Json:
        url = "string:///" + base64.b64encode(value.encode()).decode()
        return {"name": name, "secret_value": {"clear_secret_info": {"url": url}}}

    async def write(*headers: Json) -> list[Json]:
        body["spec"]["more_option"] = {"request_headers_to_add": list(headers)}
        answer = await shop.put(f"{BALANCERS}/cart", json=body)
        assert answer.status_code == 200, answer.text
        written: list[Json] = answer.json()["spec"]["more_option"]["request_headers_to_add"]
        return written

    def ref(header: Json) -> str:
        return str(header["secret_value"]["blindfold_secret_info"]["location"])

    body = balancer()
    await put(shop, BALANCERS, body)
    (old,) = await write(header("x-old", "one"))
    new, old = await write(header("x-new", "two"), old)
    *_, changed = await write(new, header("x-old", "three"))
    assert len({ref(new), ref(old), ref(changed)}) == 3
    *_, again = await write(new, header("x-old", "four"))
    assert ref(again) not in {ref(new), ref(old), ref(changed)}


async def test_a_new_certificate_needs_a_key_of_its_own(shop: httpx.AsyncClient) -> None:
    def certificate(key: ec.EllipticCurvePrivateKey) -> Json:
        return {"certificate_url": inline(self_signed(key)), "private_key": {"clear_secret_info": {"url": inline(key_pem(key))}}}

    old, new = (certificate(ec.generate_private_key(ec.SECP256R1())) for _ in range(2))
    body = balancer()
    del body["spec"]["http"]
    body["spec"]["https"] = {"tls_parameters": {"tls_certificates": [old]}}
    made = await put(shop, BALANCERS, body)
    (held,) = made["spec"]["https"]["tls_parameters"]["tls_certificates"]
    body["spec"]["https"]["tls_parameters"]["tls_certificates"] = [held | {"certificate_url": new["certificate_url"]}]
    refused = await shop.put(f"{BALANCERS}/cart", json=body)
    assert (refused.status_code, refused.json()["details"][0]["field"]) == (400, "spec.https.tls_parameters.tls_certificates[0]")
    assert "private_key does not belong to the certificate" in refused.json()["message"]
    for fits in (held, new):
        body["spec"]["https"]["tls_parameters"]["tls_certificates"] = [fits]
        assert (await shop.put(f"{BALANCERS}/cart", json=body)).status_code == 200
