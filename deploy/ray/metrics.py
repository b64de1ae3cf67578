"""`/metrics` for all replicas: an application of its own, which answers at once however busy they are.

Each replica tells it its metrics every second. Every series has the name that it has in a single server, and a
label `replica`.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Mapping

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from starlette.requests import Request
from starlette.responses import Response

from server.observe.metrics import CONTENT_TYPE, Metrics

APPLICATION = "metrics"
TELLING_SECONDS = 1.0
FORGOTTEN_SECONDS = 10.0
"""After which a replica that says nothing is one that has gone."""


@serve.deployment(name="board", ray_actor_options={"num_cpus": 0})
class Board:
    """What each replica said last."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[float, str]] = {}

    def tell(self, replica: str, text: str) -> None:
        """Take a replica's metrics in the text format."""
        self._said[replica] = (time.monotonic(), text)

    def __call__(self, request: Request) -> Response:
        """The answer to a scrape."""
        oldest = time.monotonic() - FORGOTTEN_SECONDS
        self._said = {replica: told for replica, told in self._said.items() if told[0] >= oldest}
        return Response(merged({replica: text for replica, (_, text) in self._said.items()}), media_type=CONTENT_TYPE)


@contextlib.asynccontextmanager
async def told(metrics: Metrics, replica: str) -> AsyncIterator[None]:
    """Keep telling the board a replica's metrics meanwhile."""
    telling = asyncio.create_task(_tell(metrics, replica), name="telling metrics")
    try:
        yield
    finally:
        telling.cancel()


async def _tell(metrics: Metrics, replica: str) -> None:
    while True:
        text = (await metrics.exposition()).decode()
        with contextlib.suppress(RayError, RayServeException):  # it is not there yet, or there again in a moment
            await serve.get_app_handle(APPLICATION).tell.remote(replica, text)
        await asyncio.sleep(TELLING_SECONDS)


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def merged(expositions: Mapping[str, str]) -> bytes:
    """Merge the expositions of several replicas, given by name, with a label that distinguishes them."""
    families: dict[str, Metric] = {}
    for replica, text in sorted(expositions.items()):
        for family in text_string_to_metric_families(text):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.add_sample(sample.name, sample.labels | {"replica": replica}, sample.value)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(families.values()))
    return generate_latest(registry)


def build(arguments: dict[str, str]) -> Application:
    """What `serve run` starts."""
    return Board.bind()  # type: ignore[attr-defined]
