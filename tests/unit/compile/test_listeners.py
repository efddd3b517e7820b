"""Who listens where, and who has to give way."""

from agent.protocol.items import ItemKind
from controlplane.compile.claims import claims
from controlplane.compile.intent import Intent, Observations
from controlplane.compile.site import compile_site, conditions
from controlplane.compile.snapshot import Snapshot
from controlplane.resources.base import Key
from controlplane.resources.claim import Claim
from tests.unit.compile.intents import advertised, http, id_of, intent, intent_of, observations_of, pool, site, stored, tcp, virtual_site

A, B = id_of("a"), id_of("b")
SECRET = {"blindfold_secret_info": {"location": "secret:22222222-2222-4222-8222-222222222222:1"}}


def at(site_id: str, intent: Intent) -> Snapshot:
    return compile_site(site_id, intent, Observations())


def claimed(intent: Intent, name: str, kind: str = "http_loadbalancer") -> frozenset[Claim]:
    return claims(intent.of(kind)[Key("shop", name)], intent)


def keys(snapshot: Snapshot, kind: ItemKind) -> list[str]:
    return [key for of_kind, key in snapshot.items if of_kind == kind]


def where(network: str, place: str = "a", **more: object) -> dict[str, object]:
    return {"site": {"network": network, "site": {"name": place}}, **more}


def custom(*places: dict[str, object]) -> dict[str, object]:
    return {"advertise_custom": {"advertise_where": list(places)}}


def test_both_networks_are_two_claims() -> None:
    given = intent(site("a"), http("cart", [], [], **custom(where("SITE_NETWORK_INSIDE_AND_OUTSIDE"))))
    assert claimed(given, "cart") == {Claim(A, network, "", 80, "http", "cart.test") for network in ("inside", "outside")}


def test_every_domain_is_a_claim_of_its_own() -> None:
    given = intent(site("a"), http("cart", [], ["a"], domains=["cart.test", "*.cart.test"]))
    assert {claim.domain for claim in claimed(given, "cart")} == {"cart.test", "*.cart.test"}


def test_a_tcp_load_balancer_claims_its_place_without_a_domain() -> None:
    given = intent(site("a"), tcp("raw", ["pool"], ["a"], 6000))
    assert claimed(given, "raw", "tcp_loadbalancer") == {Claim(A, "inside", "", 6000, "tcp", "")}


def test_a_place_may_have_a_port_of_its_own() -> None:
    given = intent(site("a"), http("cart", [], ["a"], **advertised("a", port_ranges="81,90-91")))
    assert {claim.port for claim in claimed(given, "cart")} == {81, 90, 91}


def test_vk8s_services_listen_on_the_service_network() -> None:
    given = intent(site("a"), http("cart", [], [], **custom({"vk8s_service": {"site": {"name": "a"}}})))
    assert {claim.network for claim in claimed(given, "cart")} == {"service"}


def test_the_vip_of_the_site_is_the_address_unless_one_is_given() -> None:
    given = intent(
        site("a", inside_vip="10.0.0.1"),
        http("one", [], ["a"]),
        http("two", [], [], **custom({"site": {"site": {"name": "a"}, "network": "SITE_NETWORK_INSIDE", "ip": "10.0.0.2"}})),
    )
    assert [claim.address for name in ("one", "two") for claim in claimed(given, name)] == ["10.0.0.1", "10.0.0.2"]


def https(certificate: str, **more: object) -> dict[str, object]:
    return {"tls_parameters": {"tls_certificates": [{"certificate_url": certificate, "private_key": SECRET}]}, **more}


def test_https_claims_443_and_its_redirect_port_80(certificate: str) -> None:
    given = intent(site("a"), http("cart", [], ["a"], https=https(certificate, http_redirect=True)))
    assert {(claim.port, claim.protocol) for claim in claimed(given, "cart")} == {(443, "https"), (80, "http")}


def test_https_on_port_80_leaves_no_room_for_a_redirect(certificate: str) -> None:
    given = intent(site("a"), http("cart", [], ["a"], https=https(certificate, http_redirect=True, port=80)))
    assert {(claim.port, claim.protocol) for claim in claimed(given, "cart")} == {(80, "https")}


