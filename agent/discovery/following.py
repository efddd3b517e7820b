"""One kind of object in one Kubernetes cluster, in all namespaces, followed with whatever credentials are good."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NoReturn

from lightkube.core.resource import Resource

from agent.discovery.kubeconfig import ClusterAccess
from agent.discovery.reflector import Difference, ReadFailed, Reflector, V, pauses
from agent.errors import AgentError, Misconfigured
from agent.log import log


@dataclass(eq=False)
class Following(Generic[V]):
    """Follows while `run` runs; `changed` is called, in the event loop, when there is something new.

    `load` is called again when the credentials are refused; it may raise `Misconfigured`.
    """

    load: Callable[[], ClusterAccess]
    resource: type[Resource]
    read: Callable[[Any], V | None]
    """An object as a value; None if it does not matter."""
    changed: Callable[[], None]
    objects: Mapping[tuple[str, str], V] | None = field(default=None, init=False)
    """The last that could be read, by namespace and name, even if they cannot be read now. None: nothing was read yet."""
    version: int = field(default=0, init=False)
    """Another one for other objects."""
    failure: ReadFailed | AgentError | None = field(default=None, init=False)
    """Why they are not being followed."""
    _reflector: Reflector[V] | None = field(default=None, init=False)

    async def run(self) -> NoReturn:
        """Keep following, whatever goes wrong."""
        delays = pauses()
        while True:
            try:
                access = self.load()
                async with access.connect() as client:
                    self._reflector = Reflector(client, self.resource, self.read, self._take)
                    await self._reflector.run()
            except (ReadFailed, Misconfigured) as error:
                self._say(error)
            if self._reflector and self._reflector.listed:
                delays = pauses()
            await asyncio.sleep(next(delays))

    def failed(self, reason: str) -> None:
        """`run` broke off."""
        self._say(AgentError(reason))

    def _take(self, differences: Sequence[Difference[V]]) -> None:
        assert self._reflector is not None
        if self._reflector.listed and (differences or self.objects is not self._reflector.objects):
            self.objects = self._reflector.objects
            self.version += 1
            self.changed()
        self._say(self._reflector.failure)

    def _say(self, failure: ReadFailed | AgentError | None) -> None:
        if (type(failure), str(failure)) != (type(self.failure), str(self.failure)):
            log.info("following", kind=self.resource.__name__, failure=str(failure or ""))
            self.failure = failure
            self.changed()
