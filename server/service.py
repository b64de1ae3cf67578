"""What lives as long as the process: settings, the loaded model's text side, the batcher, and how they come up."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from anyio import to_thread

from batching.batcher import Batcher, BatchingConfig
from batching.engine import Engine
from batching.errors import UNWINDING, BatchingError, ModelError, NotReady, Stuck
from batching.events import Observer, Rejected, State, broadcast
from batching.progress import Progress
from batching.queue import QueueLimits
from batching.stream import Stream
from batching.types import ModelInfo, Request
from server.caller import Caller
from server.defaults import Defaults
from server.encoders import Encoders
from server.errors import ApiError, bad_request, from_batching, not_ready, thousands
from server.grammar import Grammars
from server.keys import load_keys
from server.live import LiveFeed
from server.loading import Loading
from server.settings import WHOLE_ANSWER, Settings
from server.text import Text

logger = logging.getLogger(__name__)

MAX_PROMPT_LOGPROBS = 262_144
"""Log probabilities of prompts in one answer: as JSON some 20 MB."""


MAX_LOGPROB_ENTRIES = 2**18
"""In one answer; about 20 MB of JSON."""


def logprob_entries(request: Request) -> int:
    """How many log probabilities a row's answer can come to hold."""
    top = request.sampling.top_logprobs
    return 0 if top is None else request.sampling.max_tokens * (1 + top)


class Loader(Protocol):
    """Where text and engine come from. `engine` is called on the worker thread, the others on helper threads meanwhile.

    `loading` is how far the engine is; any thread may read it.
    """

    @property
    def loading(self) -> Loading: ...

    def defaults(self) -> Defaults: ...
    def text(self) -> Text: ...
    def engine(self) -> Engine: ...


