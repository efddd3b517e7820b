"""What tests with a real Envoy share."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 20.0
"""Of a condition that is expected within much less."""


async def until(condition: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """The first true value of `condition` (awaited if need be); fails after the patience."""
    async with asyncio.timeout(patience_s):
        while True:
            value = condition()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return value
            await asyncio.sleep(0.01)


def bare_bootstrap(run_dir: Path) -> dict[str, Any]:
    """The least that lets Envoy take everything from the agent."""

    def pipe(name: str) -> dict[str, Any]:
        return {"pipe": {"path": str(run_dir / name), "mode": 0o600}}

    ads = {"envoy_grpc": {"cluster_name": "xds"}}
    delta = {"resource_api_version": "V3", "ads": {}, "initial_fetch_timeout": "0s"}
    http2 = {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    }
    endpoint = {"endpoint": {"address": {"pipe": {"path": str(run_dir / "xds.sock")}}}}
    xds = {
        "name": "xds",
        "type": "STATIC",
        "typed_extension_protocol_options": http2,
        "load_assignment": {"cluster_name": "xds", "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
    return {
        "node": {"id": "n", "cluster": "c"},
        "admin": {"address": pipe("admin.sock")},
        "dynamic_resources": {
            "ads_config": {"api_type": "DELTA_GRPC", "transport_api_version": "V3", "grpc_services": [ads]},
            "cds_config": delta,
            "lds_config": delta,
        },
        "static_resources": {"clusters": [xds]},
    }
