"""`POST /v1/chat/completions`: the one path from a request's bytes to its answer, streamed or not."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from anyio import to_thread
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from batching.stream import Stream
from batching.types import Delta, Finish, Forced, Request, TokenLogprob
from server.answer import AnswerReader
from server.caller import Caller
from server.completion import Completion
from server.constrain import grammar_of
from server.disconnect import until_disconnect
from server.errors import bad_request
from server.formats import find_format
from server.logprobs import chat_logprobs
from server.message import Event, MessageReader, delta, fold
from server.messages import Message
from server.qwen import QwenFormat
from server.reasoning import ReasoningSplitter, leaves_open
from server.request import read
from server.respond import plain, streamed
from server.sampling import sampling
from server.schema import ChatRequest
from server.service import Service
from server.text import StopScanner, TemplateError, Text
from server.tool_format import CallEnded
from server.tool_prompt import without_tools


async def chat_completions(http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    chat = await read(http, ChatRequest)
    return await until_disconnect(http, respond(service, chat, http.state.caller))


async def respond(service: Service, chat: ChatRequest, caller: Caller) -> Response:
    """Everything after the body was read. Raises `ApiError`."""
    completion = Completion(service.served_name(chat.model), "chat.completion", "chatcmpl")
    with service.batcher.announce():
        requests, thinking = await prepare(service, chat, caller)
        streams = service.submit(requests)
    choices = [
        ChatChoice(index, stream, service.text, chat, reader(service.text, chat, thinking))
        for index, stream in enumerate(streams)
    ]
    if chat.stream:
        return await streamed(completion, choices, chat.include_usage, chat.continuous_usage)
    return await plain(completion, choices)


async def prepare(service: Service, chat: ChatRequest, caller: Caller) -> tuple[list[Request], bool]:
    """Template, tokens and limits: all that can be wrong with a request is found here, before the queue.

    Also answers whether the prompt ends inside a think block.
    """
    thinks = service.settings.thinking if chat.thinks is None else chat.thinks
    prompt, thinking = await to_thread.run_sync(partial(encode, service.text, chat, thinks), limiter=service.encoders)
    grammar = await grammar_of(service, chat, thinking=thinks, client=caller.name)
    room = service.room_for_output(len(prompt), "messages")
    forced = end_of_thought(service.text, chat) if thinks else None
    requests = [
        Request(
            id=caller.row_id(choice),
            prompt=prompt,
            sampling=sampling(service, chat, room, choice=choice, forced=forced),
            time_limit=service.settings.request_timeout_s,
            client=caller.name,
            weight=caller.share,
            priority=chat.priority or 0,
            grammar=grammar,
            salt=service.salt_of(caller),
            trace=caller.trace,
        )
        for choice in range(chat.n or 1)
    ]
    return requests, thinking


def encode(text: Text, chat: ChatRequest, thinks: bool) -> tuple[tuple[int, ...], bool]:
    """The prompt's ids, and whether it ends inside a think block. Blocks for milliseconds: not on the event loop."""
    tools = [tool.for_template() for tool in chat.offered]
    rendered = render(text, chat.messages, tools, thinks)
    return text.encode(rendered), leaves_open(rendered)


def render(text: Text, messages: Sequence[Message], tools: Sequence[dict[str, Any]], thinks: bool) -> str:
    """The text of a conversation. Raises `ApiError` 400."""
    turns = [message.for_template() for message in messages]
    options: dict[str, Any] = {"enable_thinking": thinks}
    if find_format(text.template) is None:
        turns = without_tools(turns, tools)
    elif tools:
        options["tools"] = tools
    try:
        return text.render(turns, options)
    except TemplateError as error:
        raise bad_request(f"The model's chat template refuses the messages: {error}.", "messages") from None


def end_of_thought(text: Text, chat: ChatRequest) -> Forced | None:
    """How a thought is cut off at its budget. Raises `ApiError` 400 for a model that has no token to end one with."""
    if chat.budget is None:
        return None
    close = text.encode("</think>")
    if len(close) != 1:
        raise bad_request("This model has no thinking that a budget could end.", "thinking_budget")
    return Forced(after=chat.budget, unless=close[0], tokens=text.encode("\n</think>\n\n"))


def reader(text: Text, chat: ChatRequest, thinking: bool) -> MessageReader:
    """What tells thinking, content and tool calls apart in this model's answers."""
    form = (find_format(text.template) or QwenFormat()) if chat.offered else None
    names = [tool.function.name for tool in chat.demanded or chat.offered]
    return MessageReader(
        ReasoningSplitter(started=thinking) if "<think>" in text.template else None,
        form.parser(names) if form else None,
    )


class ChatChoice:
    """`Choice` of a chat completion."""

    def __init__(self, index: int, stream: Stream, text: Text, chat: ChatRequest, reader: MessageReader) -> None:
        self.stream = stream
        self._index = index
        self._text = text
        self._reader = reader
        self._one_call = chat.parallel_tool_calls is False
        scanner = StopScanner(chat.stop or (), inclusive=bool(chat.include_stop_str_in_output))
        self._answer = AnswerReader(stream, text.detokenizer(), scanner)
        self._role: dict[str, Any] = {"role": "assistant", "content": ""}

    def read(self, arrived: Delta) -> tuple[list[Event], str | None]:
        """The events that these tokens complete, and why the answer is over if it is.

        Where only one call is allowed the answer ends with it.
        """
        text, finish = self._answer.push(arrived)
        events = self._reader.push(text)
        if finish:
            events += self._reader.flush()
        if self._one_call:
            end = next((n for n, event in enumerate(events, 1) if isinstance(event, CallEnded)), None)
            if end is not None:
                self.stream.stop()
                return events[:end], Finish.STOP
        return events, finish

    async def whole(self) -> dict[str, Any]:
        found: list[Event] = []
        logprobs: list[TokenLogprob] = []
        finish = None
        async for arrived in self.stream:
            events, finish = self.read(arrived)
            found += events
            logprobs += arrived.logprobs
        message = {"refusal": None} | fold(found)
        return self._choice("message", message, chat_logprobs(self._text, logprobs), self._reader.finish(finish))

    def chunks(self, arrived: Delta) -> list[dict[str, Any]]:
        events, finish = self.read(arrived)
        logprobs = chat_logprobs(self._text, arrived.logprobs)
        deltas = [news for event in events if (news := delta(event)) is not None]
        if not deltas and (logprobs or (finish and self._role)):
            deltas = [{"content": ""}]
        chunks = []
        for news in deltas:
            chunks.append(self._choice("delta", self._role | news, logprobs, None))
            self._role, logprobs = {}, None
        if finish:
            chunks.append(self._choice("delta", {}, None, self._reader.finish(finish)))
        return chunks

    def _choice(self, kind: str, said: Any, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": self._index, kind: said, "logprobs": logprobs, "finish_reason": finish}
