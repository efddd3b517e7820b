"""Rules that a reader of one function cannot check: they hold for all of them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Table

from controlplane.store import tables

ROOT = Path(__file__).parent.parent
OF_NO_TENANT = {
    "authorities.add": "the fabric's own authorities belong to no tenant",
    "edges.list_all": "edges are the same for every tenant",
    "edges.names": "edges are the same for every tenant",
    "facts.get": "facts about the installation",
    "facts.put": "facts about the installation",
    "locks.take": "a job of the whole control plane",
    "locks.try_take": "a job of the whole control plane",
    "sealed.under": "counts what is sealed for everybody",
    "public_names.list_all": "lists names of all tenants, for operators",
    "tenants.find": "looks for tenants",
    "tenants.list_all": "lists tenants",
}
"""Store functions that take a session without a tenant, and why they may."""
EMPTY_WORDS = re.compile(r"(Manager|Handler|Helper|Impl|Utils?|Common)$")


def modules(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text(), str(path))


def store_functions() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """`module.function` of every public one that takes a session first, with (name, annotation) of its parameters."""
    for path, module in modules("controlplane/store"):
        for node in module.body:
            if isinstance(node, ast.AsyncFunctionDef) and not node.name.startswith("_"):
                parameters = [(arg.arg, ast.unparse(arg.annotation) if arg.annotation else "") for arg in node.args.args]
                if parameters and "AsyncSession" in parameters[0][1]:
                    yield f"{path.stem}.{node.name}", parameters


def test_every_store_function_takes_the_tenant_second() -> None:
    functions = dict(store_functions())
    assert len(functions) > 30, "the rule found nothing to check"
    wrong = {
        name for name, parameters in functions.items() if parameters[1:2] not in ([("tenant_id", "UUID")], [("tenant_id", "UUID | None")])
    }
    assert wrong == set(OF_NO_TENANT)


OWNED = [
    table for table in tables.Base.metadata.tables.values() if "tenant_id" in table.columns and not table.columns["tenant_id"].nullable
]


@pytest.mark.parametrize("table", OWNED, ids=lambda table: table.name)
def test_a_tenants_tables_lead_their_primary_key_with_the_tenant(table: Table) -> None:
    assert next(column.name for column in table.primary_key.columns) == "tenant_id"


def test_nobody_commits_below_the_request() -> None:
    commits = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, module in modules("controlplane/store", "controlplane/services")
        if path.name != "schema.py"  # migrates, before anything is served
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute) and node.attr in {"commit", "rollback"}
    ]
    assert commits == []


def test_no_class_has_a_name_that_says_nothing() -> None:
    empty = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path, module in modules("controlplane", "agent", "lab", "bench")
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef) and EMPTY_WORDS.search(node.name)
    ]
    assert empty == []


def test_test_modules_have_names_of_their_own() -> None:
    """Pytest and mypy know test modules by their base names."""
    names = [path.stem for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
