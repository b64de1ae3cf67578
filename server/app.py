"""The ASGI application: routes, middleware, and error bodies in each API's format."""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias
from urllib.parse import quote

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from batching.events import Rejected, State
from server import replies
from server.callers import Caller
from server.http.errors import ApiError, internal
from server.http.middleware import AnswerBudget, ApiKey, BodyBudget, BrowserGuard, RequestId, allowed_hosts
from server.model.served_model import ServedModel, card
from server.observe.log import log_refusal
from server.observe.metrics import Metrics, Scrapes, scrape
from server.openai.anthropic import CountTokens, Messages, response_of, speaks_anthropic
from server.openai.chat import ChatCompletions
from server.openai.completions import Completions
from server.openai.endpoint import CLIENT_CLOSED, served_name
from server.openai.responses import InputTokens, Responses, no_response, stored_response
from server.openai.tokenize import Detokenize, Tokenize
from server.service import Service
from server.version import VERSION
from server.web.internal import ROUTES as INTERNAL
from server.web.pages import PAGE
from server.web.pages import ROUTES as DOCS

OPEN_PATHS = frozenset(
    {"/health", "/health/live", "/health/ready", "/metrics", *(route.path for route in [*DOCS, *PAGE])}
)
"""Paths that need no API key: probes and scrapers seldom have one, and documentation holds nothing secret."""

UNREAD_BYTES = 2**28
"""Memory for large answers that clients are slow to read."""

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]

ENDPOINTS: dict[str, Handler] = {
    "/chat/completions": ChatCompletions().handle,
    "/completions": Completions().handle,
    "/responses": Responses().handle,
    "/responses/input_tokens": InputTokens().handle,
    "/messages": Messages().handle,
    "/messages/count_tokens": CountTokens().handle,
    "/tokenize": Tokenize().handle,
    "/detokenize": Detokenize().handle,
}


def create_app(service: Service, metrics: Metrics, when_ready: Callable[[ServedModel], None]) -> Starlette:
    """The application around one service, which starts and ends with the application's lifespan."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # In the background, so that the port is open and probes are answered while the model loads.
        running = asyncio.create_task(service.run(when_ready))
        yield
        running.cancel()

    handlers: dict[object, Callable[..., Awaitable[Response]]] = {
        ApiError: on_api_error,
        HTTPException: on_http_error,
        ClientDisconnect: on_disconnect,
        Exception: on_bug,
    }
    app = Starlette(
        routes=routes(page=service.settings.page),
        middleware=middleware(service),
        exception_handlers=handlers,
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # to an absolute URL, of which a proxy may have another scheme and prefix
    app.router.default = without_slash
    app.state.service = service
    app.state.metrics = metrics
    app.state.scrapes = Scrapes(metrics)
    return app


def routes(*, page: bool = True) -> list[Route]:
    paths = [
        *DOCS,
        *([*PAGE, *INTERNAL] if page else []),
        Route("/health/live", live),
        Route("/health/ready", ready),
        Route("/health", ready),
        Route("/metrics", scrape),
        Route("/version", version),
    ]
    for prefix in ("/v1", ""):
        paths += [
            *(Route(prefix + path, handle, methods=["POST"]) for path, handle in ENDPOINTS.items()),
            Route(f"{prefix}/responses/{{name}}", stored_response, methods=["GET", "DELETE"]),
            Route(f"{prefix}/responses/{{name}}/{{rest:path}}", no_response, methods=["GET", "POST", "DELETE"]),
            Route(f"{prefix}/models", models),
            Route(f"{prefix}/models/{{name:path}}", model),
        ]
    return paths


def middleware(service: Service) -> list[Middleware]:
    settings = service.settings
    layers = [
        Middleware(RequestId),
        Middleware(BodyBudget, limit=int(settings.max_bodies_mib * 2**20)),
        Middleware(AnswerBudget, limit=UNREAD_BYTES),
    ]
    if settings.cors_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "request-id", "x-ignored-fields", "retry-after", "x-should-retry"],
            )
        )
    hosts = allowed_hosts(settings.host, settings.allowed_hosts)
    layers.append(Middleware(BrowserGuard, hosts=hosts, origins=settings.cors_origins, refuse=on_api_error))
    if service.keys:
        layers.append(Middleware(ApiKey, keys=service.keys, open_paths=OPEN_PATHS, refuse=on_api_error))
    return layers


async def without_slash(scope: Scope, receive: Receive, send: Send) -> None:
    """Redirect a path with a needless slash at its end, by a reference relative to itself. Any other is a 404."""
    path = scope["path"].removesuffix("/")
    if path == scope["path"] or not any(
        route.matches({**scope, "path": path})[0].value for route in scope["app"].routes
    ):
        raise HTTPException(404)
    query = Request(scope).url.query
    response = RedirectResponse(f"../{quote(path.rpartition('/')[2])}{query and '?'}{query}")
    await response(scope, receive, send)


async def live(request: Request) -> Response:
    """200 while the process serves or can still start to; 503 once only a restart helps."""
    state = request.app.state.service.batcher.state
    return _json({"state": state}, 503 if state is State.FAILED else 200)


async def ready(request: Request) -> Response:
    """200 while requests are accepted."""
    state = request.app.state.service.batcher.state
    if state is State.READY:
        return _json({"state": state})
    return _json({"state": state}, 503, {"retry-after": "5"})


async def version(request: Request) -> Response:
    service: Service = request.app.state.service
    model = service.model
    return _json({"version": VERSION, "sampling": model.defaults.as_reply() if model else None})


async def models(request: Request) -> Response:
    """The model's names, even while it loads, so that clients that list models then do not find an empty list."""
    service: Service = request.app.state.service
    return _json({"object": "list", "data": [card(name, service.created, service.model) for name in service.names]})


async def model(request: Request) -> Response:
    if not request.path_params["name"]:  # the path is that of all models, with a slash at its end
        return await models(request)
    service: Service = request.app.state.service
    name = served_name(service.names, request.path_params["name"])
    return _json(card(name, service.created, service.model))


def _json(
    content: replies.Health | replies.Version | replies.ModelList | replies.Model,
    status: int = 200,
    headers: dict[str, str] | None = None,
) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


async def on_api_error(request: Request, error: ApiError) -> Response:
    if error.reason:
        request.app.state.service.observe(Rejected(error.reason))
    if error.refusal:
        caller: Caller = request.state.caller
        log_refusal(caller.request_id, request.scope["path"], error.status, error.code, caller.name)
    return _error(request, error)


def _error(request: Request, error: ApiError) -> Response:
    """The error in the form of the path's API."""
    if speaks_anthropic(request.scope["path"]):
        return response_of(error, request.state.caller.request_id)
    return error.response()


async def on_http_error(request: Request, error: HTTPException) -> Response:
    known = {
        404: ("No such path.", "unknown_url"),
        405: ("This path does not support this method.", "unknown_method"),
    }
    message, code = known.get(error.status_code, (error.detail, None))
    return await on_api_error(request, ApiError(error.status_code, message, code=code, headers=error.headers or {}))


async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    """The client disconnected before its whole body had arrived."""
    return Response(status_code=CLIENT_CLOSED)


async def on_bug(request: Request, error: Exception) -> Response:
    """Starlette calls this outside all middleware, so the request id header is added here."""
    request_id = request.state.caller.request_id
    logger = logging.getLogger(__name__)
    # On a thread, because the lines of a traceback are read from files.
    await asyncio.to_thread(logger.error, "a handler failed on request %s", request_id, exc_info=error)
    return _error(request, dataclasses.replace(internal(), headers={"x-request-id": request_id}))
