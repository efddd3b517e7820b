"""Reading and writing single objects of a Kubernetes API, with two kinds of failure: of that object, and of everything."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
import msgspec
from lightkube.core import decoders
from lightkube.core.exceptions import ConfigError
from lightkube.core.generic_client import ALL_NS, BasicRequest, GenericAsyncClient
from lightkube.core.resource import Resource

from agent.errors import AgentError

R = TypeVar("R", bound=Resource)

FORBIDDEN, NOT_FOUND, CONFLICT = 403, 404, 409
_ABOUT_ALL = frozenset({401, 408, 429})


class ClusterAway(AgentError):
    """The API does not answer, or not us; try again later."""


class ObjectRefused(AgentError):
    """It answered that this cannot be done; others may work."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Cluster:
    """All methods raise `ClusterAway` and `ObjectRefused`."""

    client: GenericAsyncClient

    async def listed(self, resource: type[R], labels: dict[str, str], namespace: str = ALL_NS) -> list[R]:
        """With all these labels."""
        selector = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
        request = self.client.prepare_request("list", resource, namespace=namespace, params={"labelSelector": selector})
        found: list[R] = self._read(await self._send(request), lambda data: decoders.decode_list(data, resource)[2])
        return found

    async def get(self, resource: type[R], name: str, namespace: str) -> R | None:
        """None if it is not there."""
        try:
            answer = await self._send(self.client.prepare_request("get", resource, name=name, namespace=namespace))
        except ObjectRefused as refusal:
            if refusal.status == NOT_FOUND:
                return None
            raise
        return self._one(resource, answer)

    async def create(self, object: R) -> R:
        return self._one(type(object), await self._send(self.client.prepare_request("post", obj=object)))

    async def replace(self, object: R) -> R:
        """Only the version that it was made from."""
        return self._one(type(object), await self._send(self.client.prepare_request("put", obj=object)))

    async def delete(self, object: Any) -> None:
        """Just this one at just this version; nothing else that has its name. One that is gone already is no error."""
        metadata = object.metadata
        request = self.client.prepare_request("delete", type(object), name=metadata.name, namespace=metadata.namespace)
        expected = {"uid": metadata.uid, "resourceVersion": metadata.resourceVersion}
        request.data = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": expected}
        try:
            await self._send(request)
        except ObjectRefused as refusal:
            if refusal.status != NOT_FOUND:
                raise

    async def _send(self, request: BasicRequest) -> httpx2.Response:
        send: Callable[[httpx2.Request], Awaitable[httpx2.Response]] = self.client.send
        try:
            response = await send(self.client.build_adapter_request(request))
        except (httpx2.LocalProtocolError, ValueError):  # their messages show the header
            raise ClusterAway("the credentials have characters that cannot be sent") from None
        except (httpx2.HTTPError, ConfigError, OSError) as error:
            raise ClusterAway(f"{type(error).__name__}: {_brief(str(error))}") from None
        if response.is_success:
            return response
        words = f"{response.status_code} {_message(response)}"
        if response.is_server_error or response.status_code in _ABOUT_ALL:
            raise ClusterAway(words)
        raise ObjectRefused(words, response.status_code)

    def _one(self, resource: type[R], answer: httpx2.Response) -> R:
        found: R = self._read(answer, lambda data: decoders.decode_object(data, resource))
        return found

    def _read(self, answer: httpx2.Response, decode: Any) -> Any:
        try:
            return decode(answer.content)
        except msgspec.MsgspecError as error:
            raise ClusterAway(f"an answer cannot be read: {_brief(str(error))}") from None


def _message(response: httpx2.Response) -> str:
    try:
        return _brief(str(response.json()["message"]))
    except (ValueError, KeyError, TypeError):
        return response.reason_phrase


def _brief(text: str) -> str:
    return " ".join(text.split())[:300]
