"""A row, and its stream: an async iterator over its tokens, and the one place that decides its outcome.

The stream runs on the event loop's thread. The first of answer, error, cancel and deadline wins; whatever the worker
still sends for the row afterwards is dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from batching.errors import BatchingError, DeadlineExceeded, Drained
from batching.events import Outcome, RowEnded
from batching.types import Delta, Finish, PromptLogprob, Request, TokenLogprob


@dataclass(slots=True, eq=False, repr=False)
class Row:
    """One request on its way through a batch.

    The event loop owns a row until the worker takes it; from then on the worker is its only writer, except for
    `cancelled`, which the event loop may set at any time and the worker reads at the next step.
    """

    request: Request
    stream: Stream
    arrived: float
    """In monotonic seconds."""
    rank: float = 0.0
    """Orders a client's waiting rows."""
    virtual_finish: float = 0.0
    """Orders the queue."""
    passed_over: int = 0
    """Batches that took a row behind it instead."""
    num_output_tokens: int = 0
    """Tokens handed over."""
    num_prompt_logprobs: int = 0
    """Log probabilities of the prompt's tokens handed over."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""
    num_shared_tokens: int = 0
    """Those of them that other running rows hold, too."""
    num_preemptions: int = 0
    """How often it gave way to older rows."""
    num_drafted_tokens: int = 0
    """Tokens that speculation guessed for it."""
    num_accepted_tokens: int = 0
    """Those of them that were right."""
    over: bool = False
    cancelled: bool = False

    def __repr__(self) -> str:
        place = "over" if self.over else f"{self.num_output_tokens} tokens" if self.num_output_tokens else "waiting"
        return f"<Row {self.request.id} {place}>"

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log probabilities of its prompt are asked for and not all handed over."""
        asked = self.request.sampling.prompt_logprobs is not None
        return asked and self.num_prompt_logprobs < len(self.request.prompt)

    def push(self, token: int) -> Finish | None:
        """Count one new token; the row is over if it is a stop token or the last one allowed."""
        sampling = self.request.sampling
        self.num_output_tokens += 1
        if token in sampling.stop_token_ids:
            self.over = True
            return Finish.STOP
        if self.num_output_tokens >= sampling.max_tokens:
            self.over = True
            return Finish.LENGTH
        return None

    def push_prompt(self, count: int) -> Finish | None:
        """Count log probabilities of the prompt's tokens; after the last ones a row that wants no token is over."""
        self.num_prompt_logprobs += count
        self.over = self.request.sampling.max_tokens == 0 and self.num_prompt_logprobs == len(self.request.prompt)
        return Finish.LENGTH if self.over else None


MOST_TOKENS = 512
"""Tokens of one delta, and log probabilities beside them: what a reader makes of it keeps the event loop for a few
milliseconds at most."""

FEW = 16
"""Rows that have no more than this part of that are read together."""


