"""The cases of the golden files: what they say, with or without real keys in the places of `<…>`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.envoy.inputs import Addresses, AgentSnapshot, Endpoint, Item, ItemId, LocalState, NodeIdentity, OriginId, PeerView
from agent.protocol.base import content_hash
from agent.protocol.items import TYPES, ItemKind
from tests.golden_files import ROOT

CASES = sorted((ROOT / "envoy").iterdir())

Read = Callable[[Path], str]


def snapshot_of(text: str) -> AgentSnapshot:
    return AgentSnapshot.of(map(_item, json.loads(text)))


def _item(entry: dict[str, Any]) -> Item:
    kind = ItemKind(entry["kind"])
    body = TYPES[kind].model_validate_json(json.dumps(entry["body"]))
    return Item(ItemId(kind, entry["key"]), content_hash(body.canonical()), body)


def local_of(text: str, run_dir: str = "/run/isthmus") -> LocalState:
    said = json.loads(text)
    return LocalState(
        node=NodeIdentity(
            node_id="node-1",
            node_name="n1",
            site_id="00000001-0000-4000-8000-000000000000",
            site_name="a",
            certificate_pem="<certificate>",
            private_key_pem="<private key>",
        ),
        addresses=Addresses(**said["addresses"]),
        run_dir=run_dir,
        endpoints={
            OriginId(entry["pool"], entry["origin"]): tuple(Endpoint(*endpoint) for endpoint in entry["endpoints"])
            for entry in said["endpoints"]
        },
        peers={site: PeerView(**view) for site, view in said["peers"].items()},
        pods={id: None if addresses is None else tuple(addresses) for id, addresses in said.get("pods", {}).items()},
        dials=frozenset(said.get("dials", ())),
        workers=said.get("workers", 1),
        overlay=said.get("overlay", ""),
        secrets={ref: value.encode() for ref, value in said["secrets"].items()},
    )