def test_what_is_disabled_or_not_advertised_claims_nothing() -> None:
    disabled = http("cart", [], ["a"])
    disabled["metadata"]["disable"] = True
    quiet = http("quiet", [], ["a"])
    quiet["spec"] = {**quiet["spec"], "do_not_advertise": {}, "advertise_custom": None}
    given = intent(site("a"), disabled, quiet)
    assert claimed(given, "cart") == claimed(given, "quiet") == frozenset()


def test_load_balancers_with_different_domains_share_a_listener_oldest_first() -> None:
    given = intent(site("a"), http("two", [], ["a"]), http("one", [], ["a"]))
    (key,) = keys(at(A, given), ItemKind.LISTENER)
    assert (key, at(A, given).items[ItemKind.LISTENER, key].body) == (
        "inside/*/80",
        b'{"network":"inside","port":80,"protocol":"http","load_balancers":["shop/two","shop/one"]}',
    )


def test_the_older_of_two_with_one_domain_wins_whatever_their_names() -> None:
    given = intent(site("a"), http("young", [], ["a"]), http("early", [], ["a"], domains=["young.test"]))
    snapshot = at(A, given)
    assert keys(snapshot, ItemKind.HTTP_LOADBALANCER) == ["shop/young"]
    (conflict,) = conditions(given)
    assert (conflict.type, conflict.key) == ("Conflicted", Key("shop", "early"))
    assert "site a" in conflict.message
    assert "shop/young" in conflict.message


def test_at_the_same_age_kind_and_key_decide() -> None:
    given = intent_of(stored(body) for body in (site("a"), tcp("a", ["x"], ["a"], 80), http("b", [], ["a"])))
    assert keys(at(A, given), ItemKind.HTTP_LOADBALANCER) == ["shop/b"]


def test_another_protocol_on_the_place_is_a_conflict() -> None:
    given = intent(site("a"), tcp("raw", ["x"], ["a"], 80), http("cart", [], ["a"]), tcp("more", ["x"], ["a"], 80))
    assert [(found.type, found.key.name) for found in conditions(given) if found.type == "Conflicted"] == [
        ("Conflicted", "cart"),
        ("Conflicted", "more"),
    ]


def test_who_loses_in_one_place_is_left_out_at_that_site_only() -> None:
    given = intent(site("a"), site("b"), http("old", [], ["a"]), http("new", [], ["a", "b"], domains=["old.test", "new.test"]))
    assert keys(at(A, given), ItemKind.HTTP_LOADBALANCER) == ["shop/old"]
    assert keys(at(B, given), ItemKind.HTTP_LOADBALANCER) == ["shop/new"]


def test_what_a_loser_would_have_taken_is_free_for_others() -> None:
    given = intent(
        site("a"),
        http("first", [], ["a"]),
        http("second", [], ["a"], domains=["first.test", "third.test"]),
        http("third", [], ["a"]),
    )
    assert keys(at(A, given), ItemKind.HTTP_LOADBALANCER) == ["shop/first", "shop/third"]


def test_a_label_brings_a_conflict_and_a_label_ends_it() -> None:
    def labelled(label: str) -> Intent:
        return intent(
            site("a"),
            site("b", {"zone": label}),
            virtual_site("one", "zone = one"),
            http("old", ["pool"], ["b"]),
            http("new", ["pool"], ["*one"], domains=["old.test"]),
            pool("pool", "a"),
        )

    assert [found.type for found in conditions(labelled("one"))] == ["Conflicted"]
    assert conditions(labelled("two")) == ()


def test_who_lost_everywhere_is_not_let_in_at_the_origin() -> None:
    given = intent(site("a"), site("b"), pool("pool", "b"), http("old", [], ["a"]), http("new", ["pool"], ["a"], domains=["old.test"]))
    assert [str(kind) for kind, _ in compile_site(B, given, observations_of(given)).items] == ["site"]
