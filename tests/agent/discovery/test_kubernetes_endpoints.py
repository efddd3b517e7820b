"""Which endpoints a service has, as seen through a running API."""

from lab.kubernetes import objects
from lab.kubernetes.client import Client
from lab.kubernetes.objects import endpoint
from lab.kubernetes.running import Emulator
from tests.agent.discovery.watching import Watcher, watching


async def test_endpoints_are_followed(watcher: Watcher, api: Client) -> None:
    assert watcher.endpoints("cart.shop") == ["10.1.0.1:8080"]
    await api.set_endpoints("cart", "shop", ["10.1.0.1", "10.1.0.2"])
    await watcher.until_endpoints("cart.shop", "10.1.0.1:8080", "10.1.0.2:8080")
    await api.set_endpoints("cart", "shop", [])
    await watcher.until_endpoints("cart.shop")
    assert "cart.shop" in watcher.services


async def test_endpoints_that_are_not_ready_or_terminating_or_not_serving_are_not_used(watcher: Watcher, api: Client) -> None:
    unusable = [
        endpoint("10.1.0.2", ready=False),
        endpoint("10.1.0.3", terminating=True),
        endpoint("10.1.0.4", ready=True, serving=False),
    ]
    silent = {"addresses": ["10.1.0.5"]}
    await api.set_endpoints("cart", "shop", [*unusable, silent])
    await watcher.until_endpoints("cart.shop", "10.1.0.5:8080")


async def test_named_ports_lead_to_whatever_number_the_pods_of_a_slice_have(watcher: Watcher, api: Client) -> None:
    ports = [{"name": "http", "port": 80, "targetPort": "web"}, {"name": "admin", "port": 81, "targetPort": 9000}]
    await api.create(objects.service("front", "shop", ports=ports))
    await api.create(
        objects.endpoint_slice(
            "front", "shop", ["10.1.0.1"], name="a", ports=[{"name": "http", "port": 8080}, {"name": "admin", "port": 9000}]
        )
    )
    await api.create(objects.endpoint_slice("front", "shop", ["10.1.0.2"], name="b", ports=[{"name": "http", "port": 8181}]))
    await watcher.until_endpoints("front.shop", "10.1.0.1:8080", "10.1.0.2:8181", port=80)
    assert watcher.endpoints("front.shop", 81) == ["10.1.0.1:9000"]
    assert watcher.endpoints("front.shop", 9000) == ["10.1.0.1:9000"], "the target port stands in where no service port has the number"
    assert watcher.endpoints("front.shop", 8181) == ["10.1.0.1:8080", "10.1.0.2:8181"], "so does the port of a pod"
    assert watcher.endpoints("front.shop", 82) == []


async def test_slices_of_a_service_add_up_and_go_one_by_one(watcher: Watcher, api: Client) -> None:
    await api.create(objects.endpoint_slice("cart", "shop", ["10.1.0.2", "10.1.0.1"], name="cart-2"))
    await watcher.until_endpoints("cart.shop", "10.1.0.1:8080", "10.1.0.2:8080")
    await api.delete("EndpointSlice", "cart-1", "shop")
    await api.delete("EndpointSlice", "cart-2", "shop")
    await watcher.until_endpoints("cart.shop")


async def test_more_endpoints_than_a_slice_holds_add_up_while_they_move_between_slices(watcher: Watcher, api: Client) -> None:
    addresses = [f"10.2.{number // 100}.{number % 100 + 1}" for number in range(250)]
    for part in range(3):
        await api.create(objects.endpoint_slice("cart", "shop", addresses[100 * part : 100 * part + 100], name=f"cart-x{part}"))
    wanted = ["10.1.0.1:8080", *(f"{address}:8080" for address in addresses)]
    await watcher.until_endpoints("cart.shop", *wanted)
    await api.replace(objects.endpoint_slice("cart", "shop", addresses[190:], name="cart-x2"))
    assert sorted(wanted) == watcher.endpoints("cart.shop"), "ten are in two slices for a while"
    await api.replace(objects.endpoint_slice("cart", "shop", addresses[100:190], name="cart-x1"))
    await api.create(objects.endpoint_slice("cart", "shop", ["10.3.0.1"], name="cart-x3"))
    await watcher.until_endpoints("cart.shop", *wanted, "10.3.0.1:8080")


