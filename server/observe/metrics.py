"""Events -> Prometheus. Names, types and labels here are a contract with dashboards: see CHANGELOG before a change."""

import asyncio
import platform

from anyio import to_thread
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import Response

from batching.events import (
    REFUSALS,
    BatchEnded,
    BatchStarted,
    Event,
    MemoryHeld,
    Outcome,
    PromptScored,
    QueueChanged,
    Rejected,
    RowEnded,
    RowsJoined,
    State,
    StateChanged,
    Stepped,
)
from batching.progress import Progress
from batching.types import Finish, ModelInfo
from server.replies import BUSY, FAULTS
from server.settings import Settings

SECONDS_TO_FIRST = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5),
    *(0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160),
)
SECONDS_PER_TOKEN = (
    *(0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04),
    *(0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5),
)
SECONDS_WHOLE = (0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 240, 480)
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
SECONDS_OF_LAG = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
RATIO = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """An observer of the batcher, with a registry of its own. `progress` observes the same batcher."""

    def __init__(self, progress: Progress) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the counters' series, and no dashboard reads them
        self.registry = CollectorRegistry()
        self._define_service(progress)
        self._define_batches()
        self._define_requests()
        self._define_tokens()
        self._show_state(State.STARTING)
        self._start_series()
        ProcessCollector(registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"microbatch_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"microbatch_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"microbatch_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _define_service(self, progress: Progress) -> None:
        self._state = self._gauge("state", "1 for the service's current state, 0 for the others.", "state")
        self._info = self._gauge(
            "build_info", "Always 1; what is running, as labels.", "version", "python", "model", "device", "dtype"
        )
        self._memory = self._gauge(
            "device_memory_bytes", "Memory the device's allocator holds (on a CPU: of the process)."
        )
        self._memory_total = self._gauge("device_memory_total_bytes", "Memory the device has.")
        self._tasks = self._gauge("tasks", "Tasks on the event loop, including the scrape's own.")
        self.loop_lag = self._histogram(
            "loop_lag_seconds", "How long the event loop took to answer the watchdog, 4 times a second.", SECONDS_OF_LAG
        )
        idle = self._gauge("worker_seconds_since_progress", "Seconds since the busy worker last made progress.")
        idle.set_function(progress.seconds)

    def _define_batches(self) -> None:
        self._running = self._gauge("running_rows", "Requests in the running batch.")
        self._batch_limit = self._gauge("batch_limit_rows", "Maximum number of requests in a batch.")
        self._batches = self._counter("batches", "Batches started.")
        self._batch_size = self._histogram("batch_size_rows", "Requests in a batch at its start.", ROWS)
        self._step_rows = self._histogram("step_size_rows", "Requests that got a token in one step.", ROWS)
        self._joined = self._counter("joined_requests", "Requests that joined a running batch.")
        self._padding = self._histogram(
            "batch_padding_ratio", "Share of a batch's prompt positions that is padding.", RATIO
        )
        self._window_wait = self._histogram(
            "batch_window_wait_seconds", "How long a batch was held open for more rows.", SECONDS_TO_FIRST
        )
        self._batch_seconds = self._histogram(
            "batch_duration_seconds", "From a batch's start to its last row's end.", SECONDS_WHOLE
        )

    def _define_requests(self) -> None:
        self._queue_depth = self._gauge("queue_depth", "Requests waiting in the queue.")
        self._queue_limit = self._gauge("queue_limit", "Maximum number of requests in the queue.")
        self._queue_tokens = self._gauge("queue_prompt_tokens", "Prompt tokens of the requests in the queue.")
        self._queue_wait = self._histogram(
            "queue_wait_seconds", "From a request's arrival to its batch's start.", SECONDS_TO_FIRST
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", SECONDS_TO_FIRST
        )
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "Mean time between an answer's tokens.", SECONDS_PER_TOKEN
        )
        self._duration = self._histogram(
            "request_duration_seconds", "From arrival to the outcome.", SECONDS_WHOLE, "outcome"
        )
        self._finished = self._counter("finished_requests", "Requests that ended, by finish reason.", "reason")
        self._cancelled = self._counter("cancelled_requests", "Requests whose client disconnected before the end.")
        self._rejected = self._counter("rejected_requests", "Requests refused before the queue, by reason.", "reason")
        self._preemptions = self._counter(
            "preemptions", "Times that a request gave up its memory to older ones, to be recomputed later."
        )
        self.ignored_fields = self._counter("ignored_fields", "Unknown request fields that were ignored.")

    def _define_tokens(self) -> None:
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt length of requests that ended.", TOKENS)
        self._output_length = self._histogram("request_output_tokens", "Answer length of requests that ended.", TOKENS)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests whose batch started.")
        self._reused_tokens = self._counter(
            "reused_prompt_tokens", "Prompt tokens whose KV was already cached from another request."
        )
        self._scored_tokens = self._counter(
            "scored_prompt_tokens", "Prompt tokens whose log probabilities were returned."
        )
        self._output_tokens = self._counter("output_tokens", "Tokens generated.")
        self._drafted_tokens = self._counter("drafted_tokens", "Tokens that speculation guessed.")
        self._accepted_tokens = self._counter("accepted_tokens", "Tokens that speculation guessed rightly.")

    def _start_series(self) -> None:
        """Start series at zero: a series that starts at 1 hides its first event from rate()."""
        for outcome in Outcome:
            self._duration.labels(outcome)
        for finish in Finish:
            self._finished.labels(finish)
        for reason in (*REFUSALS, *BUSY, *FAULTS, "bad_request"):
            self._rejected.labels(reason)

    def __call__(self, event: Event) -> None:
        """Handle one event."""
        match event:
            case Stepped(tokens=tokens, running=running, rows=rows):
                self._output_tokens.inc(tokens)
                self._running.set(running)
                self._step_rows.observe(rows)
            case PromptScored(tokens=tokens, running=running):
                self._scored_tokens.inc(tokens)
                self._running.set(running)
            case QueueChanged(rows=rows, prompt_tokens=tokens):
                self._queue_depth.set(rows)
                self._queue_tokens.set(tokens)
            case BatchStarted():
                self._batch_started(event)
            case RowsJoined():
                self._rows_joined(event)
            case BatchEnded(running=running, duration=duration):
                self._running.set(running)
                self._batch_seconds.observe(duration)
            case MemoryHeld(memory=memory):
                self._memory.set(memory)
            case RowEnded():
                self._row_ended(event)
            case Rejected(reason=reason):
                self._rejected.labels(reason).inc()
            case StateChanged(state=state):
                self._show_state(state)
                if state in (State.STOPPED, State.FAILED):  # the end of the running batch is no longer reported
                    self._running.set(0)

    def model(self, info: ModelInfo, settings: Settings, version: str) -> None:
        """Set the series that describe the model and its limits."""
        self._info.labels(version, platform.python_version(), settings.served_names[0], info.device, info.dtype).set(1)
        self._queue_limit.set(settings.queue_size)
        self._batch_limit.set(settings.max_batch_size or info.max_rows)
        self._memory_total.set(info.device_memory)

    async def exposition(self) -> bytes:
        """Prometheus's text format, written on a helper thread because it takes milliseconds."""
        self._tasks.set(len(asyncio.all_tasks()))
        return await to_thread.run_sync(generate_latest, self.registry)

    def _show_state(self, now: State) -> None:
        for state in State:
            self._state.labels(state).set(state is now)

    def _batch_started(self, event: BatchStarted) -> None:
        self._batches.inc()
        self._batch_size.observe(event.rows)
        self._running.set(event.rows)
        self._padding.observe(1 - event.prompt_tokens / event.padded_tokens)
        self._window_wait.observe(event.window_wait)
        self._prompt_tokens.inc(event.prompt_tokens)
        for wait in event.queue_waits:
            self._queue_wait.observe(wait)

    def _rows_joined(self, event: RowsJoined) -> None:
        self._joined.inc(event.rows)
        self._running.set(event.running)
        self._prompt_tokens.inc(event.prompt_tokens)
        for wait in event.queue_waits:
            self._queue_wait.observe(wait)

    def _row_ended(self, event: RowEnded) -> None:
        self._reused_tokens.inc(event.num_cached_tokens)
        self._preemptions.inc(event.num_preemptions)
        self._drafted_tokens.inc(event.num_drafted_tokens)
        self._accepted_tokens.inc(event.num_accepted_tokens)
        self._duration.labels(event.outcome).observe(event.duration)
        self._prompt_length.observe(event.prompt_tokens)
        self._output_length.observe(event.output_tokens)
        self._finished.labels(event.finish).inc()
        if event.outcome is Outcome.CANCELLED:
            self._cancelled.inc()
        if event.ttft is not None:
            self._first_token.observe(event.ttft)
            if event.output_tokens > 1:
                self._per_token.observe((event.duration - event.ttft) / (event.output_tokens - 1))


class Scrapes:
    """Gives every scrape metrics written after its request; concurrent scrapes share one writing."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._writing = asyncio.Lock()
        self._next: asyncio.Task[bytes] | None = None

    async def take(self) -> bytes:
        if self._next is None:
            self._next = asyncio.create_task(self._write())
        return await asyncio.shield(self._next)

    async def _write(self) -> bytes:
        async with self._writing:
            self._next = None  # scrapes from now on get the next writing
            return await self._metrics.exposition()


async def scrape(request: Request) -> Response:
    return Response(await request.app.state.scrapes.take(), media_type=CONTENT_TYPE)
