"""The page's data besides the API: `/internal/live`, the batcher's events as they happen, and `/internal/state`.

A key sees its own requests; keys in `--admin-keys`, and everyone if there are no keys, see all: ids, timings and token
counts, never prompts or answers. Totals include everyone's requests, as in /metrics.
"""

import platform
import time
from importlib.metadata import version

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from server import sse
from server.http.errors import ApiError
from server.observe.live import TooManyListeners
from server.service import Service
from server.version import VERSION

MODEL = ("device", "dtype", "parameters", "context_window", "token_budget")
LIMITS = (
    *("default_max_tokens", "max_output_tokens", "max_batch_size", "batch_window_ms", "queue_size", "key_queue_size"),
    *("key_queue_tokens", "request_timeout_s", "drain_timeout_s", "max_body_mib", "thinking", "prefix_sharing"),
    *("speculation", "batch_invariant"),
)
"""Settings that matter to clients."""

VERSIONS = {
    "microbatch": VERSION,
    **{name: version(name) for name in ("torch", "transformers")},
    "Python": platform.python_version(),
}
"""Of the packages that an answer may depend on. Read while nobody waits, because it takes 20 ms."""


async def live(request: Request) -> Response:
    service: Service = request.app.state.service
    name = request.state.caller.name
    if request.method == "HEAD":  # the events have no end, for which the connection's next request would wait
        return StreamingResponse((), media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)
    try:
        frames = service.live.listen(None if not name or name in service.settings.admin_keys else name)
    except TooManyListeners:
        message = "Too many live viewers; close another tab."
        raise ApiError(429, message, "rate_limit_error", "too_many_listeners") from None
    return StreamingResponse(frames, media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)


async def state(request: Request) -> Response:
    return Response(orjson.dumps(describe(request.app.state.service)), media_type="application/json")


def describe(service: Service) -> dict[str, object]:
    """What is running. `engine`, `model` and `sampling` are None while the model loads, and `loading` is None after."""
    settings, served = service.settings, service.model
    info = served and served.info
    return {
        "state": service.batcher.state,
        "versions": VERSIONS,
        "names": settings.served_names,
        "uptime": round(time.monotonic() - service.begun),
        "engine": ("packed" if info.joins else "generate") if info else None,
        "model": {name: getattr(info, name) for name in MODEL} if info else None,
        "loading": None if info else service.loading,
        "sampling": served and served.defaults.as_reply(),
        "limits": {name: getattr(settings, name) for name in LIMITS}
        | ({"max_batch_size": settings.max_batch_size or info.max_rows} if info else {}),
    }


ROUTES = [Route("/internal/live", live), Route("/internal/state", state)]
