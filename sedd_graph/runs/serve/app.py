"""The web application: its endpoints, and the way of a request through it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from sedd_graph.report.serve import serve_page
from sedd_graph.runs.serve.answers import Answer, event
from sedd_graph.runs.serve.guard import Guard, error_response, read_body
from sedd_graph.runs.serve.jobs import Job, Mailbox
from sedd_graph.runs.serve.metrics import Metrics
from sedd_graph.runs.serve.model import ServedModel
from sedd_graph.runs.serve.reading import DEFAULT_TOKENS, read_rows, read_settings
from sedd_graph.runs.serve.wire import Completion, Outcome, Refused, read_completion
from sedd_graph.runs.serve.worker import Worker

__all__ = ["Service"]

LOG = logging.getLogger("sedd_graph.serve")
PING_S = 15.0
"""Seconds of silence after which a comment is sent in a stream, which proxies would otherwise close."""


class _Stream(StreamingResponse):
    """Server-sent events. ``ended`` is called when the client has them all, or has gone."""

    def __init__(self, content: AsyncGenerator[bytes, None], ended: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self._events, self._ended = content, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()
            await self._events.aclose()


class Service:
    """The endpoints of a served model, and its sampling thread.

    Args:
        model: The model.
        hosts: Names by which clients may address the server; None: any.
        keys: Keys of which a client must send one; empty: none is needed.

    Attributes:
        app: The ASGI application. Its lifespan starts and stops the sampling thread.
        metrics: Counters of the server.
        open: Number of completion requests that are being answered.
        stopping: Whether new requests are refused.
    """

    def __init__(self, model: ServedModel, *, hosts: Collection[str] | None = None, keys: Sequence[str] = ()) -> None:
        self.model, self.metrics, self.open, self.stopping, self._locked = model, Metrics(), 0, False, bool(keys)
        self.worker = Worker(model, self.metrics)
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="reading")
        self._page, self._policy = serve_page(model.name)
        self._started = int(time.time())
        routes = [
            Route("/", self._home),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/settings", self._settings),
            Route("/v1/completions", self._completions, methods=["POST"]),
        ]
        self.app = Starlette(
            routes=routes,
            lifespan=self._lifespan,
            exception_handlers={HTTPException: _no_such},
            middleware=[Middleware(Guard, hosts=hosts, keys=keys)],
        )
        self.app.router.redirect_slashes = False

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        try:
            yield
        finally:
            self.worker.stop()
            await asyncio.to_thread(self.worker.join, 60.0)
            self._readers.shutdown(wait=False, cancel_futures=True)

    def refuse(self) -> None:
        """Refuse new requests from now on; those that were accepted are answered."""
        self.stopping = True
        self.worker.refuse()

    # -- endpoints ------------------------------------------------------------------------------------------------

    async def _home(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers={"content-security-policy": self._policy})

    async def _health(self, request: Request) -> Response:
        alive = self.worker.is_alive()
        status = "stopping" if self.stopping else "ready" if alive else "failed"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def _described(self) -> dict[str, Any]:
        return {"id": self.model.name, "object": "model", "created": self._started, "owned_by": "sedd_graph"}

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        self._require_name(request.path_params["name"])
        return JSONResponse(self._described())

    def _require_name(self, name: str | None) -> None:
        if name not in (None, self.model.name):
            message = f"there is no model {str(name)[:100]!r}; this server has {self.model.name!r}"
            raise Refused(404, message, param="model", code="model_not_found")

    async def _settings(self, request: Request) -> Response:
        model, limits = self.model, self.model.limits
        process, found = model.process, []
        for name in model.runs:
            sampler: Any = model.runs[name].engine.process
            config = sampler.sampler.config
            found.append(
                {
                    "name": name,
                    "steps": sampler.steps,
                    "temperature": getattr(config, "temperature", None),
                    "top_p": getattr(config, "top_p", None),
                }
            )
        infilling = model.infilling
        return JSONResponse(
            {
                "model": model.name,
                "process": process.describe(),
                "weights": model.run.weights,
                "sampler": model.sampler,
                "samplers": found,
                "steps": process.steps,
                "max_tokens": DEFAULT_TOKENS,
                "length": model.run.report.data.length,
                "hole": None if infilling is None else "[[]]" if process.chooses_lengths else "[[N]]",
                "infilling": infilling is not None,
                "infilling_exact": infilling is not None and infilling.exact,
                "infilling_how": None if infilling is None else infilling.how,
                "matching": "matching" in model.takes,
                "forbid": "forbid" in model.takes,
                "allow": "allow" in model.takes,
                "drafts": model.playable,
                "block": process.block,
                "chooses_lengths": process.chooses_lengths,
                "key": self._locked,
                "limits": {
                    "length": limits.length,
                    "steps": limits.steps,
                    "choices": limits.choices,
                    "body": limits.body,
                    "timeout": limits.timeout,
                },
            }
        )

    async def _completions(self, request: Request) -> Response:
        arrived, job, stream, why = time.monotonic(), None, None, ""
        outcome: Outcome = "failed"
        self.open += 1
        try:
            self._require_room()
            async with asyncio.timeout(self.model.limits.timeout):
                body = await read_body(request.receive, request.headers, limit=self.model.limits.body)
                completion = await self._in_thread(read_completion, body)
                self._require_name(completion.model)
                answer, job = await self._accepted(completion, arrived)
            if completion.stream:
                stream = self._stream(answer, job, arrived)
                return stream
            found = await self._answered(answer, job, request.receive)
            outcome = "cancelled" if found is None else "ok"
            return Response(status_code=499) if found is None else JSONResponse(found)
        except TimeoutError:
            outcome, why = "timeout", "504"
            return error_response(self._late())
        except Refused as error:
            outcome, why = "failed" if error.status >= 500 else "refused", f"{error.status} {error.code or 'invalid'}"
            return error_response(error)
        finally:
            if stream is None:  # a stream ends later
                if job is not None:
                    self.worker.cancel(job)
                self._count(job, outcome, arrived, why)

    def _require_room(self) -> None:
        """Raise :class:`Refused` if the server stops, or answers as many requests as it may hold."""
        if self.stopping:
            raise Refused(503, "the server is stopping", code="stopping", retry_after=1)
        if self.open > self.model.limits.queue + self.model.limits.batch:
            raise Refused(429, "too many requests are open", code="queue_full", retry_after=1)

    def _count(self, job: Job | None, outcome: Outcome, arrived: float, why: str = "") -> None:
        """Count a request that ended, and log it."""
        self.open -= 1
        seconds = time.monotonic() - arrived
        self.metrics.count(outcome, seconds)
        LOG.info("%s %s %.3f s %s", "request" if job is None else job.name, outcome, seconds, why)

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)

    def _late(self) -> Refused:
        return Refused(504, f"no answer within {self.model.limits.timeout:g} seconds", code="timeout")

    async def _accepted(self, completion: Completion, arrived: float) -> tuple[Answer, Job]:
        """Make the job of a request and put it into the queue. Raises :class:`Refused`."""
        model = self.model
        if completion.drafts and not model.playable:
            raise Refused(400, "this model has no drafts: leave drafts out", param="drafts")
        seed = secrets.randbits(48) if completion.seed is None else completion.seed
        settings = await self._in_thread(read_settings, model, completion)
        if completion.drafts and settings.conditions is not None and settings.conditions.particles > 1:
            raise Refused(400, "with particles there are no drafts: leave drafts out", param="drafts")
        rows = await self._in_thread(read_rows, model, completion, settings, seed)
        job = Job(
            name=f"cmpl-{secrets.token_hex(12)}",
            rows=rows,
            settings=settings,
            mailbox=Mailbox(asyncio.get_running_loop()),
            stops=completion.stops(),
            drafts=bool(completion.drafts),
            partial=bool(completion.stream) and model.process.block is not None,
            deadline=arrived + model.limits.timeout,
        )
        answer = Answer(model, completion, job, seed, self.metrics)
        self.worker.submit(job)
        return answer, job

    async def _answered(self, answer: Answer, job: Job, receive: Receive) -> dict[str, Any] | None:
        """Return the answer; None if the client has gone before. Raises :class:`Refused` or TimeoutError."""
        whole, gone = asyncio.ensure_future(answer.whole()), asyncio.ensure_future(_gone(receive))
        try:
            left = max(0.0, job.deadline - time.monotonic())
            done, _ = await asyncio.wait((whole, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise TimeoutError
            return await whole if whole in done else None
        finally:
            for task in (whole, gone):
                task.cancel()

    def _stream(self, answer: Answer, job: Job, arrived: float) -> _Stream:
        """Return the answer as a stream, which counts as open until its client has it all, or has gone."""
        outcomes: list[Outcome] = ["cancelled"]

        def ended() -> None:
            self.worker.cancel(job)
            self._count(job, outcomes[-1], arrived, "stream")

        return _Stream(self._events(answer, job, outcomes), ended)

    async def _events(self, answer: Answer, job: Job, outcomes: list[Outcome]) -> AsyncGenerator[bytes, None]:
        """Yield the events of an answer, the last of which may be an error, and append how it ended to ``outcomes``."""
        events = answer.events()
        pending = asyncio.ensure_future(anext(events, None))
        try:
            while True:
                left = job.deadline - time.monotonic()
                done, _ = await asyncio.wait((pending,), timeout=max(0.0, min(PING_S, left)))
                if not done and left <= PING_S:
                    raise TimeoutError
                if not done:
                    yield b": waiting\n\n"
                    continue
                if (found := pending.result()) is None:
                    outcomes.append("ok")
                    return
                yield found
                pending = asyncio.ensure_future(anext(events, None))
        except TimeoutError:
            outcomes.append("timeout")
            yield event(self._late().body())
        except Refused as error:
            outcomes.append("failed" if error.status >= 500 else "refused")
            yield event(error.body())
        finally:
            pending.cancel()
            await asyncio.wait((pending,))
            await events.aclose()


async def _gone(receive: Receive) -> None:
    """Wait until the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _no_such(request: Request, error: Exception) -> Response:
    """Return the answer to a request for a path or with a method that does not exist."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 405:
        allowed = (error.headers or {}).get("Allow", "") if isinstance(error, HTTPException) else ""
        found = error_response(Refused(405, f"{request.url.path} takes {allowed}", code="method_not_allowed"))
        found.headers["allow"] = allowed
        return found
    return error_response(Refused(status, f"there is no {request.url.path[:200]}", code="not_found"))
