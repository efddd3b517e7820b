"""Refusals a caller can act on; anything else that escapes is a bug and becomes a 500.

* ControlPlaneError
  - Invalid            the request can never succeed as it is
  - Unauthenticated
  - Forbidden
  - NotFound
  - Conflict
    + AlreadyExists
    + StaleVersion
    + StillReferred
    + ListenerTaken
    + HubAndSpoke
    + NotAdmitted
    + StillTrusted
  - TooManyRequests
  - Unavailable        the same request may succeed later
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class FieldError:
    """One thing that is wrong, at a JSON path such as `spec.origin_servers[0].k8s_service.service_name`."""

    field: str
    description: str


class ControlPlaneError(Exception):
    """`code` is gRPC's number, as in the bodies of the F5 XC API; `status` the HTTP status that goes with it."""

    code: ClassVar[int]
    status: ClassVar[int]

    def __init__(self, message: str, details: Sequence[FieldError] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.details = tuple(details)


class Invalid(ControlPlaneError):
    code, status = 3, 400


class Unauthenticated(ControlPlaneError):
    code, status = 16, 401


class Forbidden(ControlPlaneError):
    code, status = 7, 403


class NotFound(ControlPlaneError):
    code, status = 5, 404


class Conflict(ControlPlaneError):
    code, status = 9, 409


class AlreadyExists(Conflict):
    code = 6


class StaleVersion(Conflict):
    code = 10

    def __init__(self, expected: str, actual: str) -> None:
        super().__init__(f"resource_version is {actual}, not {expected}: someone wrote in between; read it again")


class StillReferred(Conflict):
    """Its details list the referrers."""


class ListenerTaken(Conflict):
    """Another load balancer already has this place, port or domain, or a gateway this port."""


class HubAndSpoke(Conflict):
    """A site would be on both sides of a relation between hubs and spokes."""


class NotAdmitted(Conflict):
    """The registration waits for approval; ask again."""


class StillTrusted(Conflict):
    """The step of a rotation would leave somebody behind; its details name them."""


class TooManyRequests(ControlPlaneError):
    code, status = 8, 429

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(ControlPlaneError):
    code, status = 14, 503