async def test_hints_for_zones_inside_the_cluster_say_nothing_to_those_outside(watcher: Watcher, api: Client) -> None:
    hinted = {**endpoint("10.1.0.2"), "zone": "a", "hints": {"forZones": [{"name": "b"}], "forNodes": [{"name": "n"}]}}
    await api.set_endpoints("cart", "shop", [endpoint("10.1.0.1"), hinted])
    await watcher.until_endpoints("cart.shop", "10.1.0.1:8080", "10.1.0.2:8080")


async def test_a_slice_that_changes_its_service_leaves_the_old_one(watcher: Watcher, api: Client) -> None:
    await api.create(objects.service("other", "shop"))
    await api.replace(objects.endpoint_slice("other", "shop", ["10.1.0.1"], name="cart-1"))
    await watcher.until_endpoints("other.shop", "10.1.0.1:8080")
    assert watcher.endpoints("cart.shop") == []


async def test_both_families_of_a_dual_stack_service_are_used(watcher: Watcher, api: Client) -> None:
    await api.create(objects.endpoint_slice("cart", "shop", ["fd00::1"], name="cart-6", family="IPv6"))
    await watcher.until_endpoints("cart.shop", "10.1.0.1:8080", "fd00::1:8080")


async def test_headless_services_and_those_without_selector_have_the_endpoints_of_their_slices(watcher: Watcher, api: Client) -> None:
    await api.create(objects.service("db", "shop", 5432, clusterIP="None"))
    await api.create(objects.endpoint_slice("db", "shop", ["10.1.0.7"], 5432))
    await watcher.until_endpoints("db.shop", "10.1.0.7:5432", port=5432)


async def test_a_port_of_another_protocol_is_not_taken_for_one_of_tcp(watcher: Watcher, api: Client) -> None:
    ports = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]
    await api.create(objects.service("dns", "shop", ports=ports))
    numbers = [{"name": "dns", "port": 1053, "protocol": "UDP"}, {"name": "dns-tcp", "port": 2053, "protocol": "TCP"}]
    await api.create(objects.endpoint_slice("dns", "shop", ["10.1.0.8"], ports=numbers))
    await watcher.until_endpoints("dns.shop", "10.1.0.8:2053", port=53)


async def test_a_deleted_service_is_gone_and_comes_back_with_its_slices(watcher: Watcher, api: Client) -> None:
    await api.delete("Service", "cart", "shop")
    await watcher.until(lambda _: "cart.shop" not in watcher.services)
    await api.create(objects.service("cart", "shop", 80, 8080))
    await watcher.until_endpoints("cart.shop", "10.1.0.1:8080")


async def test_a_deleted_namespace_takes_its_services_with_it(watcher: Watcher, api: Client) -> None:
    await api.delete("Namespace", "shop")
    await watcher.until(lambda _: watcher.services == [])
    assert watcher.cluster.connected


async def test_an_isolated_cluster_is_reached_through_the_ready_nodes(emulator: Emulator, api: Client) -> None:
    for body in (objects.node("n1", "192.0.2.1"), objects.node("n2", "192.0.2.2"), objects.node("n3", "192.0.2.3", ready=False)):
        await api.create(body)
    await api.create(objects.service("web", "shop", type="NodePort", ports=[{"port": 80, "nodePort": 30080}]))
    async with watching(emulator.kubeconfig, delivery="isolated") as watcher:
        await watcher.until_connected()
        assert watcher.endpoints("web.shop") == [], "without ready pods, nodes have nowhere to send it"
        await api.create(objects.endpoint_slice("web", "shop", [endpoint("10.1.0.1", node="n1")]))
        await watcher.until_endpoints("web.shop", "192.0.2.1:30080", "192.0.2.2:30080")
        assert watcher.endpoints("cart.shop") == [], "a ClusterIP is out of reach"

        await api.patch("Service", "web", {"spec": {"externalTrafficPolicy": "Local"}}, "shop")
        await watcher.until_endpoints("web.shop", "192.0.2.1:30080")
        status = {"conditions": [{"type": "Ready", "status": "Unknown"}]}
        await api.patch("Node", "n1/status", {"status": status})
        await watcher.until_endpoints("web.shop")
        await api.patch("Service", "web", {"spec": {"externalTrafficPolicy": "Cluster"}}, "shop")
        await watcher.until_endpoints("web.shop", "192.0.2.2:30080")
        await api.delete("Node", "n2")
        await watcher.until_endpoints("web.shop")


