"""What the overlays grant is enough for what they are for, as the API sees an agent's own account."""

import json
from pathlib import Path

from agent.discovery.kubeconfig import from_kubeconfig
from agent.pods import SitePods
from lab.kubernetes import objects
from lab.wait import until
from tests.agent.discovery.test_followed_pods import SNAPSHOT, WEB, addresses
from tests.agent.test_service_exports import VALID, exported, imported, running, until_conditions
from tests.deploy.built import text
from tests.deploy.cluster import Cluster, cluster


async def as_agent(target: Cluster, directory: Path) -> Path:
    """The kubeconfig of the account that the agent's pods have."""
    config = json.loads(target.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": await target.api.token("isthmus-agent", "isthmus")}
    config["contexts"][0]["context"]["namespace"] = "isthmus"
    file = directory / "kubeconfig"
    file.write_text(json.dumps(config))
    return file


async def test_an_agent_takes_part_in_multi_cluster_services_with_the_rights_of_that_overlay(tmp_path: Path) -> None:
    async with cluster() as target:
        for name in ("multicluster", "multi-cluster-services"):
            await target.kubectl("apply", "-f", "-", stdin=text(name))
        await target.api.create(objects.namespace("shop"))
        await target.api.create(objects.service("cart", "shop"))
        await target.api.create(objects.service_export("cart", "shop"))
        async with running(await as_agent(target, tmp_path)) as node:
            node.wants(imported().with_items(exported().items.values()))
            await until_conditions(target.api, "cart", VALID, ("Conflict", "False", "NoConflicts"), ("Ready", "True", "Exported"))

            async def there() -> bool:
                return [each.get("status") for each in (await target.api.list("ServiceImport", "shop"))["items"]] == [
                    {"clusters": [{"cluster": "b"}]}
                ]

            await until(there, "the ServiceImport with its status")
            assert node.publishing.refused(node.snapshot) == {}


async def test_an_agent_sees_pods_with_the_rights_of_that_overlay_and_not_without(tmp_path: Path) -> None:
    async with cluster() as target:
        await target.kubectl("apply", "-f", "-", stdin=text("one-replica"))
        await target.api.create(objects.namespace("shop"))
        await target.api.create(objects.pod("web", "shop", "10.1.0.1", {"app": "web"}))
        config = await as_agent(target, tmp_path)
        pods = SitePods(lambda: from_kubeconfig(config.read_bytes()), dict, lambda: None)
        pods.follow(SNAPSHOT)
        try:

            async def known(wanted: tuple[str, ...] | None) -> bool:
                return pods.settled and addresses(pods)[WEB] == wanted

            await until(lambda: known(None), "pods to be out of reach")
            assert "pods is forbidden" in str(pods.refused(SNAPSHOT))
            await target.kubectl("apply", "-f", "-", stdin=text("pod-selectors"))
            await until(lambda: known(("10.1.0.1",)), "the pod", within_s=60)
        finally:
            await pods.close()
