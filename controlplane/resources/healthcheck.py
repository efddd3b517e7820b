"""How a site finds out whether an origin server of its own is healthy."""

from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator

from controlplane.resources.base import Choice, Empty, Flag, Resource, Value, Whole
from controlplane.resources.scalars import EditableHeaderName, HeaderText, Hexadecimal, HostHeader, Path, StatusRange


def _jitter(percent: int) -> int:
    if percent != 0 and not 10 <= percent <= 50:
        raise ValueError("should be 0, or 10 to 50")
    return percent


class HttpHealthCheck(Value):
    choices = (Choice("host_header_choice", ("use_origin_server_name", "host_header"), default="use_origin_server_name"),)

    path: Path
    use_origin_server_name: Empty | None = None
    host_header: HostHeader | None = None
    headers: dict[EditableHeaderName, HeaderText] = Field({}, max_length=16)
    request_headers_to_remove: tuple[EditableHeaderName, ...] = Field((), max_length=16)
    use_http2: Flag = False
    expected_status_codes: tuple[StatusRange, ...] = Field((), max_length=16)
    """Empty means 200."""


class TcpHealthCheck(Value):
    send_payload: Hexadecimal = ""
    expected_response: Hexadecimal = ""

    @model_validator(mode="after")
    def response_follows_a_payload(self) -> Self:
        if self.expected_response and not self.send_payload:
            raise ValueError("expected_response needs a send_payload")
        return self


class Healthcheck(Resource):
    kind: ClassVar[str] = "healthcheck"
    choices = (
        Choice(
            "health_check",
            ("http_health_check", "tcp_health_check"),
            required=True,
            refused={
                "udp_icmp_health_check": "UDP health checks are not supported",
                "dns_health_check": "DNS health checks are not supported",
            },
        ),
    )
    unsupported = {"jitter": "is not supported: give jitter_percent"}

    http_health_check: HttpHealthCheck | None = None
    tcp_health_check: TcpHealthCheck | None = None
    interval: Whole = Field(ge=1, le=600)
    """Seconds, as is `timeout`."""
    timeout: Whole = Field(ge=1, le=600)
    healthy_threshold: Whole = Field(ge=1, le=16)
    unhealthy_threshold: Whole = Field(ge=1, le=16)
    jitter_percent: Annotated[Whole, AfterValidator(_jitter)] = 0
    """Of the interval: 0, or 10 to 50."""
