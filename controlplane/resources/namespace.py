"""A folder of objects inside a tenant."""

from typing import ClassVar

from controlplane.resources.base import Resource


class Namespace(Resource):
    kind: ClassVar[str] = "namespace"
