"""The path of every request: read, parse, encode, submit, then stream or collect the answer."""

from __future__ import annotations

import asyncio
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from functools import partial
from typing import Generic, TypeAlias, TypeVar

import anyio
import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from batching.errors import BatchingError
from batching.events import Rejected, State
from batching.stream import Stream, with_deltas
from batching.types import Delta, Grammar, Request
from server import sse
from server.callers import Caller
from server.fields import RequestBody, parse
from server.http.errors import ApiError, bad_request, from_batching, not_ready
from server.http.exchange import WRITE
from server.http.request import check_content_type, read_body
from server.model.served_model import ServedModel
from server.openai.requests import Generation, Row
from server.service import Service

logger = logging.getLogger(__name__)

MAX_PROMPT_LOGPROBS = 262_144
"""Limit on prompt log probabilities in one answer: about 20 MB of JSON."""

MAX_LOGPROBS = 2**18
"""The same limit for generated tokens."""

INLINE_BYTES = 16_384
"""Bytes of a body that is checked on the event loop; many short messages take 7 ms. Larger ones go to a thread."""

CLIENT_CLOSED = 499
"""nginx's status for a client that disconnected; it is never received, but appears in logs and tests."""

MAX_NAMED = 20  # ignored fields listed in a header or a log line
FIT = re.compile(r"[\w.-]{1,64}", re.ASCII)

Body = TypeVar("Body", bound=RequestBody)
Generated = TypeVar("Generated", bound=Generation)
Encoded = TypeVar("Encoded")
Done = TypeVar("Done")


class Endpoint(ABC, Generic[Body, Encoded]):
    """A kind of request: its body type and how it is answered. By default `encode` returns the answer's JSON."""

    kind: type[Body]

    async def handle(self, http: HttpRequest) -> Response:
        """The route's handler. Raises `ApiError`."""
        service: Service = http.app.state.service
        model = ready_model(service)
        caller: Caller = http.state.caller
        body, size = await paced(service, caller, read(http, self.kind))
        return await until_disconnect(http, paced(service, caller, self.respond(service, model, body, size, caller)))

    async def respond(self, service: Service, model: ServedModel, body: Body, size: int, caller: Caller) -> Response:
        """Handle a request of `size` bytes that has been read. Raises `ApiError` and `BatchingError`."""
        served_name(service.names, body.model)
        encoded = await service.encoders.run(partial(self.encode, model, body), size, caller)
        return json_response(orjson.dumps(encoded))

    @abstractmethod
    def encode(self, model: ServedModel, body: Body) -> Encoded:
        """The slow part, templates and tokenizing, on a helper thread. Raises `ApiError` 400."""


def ready_model(service: Service) -> ServedModel:
    """Raises `ApiError` 503 unless requests are accepted."""
    state = service.batcher.state
    if service.model is None or state is not State.READY:
        service.observe(Rejected("not_ready"))
        raise not_ready(state)
    return service.model


def served_name(names: Sequence[str], requested: str | None) -> str:
    """The model name for an answer. RAGFlow may append `___` and a provider to it. Raises `ApiError` 404."""
    if requested is None:
        return names[0]
    for name in (requested, requested.split("___")[0]):
        if name in names:
            return name
    raise ApiError(404, f"No such model; available here: {', '.join(names)}.", code="model_not_found")


async def paced(service: Service, caller: Caller, work: Awaitable[Done]) -> Done:
    """A key that floods the service hears of it at a pace that leaves the event loop to other keys."""
    try:
        return await work
    except (ApiError, BatchingError) as error:
        refusal = from_batching(error) if isinstance(error, BatchingError) else error
        if refusal.status == 429 and caller.name:
            await service.refusals.wait(caller.name)
        raise refusal from None


async def until_disconnect(http: HttpRequest, work: Awaitable[Response]) -> Response:
    """The response of `work`, or a 499 if the client disconnects first. The body must have been read."""
    with anyio.CancelScope() as scope:
        watcher = asyncio.create_task(cancel_at_disconnect(scope, http))
        try:
            return await work
        finally:
            watcher.cancel()
    return Response(status_code=CLIENT_CLOSED)


