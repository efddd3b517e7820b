"""What the API says about itself, and which fields objects may have by lightkube's models."""

from typing import Any

import msgspec
from lightkube.codecs import from_dict
from lightkube.core.exceptions import LoadResourceError

from lab.kubernetes.refusal import bad_request, not_found
from lab.kubernetes.resource import RESOURCES
from lab.kubernetes.selector import Body

VERBS = ("create", "delete", "get", "list", "patch", "update", "watch")


def core() -> Body:
    """The kinds of the core group."""
    listed = [
        {"name": it.plural, "singularName": it.kind.lower(), "namespaced": it.namespaced, "kind": it.kind, "verbs": VERBS}
        for it in RESOURCES
        if not it.group
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "v1", "resources": listed}


def check_fields(body: Body) -> None:
    """As `fieldValidation=Strict` has it; raises `Refusal`. Kinds that have no model may have any field."""
    try:
        model: Any = from_dict(body)
    except LoadResourceError:
        return
    except (ValueError, TypeError, msgspec.MsgspecError) as error:
        raise bad_request(f"strict decoding error: {error}") from None
    unknown = _unknown(body, model.to_dict(), "")
    if unknown:
        raise bad_request(f'strict decoding error: unknown field "{unknown}"')


def _unknown(given: Any, known: Any, path: str) -> str:
    """The first field that the model dropped, or nothing."""
    if isinstance(given, dict):
        inner = [(f"{path}.{name}", value, known.get(name) if isinstance(known, dict) else None) for name, value in given.items()]
    elif isinstance(given, list):
        others = known if isinstance(known, list) else []
        inner = [(f"{path}[{at}]", value, others[at] if at < len(others) else None) for at, value in enumerate(given)]
    else:
        return path.removeprefix(".") if known is None and given is not None else ""
    return next((found for at, value, other in inner if value not in ({}, [], None) and (found := _unknown(value, other, at))), "")


def documents(path: str) -> Body:
    """Of `/openapi/v3`: as much as tells kubectl that the server checks fields itself. Raises `Refusal`."""
    bases = {resource.base.lstrip("/") for resource in RESOURCES}
    if not path:
        return {"paths": {base: {"serverRelativeURL": f"/openapi/v3/{base}"} for base in sorted(bases)}}
    if path not in bases:
        raise not_found("openapi", path)
    parameters = [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}]
    patched = {}
    for resource in RESOURCES:
        if resource.base.lstrip("/") == path:
            group, _, version = resource.api_version.rpartition("/")
            kind = {"group": group, "version": version, "kind": resource.kind}
            operation = {"parameters": parameters, "responses": {}, "x-kubernetes-group-version-kind": kind}
            patched[f"{resource.base}/{resource.plural}/{{name}}"] = {"patch": operation}
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1"}, "paths": patched}