async def test_node_ports_that_are_missing_are_said_for_each_service(emulator: Emulator, api: Client) -> None:
    await api.create(objects.service("web", "shop", type="NodePort", ports=[{"port": 80, "nodePort": 30080}]))
    async with watching(emulator.kubeconfig, delivery="isolated") as watcher:
        await watcher.until_connected()
        cart, web = watcher.cluster.report("x").services or ()
        assert (cart.delivery, "no node port" in cart.reason) == ("none", True)
        assert (web.delivery, web.reason) == ("isolated", "")


async def test_cluster_ips_lead_to_services_that_have_ready_endpoints(emulator: Emulator, api: Client) -> None:
    families = {"ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack"}
    both = objects.service("both", "shop", 80, 8080, clusterIP="10.96.7.7", clusterIPs=["10.96.7.7", "fd00:96::7"])
    both["spec"] |= families
    await api.create(both)
    await api.create(objects.service("db", "shop", clusterIP="None"))
    await api.create(objects.service("local", "shop", internalTrafficPolicy="Local"))
    for name in ("db", "local"):
        await api.set_endpoints(name, "shop", ["10.1.0.7"])
    async with watching(emulator.kubeconfig, delivery="cluster_ip") as watcher:
        await watcher.until_connected()
        assert watcher.endpoints("both.shop") == [], "nobody would answer there"
        await api.set_endpoints("both", "shop", ["10.1.0.2"])
        await watcher.until_endpoints("both.shop", "10.96.7.7:80", "fd00:96::7:80")
        assert watcher.endpoints("both.shop", 8080) == watcher.endpoints("both.shop"), "by the pods' port as well"
        assert watcher.endpoints("db.shop") == watcher.endpoints("local.shop") == []
        shown = {one.name: (one.delivery, one.reason.partition(":")[0]) for one in watcher.cluster.report("x").services or ()}
        assert shown["both"] == ("cluster_ip", "")
        assert shown["db"] == ("none", "it is headless")
        assert shown["local"] == ("none", "its internalTrafficPolicy is Local")


async def test_an_external_name_is_a_dns_name_to_follow(watcher: Watcher, api: Client) -> None:
    from agent.discovery.table import needed_names, resolve
    from agent.envoy.inputs import Endpoint
    from agent.protocol.items import Origin

    await api.create(objects.service("ext", "shop", type="ExternalName", externalName="db.example.net"))
    await watcher.until(lambda _: "ext.shop" in watcher.services)
    origin = Origin(key="any", type="k8s_service", service="ext.shop", port=5432)
    assert watcher.cluster.table is not None
    assert needed_names(origin, [watcher.cluster.table]) == {"db.example.net"}
    assert resolve(origin, [watcher.cluster.table], {"db.example.net": ("198.51.100.1",)}) == (Endpoint("198.51.100.1", 5432),)


async def test_the_report_shows_services_with_ports_labels_and_ready_counts(watcher: Watcher, api: Client) -> None:
    await api.create(objects.service("labelled", "shop", labels={"app": "labelled"}))
    await watcher.until(lambda _: "labelled.shop" in watcher.services)
    report = watcher.cluster.report("system/b")
    assert (report.discovery, report.connected, report.reason) == ("system/b", True, "")
    cart, labelled = report.services or ()
    assert (cart.name, cart.namespace, cart.endpoints, cart.ports[0].port, cart.delivery) == ("cart", "shop", 1, 80, "reachable")
    assert cart.ports[0].endpoints == ("10.1.0.1:8080",)
    assert cart.cluster_ip.startswith("10.96.")
    assert labelled.labels == {"app": "labelled"}
