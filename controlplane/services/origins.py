"""Origin pools that TCP load balancers cannot use: refused when the two come together, whichever is written last."""

from collections.abc import Iterable
from operator import attrgetter
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.errors import FieldError, Invalid
from controlplane.resources.base import Stored
from controlplane.resources.normal import MAX_DETAILS
from controlplane.resources.origin_pool import OriginPool
from controlplane.resources.tcp_loadbalancer import TcpLoadBalancer
from controlplane.store import resources as store
from controlplane.store.refs import Referrer

_REMEDY = "give sni, or origin servers by DNS name alone, or skip_server_verification"


async def check(session: AsyncSession, tenant_id: UUID, load_balancer: Stored[Any]) -> None:
    """Raises `Invalid` if certificates of origins of its pools would have to be accepted whatever name is in them."""
    if not isinstance(load_balancer.spec, TcpLoadBalancer):
        return
    used = {weighted.pool.key for weighted in load_balancer.spec.origin_pools_weights if weighted.pool and weighted.weight}
    found = map(store.parsed, await store.find(session, tenant_id, "origin_pool", used))
    nameless = {pool.key for pool in found if not pool.spec.names_certificates}
    details = [
        FieldError(
            f"spec.origin_pools_weights[{index}].pool",
            f"origin_pool {weighted.pool.key} verifies certificates, but without a Host header nothing says for whom: {_REMEDY} there",
        )
        for index, weighted in enumerate(load_balancer.spec.origin_pools_weights)
        if weighted.pool and weighted.weight and weighted.pool.key in nameless
    ]
    _refuse(details)


async def check_pool(session: AsyncSession, tenant_id: UUID, pool: Stored[OriginPool], users: Iterable[Referrer]) -> None:
    """The same, of those that use a pool. Raises `Invalid`."""
    if pool.spec.names_certificates:
        return
    keys = [user.key for user in users if user.kind == TcpLoadBalancer.kind]
    found = sorted(map(store.parsed, await store.find(session, tenant_id, TcpLoadBalancer.kind, keys)), key=attrgetter("key"))
    _refuse(
        [
            FieldError(
                "spec.use_tls",
                f"verifies certificates, but tcp_loadbalancer {user.key} has no Host header that says for whom: {_REMEDY}",
            )
            for user in found
            if any(weighted.pool and weighted.pool.key == pool.key and weighted.weight for weighted in user.spec.origin_pools_weights)
        ]
    )


def _refuse(details: list[FieldError]) -> None:
    if details:
        raise Invalid(f"{details[0].field}: {details[0].description}", details[:MAX_DETAILS])
