"""A label selector over sites. Unlike in the F5 XC API the selector may be changed."""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from controlplane.resources.base import Resource, Value
from controlplane.resources.selector import Selector
from controlplane.resources.site import SiteType


def _is_selector(text: str) -> str:
    Selector.parse(text)
    return text


Expression = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_is_selector)]


class LabelSelector(Value):
    expressions: tuple[Expression, ...] = Field(min_length=1, max_length=1)

    @property
    def selector(self) -> Selector:
        return Selector.parse(self.expressions[0])


class VirtualSite(Resource):
    kind: ClassVar[str] = "virtual_site"

    site_type: SiteType
    site_selector: LabelSelector
