"""Questions about the audit log, in the query language of the F5 XC API: `{user="admin", name!="cart"}`."""

import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Literal
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.errors import FieldError, Invalid
from controlplane.services.resources import BUILT_IN_NAMESPACES
from controlplane.store import audit
from controlplane.store.audit import AuditRecord, Term

MOST_COUNTED = 10_000
"""Hits beyond are not counted."""
_TERM = re.compile(r'\s*([a-z_]+)\s*(=|!=)\s*"((?:[^"\\]|\\.)*)"\s*')
SYSTEM = BUILT_IN_NAMESPACES[0]

FIELDS: Mapping[str, Literal["credential", "rpc", "namespace", "name"]] = {
    "user": "credential",
    "rpc": "rpc",
    "namespace": "namespace",
    "name": "name",
}
"""Words of the query language, and the columns they mean."""


def parse_query(text: str) -> tuple[Term, ...]:
    """Terms that all have to match. Raises `Invalid`."""
    inside = text.strip().removeprefix("{").removesuffix("}").strip()
    terms = []
    while inside:
        match = _TERM.match(inside)
        if match is None or match[1] not in FIELDS:
            raise _bad_query(inside)
        terms.append(Term(FIELDS[match[1]], match[2] == "=", re.sub(r"\\(.)", r"\1", match[3])))
        inside = inside[match.end() :]
        if inside and not inside.startswith(","):
            raise _bad_query(inside)
        inside = inside.removeprefix(",").lstrip()
    return tuple(terms)


async def audit_logs(
    session: AsyncSession,
    tenant_id: UUID,
    namespace: str,
    terms: Iterable[Term],
    *,
    start: datetime,
    end: datetime,
    newest_first: bool,
    most: int,
) -> tuple[tuple[AuditRecord, ...], int]:
    """The first ones of one namespace, and how many there are; in `system`, of all."""
    wanted = [*terms, *([] if namespace == SYSTEM else [Term("namespace", equal=True, value=namespace)])]
    found = await audit.between(session, tenant_id, start, end, wanted, newest_first=newest_first, most=most)
    return found, await audit.count(session, tenant_id, start, end, wanted, most=MOST_COUNTED)


def line(record: AuditRecord, tenant: str) -> str:
    """A log entry, which the API has as a string of JSON."""
    entry = {
        "time": record.at.isoformat(),
        "tenant": tenant,
        "namespace": record.namespace,
        "user": record.credential,
        "credential_id": str(record.credential_id) if record.credential_id else None,
        "operator": record.operator,
        "rpc": record.rpc,
        "name": record.name,
        "uid": str(record.uid) if record.uid else None,
        "revision": record.revision,
        "object": record.object,
    }
    return json.dumps(entry)


def _bad_query(rest: str) -> Invalid:
    description = f'should be terms such as {{user="admin", rpc!="…"}} over {", ".join(FIELDS)}, with = or !=; cannot read {rest[:64]!r}'
    return Invalid(f"query: {description}", [FieldError("query", description)])
