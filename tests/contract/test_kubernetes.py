"""What discovery relies on in a Kubernetes API. The emulator has to pass, and so has a real API server when one is given."""

import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest
import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

from lab.kubernetes import objects
from lab.kubernetes.client import Client, connect
from lab.kubernetes.running import running
from lab.wait import until

REAL = "ISTHMUS_TEST_KUBECONFIG"
Event = dict[str, Any]
DEFINITIONS = sorted((Path(__file__).parents[2] / "deploy/kubernetes/multicluster").glob("service*.yaml"))
EXPORTS = "/apis/multicluster.x-k8s.io/v1alpha1/namespaces/{namespace}/serviceexports"


@pytest.fixture(params=["emulator", "real"])
async def api(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Client]:
    if request.param == "emulator":
        async with running(tmp_path, "--no-allow-loopback") as emulator, connect(emulator.kubeconfig) as client:
            yield client
    elif REAL in os.environ:
        async with connect(Path(os.environ[REAL])) as client:
            yield client
    else:
        pytest.skip(f"needs a real Kubernetes API server: set {REAL} to a kubeconfig that may create namespaces")


@pytest.fixture
async def namespace(api: Client) -> AsyncIterator[str]:
    name = f"isthmus-{uuid4().hex[:8]}"
    await api.create(objects.namespace(name))
    yield name
    await api.delete("Namespace", name)


def version(body: dict[str, Any]) -> str:
    text: str = body["metadata"]["resourceVersion"]
    return text


def names(body: dict[str, Any]) -> list[str]:
    return [item["metadata"]["name"] for item in body["items"]]


def shown(events: list[Event]) -> list[tuple[str, str]]:
    return [(event["type"], event["object"]["metadata"]["name"]) for event in events]


async def collect(api: Client, count: int, *watch: str, **query: str) -> list[Event]:
    """The first `count` events of a watch."""
    events: list[Event] = []
    async with aclosing(api.watch(*watch, **query)) as stream:
        async for event in stream:
            events.append(event)
            if len(events) == count:
                break
    return events


def slice_named(name: str, namespace: str, address: str = "10.1.0.1", service: str = "cart") -> dict[str, Any]:
    return objects.endpoint_slice(service, namespace, [address], name=name)


async def refused(call: Any, code: int, reason: str) -> None:
    with pytest.raises(httpx2.HTTPStatusError) as error:
        await call
    status = error.value.response.json()
    assert (status["kind"], status["code"], status["reason"]) == ("Status", code, reason)


async def test_a_watch_shows_what_came_after_the_list_in_order(api: Client, namespace: str) -> None:
    await api.create(slice_named("before", namespace))
    listed = await api.list("EndpointSlice", namespace)
    assert names(listed) == ["before"]
    await api.create(slice_named("after", namespace))
    await api.replace(slice_named("after", namespace, "10.1.0.2"))
    await api.delete("EndpointSlice", "before", namespace)
    events = await collect(api, 3, "EndpointSlice", namespace, resourceVersion=version(listed))
    assert shown(events) == [("ADDED", "after"), ("MODIFIED", "after"), ("DELETED", "before")]
    versions = [int(version(event["object"])) for event in events]
    assert versions == sorted(set(versions)), "a deletion has a version of its own"
    assert events[2]["object"]["endpoints"][0]["addresses"] == ["10.1.0.1"], "and shows the last state"


async def test_a_watch_from_nowhere_begins_with_what_there_is(api: Client, namespace: str) -> None:
    await api.create(slice_named("one", namespace))
    assert shown(await collect(api, 1, "EndpointSlice", namespace)) == [("ADDED", "one")]


