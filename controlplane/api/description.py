"""The API's description, with what FastAPI cannot see: names in paths, and bodies that we read ourselves."""

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from controlplane.resources.base import Metadata, Value
from controlplane.resources.registry import KINDS, Kind

Json = dict[str, Any]


REFUSED: Json = {
    "description": "Refused. `code` is gRPC's number; `details` name the fields, by their JSON path.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Refusal"}}},
}
REFUSAL: Json = {
    "type": "object",
    "required": ["code", "message", "details"],
    "properties": {
        "code": {"type": "integer"},
        "message": {"type": "string"},
        "details": {
            "type": "array",
            "items": {"type": "object", "properties": {"field": {"type": "string"}, "description": {"type": "string"}}},
        },
    },
}
SCHEMES: Json = {"token": {"type": "apiKey", "in": "header", "name": "Authorization", "description": "`APIToken <token>`"}}


def described(path: str, kind: Kind | None = None) -> Json:
    """For `openapi_extra`: the names in the path, and for a kind the body that creates or replaces one, and the answer."""
    names = [segment[1:-1] for segment in path.split("/") if segment.startswith("{")]
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    return {"parameters": parameters} | ({"requestBody": _body(kind), "responses": {"200": _answer(kind)}} if kind else {})


def asked(of: type[Value], *, required: bool = True) -> Json:
    """For `openapi_extra`: a body that is no object of a kind."""
    return {"requestBody": {"required": required, "content": _json(_inline(of))}}


def asked_object(spec: type[Value], *, required: bool = True) -> Json:
    """As `asked`, for a body of metadata and this spec."""
    properties = {"metadata": {"$ref": "#/components/schemas/Metadata"}, "spec": _inline(spec)}
    schema = {"type": "object", "required": ["metadata"] if required else [], "properties": properties}
    return {"requestBody": {"required": required, "content": _json(schema)}}


def install(app: FastAPI) -> None:
    """Complete the description, which is made once."""
    describe = app.openapi

    def openapi() -> Json:
        if app.openapi_schema is None:
            _complete(describe())
        return describe()

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's own documentation extends it


def _complete(document: Json) -> None:
    components = document.setdefault("components", {})
    components["schemas"] = {**components.get("schemas", {}), **_schemas(), "Refusal": REFUSAL}
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    components["responses"] = {"Refused": REFUSED}
    components["securitySchemes"] = SCHEMES
    document["security"] = [{"token": []}]
    for operations in document["paths"].values():
        for operation in operations.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                components["schemas"] |= _hoisted(content["schema"])
            operation["responses"].pop("422", None)  # FastAPI's own refusal; ours are all alike
            operation["responses"] |= {status: {"$ref": "#/components/responses/Refused"} for status in ("4XX", "5XX")}


def _body(kind: Kind) -> Json:
    properties = _envelope(kind) | {"resource_version": {"type": ["string", "null"]}}
    return {"required": True, "content": _json({"type": "object", "required": ["metadata"], "properties": properties})}


def _answer(kind: Kind) -> Json:
    properties = _envelope(kind) | {
        "system_metadata": {"type": "object"},
        "resource_version": {"type": "string"},
        "revision": {"type": "integer", "description": "The tenant's revision of this write."},
    }
    return {"content": _json({"type": "object", "title": kind.type.__name__, "properties": properties})}


def _envelope(kind: Kind) -> Json:
    return {"metadata": {"$ref": "#/components/schemas/Metadata"}, "spec": {"$ref": f"#/components/schemas/{kind.type.__name__}"}}


def _inline(of: type[Value]) -> Json:
    """What it refers to comes with it, for `_hoisted`."""
    return of.model_json_schema(ref_template="#/components/schemas/{model}")


def _hoisted(schema: Json) -> Json:
    """Takes out what an inline schema refers to, and returns it."""
    found = schema.pop("$defs", {})
    for inner in schema.get("properties", {}).values():
        found |= inner.pop("$defs", {})
    return dict(found)


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _schemas() -> Json:
    types: list[type[Value]] = [Metadata, *(kind.type for kind in KINDS.values())]
    _, document = models_json_schema([(type_, "validation") for type_ in types], ref_template="#/components/schemas/{model}")
    schemas: Json = document["$defs"]
    return schemas