class Service:
    """One served model. `start` returns when it is ready; until then, and after its end, `check_ready` refuses.

    `stopped` is set once the process should end, and `exit_code` then says how.
    """

    defaults: Defaults
    text: Text
    grammars: Grammars
    info: ModelInfo

    def __init__(
        self, settings: Settings, loader: Loader, progress: Progress, observers: Iterable[Observer] = ()
    ) -> None:
        self.settings = settings
        self.max_body_bytes = int(settings.max_body_mib * 2**20)
        self.encoders = Encoders()
        self.stopped = asyncio.Event()
        self.exit_code = 0
        self.begun = time.monotonic()
        self.live = LiveFeed()
        self._created = int(time.time())
        self._loader = loader
        keys = load_keys(settings.api_keys, settings.api_keys_file)
        self._limits = QueueLimits(
            settings.queue_size, settings.key_queue_size, settings.key_queue_tokens, shared=len(keys) > 1
        )
        config = BatchingConfig(
            max_batch_rows=settings.max_batch_size,
            window=settings.batch_window_ms / 1000,
            queue=self._limits,
        )
        self.observe = broadcast([progress, *observers, *([self.live] if settings.page else [])])
        self.batcher = Batcher(loader.engine, config, [self.observe])

    async def run(self, when_ready: Callable[[], None]) -> None:
        """Load the model, then wait for the end. Never raises: a failure is logged in one line and ends the process."""
        try:
            # Side by side; the batcher is not ready before both are.
            text = asyncio.create_task(self._load_text())
            self.info = await self.batcher.start(text)
            when_ready()
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

    async def _load_text(self) -> None:
        self.defaults = await to_thread.run_sync(self._loader.defaults)
        self.text = await to_thread.run_sync(self._loader.text)
        self.grammars = await to_thread.run_sync(self.text.grammars)

    def worker_stuck(self) -> None:
        """The worker has a batch and makes no progress: only a new process helps."""
        if not self.batcher.ended.is_set():
            limit = self.settings.watchdog_s
            logger.critical("the model made no progress for %g s while a batch was running; exiting", limit)
            self.batcher.on_worker_died(Stuck("the worker makes no progress"))

    async def drain(self) -> None:
        """Finish what was accepted, within the drain time, and stop."""
        await self.batcher.drain(self.settings.drain_timeout_s)
        self._end()

    def _end(self) -> None:
        self.live.close()
        self.stopped.set()

    @property
    def loading(self) -> Loading:
        return self._loader.loading

    @property
    def ready(self) -> bool:
        return self.batcher.state is State.READY

    def check_ready(self) -> None:
        """Raises `ApiError` 503 unless requests are taken."""
        if not self.ready:
            self.observe(Rejected("not_ready"))
            raise not_ready(self.batcher.state)

    @property
    def told_defaults(self) -> dict[str, float] | None:
        """How tokens are chosen where a request does not say; None while that is not known yet."""
        return self.defaults.model_dump() if hasattr(self, "defaults") else None

    @property
    def stop_token_ids(self) -> frozenset[int]:
        return self.text.stop_token_ids | self.info.stop_token_ids

    def submit(self, requests: Sequence[Request]) -> list[Stream]:
        """Queue the rows of one HTTP request. Raises `ApiError` 429 or 503, or 400 if they never have room."""
        if sum(map(num_prompt_logprobs, requests)) > MAX_PROMPT_LOGPROBS:
            raise bad_request(
                f"An answer can hold {MAX_PROMPT_LOGPROBS:,} log probabilities of prompts; ask for fewer of the "
                "likeliest tokens, for fewer prompts or choices, or with a shorter prompt.",
                code="too_large",
            )
        if not self._limits.allow(requests):
            raise bad_request("The queue can never hold this; ask for fewer choices or fewer tokens.", code="too_large")
        if sum(map(logprob_entries, requests)) > MAX_LOGPROB_ENTRIES:
            raise bad_request(
                "That many log probabilities are too large an answer; ask for fewer tokens or choices.", "logprobs"
            )
        try:
            return self.batcher.submit_all(requests)
        except BatchingError as error:
            raise from_batching(error) from None

    def salt_of(self, caller: Caller) -> str:
        """Requests of the same salt may begin with what was computed for each other."""
        return caller.name if self.settings.prefix_sharing == "key" else ""

    def served_name(self, asked: str | None) -> str:
        """The name an answer carries. RAGFlow may append `___` and a provider to it. Raises `ApiError` 404."""
        names = self.settings.served_names
        if asked is None:
            return names[0]
        for name in (asked, asked.split("___")[0]):
            if name in names:
                return name
        raise ApiError(404, f"There is no model of that name here, only {', '.join(names)}.", code="model_not_found")

    @property
    def advertised_window(self) -> int:
        """The prompt length that clients should trim to, below the true window by all they do not count.

        Clients count with a tokenizer of their own (a tenth is left for that), RAGFlow adds a guide of 1,543 tokens
        after it trimmed, and the answer needs its place. Never less than half of the true window.
        """
        window = self.info.context_window
        answer = min(self.settings.default_max_tokens or WHOLE_ANSWER, self.settings.max_output_tokens)
        return max(window // 2, int(0.9 * (window - 1543 - answer)))

    def card(self, name: str) -> dict[str, object]:
        """What `/v1/models` says of a name, while the model loads without its windows.

        vLLM's clients read `max_model_len`. RAGFlow, which fills what it finds, reads `context_length` first.
        """
        card = {"id": name, "object": "model", "created": self._created, "owned_by": "microbatch"}
        if not hasattr(self, "info"):
            return card
        return card | {"max_model_len": self.info.context_window, "context_length": self.advertised_window}

    def room_for_output(self, prompt_tokens: int, param: str, *, least: int = 1) -> int:
        """How many tokens can follow the prompt, which came in the field `param`.

        Raises `ApiError` 400 if not even `least`.
        """
        room = self.info.context_window - prompt_tokens
        if room < least:
            raise bad_request(
                f"The prompt has {thousands(prompt_tokens)} tokens, but with its answer it must fit in a context "
                f"window of {thousands(self.info.context_window)}; shorten it.",
                param,
                "context_length_exceeded",
            )
        return room


def num_prompt_logprobs(request: Request) -> int:
    """How many log probabilities of its prompt a request asks for: of each token's own and the likeliest."""
    top = request.sampling.prompt_logprobs
    return 0 if top is None else (1 + top) * len(request.prompt)
