from pydantic import TypeAdapter

from agent.discovery.table import Port, Service, ServiceTable, needed_names, resolve
from agent.envoy.inputs import Endpoint
from agent.protocol.items import Origin
from agent.protocol.report import MOST_ENDPOINTS, MOST_ENDPOINTS_NAMED, MOST_LABELS, MOST_PORTS, MOST_SERVICES

A, B = Endpoint("10.0.0.1", 8080), Endpoint("10.0.0.2", 8080)


def service(name: str = "cart", *endpoints: Endpoint, port: int = 80, namespace: str = "shop") -> Service:
    ports = (Port("main", port, "TCP", 8080, endpoints),)
    return Service(namespace, name, "ClusterIP", "10.96.0.1", labels=(("app", name),), ports=ports)


def table(*services: Service, cluster_id: str = "") -> ServiceTable:
    return ServiceTable(cluster_id, services={f"{one.name}.{one.namespace}": one for one in services})


def k8s(name: str, port: int = 80) -> Origin:
    return Origin(key="any", type="k8s_service", service=name, port=port)


def test_a_service_without_a_cluster_is_not_looked_for_in_clusters_with_an_id() -> None:
    tables = [table(service("cart", A)), table(service("cart", B), cluster_id="east")]
    assert resolve(k8s("cart.shop"), tables) == (A,)
    assert resolve(k8s("cart.shop:east"), tables) == (B,)
    assert resolve(k8s("cart.shop:west"), tables) == ()


def test_services_of_the_same_name_in_two_clusters_of_one_id_stay_apart() -> None:
    assert resolve(k8s("cart.shop"), [table(service("cart", A)), table(service("cart", B))]) == (A,)
    assert resolve(k8s("cart.shop"), [table(), table(service("cart", B))]) == (B,)


def test_an_endpoint_may_have_a_name_that_is_looked_up() -> None:
    tables = [table(service("cart", A, Endpoint("lb.example.com", 80)))]
    assert needed_names(k8s("cart.shop"), tables) == {"lb.example.com"}
    assert resolve(k8s("cart.shop"), tables) == (A,)
    assert resolve(k8s("cart.shop"), tables, {"lb.example.com": ("10.0.0.9",)}) == (A, Endpoint("10.0.0.9", 80))


def test_an_unknown_service_has_no_endpoints() -> None:
    assert resolve(k8s("none.shop"), [table(service("cart", A))]) == ()


def test_the_port_of_the_service_goes_before_the_port_of_a_pod() -> None:
    ports = (Port("a", 80, "TCP", 8080, (A,)), Port("b", 8080, "TCP", 9090, (Endpoint("10.0.0.1", 9090),)))
    both = Service("shop", "cart", "ClusterIP", "", ports=ports)
    assert both.endpoints(8080) == (Endpoint("10.0.0.1", 9090),)
    assert both.endpoints(80) == (A,)
    assert both.endpoints(9090) == (Endpoint("10.0.0.1", 9090),)


def test_slices_without_ports_take_the_port_that_was_asked_for() -> None:
    portless = Service("shop", "cart", "ClusterIP", "None", any_port=("10.0.0.1",))
    assert portless.endpoints(7000) == (Endpoint("10.0.0.1", 7000),)


def test_plain_addresses_and_names_resolve_to_the_same_kind_of_endpoint() -> None:
    address = Origin(key="any", type="ip", address="192.0.2.1", port=443)
    name = Origin(key="any", type="dns", address="api.example.net", port=443)
    assert resolve(address, []) == (Endpoint("192.0.2.1", 443),)
    assert needed_names(name, []) == {"api.example.net"}
    assert needed_names(address, []) == frozenset()
    assert resolve(name, []) == ()
    assert resolve(name, [], {"api.example.net": ("192.0.2.2", "192.0.2.3")}) == (Endpoint("192.0.2.2", 443), Endpoint("192.0.2.3", 443))


def test_equal_tables_are_equal_and_any_endpoint_makes_them_differ() -> None:
    assert table(service("cart", A)) == table(service("cart", A))
    assert table(service("cart", A)) != table(service("cart", A, B))


def test_a_table_survives_as_json() -> None:
    adapter = TypeAdapter(ServiceTable)
    known = table(service("cart", A), service("till"), cluster_id="east")
    assert adapter.validate_json(adapter.dump_json(known)) == known


def test_a_report_is_sorted_and_bounded() -> None:
    many = table(*(service(f"s{number:05}") for number in reversed(range(MOST_SERVICES + 1))))
    report = many.report()
    assert len(report) == MOST_SERVICES
    assert [one.name for one in report[:2]] == ["s00000", "s00001"]


def test_what_is_reported_of_a_service_is_bounded() -> None:
    labels = tuple((f"label-{number:03}", "yes") for number in range(MOST_LABELS + 1))
    ports = tuple(Port(f"port-{number}", number, "TCP", None) for number in range(1, MOST_PORTS + 2))
    (report,) = table(Service("shop", "cart", "ClusterIP", "", labels=labels, ports=ports)).report()
    assert (len(report.labels), len(report.ports)) == (MOST_LABELS, MOST_PORTS)


def test_the_endpoints_that_are_named_are_bounded() -> None:
    few = table(service("cart", A, Endpoint("fd00::1", 8080))).report()[0]
    assert few.ports[0].endpoints == ("10.0.0.1:8080", "[fd00::1]:8080")
    hundreds = [Endpoint(f"10.1.{number // 250}.{number % 250}", 80) for number in range(2 * MOST_ENDPOINTS)]
    (one,) = table(service("cart", *hundreds)).report()
    assert (one.endpoints, len(one.ports[0].endpoints)) == (2 * MOST_ENDPOINTS, MOST_ENDPOINTS)
    many = table(*(service(f"s{number}", *hundreds) for number in range(1_000))).report()
    assert sum(len(port.endpoints) for one in many for port in one.ports) == MOST_ENDPOINTS_NAMED


def test_ready_endpoints_are_counted_by_address() -> None:
    ports = (Port("a", 80, "TCP", 8080, (A, B)), Port("b", 81, "TCP", 8081, (Endpoint("10.0.0.1", 8081),)))
    assert Service("shop", "cart", "ClusterIP", "", ports=ports).ready == 2
