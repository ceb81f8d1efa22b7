"""Rendering of the report's Jinja templates. Values are HTML-escaped unless they are the output of another template."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["page_policy", "policy", "render"]

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


def policy(script: str, style: str) -> str:
    """Return the Content Security Policy of a page: its own script and style by their hashes, embedded images only."""
    return f"{_own_parts(script, style)} img-src data:; base-uri 'none'; form-action 'none'"


def page_policy(script: str, style: str) -> str:
    """Return the Content Security Policy of a page that a server sends and that sends requests to this server alone."""
    return (
        f"{_own_parts(script, style)} img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    )


def _own_parts(script: str, style: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    return f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}';"
