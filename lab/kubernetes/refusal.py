"""What an API server says when it does not do what was asked: a `Status` object."""

from typing import Any


class Refusal(Exception):
    """`reason` is Kubernetes' machine-readable word for it."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason

    @property
    def status(self) -> dict[str, Any]:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": str(self),
            "reason": self.reason,
            "code": self.code,
        }


def bad_request(message: str) -> Refusal:
    return Refusal(400, "BadRequest", message)


def unauthorized() -> Refusal:
    return Refusal(401, "Unauthorized", "Unauthorized")


def forbidden(message: str) -> Refusal:
    return Refusal(403, "Forbidden", message)


def not_found(plural: str, name: str) -> Refusal:
    return Refusal(404, "NotFound", f'{plural} "{name}" not found')


def not_served() -> Refusal:
    return Refusal(404, "NotFound", "the server could not find the requested resource")


def already_exists(plural: str, name: str) -> Refusal:
    return Refusal(409, "AlreadyExists", f'{plural} "{name}" already exists')


def conflict(plural: str, name: str) -> Refusal:
    message = "the object has been modified; please apply your changes to the latest version and try again"
    return Refusal(409, "Conflict", f'Operation cannot be fulfilled on {plural} "{name}": {message}')


def expired(version: int) -> Refusal:
    return Refusal(410, "Expired", f"too old resource version: {version}")


def invalid(kind: str, name: str, problem: str) -> Refusal:
    return Refusal(422, "Invalid", f'{kind} "{name}" is invalid: {problem}')
