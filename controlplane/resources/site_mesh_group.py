"""Sites that tunnel to each other directly."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from controlplane.resources.base import Choice, Empty, Resource, Unless, Value, VirtualSiteRef

HUBS = "hub and spoke meshes are not supported yet"

_TYPE_FULL_MESH = ("SITE_MESH_GROUP_TYPE_FULL_MESH", 3)


class FullMesh(Value):
    choices = (
        Choice(
            "full_mesh_choice",
            ("control_and_data_plane_mesh", "data_plane_mesh"),
            default="data_plane_mesh",
        ),
    )

    control_and_data_plane_mesh: Empty | None = None
    data_plane_mesh: Empty | None = None


class SiteMeshGroup(Resource):
    kind: ClassVar[str] = "site_mesh_group"
    choices = (
        Choice("mesh_choice", ("full_mesh",), required=True, refused={"hub_mesh": HUBS, "spoke_mesh": HUBS}),
        Choice("re_fallback_choice", ("disable_re_fallback", "enable_re_fallback"), default="disable_re_fallback"),
        Choice("bfd_choice", off=("bfd_disabled",), refused={"bfd_enabled": "BFD is not supported: peers are probed"}),
    )
    unsupported = {
        "type": Unless(HUBS, ("SITE_MESH_GROUP_TYPE_INVALID", *_TYPE_FULL_MESH)),
        "hub": HUBS,
        "tunnel_type": Unless("tunnels are TLS", ("SITE_TO_SITE_TUNNEL_IPSEC_OR_SSL", "SITE_TO_SITE_TUNNEL_SSL", 2)),
    }

    full_mesh: FullMesh | None = None
    virtual_site: tuple[VirtualSiteRef, ...] = Field((), max_length=1)
    """Whose sites are members."""
    disable_re_fallback: Empty | None = None
    enable_re_fallback: Empty | None = None

    @classmethod
    def modernised(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        if raw.get("type") in _TYPE_FULL_MESH and raw.get("full_mesh") is None:
            return {**raw, "full_mesh": {}}
        return raw
