"""What every request passes before it is answered: who may ask, JSON errors, and headers of the answer."""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Collection, Mapping, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sedd_graph.runs.serve.wire import Refused

__all__ = ["Guard", "error_response", "read_body"]

LOG = logging.getLogger("sedd_graph.serve")
HEADERS = {
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""Headers of every answer."""
OPEN = ("/", "/health")
"""Paths that need no key."""


class Guard:
    """Middleware that refuses requests of unknown hosts and without a key, and turns errors into JSON.

    A page of another site may make a browser send requests to a server on the same machine. Names that are not the
    server's own (which DNS rebinding would need) are therefore refused, and so is a foreign ``Origin``.

    Args:
        app: The application.
        hosts: Names by which clients may address the server; None: any.
        keys: Keys of which a client must send one; empty: none is needed.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str] | None, keys: Sequence[str]) -> None:
        self._app, self._hosts, self._keys = app, hosts, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1002})
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(Headers(scope=scope), scope["path"])
            await self._app(scope, receive, sending)
        except Refused as error:
            await error_response(error)(scope, receive, sending)
        except Exception as error:
            LOG.error("%s %r failed", scope["method"], scope["path"], exc_info=error)
            if started:
                raise
            failed = Refused(500, "internal error: the server's log has more", code="internal_error")
            await error_response(failed)(scope, receive, sending)

    def _check(self, headers: Headers, path: str) -> None:
        """Raise :class:`Refused` if the client may not ask."""
        host = headers.get("host", "")
        name = re.sub(r":\d+$", "", host).strip("[]").lower()
        if self._hosts is not None and name not in self._hosts:
            raise Refused(403, "this server answers requests to its own address only", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refused(403, "this server answers no pages of other sites", code="wrong_origin")
        if not self._keys or path in OPEN:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        sent = key.strip().encode(errors="replace")
        right = [hmac.compare_digest(sent, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(right):
            raise Refused(401, "send a key of this server: Authorization: Bearer KEY", code="invalid_api_key")


def error_response(error: Refused) -> JSONResponse:
    """Return the answer to a request that is refused."""
    headers: Mapping[str, str] = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    if error.status == 401:
        headers = {"www-authenticate": "Bearer"}
    return JSONResponse(error.body(), error.status, headers=headers)


async def read_body(receive: Receive, headers: Headers, *, limit: int) -> bytes:
    """Read the body of a request.

    Args:
        receive: The request.
        headers: Its headers.
        limit: Largest size, in bytes.

    Raises:
        Refused: The body is larger, or is not declared as JSON.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "send JSON: Content-Type: application/json", code="unsupported_media_type")
    large = Refused(413, f"the body may have up to {limit:,} bytes", code="request_too_large")
    declared = headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
        raise large
    parts, size = list[bytes](), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the connection was closed", code="disconnected")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise large
        if not message.get("more_body", False):
            return b"".join(parts)
