"""`python -m server`: settings -> service -> app -> uvicorn, and signal handling."""

import asyncio
import logging
import os
import resource
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING, Never

import uvicorn
import uvloop
from anyio import to_thread
from rich.console import Console

from batching.events import Observer
from batching.progress import Progress
from server.app import create_app
from server.garbage import search_seldom, spare_imports, spare_what_is_loaded
from server.http.connection import Connections, listener
from server.model.loader import ModelLoader
from server.model.served_model import ServedModel
from server.observe.log import configure, log_event
from server.observe.metrics import Metrics
from server.service import Loader, Service
from server.settings import WHOLE_ANSWER, Settings, parse
from server.version import VERSION
from server.watchdog import Watchdog, end_process, end_unless_called_again

if TYPE_CHECKING:
    from server.observe.tracing import Tracing

logger = logging.getLogger("microbatch")

CLOSING_SECONDS = 5
"""Time limit for connections to close once every request has ended."""

DESCRIPTORS = 65_536
"""File descriptors that the process requests, if the system allows it."""


OTHER_DESCRIPTORS = 256
"""File descriptors for other things than connections: the model's files, the device, pipes."""


class Server(uvicorn.Server):
    """uvicorn, except that the first SIGTERM or SIGINT drains the service before the port closes; the second exits."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._signalled = False

    async def serve_until_stopped(self, listener: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        closing = asyncio.create_task(self._close_when_stopped())
        await self.serve([listener])
        closing.cancel()

    async def _close_when_stopped(self) -> None:
        await self._service.stopped.wait()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn calls this from the signal handler."""
        if self._signalled:
            end(128 + sig)  # at once, even if the event loop is blocked
        self._signalled = True
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = self._loop.create_task(self._service.drain())


def listen(host: str, port: int) -> socket.socket:
    """Bind the address before the model is loaded, so that a port in use is reported at once."""
    try:
        return listener(host, port)
    except OSError as error:
        logger.error("cannot listen: %s", error.strerror)  # the message includes the address
        raise SystemExit(1) from None


EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Wildcard addresses, and the loopback addresses that reach them."""


def url_of(host: str, port: int, path: str = "/v1") -> str:
    """The API's base URL, or another path's."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"


def batches_of(model: ServedModel) -> str:
    """A description of what a batch holds."""
    if model.info.joins:
        return "tokens; requests join at any time"
    return f"padded tokens, window {model.settings.batch_window_ms:g} ms"


def answers_of(settings: Settings) -> str:
    """A description of the limits on answers."""
    most = settings.max_output_tokens
    if not settings.default_max_tokens:
        return f"as many tokens as fit the window by default, {most} at most"
    whole = min(max(settings.default_max_tokens, WHOLE_ANSWER), most)
    unless = f" ({whole} with tools or a format)" if whole > settings.default_max_tokens else ""
    return f"{settings.default_max_tokens} tokens by default{unless}, {most} at most"


def announce(model: ServedModel, port: int) -> None:
    """Print the URLs and limits for a person, or log them as one JSON line."""
    settings, info = model.settings, model.info
    lines = {
        "url": url_of(settings.host, port),
        **({"here": url_of(EVERYWHERE[settings.host], port)} if settings.host in EVERYWHERE else {}),
        **({"page": url_of(EVERYWHERE.get(settings.host, settings.host), port, "/")} if settings.page else {}),
        "model": f"{', '.join(settings.served_names)} ({info.parameters / 1e9:.2f} B parameters)",
        "device": f"{info.device}, {info.dtype}",
        "window": f"{info.context_window} tokens of prompt and answer",
        "answers": answers_of(settings),
        "sampling": f"{model.defaults} by default",
        "batches": f"up to {settings.max_batch_size or info.max_rows} requests or {info.token_budget} "
        f"{batches_of(model)}, queue of {settings.queue_size}",
    }
    if settings.log_format == "json":
        logger.info("ready", extra={"facts": lines})
        return
    console = Console(stderr=True, highlight=False)
    console.print(f"[bold]microbatch {VERSION} is ready[/]")
    for name, value in lines.items():
        console.print(f"  {name:8} {value}", markup=False, soft_wrap=True)


def tracing_of(settings: Settings) -> "Tracing | None":
    """The tracing observer, if an endpoint is set. Its packages are optional."""
    if settings.otlp_endpoint is None:
        return None
    from server.observe.tracing import Tracing

    return Tracing(settings.otlp_endpoint, settings.served_names[0])


def allow_many_connections(wished: int) -> None:
    """Raise the limit on file descriptors: every connection is one, and shells set a low limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < wished + OTHER_DESCRIPTORS:
        logger.warning("the system allows %d open files, too few for --max-connections %d", wanted, wished)


async def serve(settings: Settings, loader: Loader, progress: Progress) -> int:
    """Run until a signal or a fatal failure. Returns the process's exit status."""
    loop = asyncio.get_running_loop()
    if settings.log_level == "debug":
        loop.set_debug(True)
        loop.slow_callback_duration = SLOW_SECONDS
    metrics = Metrics(progress)
    tracing = tracing_of(settings)
    observers: list[Observer] = [metrics, log_event, *([tracing] if tracing else [])]
    service = Service(settings, loader, progress, observers)

    def when_ready(model: ServedModel) -> None:
        spare_what_is_loaded()
        metrics.model(model.info, settings, VERSION)
        announce(model, bound.getsockname()[1])
        model.grammars.warm()

    config = uvicorn.Config(
        create_app(service, metrics, when_ready),
        http=Connections(settings, service.observe),  # type: ignore[arg-type]  # called like a class
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    bound = listen(settings.host, settings.port)
    with Watchdog(
        loop,
        settings.watchdog_s,
        progress,
        service.worker_stuck,
        metrics.loop_lag.observe,
        end_process,
        end_unless_called_again,
    ):
        await Server(config, service).serve_until_stopped(bound)
        if tracing:
            await to_thread.run_sync(tracing.close)
        return service.exit_code


SLOW_SECONDS = 0.02
"""Callbacks that block the event loop for longer are logged at level debug."""

SWITCH_SECONDS = 0.0005
"""How long a thread may hold the GIL while another waits for it. The default of 5 ms is half a decode step, for which
the event loop could keep the worker from launching the device's next work."""


def end(status: int) -> Never:
    """Exit without waiting: a thread in a kernel, a download or a native call cannot be joined."""
    sys.stderr.flush()
    os._exit(status)


def run(settings: Settings, loader: Loader, progress: Progress) -> None:
    """Serve until the service ends, then exit."""
    search_seldom()
    sys.setswitchinterval(SWITCH_SECONDS)
    configure(settings.log_format, settings.log_level)
    allow_many_connections(settings.max_connections)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        end(runner.run(serve(settings, loader, progress)))


def start(settings: Settings) -> None:
    """Serve the configured model until the service ends, then exit."""
    progress = Progress()
    run(settings, ModelLoader(settings, progress, spare_imports), progress)


if __name__ == "__main__":
    start(parse())
