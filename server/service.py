"""The life cycle of the process: start, serve, drain and end."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from anyio import to_thread

from batching.batcher import Batcher, BatchingConfig
from batching.engine import Engine
from batching.errors import UNWINDING, ModelError, NotReady, Stuck
from batching.events import Observer, State, broadcast
from batching.progress import Progress
from batching.queue import QueueLimits
from server.callers import Pace, load_keys
from server.grammar.compiler import Grammars
from server.model.defaults import Defaults
from server.model.loader import Loading
from server.model.served_model import ServedModel
from server.model.text import Text
from server.observe.live import LiveFeed
from server.response_store import ResponseStore
from server.settings import Settings
from server.threads import Encoders

logger = logging.getLogger(__name__)

REFUSALS_AT_ONCE, REFUSALS_A_SECOND, REFUSAL_SECONDS = 64, 100.0, 5.0
"""429s of one key that are answered at once, how many a second after that, and for how long one may wait. Each takes
about a millisecond of the event loop."""


class Loader(Protocol):
    """Loads text and engine. `engine` is called on the worker thread, the others meanwhile on helper threads.

    `loading` is the engine's progress; any thread may read it.
    """

    @property
    def loading(self) -> Loading: ...

    def defaults(self) -> Defaults: ...
    def text(self) -> Text: ...
    def engine(self) -> Engine: ...


class Service:
    """One served model, once `run` has loaded it.

    `stopped` is set once the process should end, and `exit_code` then says how.
    """

    def __init__(
        self, settings: Settings, loader: Loader, progress: Progress, observers: Iterable[Observer] = ()
    ) -> None:
        self.settings = settings
        self.max_body_bytes = int(settings.max_body_mib * 2**20)
        self.encoders = Encoders()
        self.refusals = Pace(REFUSALS_AT_ONCE, REFUSALS_A_SECOND, REFUSAL_SECONDS)
        self.responses = ResponseStore(int(settings.stored_responses_mib * 2**20), settings.stored_responses_s)
        self.stopped = asyncio.Event()
        self.exit_code = 0
        self.begun = time.monotonic()
        self.live = LiveFeed()
        self.created = int(time.time())
        self.names = settings.served_names
        self.model: ServedModel | None = None
        self._loader = loader
        self.keys = load_keys(settings.api_keys, settings.api_keys_file)
        queue = QueueLimits(
            settings.queue_size, settings.key_queue_size, settings.key_queue_tokens, shared=len(self.keys) > 1
        )
        config = BatchingConfig(settings.max_batch_size, settings.batch_window_ms / 1000, queue)
        self.observe = broadcast([progress, *observers, *([self.live] if settings.page else [])])
        self.batcher = Batcher(loader.engine, config, [self.observe])

    async def run(self, when_ready: Callable[[ServedModel], None]) -> None:
        """Load the model, then wait for the end. Never raises: a failure is logged in one line and ends the service."""
        try:
            # In parallel; the batcher becomes ready once both are done.
            text = asyncio.create_task(self._load_text())
            info = await self.batcher.start(text)
            self.model = ServedModel(self.settings, info, *text.result())
            when_ready(self.model)
            await self.batcher.ended.wait()
        except (ModelError, NotReady) as error:
            if self.batcher.state is not State.STOPPED:
                logger.error("%s", error, exc_info=logger.isEnabledFor(logging.DEBUG))
        except UNWINDING:
            raise
        except BaseException:
            logger.exception("the service could not start")
        if self.batcher.state is not State.STOPPED:
            self.exit_code = 1
        self._end()

    async def _load_text(self) -> tuple[Text, Grammars, Defaults]:
        defaults = await to_thread.run_sync(self._loader.defaults)
        text = await to_thread.run_sync(self._loader.text)
        return text, await to_thread.run_sync(text.grammars), defaults

    def worker_stuck(self) -> None:
        """The worker has a batch but makes no progress: only a restart helps."""
        if not self.batcher.ended.is_set():
            limit = self.settings.watchdog_s
            logger.critical("the model made no progress for %g s while a batch was running; exiting", limit)
            self.batcher.on_worker_died(Stuck("the worker makes no progress"))

    async def drain(self) -> None:
        """Finish accepted requests within the drain time, then stop."""
        await self.batcher.drain(self.settings.drain_timeout_s)
        self._end()

    def _end(self) -> None:
        self.live.close()
        self.stopped.set()

    @property
    def loading(self) -> Loading:
        return self._loader.loading