async def cancel_at_disconnect(scope: anyio.CancelScope, http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def read(http: HttpRequest, kind: type[Body]) -> tuple[Body, int]:
    """Read and check a request's body. Returns it and its size in bytes.

    The middleware names ignored fields in the response header `x-ignored-fields`. Raises `ApiError`: 400, 408, 413,
    415, 429 or 503.
    """
    service: Service = http.app.state.service
    check_content_type(http.headers.get("content-type", ""))
    content = await read_body(http, service.max_body_bytes)
    check = partial(parse, kind, content, refuse_unknown=service.settings.unknown_fields == "refuse")
    small = len(content) <= INLINE_BYTES
    body, ignored = check() if small else await service.encoders.run(check, len(content), http.state.caller)
    if ignored:
        http.app.state.metrics.ignored_fields.inc(len(ignored))
        http.state.ignored = ", ".join(name if FIT.fullmatch(name) else "?" for name in ignored[:MAX_NAMED])
        logger.debug("request %s: ignored fields %s", http.state.caller.request_id, http.state.ignored)
    return body, len(content)


class GeneratingEndpoint(Endpoint[Generated, tuple[Encoded, list[Row]]], Generic[Generated, Encoded]):
    """A kind of request that is answered by generating tokens. `encode` returns what its grammar and its answer are
    made from, and its rows."""

    async def respond(
        self, service: Service, model: ServedModel, body: Generated, size: int, caller: Caller
    ) -> Response:
        name = served_name(service.names, body.model)
        with service.batcher.announce(caller.name):
            encoded, rows = await service.encoders.run(partial(self.encode, model, body), size, caller)
            grammar = await self.grammar(model, body, encoded, caller.name or caller.request_id)
            check_logprobs(rows)
            streams = service.batcher.submit_all(requests(service, rows, grammar, body.priority or 0, caller))
        answer = self.answer(model, name, body, encoded, streams)
        return await (streamed(answer, model.settings.first_byte_s) if body.stream else collected(answer))

    @abstractmethod
    async def grammar(self, model: ServedModel, body: Generated, encoded: Encoded, client: str) -> Grammar | None:
        """What the answer must match. Clients take turns to compile. Raises `ApiError`: 400 if it cannot be enforced,
        503 if too many are being compiled."""

    @abstractmethod
    def answer(
        self, model: ServedModel, name: str, body: Generated, encoded: Encoded, streams: Sequence[Stream]
    ) -> Answer:
        """The writer of these rows' answer; `name` is the model's name in the reply."""


def check_logprobs(rows: Sequence[Row]) -> None:
    """Raises `ApiError` 400 if an answer would hold too many."""
    if sum(map(num_prompt_logprobs, rows)) > MAX_PROMPT_LOGPROBS:
        raise bad_request(
            f"An answer can hold at most {MAX_PROMPT_LOGPROBS:,} log probabilities of prompt tokens; ask for fewer "
            "likeliest tokens, prompts or choices, or shorten the prompt.",
            code="too_large",
        )
    if sum(map(num_logprobs, rows)) > MAX_LOGPROBS:
        raise bad_request(
            "An answer with this many log probabilities would be too large; ask for fewer tokens or choices.",
            "logprobs",
        )


def num_prompt_logprobs(row: Row) -> int:
    """Number of prompt log probabilities a row asks for: each token's own and the likeliest ones."""
    top = row.sampling.prompt_logprobs
    return 0 if top is None else (1 + top) * len(row.prompt)


def num_logprobs(row: Row) -> int:
    """Maximum number of log probabilities in a row's answer."""
    top = row.sampling.top_logprobs
    return 0 if top is None else row.sampling.max_tokens * (1 + top + len(row.sampling.logprob_token_ids))


def requests(
    service: Service, rows: Iterable[Row], grammar: Grammar | None, priority: int, caller: Caller
) -> list[Request]:
    """The rows as the batcher takes them."""
    salt = caller.name if service.settings.prefix_sharing == "key" else ""
    return [
        Request(
            id=f"{caller.request_id}.{n}" if n else caller.request_id,  # the first row has the request's own
            prompt=row.prompt,
            sampling=row.sampling,
            time_limit=service.settings.request_timeout_s,
            client=caller.name,
            weight=caller.share,
            priority=priority,
            grammar=grammar,
            salt=salt,
            prediction=row.prediction,
            trace=caller.trace,
        )
        for n, row in enumerate(rows)
    ]


# The answer

Step: TypeAlias = Sequence[tuple[int, Delta]]
"""Tokens that arrived together, each with its row."""


class Answer(ABC):
    """Writes one answer: with `add` and `whole` if it is collected, else with `frames` and `last` or `failed`."""

    streams: Sequence[Stream]

    @abstractmethod
    def add(self, row: int, arrived: Delta) -> None:
        """Add tokens of a collected answer."""

    @abstractmethod
    async def whole(self) -> bytes:
        """The JSON of a collected answer, after its last token was added."""

    @abstractmethod
    def frames(self, step: Step) -> bytes:
        """The events for these tokens, possibly none yet."""

    @abstractmethod
    def last(self) -> Iterable[bytes]:
        """The end of a stream, in pieces that are built and sent one by one, because they can reach megabytes. An empty
        one lets the event loop do something else."""

    @abstractmethod
    def failed(self, error: ApiError) -> bytes:
        """The end of a stream that failed."""

    def cancel(self) -> None:
        for stream in self.streams:
            stream.cancel()


async def collected(answer: Answer) -> Response:
    """The whole answer as one JSON object. Raises `BatchingError`."""
    try:
        async for step in steps(answer.streams):
            for row, arrived in step:
                answer.add(row, arrived)
    finally:
        answer.cancel()
    return json_response(await answer.whole())


async def steps(streams: Iterable[Stream]) -> AsyncIterator[list[tuple[int, Delta]]]:
    """The tokens of all rows as they arrive. Raises what a stream raises.

    Collected answers are read this way too: processing a whole answer's tokens at once would block the event loop.
    """
    going = {stream: row for row, stream in enumerate(streams)}
    while going:
        step = []
        for stream in await with_deltas(going):
            arrived = stream.take()
            if arrived is None:
                del going[stream]
            else:
                step.append((going[stream], arrived))
        if step:
            yield step


async def streamed(answer: Answer, patience: float) -> Response:
    """The answer as server-sent events, once the first event is there or `patience` seconds have passed.

    The status line waits so that failures in the queue get a status of their own, but no longer than proxies wait for
    a first byte. Raises `BatchingError`.
    """
    frames = written(answer)
    first = asyncio.ensure_future(anext(frames))
    try:
        if (await asyncio.wait([first], timeout=patience))[0]:
            first.result()
        return AnswerResponse(answer, first, frames, patience)
    except BaseException:
        first.cancel()
        answer.cancel()
        raise


async def written(answer: Answer) -> AsyncIterator[bytes]:
    """The frames of a stream; tokens that arrived together share one."""
    async for step in steps(answer.streams):
        if frames := answer.frames(step):
            yield frames
    for piece in answer.last():
        if piece:
            yield piece
        await asyncio.sleep(0)


class AnswerResponse(StreamingResponse):
    """A stream that is never silent for longer than `patience` seconds. When it ends, its rows are cancelled."""

    def __init__(
        self, answer: Answer, first: asyncio.Future[bytes], rest: AsyncIterator[bytes], patience: float
    ) -> None:
        super().__init__(rest, media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)
        self._answer = answer
        self._first = first
        self._rest = rest
        self._patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Other servers, such as Ray's, have no such extension.
        self._write = (scope.get("extensions") or {}).get(WRITE, lambda frames: False)
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._first.cancel()
            self._answer.cancel()

    async def stream_response(self, send: Send) -> None:
        """Sends an error after the status line as the last frame."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pinged = sse.Pinged(send, self._write, self._patience)
        pings = asyncio.create_task(pinged.ping())
        try:
            await pinged.send(await self._first)
            async for frames in self._rest:
                await pinged.send(frames)
        except BatchingError as error:
            await pinged.send(self._answer.failed(from_batching(error)))
        finally:
            pings.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def json_response(content: bytes) -> Response:
    return Response(content, media_type="application/json")
