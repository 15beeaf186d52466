"""The HTTP side of an agent: OpenAI's API, what the mesh knows, metrics.

A handler that is cancelled is a client that left: its sessions are stopped on the way out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import msgspec
from aiohttp import web

from mesh.errors import ConfigError, InputError, MeshError, RequestError
from mesh.session_events import Finish
from mesh.types import SessionId
from node_agent.adapters.control_loop import ControlLoop, check_version
from node_agent.adapters.metrics import AgentMetrics
from node_agent.adapters.planner import RoutePlanner
from node_agent.adapters.session_driver import SessionDriver, SessionHandle
from node_agent.ingress.answer import Choice, Envelope, error_body, error_of, usage_of
from node_agent.ingress.resumption import event_id, parse_event_id
from node_agent.ingress.schema import Generation, parse_chat, parse_completion
from node_agent.ingress.text import TextAssembler

log = logging.getLogger(__name__)

BODY_MAX = 4 << 20
_SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class Job:
    """A request on its way: sessions, one a choice, and the text that becomes of them."""

    def __init__(
        self,
        generation: Generation,
        envelope: Envelope,
        choices: list[Choice],
        handles: list[SessionHandle],
        prompt_tokens: int,
        cached_tokens: int = 0,
        seen: int = 0,
    ) -> None:
        """``seen``: tokens that the client has already; what they gave is not sent again."""
        self.seen = seen
        self.generation, self.envelope = generation, envelope
        self.cached_tokens = cached_tokens
        self.choices, self.handles, self.prompt_tokens = choices, handles, prompt_tokens

    @property
    def logprobs(self) -> bool:
        return self.generation.sampling.logprobs >= 0

    def usage(self) -> dict[str, Any]:
        made = [h.session.speculation for h in self.handles if h.session.speculation is not None]
        guesses, right = sum(s.made for s in made), sum(s.right for s in made)
        tokens = sum(c.tokens for c in self.choices)
        return usage_of(self.prompt_tokens, tokens, self.cached_tokens, guesses, right)

    def stop(self) -> None:
        """Free every session that still runs."""
        for handle in self.handles:
            handle.stop()

    async def texts(self) -> AsyncIterator[tuple[Choice, str, str | None]]:
        """Choice, text and, with the last text of a choice, its finish reason."""
        if len(self.handles) == 1:
            async for text, finish in self._texts_of(0):
                yield self.choices[0], text, finish
            return
        merged: asyncio.Queue[tuple[int, str, str | None, MeshError | None]] = asyncio.Queue(64)

        async def pump(index: int) -> None:
            try:
                async for text, finish in self._texts_of(index):
                    await merged.put((index, text, finish, None))
            except MeshError as error:
                await merged.put((index, "", None, error))

        tasks = [asyncio.create_task(pump(i)) for i in range(len(self.handles))]
        try:
            running = len(tasks)
            while running:
                index, text, finish, error = await merged.get()
                if error is not None:
                    raise error
                running -= finish is not None
                yield self.choices[index], text, finish
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _texts_of(self, index: int) -> AsyncIterator[tuple[str, str | None]]:
        choice, handle = self.choices[index], self.handles[index]
        async for token in handle.tokens():
            piece, stopped = choice.push(token)
            if stopped:
                break
            if choice.tokens <= self.seen:
                choice.skip()
            elif piece or self.logprobs:
                yield piece, None
        else:
            piece, stopped = choice.flush()
        if stopped:
            handle.stop(Finish.STOP)
        choice.finish = (Finish.STOP if stopped else handle.finish or Finish.STOP).value
        yield piece, choice.finish


class Jobs(Protocol):
    """Starts what clients ask for; raises ``MeshError`` with what to say."""

    async def start(self, generation: Generation, class_name: str = "") -> Job: ...

    async def resume(self, event: str) -> Job: ...


CLASS_HEADER = "X-Mesh-Class"


class HttpApi:
    """Routes of the API over what the agent gives it."""

    def __init__(
        self,
        jobs: Jobs,
        routes: RoutePlanner,
        drain: Callable[[str, bool], Awaitable[dict[str, Any]]],
        models: Callable[[], list[dict[str, Any]]],
        nodes: Callable[[], dict[str, Any]],
        control: ControlLoop,
        driver: SessionDriver,
        metrics: AgentMetrics,
        before_metrics: Callable[[], None],
    ) -> None:
        self._drain, self._routes = drain, routes
        self._jobs, self._models, self._nodes = jobs, models, nodes
        self._control = control
        self._driver, self._metrics, self._before_metrics = driver, metrics, before_metrics
        self._runner: web.AppRunner | None = None

    async def listen(self, host: str, port: int) -> int:
        """Serve; returns the port. Raises ``OSError`` when it is taken."""
        app = web.Application(client_max_size=BODY_MAX, middlewares=[self._errors])
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_get("/v1/models/{name:.+}", self._one_model)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/mesh/v1/nodes", self._list_nodes)
        app.router.add_post("/mesh/v1/drain", self._drain_node)
        app.router.add_get("/mesh/v1/route", self._route)
        app.router.add_get("/mesh/v1/plan", self._plan)
        app.router.add_post("/mesh/v1/plan", self._plan)
        app.router.add_put("/mesh/v1/policy", self._apply)
        app.router.add_get("/mesh/v1/sessions", self._sessions)
        app.router.add_get("/mesh/v1/sessions/{id}", self._session)
        app.router.add_get("/mesh/v1/sessions/{id}/stream", self._resume)
        app.router.add_get("/metrics", self._show_metrics)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, reuse_address=True)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        """Stop listening and end what is open."""
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except MeshError as error:
            return self._error(error)
        except web.HTTPRequestEntityTooLarge:
            body = error_body(
                f"the body is over {BODY_MAX} bytes; send less", "invalid_request_error", "too_large", None
            )
            return web.json_response(body, status=413)
        except web.HTTPException as error:
            message = f"{request.method} {request.path}: {error.reason}"
            body = error_body(message, "invalid_request_error", "unknown_url", None)
            return web.json_response(body, status=error.status)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            body = error_body("internal error; see the agent's log", "server_error", None, None)
            return web.json_response(body, status=500)

    def _error(self, error: MeshError) -> web.Response:
        if isinstance(error, ConfigError):
            error = RequestError(str(error), param="policy")
        status, body, retry_after_s = error_of(error)
        headers = {} if retry_after_s is None else {"Retry-After": str(math.ceil(retry_after_s))}
        if isinstance(error, InputError) and not isinstance(error, RequestError):
            status = 503  # our store is broken, not the request
        if status >= 500:
            log.warning("request failed: %s", error)
        return web.json_response(body, status=status, headers=headers)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_chat(await request.read()))

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_completion(await request.read()))

    async def _generate(self, request: web.Request, generation: Generation) -> web.StreamResponse:
        job = await self._jobs.start(generation, request.headers.get(CLASS_HEADER, ""))
        try:
            if generation.stream:
                return await self._stream(request, job)
            async for _ in job.texts():
                pass
            choices = [job.envelope.message(c, job.logprobs) for c in job.choices]
            return _json(job.envelope.whole(choices, job.usage()))
        finally:
            job.stop()

    async def _resume(self, request: web.Request) -> web.StreamResponse:
        """A stream that broke off goes on after the event that is named."""
        session = request.match_info["id"]
        event = request.headers.get("Last-Event-ID", request.query.get("last_event_id", session))
        if parse_event_id(event)[0] != parse_event_id(session)[0]:
            raise RequestError(
                f"Last-Event-ID {event!r} is not of session {session!r}", param="Last-Event-ID"
            )
        job = await self._jobs.resume(event)
        try:
            return await self._stream(request, job)
        finally:
            job.stop()

    async def _stream(self, request: web.Request, job: Job) -> web.StreamResponse:
        envelope, generation = job.envelope, job.generation
        texts = job.texts()
        # Refusals come before the first token: they deserve a status of their own.
        first = await anext(texts, None)
        response = web.StreamResponse(headers=_SSE_HEADERS)
        await response.prepare(request)
        usage: Any = {} if generation.include_usage else None
        opened: set[int] = set()

        async def send(choice: Choice, text: str, finish: str | None) -> None:
            role = generation.chat and choice.index not in opened and not job.seen
            opened.add(choice.index)
            delta = envelope.delta(choice, text, finish, job.logprobs, role)
            session = job.handles[job.choices.index(choice)].session.order.session
            await _event(response, envelope.chunk([delta], usage), event_id(session, choice.tokens))

        try:
            if first is not None:
                await send(*first)
            async for choice, text, finish in texts:
                await send(choice, text, finish)
            if generation.include_usage:
                await _event(response, envelope.chunk([], job.usage()))
            await response.write(b"data: [DONE]\n\n")
        except MeshError as error:
            await _event(response, error_of(error)[1])
        finally:
            await texts.aclose()  # type: ignore[attr-defined]
        with contextlib.suppress(ConnectionError):
            await response.write_eof()
        return response

    async def _list_models(self, request: web.Request) -> web.Response:
        return _json({"object": "list", "data": self._models()})

    async def _one_model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        for model in self._models():
            if model["id"] == name:
                return _json(model)
        raise RequestError(
            f"the model {name!r} does not exist here", param="model", code="model_not_found", status=404
        )

    async def _list_nodes(self, request: web.Request) -> web.Response:
        return _json(self._nodes())

    async def _route(self, request: web.Request) -> web.Response:
        query = request.query
        asked = query.get("model", ""), query.get("percentile", "p50"), query.get("class", "")
        return _json(self._routes.explain(*asked))

    async def _drain_node(self, request: web.Request) -> web.Response:
        try:
            body = msgspec.json.decode(await request.read(), type=_DrainBody)
        except msgspec.MsgspecError as error:
            raise RequestError(f"the body is not as it should be: {error}") from None
        return _json(await self._drain(body.node, not body.undo))

    async def _plan(self, request: web.Request) -> web.Response:
        if request.method == "GET":
            return _json(await self._control.report())
        body = await _policy_body(request)
        return _json(await self._control.report(body.policy, body.name))

    async def _apply(self, request: web.Request) -> web.Response:
        body = await _policy_body(request)
        return _json(self._control.apply(body.policy, body.name, check_version(body.version)))

    async def _sessions(self, request: web.Request) -> web.Response:
        return _json(self._driver.report())

    async def _session(self, request: web.Request) -> web.Response:
        wanted = request.match_info["id"]
        name = wanted.removeprefix("chatcmpl-").removeprefix("cmpl-")
        trace = self._driver.traces.get(SessionId(name))
        if trace is None:
            raise RequestError(f"no session {wanted!r} is known here", code="not_found", status=404)
        return _json(trace.report())

    async def _show_metrics(self, request: web.Request) -> web.Response:
        self._before_metrics()
        return web.Response(
            body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def _health(self, request: web.Request) -> web.Response:
        return _json({"status": "draining" if self._driver.draining else "ok", "sessions": len(self._driver)})


class _DrainBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``node`` by id or name."""

    node: str
    undo: bool = False


class _PolicyBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``policy`` is the TOML, ``name`` what errors call it, ``version`` what it replaces."""

    policy: str
    name: str = "policy"
    version: Any = None


async def _policy_body(request: web.Request) -> _PolicyBody:
    try:
        return msgspec.json.decode(await request.read(), type=_PolicyBody)
    except msgspec.MsgspecError as error:
        raise RequestError(f"the body is not as it should be: {error}") from None


def new_envelope(job_id: SessionId, model: str, chat: bool, created: int) -> Envelope:
    """An envelope whose id names the first choice's session."""
    prefix = "chatcmpl-" if chat else "cmpl-"
    return Envelope(prefix + job_id, created, model, chat)


def new_choice(index: int, model: Any, stop: tuple[str, ...]) -> Choice:
    """An empty choice."""
    return Choice(index, model, TextAssembler(stop))


def _json(body: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")


async def _event(response: web.StreamResponse, body: Any, name: str = "") -> None:
    head = f"id: {name}\n".encode() if name else b""
    await response.write(head + b"data: " + msgspec.json.encode(body) + b"\n\n")
