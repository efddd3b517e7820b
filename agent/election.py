"""Which of a site's nodes does what one of them suffices for: the one that holds a Lease in their cluster."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import uniform

from agent.cluster import Cluster, ClusterAway, ObjectRefused
from agent.discovery.kubeconfig import ClusterAccess
from agent.errors import Misconfigured
from agent.leases import Leases, home
from agent.log import log

PACE_S = 10.0
_RESIGN_S = 3.0


@dataclass
class Election:
    """`changed` is called when `leads` or `warning` are others."""

    leases: Leases
    duty: str
    """Part of the Lease's name."""
    cluster: Callable[[], ClusterAccess] | None
    """None: every node leads."""
    changed: Callable[[], None]
    warning: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.leads = self.cluster is None

    async def run(self) -> None:
        """For ever, if there is anything to elect. While the cluster is away nothing changes; where Leases are forbidden every node leads."""
        while self.cluster is not None:
            try:
                access = self.cluster()
                async with access.connect() as client:
                    self._conclude(await self.leases.lead(Cluster(client), home(access), self.duty), None)
            except ObjectRefused as refusal:
                self._conclude(True, f"no node can be elected for {self.duty}: {refusal}")
            except (ClusterAway, Misconfigured) as error:
                log.debug("no election", duty=self.duty, reason=str(error))
            await asyncio.sleep(uniform(0.8, 1.0) * PACE_S)

    async def resign(self) -> None:
        """Before this node stops: others need not wait until its Lease has run out."""
        if self.cluster is None:
            return
        with suppress(ClusterAway, ObjectRefused, Misconfigured, TimeoutError):
            async with asyncio.timeout(_RESIGN_S):
                access = self.cluster()
                async with access.connect() as client:
                    await self.leases.resign(Cluster(client), home(access), self.duty)

    def _conclude(self, leads: bool, warning: str | None) -> None:
        if (leads, warning) != (self.leads, self.warning):
            log.info("election", duty=self.duty, leads=leads)
            self.leads, self.warning = leads, warning
            self.changed()
