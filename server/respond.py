"""From the choices of an answer to its HTTP response, plain or streamed, whatever the endpoint."""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Protocol, TypeVar

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from batching.errors import BatchingError
from batching.stream import Stream, with_deltas
from batching.types import Delta
from server import sse
from server.completion import Completion
from server.errors import from_batching

T = TypeVar("T")


class Choice(Protocol):
    """One row's answer in an endpoint's own words."""

    stream: Stream

    def add(self, arrived: Delta) -> None:
        """Take in tokens of a plain answer."""
        ...

    def whole(self) -> dict[str, Any]:
        """The choice of a plain answer, once all of its tokens were added."""
        ...

    def chunks(self, arrived: Delta) -> list[dict[str, Any]]:
        """The choice's news that these tokens complete, often one, sometimes none; the last has its finish reason."""
        ...


async def plain(
    completion: Completion, choices: Sequence[Choice], others: Callable[[], Mapping[str, Any]] = dict
) -> Response:
    """The whole answer as one JSON object, with `others` beside its choices."""
    async with AsyncExitStack() as stack:
        for choice in choices:
            await stack.enter_async_context(choice.stream)
        try:
            async for step in deltas_of(choices):
                for choice, arrived in step:
                    choice.add(arrived)
        except BatchingError as error:
            raise from_batching(error) from None
    done = [choice.whole() for choice in choices]
    return Response(completion.whole(done, usage(choices), **others()), media_type="application/json")


async def deltas_of(choices: Iterable[Choice]) -> AsyncIterator[list[tuple[Choice, Delta]]]:
    """The tokens of all choices as they come; those that came together are one list. Raises what a stream raises.

    Read as they come also where nothing is sent before the end, because a whole answer's tokens would hold the event
    loop up.
    """
    going = {choice.stream: choice for choice in choices}
    while going:
        step = []
        for stream in await with_deltas(going):
            arrived = stream.take()
            if arrived is None:
                del going[stream]
            else:
                step.append((going[stream], arrived))
        yield step


async def streamed(
    completion: Completion, choices: Sequence[Choice], include_usage: bool, continuous_usage: bool
) -> Response:
    """The answer as server-sent events; token counts in one of their own at the end, or so far in every one."""
    news = news_of(choices)
    first = await begun(choices, news)
    return RowsResponse(choices, frames(completion, choices, first, news, include_usage, continuous_usage))


async def begun(choices: Sequence[Choice], news: AsyncIterator[T]) -> T:
    """The first news. Raises `ApiError`.

    It is waited for before the status line is sent, so that all that can go wrong in the queue still has a status of
    its own.
    """
    try:
        return await anext(news)
    except BaseException as error:
        cancel(choices)
        if isinstance(error, BatchingError):
            raise from_batching(error) from None
        raise


async def news_of(choices: Sequence[Choice]) -> AsyncIterator[list[dict[str, Any]]]:
    """The news of all choices as they come; those that came together are one list."""
    async for step in deltas_of(choices):
        if news := [chunk for choice, arrived in step for chunk in choice.chunks(arrived)]:
            yield news


async def frames(
    completion: Completion,
    choices: Sequence[Choice],
    first: Sequence[Mapping[str, Any]],
    rest: AsyncIterator[Sequence[Mapping[str, Any]]],
    include_usage: bool,
    continuous_usage: bool,
) -> AsyncIterator[bytes]:
    """The frames of a streamed answer, those that came together in one write.

    An error after the first becomes a last frame, without `[DONE]`.
    """
    yield completion.chunks(first, usage(choices) if continuous_usage else None)
    try:
        async for news in rest:
            yield completion.chunks(news, usage(choices) if continuous_usage else None)
    except BatchingError as error:
        cancel(choices)
        yield sse.event(from_batching(error).body())
        return
    if include_usage:
        yield completion.usage_chunk(usage(choices)) + sse.DONE
    else:
        yield sse.DONE


def cancel(choices: Iterable[Choice]) -> None:
    for choice in choices:
        choice.stream.cancel()


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Token counts of an answer. Choices that continue the same prompt count it once, as OpenAI does.

    `cached_tokens`: how many of the prompts' tokens had been computed for other requests.
    """
    prompts = {id(row.request.prompt): row for row in (choice.stream.row for choice in choices)}
    prompt = sum(len(row.request.prompt) for row in prompts.values())
    output = sum(choice.stream.output_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(row.num_cached_tokens for row in prompts.values())},
    }


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
