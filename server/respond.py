"""From the choices of an answer to its HTTP response, plain or streamed, whatever the endpoint."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Protocol, TypeVar

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from batching.errors import BatchingError
from batching.stream import Stream
from server import sse
from server.completion import Completion
from server.errors import from_batching

T = TypeVar("T")


class Choice(Protocol):
    """One row's answer in an endpoint's own words."""

    stream: Stream

    async def whole(self) -> dict[str, Any]:
        """The choice of a plain answer. Raises what the stream raises."""
        ...

    def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The choice's news as they come; the last one has its finish reason. Raises what the stream raises."""
        ...


async def plain(completion: Completion, choices: Sequence[Choice]) -> Response:
    """The whole answer as one JSON object."""
    async with AsyncExitStack() as stack:
        for choice in choices:
            await stack.enter_async_context(choice.stream)
        try:
            # One after the other is no slower: the rows run at the same time, and their streams keep what comes.
            done = [await choice.whole() for choice in choices]
        except BatchingError as error:
            raise from_batching(error) from None
    return Response(completion.whole(done, usage(choices)), media_type="application/json")


async def streamed(completion: Completion, choices: Sequence[Choice], *, include_usage: bool) -> Response:
    """The answer as server-sent events."""
    chunks = merged([choice.chunks() for choice in choices])
    first = await begun(choices, chunks)
    return RowsResponse(choices, events(completion, choices, first, chunks, include_usage))


async def begun(choices: Sequence[Choice], chunks: AsyncIterator[T]) -> T:
    """The first chunk. Raises `ApiError`.

    It is waited for before the status line is sent, so that all that can go wrong in the queue still has a status of
    its own.
    """
    try:
        return await anext(chunks)
    except BaseException as error:
        cancel(choices)
        if isinstance(error, BatchingError):
            raise from_batching(error) from None
        raise


async def events(
    completion: Completion,
    choices: Sequence[Choice],
    first: Mapping[str, Any],
    rest: AsyncIterator[Mapping[str, Any]],
    include_usage: bool,
) -> AsyncIterator[bytes]:
    """The frames of a streamed answer. An error after the first chunk becomes a last frame, without `[DONE]`."""
    yield completion.chunk(first)
    try:
        async for choice in rest:
            yield completion.chunk(choice)
    except BatchingError as error:
        cancel(choices)
        yield sse.event(from_batching(error).body())
        return
    if include_usage:
        yield completion.usage_chunk(usage(choices))
    yield sse.DONE


async def merged(sources: Sequence[AsyncIterator[T]]) -> AsyncIterator[T]:
    """The items of several iterators as they come."""
    if len(sources) == 1:
        async for item in sources[0]:
            yield item
        return
    waiting = {asyncio.ensure_future(_next(source)): source for source in sources}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                source = waiting.pop(task)
                for item in task.result():
                    yield item
                    waiting[asyncio.ensure_future(_next(source))] = source
    finally:
        for task in waiting:
            task.cancel()


async def _next(source: AsyncIterator[T]) -> tuple[T, ...]:
    """The next item; none at the end. A task may not raise StopAsyncIteration."""
    try:
        return (await anext(source),)
    except StopAsyncIteration:
        return ()


def cancel(choices: Iterable[Choice]) -> None:
    for choice in choices:
        choice.stream.cancel()


def usage(choices: Sequence[Choice]) -> dict[str, int]:
    """Token counts of an answer. Choices that continue the same prompt count it once, as OpenAI does."""
    prompts = {id(request.prompt): len(request.prompt) for request in (c.stream.row.request for c in choices)}
    prompt, output = sum(prompts.values()), sum(choice.stream.output_tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


class RowsResponse(StreamingResponse):
    """A streamed answer. However it ends, its rows have ended with it."""

    def __init__(self, choices: Sequence[Choice], content: AsyncIterator[bytes]) -> None:
        super().__init__(content, media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)
        self._choices = choices

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            cancel(self._choices)
