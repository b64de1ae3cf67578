"""`POST /v1/chat/completions`: the one path from a request's bytes to its answer, streamed or not."""

import secrets
from collections.abc import AsyncIterator
from functools import partial

from anyio import to_thread
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from batching.errors import BatchingError
from batching.stream import Stream
from batching.types import Request, Sampling
from server import sse
from server.answer import Piece, pieces
from server.body import read_body
from server.completion import Completion
from server.disconnect import until_disconnect
from server.errors import bad_request, from_batching
from server.schema import ChatRequest, parse
from server.service import Service
from server.text import TemplateError


async def chat_completions(http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    service.check_ready()
    chat = parse(await read_body(http, service.max_body_bytes))
    return await until_disconnect(http, respond(service, chat, http.state.request_id))


async def respond(service: Service, chat: ChatRequest, request_id: str) -> Response:
    """Everything after the body was read. Raises `ApiError`.

    A streamed answer waits for its first piece before the status line is sent, so that all that can go wrong in the
    queue still has a status code of its own.
    """
    model = service.served_name(chat.model)
    with service.batcher.announce():
        request = await prepare(service, chat, request_id)
        try:
            stream = service.batcher.submit(request)
        except BatchingError as error:
            raise from_batching(error) from None
    completion = Completion(model)
    text = pieces(stream, service.text.detokenizer(), chat.stop or ())
    if chat.stream:
        return await streamed(chat, completion, stream, text)
    return await plain(completion, stream, text)


async def prepare(service: Service, chat: ChatRequest, request_id: str) -> Request:
    """Template, tokens and limits: all that can be wrong with a request is found here, before the queue."""
    thinks = service.settings.thinking if chat.thinks is None else chat.thinks
    messages = [message.for_template() for message in chat.messages]
    encode = partial(service.text.prompt, messages, {"enable_thinking": thinks})
    try:
        prompt = await to_thread.run_sync(encode, limiter=service.encoders)
    except TemplateError as error:
        raise bad_request(f"The model's chat template refuses the messages: {error}.", "messages") from None
    return Request(
        id=request_id,
        prompt=prompt,
        sampling=sampling(service, chat, service.room_for_output(len(prompt))),
        time_limit=service.settings.request_timeout_s,
    )


def sampling(service: Service, chat: ChatRequest, room: int) -> Sampling:
    """The request's sampling with this service's defaults. A length that does not fit is cut to what does."""
    settings = service.settings
    wanted = min(chat.wanted_tokens or settings.default_max_tokens, settings.max_output_tokens)
    return Sampling(
        max_tokens=min(wanted, room),
        seed=secrets.randbits(63) if chat.seed is None else chat.seed,
        temperature=0.0 if chat.greedy else _or(chat.temperature, 1.0),
        top_p=_or(chat.top_p, 1.0),
        top_k=max(chat.top_k or 0, 0),
        min_p=chat.min_p or 0.0,
        presence_penalty=chat.presence_penalty or 0.0,
        frequency_penalty=chat.frequency_penalty or 0.0,
        repetition_penalty=chat.repetition_penalty or 1.0,
        stop_token_ids=frozenset() if chat.ignore_eos else service.stop_token_ids,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


async def plain(completion: Completion, stream: Stream, text: AsyncIterator[Piece]) -> Response:
    """The whole answer as one JSON object."""
    async with stream:
        try:
            parts = [piece async for piece in text]
        except BatchingError as error:
            raise from_batching(error) from None
    content = "".join(piece.text for piece in parts)
    return Response(completion.whole(content, parts[-1].finish, usage(stream)), media_type="application/json")


async def streamed(chat: ChatRequest, completion: Completion, stream: Stream, text: AsyncIterator[Piece]) -> Response:
    """The answer as server-sent events, once its first piece is there."""
    try:
        first = await anext(text)
    except BaseException as error:
        stream.cancel()
        if isinstance(error, BatchingError):
            raise from_batching(error) from None
        raise
    return RowResponse(stream, events(chat, completion, stream, first, text))


async def events(
    chat: ChatRequest, completion: Completion, stream: Stream, first: Piece, rest: AsyncIterator[Piece]
) -> AsyncIterator[bytes]:
    """The frames of a streamed answer. An error after the first piece becomes a last frame, without `[DONE]`."""
    yield completion.first_chunk(first.text)
    finish = first.finish
    try:
        async for piece in rest:
            finish = piece.finish
            if piece.text:
                yield completion.chunk(piece.text)
    except BatchingError as error:
        yield sse.event(from_batching(error).body())
        return
    yield completion.last_chunk(finish)
    if chat.stream_options is not None and chat.stream_options.include_usage:
        yield completion.usage_chunk(usage(stream))
    yield sse.DONE


def usage(stream: Stream) -> dict[str, int]:
    prompt, output = len(stream.row.request.prompt), stream.output_tokens
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


class RowResponse(StreamingResponse):
    """A streamed answer. However it ends, its row has ended with it."""

    def __init__(self, stream: Stream, content: AsyncIterator[bytes]) -> None:
        super().__init__(content, media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stream:
            await super().__call__(scope, receive, send)
