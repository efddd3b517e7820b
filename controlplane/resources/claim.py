"""Claims of load balancers on the listeners of sites."""

from typing import Literal, NamedTuple

from agent.protocol.items import Network

Protocol = Literal["http", "https", "tcp"]


class Place(NamedTuple):
    """What can be listened on once."""

    site_id: str
    network: Network
    address: str
    """A VIP; empty: the node's own address on that network."""
    port: int


class Claim(NamedTuple):
    """Two load balancers conflict if they claim the same place with different protocols or with the same domain."""

    site_id: str
    network: Network
    address: str
    port: int
    protocol: Protocol
    domain: str
    """Empty for tcp, which therefore has its place alone."""

    @property
    def place(self) -> Place:
        return Place(*self[:4])
