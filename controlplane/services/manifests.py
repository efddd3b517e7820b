"""What installs an agent in a Kubernetes cluster: the overlays of `deploy/kubernetes/agent` as they were built, with a token."""

import json
from functools import cache
from importlib.resources import files
from typing import Literal

from controlplane.store.tokens import Token

Replicas = Literal["1", "3"]

_OVERLAYS: dict[Replicas, str] = {"1": "one-replica", "3": "three-replicas"}
_IMAGE = "image: isthmus-agent\n"
_END = "---\n"


def manifest(replicas: Replicas, token: Token, content: str, image: str) -> str:
    """YAML for `kubectl apply`. The token is in a Secret right after the namespace, so that the pods find it."""
    namespace, end, rest = _built(replicas).partition(_END)
    head = f"# The agent of site {token.site_name}, {replicas} node(s). Apply it before {token.expires_at:%Y-%m-%d %H:%M:%S %Z}.\n"
    return head + namespace + end + _secret(content) + end + rest.replace(_IMAGE, f"image: {json.dumps(image)}\n")


def _secret(content: str) -> str:
    return f"""apiVersion: v1
kind: Secret
metadata:
  labels:
    app.kubernetes.io/name: isthmus-agent
    app.kubernetes.io/part-of: isthmus
  name: isthmus-token
  namespace: isthmus
stringData:
  token: {json.dumps(content)}
type: Opaque
"""


@cache
def _built(replicas: Replicas) -> str:
    """Made by `make manifests`."""
    return (files("controlplane") / "installation" / f"{_OVERLAYS[replicas]}.yaml").read_text()