async def test_a_watch_shows_everything_and_says_where_that_ends(api: Client, namespace: str) -> None:
    await api.create(slice_named("one", namespace))
    await api.create(slice_named("two", namespace))
    query = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan", "allowWatchBookmarks": "true"}
    events: list[Event] = []
    async with aclosing(api.watch("EndpointSlice", namespace, **query)) as stream:
        async for event in stream:
            events.append(event)
            if len(events) == 3:
                await api.create(slice_named("three", namespace))
            if len(events) == 4:
                break
    assert sorted(shown(events[:2])) == [("ADDED", "one"), ("ADDED", "two")]
    assert events[2]["type"] == "BOOKMARK"
    assert events[2]["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"] == "true"
    assert int(version(events[2]["object"])) < int(version(events[3]["object"]))
    assert shown(events[3:]) == [("ADDED", "three")]


async def test_everything_is_shown_by_a_watch_only_with_bookmarks_and_at_the_latest_version(api: Client, namespace: str) -> None:
    for query in ({"resourceVersionMatch": "NotOlderThan"}, {"allowWatchBookmarks": "true"}):
        with pytest.raises(httpx2.HTTPStatusError) as error:
            await collect(api, 1, "Service", namespace, sendInitialEvents="true", **query)
        assert error.value.response.status_code == 422


async def test_a_watch_of_all_namespaces_sees_this_one(api: Client, namespace: str) -> None:
    listed = await api.list("EndpointSlice")
    await api.create(slice_named("one", namespace))
    async with aclosing(api.watch("EndpointSlice", resourceVersion=version(listed))) as stream:
        async for event in stream:
            if event["object"]["metadata"]["namespace"] == namespace:
                break
    assert shown([event]) == [("ADDED", "one")]


async def test_a_watch_ends_in_time_with_a_bookmark_from_which_another_can_go_on(api: Client, namespace: str) -> None:
    listed = await api.list("Service", namespace)
    query = {"allowWatchBookmarks": "true", "timeoutSeconds": "4"}
    events = [event async for event in api.watch("Service", namespace, resourceVersion=version(listed), **query)]
    assert {event["type"] for event in events} == {"BOOKMARK"}
    bookmark = events[-1]["object"]
    assert bookmark["kind"] == "Service"
    await api.create(objects.service("cart", namespace))
    assert shown(await collect(api, 1, "Service", namespace, resourceVersion=version(bookmark))) == [("ADDED", "cart")]


async def test_a_version_that_is_too_old_is_gone(api: Client, namespace: str) -> None:
    (event,) = await collect(api, 1, "EndpointSlice", namespace, resourceVersion="1")
    assert (event["type"], event["object"]["code"], event["object"]["reason"]) == ("ERROR", 410, "Expired")


async def test_a_stale_write_is_refused(api: Client, namespace: str) -> None:
    first = await api.create(slice_named("one", namespace))
    second = await api.replace({**slice_named("one", namespace, "10.1.0.2"), "metadata": first["metadata"]})
    assert int(version(second)) > int(version(first))
    await refused(api.replace({**slice_named("one", namespace, "10.1.0.3"), "metadata": first["metadata"]}), 409, "Conflict")
    await refused(
        api.patch("EndpointSlice", "one", {"metadata": {"resourceVersion": version(first), "labels": {"a": "b"}}}, namespace),
        409,
        "Conflict",
    )
    await refused(api.delete("EndpointSlice", "one", namespace, preconditions={"resourceVersion": version(first)}), 409, "Conflict")


async def test_what_exists_is_not_created_again(api: Client, namespace: str) -> None:
    await api.create(slice_named("one", namespace))
    await refused(api.create(slice_named("one", namespace)), 409, "AlreadyExists")


async def test_what_does_not_exist_is_not_found(api: Client, namespace: str) -> None:
    await refused(api.get("Service", "none", namespace), 404, "NotFound")
    await refused(api.replace({**slice_named("none", namespace), "metadata": {"name": "none", "namespace": namespace}}), 404, "NotFound")
    await refused(api.create(slice_named("one", f"{namespace}-none")), 404, "NotFound")


async def test_a_write_that_changes_nothing_keeps_the_version(api: Client, namespace: str) -> None:
    first = await api.create(slice_named("one", namespace))
    assert version(await api.replace(first)) == version(first)


