"""What tests of the compilers share."""

import pytest
import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

from tests.golden_files import ROOT


@pytest.fixture(scope="session")
def certificate() -> str:
    """As `certificate_url`; the one of the golden case."""
    documents = yaml.safe_load_all((ROOT / "compile" / "https" / "intent.yaml").read_text())
    https = next(body for body in documents if body["kind"] == "http_loadbalancer")["spec"]["https"]
    return str(https["tls_parameters"]["tls_certificates"][0]["certificate_url"])
