"""Sites that tunnel to each other directly: all of them, or spokes to hubs."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from controlplane.resources.base import Choice, Empty, ObjectRef, Resource, Unless, Value, VirtualSiteRef
from controlplane.resources.site import TunnelType

_INVALID, _HUB, _SPOKE, _FULL = (f"SITE_MESH_GROUP_TYPE_{name}" for name in ("INVALID", "HUB_FULL_MESH", "SPOKE", "FULL_MESH"))
_CHOICES = {_HUB: "hub_mesh", 1: "hub_mesh", _SPOKE: "spoke_mesh", 2: "spoke_mesh", _FULL: "full_mesh", 3: "full_mesh"}
"""Of the deprecated `type`."""
_PLANES = Choice("mesh_type_choice", ("control_and_data_plane_mesh", "data_plane_mesh"), default="data_plane_mesh")


class HubGroupRef(ObjectRef):
    refers_to = "site_mesh_group"


class FullMesh(Value):
    choices = (_PLANES,)

    control_and_data_plane_mesh: Empty | None = None
    data_plane_mesh: Empty | None = None


class HubMesh(FullMesh):
    """Hubs are meshed fully among themselves."""


class SpokeMesh(FullMesh):
    hub_mesh_group: HubGroupRef
    """Whose members the spokes reach directly."""


class SiteMeshGroup(Resource):
    kind: ClassVar[str] = "site_mesh_group"
    choices = (
        Choice("mesh_choice", ("full_mesh", "hub_mesh", "spoke_mesh"), required=True),
        Choice("re_fallback_choice", ("disable_re_fallback", "enable_re_fallback"), default="disable_re_fallback"),
        Choice(
            "multi_cluster_services_choice",
            ("disable_multi_cluster_services", "enable_multi_cluster_services"),
            default="disable_multi_cluster_services",
        ),
        Choice("bfd_choice", off=("bfd_disabled",), refused={"bfd_enabled": "BFD is not supported: peers are probed"}),
    )
    unsupported = {
        "type": Unless("is not a type of site mesh group", (_INVALID, *_CHOICES)),
        "hub": "belongs to a spoke, which names one group of hubs; make a group for each",
    }

    full_mesh: FullMesh | None = None
    hub_mesh: HubMesh | None = None
    spoke_mesh: SpokeMesh | None = None
    virtual_site: tuple[VirtualSiteRef, ...] = Field((), max_length=1)
    """Whose sites are members: hubs of a hub mesh, spokes of a spoke mesh."""
    disable_re_fallback: Empty | None = None
    enable_re_fallback: Empty | None = None
    disable_multi_cluster_services: Empty | None = None
    enable_multi_cluster_services: Empty | None = None
    """Whoever may create a ServiceExport in one of the sites' clusters makes that service callable in all the others. Unlike in the F5 XC API."""
    tunnel_type: TunnelType = "SITE_TO_SITE_TUNNEL_IPSEC_OR_SSL"

    @classmethod
    def modernised(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """`type` and `hub` are said as a mesh choice; what does not fit one stays, and is refused."""
        wanted = raw.get("type")
        choice = _CHOICES.get(wanted) if isinstance(wanted, str | int) and not isinstance(wanted, bool) else None
        if choice is None:
            return raw
        modern = dict(raw) if raw.get(choice) is not None else {**raw, choice: {}}
        hubs, mesh = raw.get("hub"), modern[choice]
        if choice == "spoke_mesh" and isinstance(hubs, list) and len(hubs) == 1 and mesh == {}:
            modern |= {"spoke_mesh": {"hub_mesh_group": hubs[0]}, "hub": None}
        return modern
