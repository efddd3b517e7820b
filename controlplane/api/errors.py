"""The only place that turns refusals into HTTP: `{code, message, details: [{field, description}]}` with gRPC's numbers, as F5 XC has it."""

import math
from collections.abc import Awaitable, Callable, Mapping

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from controlplane.errors import ControlPlaneError, FieldError, TooManyRequests, Unauthenticated
from controlplane.pki import Unsealable

log = structlog.get_logger()

CODES = {400: 3, 401: 16, 403: 7, 404: 5, 405: 12, 409: 9, 413: 3, 429: 8, 503: 14}
INTERNAL = 13


def install(app: FastAPI) -> None:
    """Starlette finds the handler through the exception's base classes."""
    for kind, handler in _EXPECTED.items():
        app.add_exception_handler(kind, handler)
    app.add_exception_handler(Exception, _bug)


async def refused(request: Request, error: Exception) -> JSONResponse:
    """The answer that Starlette would find; raises the error itself if that is a bug."""
    handler = next((_EXPECTED[kind] for kind in type(error).__mro__ if kind in _EXPECTED), None)
    if handler is None:
        raise error
    return await handler(request, error)


def answer(
    status: int, code: int, message: str, details: tuple[FieldError, ...] = (), headers: Mapping[str, str] | None = None
) -> JSONResponse:
    body = {"code": code, "message": message, "details": [vars(detail) for detail in details]}
    return JSONResponse(body, status, headers)


async def _refused(_: Request, refusal: Exception) -> JSONResponse:
    assert isinstance(refusal, ControlPlaneError)
    headers = {}
    if isinstance(refusal, TooManyRequests):
        headers["Retry-After"] = str(max(1, math.ceil(refusal.retry_after_s)))
    if isinstance(refusal, Unauthenticated):
        headers["WWW-Authenticate"] = "APIToken"
    return answer(refusal.status, refusal.code, refusal.message, refusal.details, headers)


async def _invalid(_: Request, refusal: Exception) -> JSONResponse:
    assert isinstance(refusal, RequestValidationError)
    details = tuple(FieldError(".".join(map(str, error["loc"][1:])) or "body", error["msg"]) for error in refusal.errors())
    return answer(400, 3, "; ".join(f"{detail.field}: {detail.description}" for detail in details), details)


async def _http(_: Request, refusal: Exception) -> JSONResponse:
    assert isinstance(refusal, HTTPException)
    return answer(refusal.status_code, CODES.get(refusal.status_code, 2), str(refusal.detail), headers=refusal.headers)


async def _database_lost(request: Request, error: Exception) -> JSONResponse:
    log.warning("database unavailable", path=request.url.path, error=type(error).__name__, reason=str(getattr(error, "orig", error))[:300])
    return answer(503, 14, "the database cannot be reached, try again", headers={"Retry-After": "1"})


async def _unsealable(request: Request, error: Exception) -> JSONResponse:
    """Another replica may have the version of the key-encryption key that this one lacks."""
    log.error("cannot unseal", path=request.url.path, reason=str(error))
    return answer(503, 14, "this replica lacks a key, try again", headers={"Retry-After": "1"})


_EXPECTED: Mapping[type[Exception], Callable[[Request, Exception], Awaitable[JSONResponse]]] = {
    ControlPlaneError: _refused,
    RequestValidationError: _invalid,
    HTTPException: _http,
    **dict.fromkeys((OperationalError, InterfaceError, PoolTimeout), _database_lost),
    Unsealable: _unsealable,
}


async def _bug(request: Request, error: Exception) -> JSONResponse:
    """What was wrong inside is nobody's business outside."""
    log.error("request failed", method=request.method, path=request.url.path, exc_info=error)
    return answer(500, INTERNAL, "internal error")
