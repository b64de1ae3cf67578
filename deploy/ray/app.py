"""The service as a Ray Serve deployment: a replica for each GPU, of one machine or many, behind one address.

`serve run deploy/ray/serve.yaml`; see README.md here. A replica is the very application of `python -m server`, with its
own model, queue and batches; its settings come from MICROBATCH_* variables.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

from anyio import to_thread
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from starlette.applications import Starlette

from batching.events import Observer, State
from batching.progress import Progress
from deploy.ray.metrics import told
from server.__main__ import tracing_of
from server.app import create_app
from server.garbage import spare_what_is_loaded
from server.model.loader import ModelLoader
from server.model.served_model import ServedModel
from server.observe.log import configure, log_event
from server.observe.metrics import Metrics
from server.service import Service
from server.settings import parse
from server.version import VERSION
from server.watchdog import Watchdog, end_process

ROUTER = RequestRouterConfig(request_router_class="deploy.ray.router:SessionRouter")
BEHIND_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
"""The variable with which Ray puts HAProxy before the replicas instead of its own proxies, which then route nothing."""


def replica_app() -> Starlette:
    """The application of one replica. Ray calls this in the replica's process."""
    settings = parse([])
    configure(settings.log_format, settings.log_level)
    progress, ready = Progress(), asyncio.Event()
    metrics = Metrics(progress)
    replica = serve.get_replica_context().replica_id.unique_id
    tracing = tracing_of(settings)
    observers: list[Observer] = [metrics, log_event, *([tracing] if tracing else [])]
    service = Service(settings, ModelLoader(settings, progress), progress, observers)

    def when_ready(model: ServedModel) -> None:
        spare_what_is_loaded()
        metrics.model(model.info, settings, VERSION)
        ready.set()

    app = create_app(service, metrics, when_ready)
    loading = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        """The application's own, but started only once the model is loaded: before that a replica gets no requests."""
        loop = asyncio.get_running_loop()
        lag = metrics.loop_lag.observe
        async with loading(app), told(metrics, replica):
            with Watchdog(loop, settings.watchdog_s, progress, service.worker_stuck, lag, end_process):
                await first_of(ready, service.stopped)
                if not ready.is_set():
                    raise RuntimeError("the model could not be loaded; the replica's log says why")
                yield
                await service.drain()
                if tracing:
                    await to_thread.run_sync(tracing.close)

    app.router.lifespan_context = lifespan
    return app


async def first_of(*events: asyncio.Event) -> None:
    """Wait until one of these is set."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


@serve.deployment(name="microbatch")
@serve.ingress(replica_app)
class Replica:
    """Ray asks after its health, and replaces it if only a restart helps."""

    app: Starlette

    def check_health(self) -> None:
        """Raises once the worker has died, is stuck or has lost its device."""
        if self.app.state.service.batcher.state is State.FAILED:
            raise RuntimeError("the model is down")


def build(arguments: dict[str, str]) -> Application:
    """What `serve run` starts."""
    deployment: Any = Replica
    if os.environ.get(BEHIND_HAPROXY) != "1":
        deployment = deployment.options(request_router_config=ROUTER)
    return deployment.bind()
