"""The templates of the report. Every value that they are given is escaped, unless it is itself the output of a template."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["render"]

_ENVIRONMENT = Environment(
    loader=PackageLoader("sedd_graph.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"separators": (",", ":")}


def render(template: str, **values: Any) -> Markup:
    """Return ``template`` of ``sedd_graph/report/templates`` filled with ``values``, as HTML that is not escaped again."""
    return Markup(_ENVIRONMENT.get_template(template).render(**values))
