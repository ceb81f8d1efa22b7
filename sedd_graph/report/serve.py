"""The page of ``sedd-graph serve``, on which a model is tried: one HTML text with its script and style, without links.

All text of users and of the model is put in as text by the page's script. The server sends a Content Security Policy that
allows this script and style alone, and requests to the server itself.
"""

from __future__ import annotations

from sedd_graph.report.render import page_policy, render

__all__ = ["serve_page"]


def serve_page(name: str) -> tuple[str, str]:
    """Return the page, and the Content Security Policy to send with it.

    Args:
        name: Name of the model.
    """
    script = render("player.js") + render("theme.js") + render("serve.js")
    style = render("palette.css") + render("player.css") + render("view.css") + render("serve.css")
    page = render("serve.html", mark="sedd-graph serve", name=name, script=script, style=style)
    return str(page), page_policy(script, style)
