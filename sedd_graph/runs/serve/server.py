"""Running the web application under uvicorn: address, keys, log, and a stop that loses no answer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import json
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.inputs.files import read_text
from sedd_graph.runs.serve.app import Service
from sedd_graph.runs.serve.model import ServedModel
from sedd_graph.runs.serve.wire import Refused

__all__ = ["Address", "Server", "is_loopback", "listen", "read_keys", "serve"]

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
LOG = logging.getLogger("sedd_graph.serve")
LAST_S = 2
"""Seconds that open connections have after the sampling thread was stopped."""


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a server listens: ``host`` and ``port``; port 0 is any free one."""

    host: str
    port: int


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def read_keys(path: Path) -> list[str]:
    """Read the keys of clients from a file, one on each line.

    Args:
        path: The file.

    Raises:
        UserError: The file cannot be read, or has no key.
    """
    keys = [line.strip() for line in read_text(path, limit=2**20).splitlines() if line.strip()]
    if not keys:
        raise UserError(f"{path}: has no key: write one on a line of its own")
    return keys


class _Protocol(H11Protocol):
    """HTTP protocol whose answer to what is no HTTP is JSON, too."""

    def send_400_response(self, msg: str) -> None:
        content = json.dumps(Refused(400, msg, code="invalid_http").body()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(content))), ("connection", "close")]
        for part in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=content),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """Server that, on SIGINT or SIGTERM, answers what it has accepted, and then ends with exit code 0.

    Meanwhile it refuses new requests. A second signal ends it at once.

    Args:
        config: Configuration of uvicorn.
        service: The application.
        grace: Seconds that accepted requests have after the signal.
        say: Function that prints a line for the user.
    """

    def __init__(self, config: uvicorn.Config, service: Service, grace: float, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self._service, self._grace, self._say, self._signals, self._until = service, grace, say, 0, 0.0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        await super().on_tick(counter)
        if self._signals and not self._service.stopping:
            self._service.refuse()
            self._until = asyncio.get_running_loop().time() + self._grace
            self._say(f"stopping    {self._service.open} requests are answered first; a second signal stops at once")
        if not self._service.stopping:
            return False
        late = asyncio.get_running_loop().time() > self._until
        if self._signals > 1 or late or not self._service.open:
            self._service.worker.stop()
            return True
        return False


def serve(
    model: ServedModel,
    sock: socket.socket,
    *,
    page: tuple[str, str],
    keys: Sequence[str],
    grace: float,
    say: Callable[[str], None],
    hosts: Sequence[str] = (),
) -> None:
    """Serve a model until SIGINT or SIGTERM.

    Args:
        model: The model.
        sock: Listening socket (:func:`listen`).
        page: The HTML of ``/``, and its Content Security Policy (:func:`sedd_graph.report.serve.serve_page`).
        keys: Keys of which a client must send one; empty: none is needed.
        grace: Seconds that accepted requests have after the signal.
        say: Function that prints a line for the user.
        hosts: Further names by which clients may address a server that only this machine reaches, such as that of a
            proxy.
    """
    host, port = sock.getsockname()[:2]
    names = {*LOOPBACK_NAMES, host, *(name.lower() for name in hosts)} if is_loopback(host) else None
    service = Service(model, page=page, hosts=names, keys=keys)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    config = uvicorn.Config(
        service.app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=LAST_S,
        backlog=2048,
    )
    shown = f"[{host}]" if ":" in host else host
    say(f"serving     http://{shown}:{port} (try it in a browser; OpenAI's clients: base_url=http://{shown}:{port}/v1)")
    try:
        Server(config, service, grace, say).run(sockets=[sock])
    finally:
        LOG.removeHandler(handler)
    say("stopped")


def listen(address: Address) -> socket.socket:
    """Return a listening socket.

    Args:
        address: Where to listen.

    Raises:
        EnvironmentFault: The address is in use, is not one of this machine's, or may not be used.
    """
    try:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        return socket.create_server((address.host, address.port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise EnvironmentFault(
            f"cannot listen on {address.host}, port {address.port}: {reason}; choose another --host or --port"
        ) from None
