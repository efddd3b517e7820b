"""What callers did, written down in the transaction that does it."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.auth import Caller
from controlplane.store import audit


async def record(
    session: AsyncSession,
    caller: Caller,
    rpc: str,
    now: datetime,
    *,
    namespace: str,
    name: str,
    uid: UUID | None = None,
    revision: int | None = None,
    shown: dict[str, Any] | None = None,
) -> None:
    """In the log of the caller's tenant. `rpc` is without its `ves.io.schema.`; `shown` is the object after the change, without its secrets."""
    entry = audit.AuditRecord(
        at=now,
        credential=caller.credential,
        credential_id=caller.credential_id,
        operator=caller.operator,
        rpc=f"ves.io.schema.{rpc}",
        namespace=namespace,
        name=name,
        uid=uid,
        revision=revision,
        object=shown,
    )
    await audit.add(session, caller.tenant_id, entry)
