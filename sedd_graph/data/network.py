"""Quick check that a network service can be reached; client libraries of such services may retry for minutes."""

from __future__ import annotations

import socket
import threading
import urllib.request
from urllib.parse import urlsplit

__all__ = ["unreachable"]


def unreachable(url: str, seconds: float = 3.0) -> str | None:
    """Return the reason why the host of ``url`` cannot be reached; None if it accepts a connection.

    Behind a proxy (``https_proxy`` and similar variables), the proxy is tried instead of the host.

    Args:
        url: Address of the service, such as ``https://huggingface.co``.
        seconds: Time limit in seconds for name resolution and connection together.
    """
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and parts.hostname and not urllib.request.proxy_bypass(parts.hostname):
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    place = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    reasons = [f"no answer within {seconds:g} s"]

    def connect() -> None:
        try:
            with socket.create_connection(place, timeout=seconds):
                reasons.clear()
        except OSError as error:
            reasons[:] = [error.strerror or str(error)]

    thread = threading.Thread(target=connect, daemon=True)  # name resolution has no time limit of its own
    thread.start()
    thread.join(seconds)
    return next(iter(reasons), None)
