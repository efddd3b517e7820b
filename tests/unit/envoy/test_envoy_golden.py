"""Whole snapshots, and what a node's Envoy is told. `tests/e2e/test_dataplane_golden.py` asks a real Envoy what it thinks of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import symbol_database
from google.protobuf.json_format import MessageToDict

from agent.envoy import names
from agent.envoy.inputs import AgentSnapshot
from agent.envoy.messages import TYPE_PREFIX
from agent.envoy.render import render
from agent.envoy.resources import Resource, Resources
from agent.protocol.items import SHARDS
from tests.golden_files import Golden
from tests.unit.envoy.golden_cases import CASES, local_of, snapshot_of


def readable(resources: Resources) -> str:
    shown: dict[str, Any] = {"problems": [f"{problem.item.kind} {problem.item.key}: {problem.reason}" for problem in resources.problems]}
    for type_url, named in resources.by_type.items():
        shown[type_url.rpartition(".")[2]] = {name: _resource(named[name]) for name in sorted(named)}
    return json.dumps(shown, indent=1, sort_keys=True) + "\n"


def _resource(resource: Resource) -> dict[str, Any]:
    message = symbol_database.Default().GetSymbol(resource.type_url.removeprefix(TYPE_PREFIX))()
    message.ParseFromString(resource.value)
    sources = sorted(f"{source.kind} {source.key}" for source in resource.sources)
    shown = MessageToDict(message, preserving_proto_field_name=True)
    if "filter_chains" in shown:
        shown["filter_chains"] = _by_shards(shown["filter_chains"])
    return {"sources": sources, "resource": shown}


def _by_shards(chains: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Filter chains for sessions of peers are shown once, with the shards for which they differ in nothing else."""
    shown: dict[str, str] = {}
    for chain in chains:
        text = json.dumps(chain)
        shard = next((shard for shard in SHARDS if f'"{names.peers_server_name(shard)}"' in text), "")
        text = text.replace(f'"{shard}.', '"<shard>.').replace(f'/site/{shard}"', '/site/<shard>"') if shard else text
        shown[text] = shown.get(text, "") + shard
    return [json.loads(text) | ({"shards": shards} if shards else {}) for text, shards in shown.items()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_node_is_told_what_the_case_says(case: Path, golden: Golden) -> None:
    snapshot, local = snapshot_of(golden.read(case / "snapshot.json")), local_of(golden.read(case / "local.json"))
    golden(case / "config.json", readable(render(snapshot, local)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_order_of_items_does_not_matter(case: Path) -> None:
    snapshot, local = snapshot_of((case / "snapshot.json").read_text()), local_of((case / "local.json").read_text())
    reverse = AgentSnapshot.of(reversed(list(snapshot.items.values())))
    assert render(snapshot, local).by_type == render(reverse, local).by_type
