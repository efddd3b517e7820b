"""The manifests: they build, the API knows every field of them, and they ask for no more than they need."""

import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml  # type: ignore[import-untyped]  # ships no types
from lightkube.codecs import from_dict
from lightkube.core.resource import NamespacedResource

from agent.settings import Settings as AgentSettings
from controlplane.settings import Settings as ControlPlaneSettings
from lab.kubernetes.client import connect
from tests.deploy.built import AGENTS, ALL, RIGHTS, ROOT, SHIPPED, Json, parsed, pods, text, variables
from tests.deploy.cluster import Cluster, cluster

REAL = "ISTHMUS_TEST_KUBECONFIG"
READ_ONLY = {"get", "list", "watch"}


def of_kind(objects: list[Json], *kinds: str) -> list[Json]:
    return [each for each in objects if each["kind"] in kinds]


def known_of(each: Json) -> Json:
    """What the API's model of it has fields for."""
    model: Any = from_dict(each)
    known: Json = model.to_dict()
    return known


def without_nothing(value: Any) -> Any:
    """`{}`, `[]` and null say nothing to the API."""
    if isinstance(value, dict):
        return {key: clean for key, item in value.items() if (clean := without_nothing(item)) not in ({}, [], None)}
    return [without_nothing(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", RIGHTS)
def test_every_overlay_builds(name: str) -> None:
    assert "kind: Namespace" in text(name)


def test_what_the_control_plane_hands_out_is_what_the_overlays_come_to() -> None:
    shipped = sorted(SHIPPED.glob("*.yaml"))
    assert [file.stem for file in shipped] == ["one-replica", "three-replicas"]
    for file in shipped:
        assert file.read_text() == text(file.stem), f"{file} is stale: make manifests"


@pytest.mark.parametrize("name", RIGHTS)
def test_the_api_knows_every_field(name: str) -> None:
    """A model drops what it does not know, so that what comes back is less."""
    for each in parsed(name):
        assert without_nothing(known_of(each)) == without_nothing(each), f"{each['kind']} {each['metadata']['name']}"


def test_an_unknown_field_would_be_found() -> None:
    found = of_kind(parsed("one-replica"), "StatefulSet")[0]
    found["spec"]["template"]["spec"]["hostnetwork"] = True
    assert without_nothing(known_of(found)) != without_nothing(found)


@pytest.mark.parametrize("name", ALL)
def test_every_namespaced_object_is_in_the_namespace_that_comes_along(name: str) -> None:
    objects = parsed(name)
    namespaces = {each["metadata"]["name"] for each in of_kind(objects, "Namespace")}
    for each in objects:
        if isinstance(from_dict(each), NamespacedResource):
            assert {each["metadata"]["namespace"]} == namespaces, each["kind"]


@pytest.mark.parametrize("name", ALL)
def test_pods_keep_to_the_restricted_profile(name: str) -> None:
    for namespace in of_kind(parsed(name), "Namespace"):
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    found = list(pods(parsed(name)))
    assert found
    for pod in found:
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["securityContext"].get("runAsUser") != 0
        assert all({"emptyDir", "secret"} & volume.keys() for volume in pod["volumes"])
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            asked = container["securityContext"]
            assert asked == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
            assert not any("hostPort" in port for port in container.get("ports", []))
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def test_ipsec_adds_a_capability_a_device_and_a_port_and_nothing_else() -> None:
    (plain,), (pod,) = pods(parsed("one-replica")), pods(parsed("ipsec"))
    before, container = plain["containers"][0], pod["containers"][0]
    assert container["securityContext"].pop("capabilities") == {"drop": ["ALL"], "add": ["NET_ADMIN"]}
    assert before["securityContext"].pop("capabilities") == {"drop": ["ALL"]}
    assert (pod["securityContext"].pop("runAsUser"), pod["securityContext"].pop("runAsNonRoot")) == (0, False)
    assert plain["securityContext"].items() >= pod["securityContext"].items()
    assert _added(plain["volumes"], pod["volumes"]) == [{"name": "tun", "hostPath": {"path": "/dev/net/tun", "type": "CharDevice"}}]
    assert _added(before["volumeMounts"], container["volumeMounts"]) == [{"name": "tun", "mountPath": "/dev/net/tun"}]
    assert _added(before["ports"], container["ports"]) == [{"name": "ipsec", "containerPort": 4500, "protocol": "UDP"}]
    assert [it["name"] for it in _added(before["env"], container["env"])] == ["AGENT_ADVERTISED_IPSEC"]
    same = set(container) - {"env", "image", "ports", "volumeMounts"}
    assert {field: container[field] for field in same} == {field: before[field] for field in same}


def _added(before: list[Json], after: list[Json]) -> list[Json]:
    assert all(each in after for each in before)
    return [each for each in after if each not in before]


def test_openshift_chooses_users_and_groups_itself() -> None:
    (pod,) = pods(parsed("openshift"))
    assert not {"runAsUser", "runAsGroup", "fsGroup"} & pod["securityContext"].keys()


def rules(objects: list[Json]) -> Iterator[Json]:
    for each in of_kind(objects, "Role", "ClusterRole"):
        yield from each["rules"]


@pytest.mark.parametrize("name", AGENTS)
def test_agents_may_read_services_and_their_endpoints_and_nothing_else(name: str) -> None:
    """Several of them elect one among them, in their own namespace."""
    objects = parsed(name)
    granted = {(group, resource) for rule in rules(objects) for group in rule["apiGroups"] for resource in rule["resources"]}
    election = {("coordination.k8s.io", "leases")} if name == "three-replicas" else set()
    assert granted == {("", "services"), ("discovery.k8s.io", "endpointslices")} | election
    for rule in rules(objects):
        assert set(rule["verbs"]) <= READ_ONLY or rule["resources"] == ["leases"]
        assert rule.keys() <= {"apiGroups", "resources", "verbs", "resourceNames"}
    assert not any("leases" in rule["resources"] for role in of_kind(objects, "ClusterRole") for rule in role["rules"])
    (pod,) = pods(objects)
    assert ("AGENT_LEADER_ELECTION" in variables(pod, "AGENT_")) == bool(election)
    for binding in of_kind(objects, "RoleBinding", "ClusterRoleBinding"):
        assert [(it["kind"], it["name"]) for it in binding["subjects"]] == [("ServiceAccount", "isthmus-agent")]


def test_only_who_advertises_addresses_of_machines_may_read_machines() -> None:
    assert not any("nodes" in rule["resources"] for name in AGENTS for rule in rules(parsed(name)))
    objects = parsed("machine-address")
    (rule,) = (rule for rule in rules(objects) if "nodes" in rule["resources"])
    assert rule == {"apiGroups": [""], "resources": ["nodes"], "verbs": ["list", "watch"]}
    (pod,) = pods(objects)
    assert variables(pod, "AGENT_")["AGENT_HOST_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "spec.nodeName"


def test_a_load_balancer_stands_before_the_gateway_where_one_is_asked_for() -> None:
    (gateway,) = (each["spec"] for each in of_kind(parsed("load-balancer"), "Service") if each["metadata"]["name"] == "isthmus-gateway")
    assert (gateway["type"], gateway["externalTrafficPolicy"]) == ("LoadBalancer", "Local")
    assert all("nodePort" not in port for port in gateway["ports"])


def test_publishing_adds_services_their_endpoints_and_a_lease() -> None:
    objects = parsed("publishing")
    writing = [rule for rule in rules(objects) if not set(rule["verbs"]) <= READ_ONLY]
    assert {resource for rule in writing for resource in rule["resources"]} == {
        "services",
        "endpointslices",
        "endpointslices/restricted",
        "leases",
    }
    (pod,) = pods(objects)
    assert variables(pod, "AGENT_")["AGENT_PUBLISH"]["value"] == "true"
    for role in of_kind(objects, "ClusterRole"):
        assert not any("leases" in rule["resources"] for rule in role["rules"])


def added(name: str, to: str) -> set[tuple[str, str]]:
    """Resources with verbs that one overlay may use and another may not."""
    verbs = [
        {(resource, verb) for rule in rules(parsed(each)) for resource in rule["resources"] for verb in rule["verbs"]}
        for each in (name, to)
    ]
    return verbs[0] - verbs[1]


def test_multi_cluster_services_add_their_own_kinds_and_no_exports_are_written() -> None:
    found = added("multi-cluster-services", "publishing")
    assert {resource for resource, _ in found} == {"serviceexports", "serviceexports/status", "serviceimports", "serviceimports/status"}
    assert {verb for resource, verb in found if resource == "serviceexports"} == READ_ONLY
    assert {verb for resource, verb in found if resource.endswith("/status")} == {"update"}


def test_pod_selectors_add_nothing_but_pods_to_read() -> None:
    assert added("pod-selectors", "one-replica") == {("pods", "list"), ("pods", "watch")}


async def test_the_kinds_of_the_multi_cluster_services_api_are_applied_and_the_api_knows_every_field() -> None:
    built = text("multicluster")
    definitions = list(yaml.safe_load_all(built))
    assert [each["metadata"]["name"].partition(".")[0] for each in definitions] == ["serviceexports", "serviceimports"]
    for each in definitions:
        assert without_nothing(known_of(each)) == without_nothing(each)
    async with cluster() as target:
        said = await target.kubectl("apply", "--validate=false", "-f", "-", stdin=built)
        assert said.count(" created") == 2


@pytest.mark.parametrize("name", RIGHTS)
def test_nothing_grants_secrets_wildcards_or_roles_of_the_cluster(name: str) -> None:
    for rule in rules(parsed(name)):
        said = {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
        assert not said & {"*", "secrets", "escalate", "bind", "impersonate"}
        writes = name in {"publishing", "multi-cluster-services"} or rule["resources"] == ["leases"]
        assert set(rule["verbs"]) <= READ_ONLY or writes
    own = {each["metadata"]["name"] for each in of_kind(parsed(name), "Role", "ClusterRole")}
    assert {each["roleRef"]["name"] for each in of_kind(parsed(name), "RoleBinding", "ClusterRoleBinding")} <= own


def test_removal_names_all_that_is_outside_of_the_namespace() -> None:
    overlays = [name for name, path in RIGHTS.items() if path.startswith("agent/")]
    made = {each["metadata"]["name"] for name in overlays for each in of_kind(parsed(name), "ClusterRole", "ClusterRoleBinding")}
    removed = (ROOT / "deploy/README.md").read_text().partition("## Removal")[2].split()
    assert made - {*removed} == set()


def test_the_control_plane_has_no_rights_in_its_cluster() -> None:
    objects = parsed("controlplane")
    assert not of_kind(objects, "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding")
    assert not any(pod["automountServiceAccountToken"] for pod in pods(objects))
    assert not of_kind(objects, "Secret")


def test_only_the_migration_has_the_owner_of_the_database() -> None:
    holders = {each["kind"] for each in parsed("controlplane") if "isthmus-database-owner" in str(each)}
    assert holders == {"Job"}


@pytest.mark.parametrize("name", ALL)
def test_every_variable_is_a_setting(name: str) -> None:
    settings, prefix = (ControlPlaneSettings, "CONTROLPLANE_") if name == "controlplane" else (AgentSettings, "AGENT_")
    known = {prefix + field.upper() for field in settings.model_fields}
    for pod in pods(parsed(name)):
        found = variables(pod, prefix)
        assert found
        assert found.keys() <= known


@pytest.mark.parametrize("name", AGENTS)
def test_each_node_advertises_the_service_that_leads_to_it_and_may_read_that_one(name: str) -> None:
    (pod,) = pods(parsed(name))
    told = variables(pod, "AGENT_")
    gateway = told["AGENT_GATEWAY_SERVICE"]["value"]
    service = next(each for each in of_kind(parsed(name), "Service") if each["metadata"]["name"] == gateway)["spec"]
    assert service["externalTrafficPolicy"] == "Local", "the port of a machine leads to the node on it"
    assert [port["name"] for port in service["ports"]] == ["gateway"]
    assert told["AGENT_HOST_ADDRESS"]["valueFrom"]["fieldRef"]["fieldPath"] == "status.hostIP"
    (rule,) = (rule for rule in rules(parsed(name)) if "resourceNames" in rule)
    assert (rule["resources"], rule["resourceNames"], rule["verbs"]) == (["services"], [gateway], ["list", "watch"])


@pytest.mark.parametrize("name", ALL)
def test_services_and_probes_lead_to_ports_of_the_pods_they_select(name: str) -> None:
    objects = parsed(name)
    templates = [each["spec"]["template"] for each in of_kind(objects, "StatefulSet", "Deployment")]
    for service in of_kind(objects, "Service"):
        selected = [one for one in templates if service["spec"]["selector"].items() <= one["metadata"]["labels"].items()]
        assert len(selected) == 1
        named = {port["name"] for container in selected[0]["spec"]["containers"] for port in container["ports"]}
        assert all(port["targetPort"] in named for port in service["spec"]["ports"] if isinstance(port["targetPort"], str))
    for template in templates:
        for container in template["spec"]["containers"]:
            named = {port["name"] for port in container["ports"]}
            assert {container[probe]["httpGet"]["port"] for probe in ("livenessProbe", "readinessProbe")} <= named


def test_three_replicas_are_on_three_machines_and_leave_one_by_one() -> None:
    objects = parsed("three-replicas")
    (nodes,), (budget,) = of_kind(objects, "StatefulSet"), of_kind(objects, "PodDisruptionBudget")
    assert nodes["spec"]["replicas"] == 3
    (apart,) = nodes["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    labels = nodes["spec"]["template"]["metadata"]["labels"]
    assert apart["topologyKey"] == "kubernetes.io/hostname"
    assert budget["spec"]["maxUnavailable"] == 1
    for selector in (apart["labelSelector"], budget["spec"]["selector"], nodes["spec"]["selector"]):
        assert selector["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("name", AGENTS)
def test_identity_is_on_a_volume_of_each_node(name: str) -> None:
    (nodes,) = of_kind(parsed(name), "StatefulSet")
    (pod,) = pods([nodes])
    (claim,) = nodes["spec"]["volumeClaimTemplates"]
    mounted = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    settings = variables(pod, "AGENT_")
    assert settings["AGENT_STATE_DIR"]["value"].startswith(mounted[claim["metadata"]["name"]])
    assert settings["AGENT_TOKEN_FILE"]["value"].startswith(mounted["token"])
    assert settings["AGENT_NODE"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"


@pytest.mark.parametrize("name", RIGHTS)
async def test_kubectl_applies_every_overlay_and_finds_it_unchanged(name: str) -> None:
    built = text(name)
    async with cluster() as target:
        said = await target.kubectl("apply", "-f", "-", stdin=built)
        assert said.count(" created") == built.count("\nkind: ")
        again = await target.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=built)
        assert again.count(" serverside-applied") == built.count("\nkind: ")


async def test_a_field_that_the_api_does_not_know_is_refused_when_it_is_applied() -> None:
    built = text("one-replica").replace("serviceName:", "hostnetwork: true\n  serviceName:")
    async with cluster() as target:
        said = await target.kubectl("apply", "-f", "-", stdin=built, fails=True)
        assert 'unknown field "spec.hostnetwork"' in said


@pytest.mark.parametrize("which", ["emulator", "real"])
async def test_kubectl_installs_upgrades_and_removes_an_agent(which: str, tmp_path: Path) -> None:
    """In a namespace of the test's own, under names of its own: in JSON, since YAML takes some of them for numbers."""
    if which == "real" and REAL not in os.environ:
        pytest.skip(f"needs a real Kubernetes API server: set {REAL} to a kubeconfig of an administrator")
    own = f"isthmus-{uuid4().hex[:8]}"
    base = os.path.relpath(ROOT / "deploy/kubernetes/agent/overlays/three-replicas", tmp_path)
    kustomization = {"resources": [base], "namespace": own, "nameSuffix": f"-{own[-8:]}"}
    (tmp_path / "kustomization.yaml").write_text(json.dumps(kustomization))
    async with cluster() if which == "emulator" else real() as target:
        installed = await target.kubectl("apply", "-k", str(tmp_path))
        try:
            assert f"namespace/{own} created" in installed
            assert " unchanged" in await target.kubectl("apply", "-k", str(tmp_path))
            (tmp_path / "kustomization.yaml").write_text(json.dumps(kustomization | {"replicas": [{"name": "isthmus", "count": 1}]}))
            await target.kubectl("apply", "--server-side", "--force-conflicts", "-k", str(tmp_path))
            name = f"isthmus-{own[-8:]}"
            said = await target.kubectl("-n", own, "get", "statefulset", name, "-o", "jsonpath={.spec.replicas}")
            assert said == "1"
        finally:
            await target.kubectl("delete", "--wait=false", "--ignore-not-found", "-k", str(tmp_path))
        said = await target.kubectl("get", "clusterrole", f"isthmus-agent-{own[-8:]}", fails=True)
        assert "NotFound" in said


@asynccontextmanager
async def real() -> AsyncIterator[Cluster]:
    async with connect(Path(os.environ[REAL])) as api:
        yield Cluster(Path(os.environ[REAL]), api)