class Stream:
    """Tokens of one request. Leaving its `async with` block early cancels the row.

    Iterating yields `Delta`s, each with all tokens that came since the last one, up to `MOST_TOKENS` or as many fewer
    as have log probabilities beside them, so a slow reader gets fewer and larger deltas and the buffer never holds more
    than `max_tokens`; but log probabilities of the prompt in the pieces that they came in. Raises the row's error:
    `DeadlineExceeded`, `Drained` or an `EngineError`.
    """

    def __init__(self, request: Request, ended: Callable[[Row, RowEnded], None]) -> None:
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: deque[tuple[PromptLogprob | None, ...]] = deque()
        self._finish: Finish | None = None
        self._error: BatchingError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._queue_wait: float | None = None
        self._ttft: float | None = None
        self._batch_size = 0
        self.has_news = False
        """Whether there is a delta to take, or the row is over."""
        asked = request.sampling
        beside = 0 if asked.top_logprobs is None else asked.top_logprobs + len(asked.logprob_token_ids)
        self._most = max(1, MOST_TOKENS // (1 + beside))
        self.row = Row(request, self, arrived=time.monotonic())
        self._deadline = self._loop.call_later(request.time_limit, self._expire)
        self.output_tokens = 0

    @property
    def over(self) -> bool:
        return self._finish is not None

    def take(self) -> Delta | None:
        """All tokens that came since the last time, up to the most; None once the row is over and all were taken.

        For a stream that `with_deltas` returned. Raises the row's error after the tokens that came before it.
        """
        finish = None if self._error else self._finish
        if self._prompt_logprobs:
            piece = self._prompt_logprobs.popleft()
            last = not (self._tokens or self._prompt_logprobs)
            self.has_news = not last or self.over
            return Delta((), finish if last else None, (), piece)
        if self._tokens:
            most, last = self._most, len(self._tokens) <= self._most
            delta = Delta(tuple(self._tokens[:most]), finish if last else None, tuple(self._logprobs[:most]))
            del self._tokens[:most], self._logprobs[:most]
            self.has_news = not last or self.over
            return delta
        if self._error is not None:
            raise self._error
        return None

    def started(self, at: float, batch_size: int) -> None:
        """The row was handed to the worker, which runs `batch_size` rows with it."""
        self._queue_wait = at - self.row.arrived
        self._batch_size = batch_size

    def feed(self, token: int, finish: Finish | None, at: float, logprob: TokenLogprob | None = None) -> None:
        """One token from the worker, produced at monotonic time `at`."""
        if self._finish is not None:
            return
        if self._ttft is None:
            self._ttft = at - self.row.arrived
        self.output_tokens += 1
        self._tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        if finish is not None:
            self._end(finish, Outcome.ANSWERED)
        self._wake()

    def feed_prompt(self, logprobs: Sequence[PromptLogprob | None], finish: Finish | None) -> None:
        """Log probabilities of the prompt's next tokens, at least one."""
        if self._finish is not None:
            return
        self._prompt_logprobs.append(tuple(logprobs))
        if finish is not None:
            self._end(finish, Outcome.ANSWERED)
        self._wake()

    def fail(self, error: BatchingError) -> None:
        """End the row with an error, which the reader gets after the tokens that came before it."""
        if not self.over:
            self._error = error
            self._end(Finish.ERROR, Outcome.DRAINED if isinstance(error, Drained) else Outcome.ERROR)

    def cancel(self) -> None:
        """The client left: nobody reads this any more."""
        self._stop(Finish.CANCELLED, Outcome.CANCELLED)

    def stop(self, unread: int = 0) -> None:
        """The reader has all it needs (a stop string): the row is answered and needs no more steps. Tokens that were
        not taken, and the last `unread` of those that were, are no part of the answer. `RowEnded` counts them, because
        they were generated."""
        self._stop(Finish.STOP, Outcome.ANSWERED)
        self.output_tokens -= unread + len(self._tokens)
        self._tokens, self._logprobs = [], []

    def _expire(self) -> None:
        self._error = DeadlineExceeded("the request's time limit passed")
        self._stop(Finish.DEADLINE, Outcome.DEADLINE)

    def _stop(self, finish: Finish, outcome: Outcome) -> None:
        if not self.over:
            self.row.cancelled = True
            self._end(finish, outcome)

    def _end(self, finish: Finish, outcome: Outcome) -> None:
        self._finish = finish
        self._deadline.cancel()
        self._wake()
        request = self.row.request
        self._ended(
            self.row,
            RowEnded(
                id=request.id,
                outcome=outcome,
                finish=finish,
                prompt_tokens=len(request.prompt),
                output_tokens=self.output_tokens,
                queue_wait=self._queue_wait,
                ttft=self._ttft,
                duration=time.monotonic() - self.row.arrived,
                batch_size=self._batch_size,
                num_cached_tokens=self.row.num_cached_tokens,
                num_preemptions=self.row.num_preemptions,
                num_drafted_tokens=self.row.num_drafted_tokens,
                num_accepted_tokens=self.row.num_accepted_tokens,
                trace=request.trace,
                client=request.client,
            ),
        )

    def _wake(self) -> None:
        self.has_news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        await with_deltas((self,))
        delta = self.take()
        if delta is None:
            raise StopAsyncIteration
        return delta

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


async def with_deltas(streams: Collection[Stream]) -> list[Stream]:
    """Those of `streams` that have a delta to take or are over, as soon as one is; one alone if much waits in it."""
    while not (found := [stream for stream in streams if stream.has_news]):
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for stream in streams:
            stream._waiter = waiter
        await waiter
    for stream in found:
        if stream._prompt_logprobs or len(stream._tokens) > stream._most // FEW + 1:
            await asyncio.sleep(0)  # much may be there already, and each piece takes the reader milliseconds
            return [stream]
    return found
