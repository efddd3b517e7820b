"""Who waits for nodes to say something."""

import asyncio
from uuid import UUID


class Bell:
    """Rings when nodes of a tenant said something new."""

    def __init__(self) -> None:
        self._next: dict[UUID, asyncio.Event] = {}
        self.silenced = False
        """Nobody should wait any more."""

    def silence(self) -> None:
        """Wake everybody, for the last time."""
        self.silenced = True
        for tenant_id in list(self._next):
            self.ring(tenant_id)

    def ring(self, tenant_id: UUID) -> None:
        if event := self._next.pop(tenant_id, None):
            event.set()

    def next(self, tenant_id: UUID) -> asyncio.Event:
        """Set at the next ring; taken before one looks, nothing is missed."""
        return self._next.setdefault(tenant_id, asyncio.Event())
