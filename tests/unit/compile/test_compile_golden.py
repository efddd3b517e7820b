"""Whole tenants, and what each of their sites is told."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from controlplane.compile.edge import Share, compile_edge, public_items, relay_item
from controlplane.compile.intent import Intent, Tenant
from controlplane.compile.site import compile_site, conditions
from controlplane.compile.snapshot import Snapshot
from tests.golden_files import ROOT, Golden
from tests.unit.compile.intents import intent_of, observations_of, read_intent

OPERATOR = Tenant(
    id="22222222-2222-4222-8222-222222222222",
    name="default",
    trust_domain="fabric.test",
    peer_anchor_pem="<the operator's intermediate>",
    edge_anchor_pem="<the edges' intermediate>",
)
CASES = sorted((ROOT / "compile").iterdir())


def share_of(intent: Intent) -> Share:
    live = tuple(sorted(str(site.uid) for site in intent.of("site").values()))
    relay = relay_item(intent.tenant.id, intent.tenant.peer_anchor_pem, "", live)
    return Share(relay, public_items(intent, observations_of(intent)), dict(intent.tenant.revocations))


def readable(snapshot: Snapshot) -> str:
    shown = {f"{kind} {key}": json.loads(item.body) for (kind, key), item in snapshot.items.items()}
    return json.dumps(shown, indent=2) + "\n"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sites_and_users_are_told_what_the_case_says(case: Path, golden: Golden) -> None:
    intent = read_intent(golden.read(case / "intent.yaml"))
    observations = observations_of(intent)
    for key, site in intent.of("site").items():
        golden(case / f"{key.name}.json", readable(compile_site(str(site.uid), intent, observations)))
    for key, edge in intent.edges.items():
        golden(case / f"{key.name}.json", readable(compile_edge(edge, OPERATOR, [share_of(intent)])))
    said = [f"{found.type} {found.kind} {found.key}: {found.message}\n" for found in conditions(intent)]
    golden(case / "conditions.txt", "".join(said))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_order_of_objects_does_not_matter(case: Path, golden: Golden) -> None:
    intent = read_intent(golden.read(case / "intent.yaml"))
    objects = [stored for of_kind in (*intent.objects.values(), intent.edges) for stored in of_kind.values()]
    reverse = replace(intent_of(reversed(objects), intent.names), imports=intent.imports)
    observations = observations_of(intent)
    for site in intent.of("site").values():
        snapshots = [compile_site(str(site.uid), given, observations) for given in (intent, reverse)]
        assert list(snapshots[0].items.items()) == list(snapshots[1].items.items())
    for edge in intent.edges.values():
        snapshots = [compile_edge(edge, OPERATOR, [share_of(given)]) for given in (intent, reverse)]
        assert list(snapshots[0].items.items()) == list(snapshots[1].items.items())