async def test_pages_of_a_list_show_one_version(api: Client, namespace: str) -> None:
    for number in range(5):
        await api.create(slice_named(f"s{number}", namespace))
    first = await api.list("EndpointSlice", namespace, limit="2")
    await api.create(slice_named("s10", namespace))
    second = await api.list("EndpointSlice", namespace, **{"limit": "2", "continue": first["metadata"]["continue"]})
    third = await api.list("EndpointSlice", namespace, **{"limit": "2", "continue": second["metadata"]["continue"]})
    assert [names(page) for page in (first, second, third)] == [["s0", "s1"], ["s2", "s3"], ["s4"]]
    assert {version(page) for page in (first, second, third)} == {version(first)}
    assert not third["metadata"].get("continue")


async def test_selectors_narrow_lists_and_watches(api: Client, namespace: str) -> None:
    for service in ("cart", "till"):
        await api.create(slice_named(f"{service}-1", namespace, service=service))
    label = "kubernetes.io/service-name"
    for selector, expected in {
        f"{label}=cart": ["cart-1"],
        f"{label}!=cart": ["till-1"],
        f"{label} in (cart, till)": ["cart-1", "till-1"],
        f"{label} notin (cart),{label}": ["till-1"],
        f"!{label}": [],
    }.items():
        assert names(await api.list("EndpointSlice", namespace, labelSelector=selector)) == expected
    assert names(await api.list("EndpointSlice", namespace, fieldSelector="metadata.name=till-1")) == ["till-1"]

    listed = await api.list("EndpointSlice", namespace)
    await api.patch("EndpointSlice", "till-1", {"metadata": {"labels": {label: "cart"}}}, namespace)
    await api.patch("EndpointSlice", "till-1", {"metadata": {"labels": {label: None}}}, namespace)
    events = await collect(api, 2, "EndpointSlice", namespace, resourceVersion=version(listed), labelSelector=f"{label}=cart")
    assert shown(events) == [("ADDED", "till-1"), ("DELETED", "till-1")], "to begin to match is to be added, to cease is to be deleted"


async def test_a_service_gets_an_address_and_node_ports(api: Client, namespace: str) -> None:
    plain = await api.create(objects.service("plain", namespace, 80, 8080))
    assert plain["spec"]["clusterIP"]
    assert plain["spec"]["ports"][0] | {"targetPort": 8080, "protocol": "TCP"} == plain["spec"]["ports"][0]
    exposed = await api.create(objects.service("exposed", namespace, type="NodePort"))
    assert 30_000 <= exposed["spec"]["ports"][0]["nodePort"] < 32_768
    assert exposed["spec"]["externalTrafficPolicy"] == "Cluster"
    headless = await api.create(objects.service("headless", namespace, clusterIP="None"))
    assert headless["spec"]["clusterIP"] == "None"


async def test_several_ports_need_names(api: Client, namespace: str) -> None:
    await refused(api.create(objects.service("two", namespace, ports=[{"port": 80}, {"port": 81}])), 422, "Invalid")


async def test_addresses_that_no_pod_can_have_are_refused(api: Client, namespace: str) -> None:
    for address in ("127.0.0.1", "169.254.0.1", "0.0.0.0", "fd00::1", "not-an-address"):
        await refused(api.create(slice_named("one", namespace, address)), 422, "Invalid")


async def test_the_family_of_a_slice_stays(api: Client, namespace: str) -> None:
    await api.create(slice_named("one", namespace))
    await refused(api.replace(objects.endpoint_slice("cart", namespace, ["fd00::1"], name="one", family="IPv6")), 422, "Invalid")


async def test_of_two_that_write_a_lease_one_is_refused(api: Client, namespace: str) -> None:
    body = {
        "kind": "Lease",
        "apiVersion": "coordination.k8s.io/v1",
        "metadata": {"name": "one", "namespace": namespace},
        "spec": {"holderIdentity": "a"},
    }
    stored = await api.create(body)
    await api.replace({**stored, "spec": {"holderIdentity": "b"}})
    await refused(api.replace({**stored, "spec": {"holderIdentity": "c"}}), 409, "Conflict")


