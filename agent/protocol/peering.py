"""The small document that a gateway serves to its peers, over the tunnel and without the control plane."""

from typing import Annotated

from pydantic import Field

from agent.protocol.base import Message

PEER_AUTHORITY = "peers.isthmus"
"""`:authority` of the document's requests at a gateway."""
PEER_DOCUMENT_PATH = "/v1/exports"
PEER_HEALTH_PATH = "/v1/health"
PROBE_PATH_HEADER = "x-isthmus-probe-path"
"""At the probe listener: the path by which a request is to go, named as in `PeerHealth.path`. Without it, the one in use."""


_Id = Annotated[str, Field(max_length=64)]


class ExportState(Message):
    pool: str = Field(max_length=300)
    """Key of the export."""
    healthy: int = Field(ge=0, lt=1 << 31)
    """Healthy endpoints, bucketed down to a power of two; 0 means: do not use."""


class PeerDocument(Message):
    """Only exports that the asking peer may use."""

    site_id: _Id
    node_id: _Id
    reaches_you: bool | None = None
    """Whether the answering node reaches the asking site directly; None: not known. A peer that cannot is dialled from here, and keeps using that."""
    draining: bool = False
    exports: tuple[ExportState, ...]
