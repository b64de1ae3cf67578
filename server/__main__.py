"""`python -m server`: settings -> service -> app -> uvicorn, and what signals do."""

import asyncio
import gc
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


YOUNG = 10_000
"""New objects until the next search among them. A step of many rows makes thousands at once, which soon go again:
with CPython's 700 the searches took a quarter of the time that 2,000 streams need, and an eighth of the start's."""


def search_seldom() -> None:
    """For good, from before the model is loaded: what makes most objects then, imports, leaves next to no garbage."""
    gc.set_threshold(YOUNG)


def spare_imports() -> None:
    """Leave the modules out of the full searches that loading the model goes on to make."""
    gc.freeze()


def spare_what_is_loaded() -> None:
    """Nothing that exists by now is looked at again: modules, the model, the tokenizer."""
    gc.collect()
    gc.freeze()


logger = logging.getLogger("microbatch")

CLOSING_SECONDS = 5
"""How long connections may take to close once every request has its outcome."""

DESCRIPTORS = 65_536
"""File descriptors that the process asks for, if the system allows so many."""


OTHER_DESCRIPTORS = 256
"""Those that are no connections: the model's files, the device, pipes."""


class Server(uvicorn.Server):
    """uvicorn, but the first SIGTERM or SIGINT drains the service before the port is closed; a second one stops now."""

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
            end(128 + sig)  # at once, also where the event loop stands
        self._signalled = True
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = self._loop.create_task(self._service.drain())


def listen(host: str, port: int) -> socket.socket:
    """Take the address before the model is loaded, so that a port in use is told at once."""
    try:
        return listener(host, port)
    except OSError as error:
        logger.error("cannot listen: %s", error.strerror)  # which ends with the address
        raise SystemExit(1) from None


EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that stand for all of a machine's, and those that reach it from itself."""


def url_of(host: str, port: int) -> str:
    """Where the API is."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def batches_of(model: ServedModel) -> str:
    """What a batch is made of, in words."""
    if model.info.joins:
        return "tokens, joined at any time"
    return f"padded tokens, window {model.settings.batch_window_ms:g} ms"


def answers_of(settings: Settings) -> str:
    """How long answers are, in words."""
    most = settings.max_output_tokens
    if not settings.default_max_tokens:
        return f"what fits the window by default, {most} tokens at most"
    whole = min(max(settings.default_max_tokens, WHOLE_ANSWER), most)
    unless = f" ({whole} with tools or a format)" if whole > settings.default_max_tokens else ""
    return f"{settings.default_max_tokens} tokens by default{unless}, {most} at most"


def announce(model: ServedModel, port: int) -> None:
    """Tell a person where the service is and what its limits are, or a log of JSON the same in one line of its own."""
    settings, info = model.settings, model.info
    lines = {
        "url": url_of(settings.host, port),
        **({"here": url_of(EVERYWHERE[settings.host], port)} if settings.host in EVERYWHERE else {}),
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
    """What sends traces, if the settings say where to. Its packages are optional."""
    if settings.otlp_endpoint is None:
        return None
    from server.observe.tracing import Tracing

    return Tracing(settings.otlp_endpoint, settings.served_names[0])


def allow_many_connections(wished: int) -> None:
    """Every connection is a file descriptor, and the limit that shells set is low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < wished + OTHER_DESCRIPTORS:
        logger.warning("the system allows %d open files, too few for --max-connections %d", wanted, wished)


async def serve(settings: Settings, loader: Loader, progress: Progress) -> int:
    """Run until a signal or the model's end; the process's exit status."""
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
        http=Connections(settings),  # type: ignore[arg-type]  # it is called as the class would be
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
"""A callback that keeps the event loop longer is a line in the log, at level debug."""

SWITCH_SECONDS = 0.0005
"""How long a thread may keep the interpreter while another waits for it. The usual 5 ms are half a decode step: so long
the event loop could keep the worker from giving the device its next orders."""


def end(status: int) -> Never:
    """End the process without waiting: a thread inside a kernel, a download or a native call cannot be joined."""
    sys.stderr.flush()
    os._exit(status)


def run(settings: Settings, loader: Loader, progress: Progress) -> None:
    """Serve until the end, and end the process."""
    search_seldom()
    sys.setswitchinterval(SWITCH_SECONDS)
    configure(settings.log_format, settings.log_level)
    allow_many_connections(settings.max_connections)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        end(runner.run(serve(settings, loader, progress)))


def start(settings: Settings) -> None:
    """Serve the model that the settings name until the end, and end the process."""
    progress = Progress()
    run(settings, ModelLoader(settings, progress, spare_imports), progress)


if __name__ == "__main__":
    start(parse())