async def test_a_deleted_namespace_takes_its_objects_with_it(api: Client, namespace: str) -> None:
    inner = f"{namespace}-inner"
    await api.create(objects.namespace(inner))
    await api.create(slice_named("one", inner))
    listed = await api.list("EndpointSlice", inner)
    await api.delete("Namespace", inner)
    assert shown(await collect(api, 1, "EndpointSlice", inner, resourceVersion=version(listed))) == [("DELETED", "one")]


async def test_the_api_tells_its_version_and_kinds(api: Client) -> None:
    assert (await api.http.get("/version")).json()["major"] == "1"
    kinds = (await api.http.get("/apis/discovery.k8s.io/v1")).json()["resources"]
    assert {"name": "endpointslices", "kind": "EndpointSlice", "namespaced": True}.items() <= next(
        k for k in kinds if k["name"] == "endpointslices"
    ).items()


async def test_a_service_account_may_do_what_its_roles_say_and_no_more(api: Client, namespace: str) -> None:
    for name in ("gateway", "other"):
        await api.create(objects.service(name, namespace))
    named_only = objects.rule("", "services", "list", "watch", resourceNames=["gateway"])
    for body in (objects.account("agent", namespace), *objects.granted("agent", namespace, named_only)):
        await api.create(body)
    token = {"Authorization": f"Bearer {await api.token('agent', namespace)}"}
    services = f"/api/v1/namespaces/{namespace}/services"

    async def asked(path: str = services, method: str = "GET", **query: str) -> int:
        answer = await api.http.request(method, path, params=query, headers=token, auth=None)
        return answer.status_code

    named = {"fieldSelector": "metadata.name=gateway"}

    async def is_answered(status: int) -> bool:
        """API servers take a moment to hear of roles."""
        return await asked(**named) == status

    await until(lambda: is_answered(200), "the role to hold")
    assert await asked(**named, watch="true", timeoutSeconds="1") == 200
    assert await asked(fieldSelector="metadata.name=other") == await asked() == 403
    assert await asked(f"{services}/gateway") == 403, "get is a verb of its own"
    assert await asked(f"{services}/gateway", "DELETE") == await asked("/api/v1/services", **named) == 403
    await api.delete("RoleBinding", "agent", namespace)
    await until(lambda: is_answered(403), "the role to be lost")


async def test_custom_objects_are_served_once_they_are_defined_and_their_status_is_written_by_itself(api: Client, namespace: str) -> None:
    for definition in DEFINITIONS:
        body = yaml.safe_load(definition.read_text())
        try:
            await api.create(body)
        except httpx2.HTTPStatusError as error:
            assert error.response.status_code == httpx2.codes.CONFLICT, "the cluster may have it from elsewhere"  # noqa: PT017

    async def served() -> bool:
        return (await api.http.get(EXPORTS.format(namespace=namespace))).is_success

    await until(served, "the new kind")
    export = objects.service_export("cart", namespace)
    made = await api.create({**export, "status": {"conditions": []}})
    assert "status" not in made
    condition = {"type": "Valid", "status": "True", "reason": "Valid", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    said = await api.http.put(f"{EXPORTS.format(namespace=namespace)}/cart/status", json={**made, "status": {"conditions": [condition]}})
    assert said.is_success, said.text
    assert said.json()["status"]["conditions"] == [condition]
    labelled = {**said.json(), "metadata": {**said.json()["metadata"], "labels": {"a": "b"}}, "status": {"conditions": []}}
    assert (await api.replace(labelled))["status"]["conditions"] == [condition]
    stale = await api.http.put(f"{EXPORTS.format(namespace=namespace)}/cart/status", json={**made, "status": {}})
    assert stale.status_code == httpx2.codes.CONFLICT


async def test_kinds_that_are_not_defined_are_not_found(tmp_path: Path) -> None:
    async with running(tmp_path) as emulator, connect(emulator.kubeconfig) as client:
        answer = await client.http.get(EXPORTS.format(namespace="default"))
        assert (answer.status_code, answer.json()["reason"]) == (httpx2.codes.NOT_FOUND, "NotFound")
