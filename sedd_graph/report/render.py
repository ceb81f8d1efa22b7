"""Rendering of the report's Jinja templates. Values are HTML-escaped unless they are the output of another template."""

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
    """Render a Jinja template of ``sedd_graph/report/templates``.

    Args:
        template: File name of the template.
        values: Values of the template's variables.

    Returns:
        HTML, marked as safe so that it is not escaped again.
    """
    return Markup(_ENVIRONMENT.get_template(template).render(**values))
