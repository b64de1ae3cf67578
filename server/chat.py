"""`POST /v1/chat/completions`: the one path from a request's bytes to its answer, streamed or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from batching.stream import Stream
from batching.types import Delta, Finish, Forced, Request
from server.answer import AnswerReader
from server.caller import Caller
from server.completion import Completion
from server.constrain import grammar_of
from server.disconnect import until_disconnect
from server.errors import bad_request
from server.formats import find_format, format_of
from server.logprobs import EncodedLists, chat_logprobs, prompt_logprobs
from server.message import Event, MessageReader, as_legacy, delta, end_of_first_call, fold
from server.messages import Message
from server.reasoning import CLOSE, OPEN, ReasoningSplitter, ThoughtState, thought_state
from server.request import read
from server.respond import plain, streamed
from server.sampling import sampling
from server.schema import ChatRequest
from server.service import Service
from server.text import StopScanner, TemplateError, Text
from server.tool_names import ToolNames
from server.tool_prompt import without_tools
from server.tools import Tool


async def chat_completions(http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    chat = await read(http, ChatRequest)
    return await until_disconnect(http, respond(service, chat, http.state.caller))


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it, and what must be known of it to read the answer."""

    tokens: tuple[int, ...]
    thought: ThoughtState
    names: ToolNames


async def respond(service: Service, chat: ChatRequest, caller: Caller) -> Response:
    """Everything after the body was read. Raises `ApiError`."""
    completion = Completion(service.served_name(chat.model), "chat.completion", "chatcmpl")
    with service.batcher.announce():
        requests, prompt = await prepare(service, chat, caller)
        streams = service.submit(requests)
    choices = [
        ChatChoice(index, stream, service.text, chat, reader(service.text, chat, prompt))
        for index, stream in enumerate(streams)
    ]
    if chat.stream:
        return await streamed(completion, choices, chat.include_usage, chat.continuous_usage)
    return await plain(completion, choices, choices[0].of_prompt)


async def prepare(service: Service, chat: ChatRequest, caller: Caller) -> tuple[list[Request], Prompt]:
    """Template, tokens and limits: all that can be wrong with a request is found here, before the queue."""
    thinks = service.settings.thinking if chat.thinks is None else chat.thinks
    prompt = await service.encoders.run(partial(encode, service.text, chat, thinks), chat.size, caller)
    grammar = await grammar_of(service, chat, prompt.names, prompt.thought, caller.name or caller.request_id)
    room = service.room_for_output(len(prompt.tokens), "messages")
    forced = end_of_thought(service.text, chat, prompt.thought)
    requests = [
        Request(
            id=caller.row_id(choice),
            prompt=prompt.tokens,
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
    return requests, prompt


def encode(text: Text, chat: ChatRequest, thinks: bool) -> Prompt:
    """The prompt. Blocks for milliseconds: not on the event loop. Raises `ApiError` 400."""
    names = names_in(text, chat.messages, chat.offered)
    rendered = render(text, chat.messages, chat.offered, names, thinks)
    return Prompt(text.encode(rendered), thought_state(text.template, rendered), names)


def names_in(text: Text, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> ToolNames:
    """The functions that a conversation speaks of."""
    offered = [tool.function.name for tool in tools]
    called = [name for message in messages for name in message.functions]
    return ToolNames(offered + called, format_of(text.template).carries)


def render(text: Text, messages: Sequence[Message], offered: Sequence[Tool], names: ToolNames, thinks: bool) -> str:
    """The text of a conversation. Raises `ApiError` 400."""
    turns = [text.as_text(names.in_turn(message.for_template())) for message in messages]
    tools = text.as_data([names.in_tool(tool.for_template()) for tool in offered])
    options: dict[str, Any] = {"enable_thinking": thinks}
    if find_format(text.template) is None:
        turns = without_tools(turns, tools)
    elif tools:
        options["tools"] = tools
    try:
        return text.render(turns, options)
    except TemplateError as error:
        raise bad_request(f"The model's chat template refuses the messages: {error}.", "messages") from None


def end_of_thought(text: Text, chat: ChatRequest, thought: ThoughtState) -> Forced | None:
    """How a thought is cut off at its budget. Raises `ApiError` 400 for a model that has no tokens around its own."""
    if chat.budget is None or not thought.to_come:
        return None
    free = thought is ThoughtState.FREE
    opening, closing = text.encode(OPEN), text.encode(CLOSE)
    if len(closing) == 1 and (len(opening) == 1 or not free):
        first = opening[0] if free else None
        return Forced(after=chat.budget, unless=closing[0], tokens=text.encode(f"\n{CLOSE}\n\n"), first=first)
    if free and not chat.thinks:
        return None  # nothing says that the model thinks at all
    raise bad_request("This model has no thinking that a budget could end.", "thinking_budget")


def reader(text: Text, chat: ChatRequest, prompt: Prompt) -> MessageReader:
    """What tells thinking, content and tool calls apart in this model's answers."""
    started = prompt.thought is ThoughtState.OPENED
    return MessageReader(
        None if prompt.thought is ThoughtState.UNKNOWN else ReasoningSplitter(started=started),
        format_of(text.template).parser() if chat.offered else None,
        prompt.names,
    )


class ChatChoice:
    """`Choice` of a chat completion."""

    def __init__(self, index: int, stream: Stream, text: Text, chat: ChatRequest, reader: MessageReader) -> None:
        self.stream = stream
        self._index = index
        self._text = text
        self._reader = reader
        self._legacy = chat.is_legacy
        self._one_call = chat.one_call
        scanner = StopScanner(chat.stop or (), inclusive=bool(chat.include_stop_str_in_output))
        self._answer = AnswerReader(stream, text.detokenizer(), scanner)
        self._begun = False
        self._events: list[Event] = []
        self._logprobs = EncodedLists()
        self._prompt_logprobs = EncodedLists()
        self._finish: str | None = None

    def read(self, arrived: Delta) -> tuple[list[Event], str | None]:
        """The events that these tokens complete, and why the answer is over if it is.

        Where only one call is allowed the answer ends with it.
        """
        text, finish = self._answer.push(arrived)
        events = self._reader.push(text)
        if finish:
            events += self._reader.flush()
        if self._one_call and (end := end_of_first_call(events)) is not None:
            self.stream.stop()
            return events[:end], Finish.STOP
        return events, finish

    def add(self, arrived: Delta) -> None:
        events, self._finish = self.read(arrived)
        self._events += events
        self._logprobs.add(chat_logprobs(self._text, arrived.logprobs))
        if arrived.prompt_logprobs:
            self._prompt_logprobs.add({"prompt_logprobs": prompt_logprobs(self._text, arrived.prompt_logprobs)})

    def of_prompt(self) -> dict[str, Any]:
        """What the answer says of its prompt, beside the choices."""
        return self._prompt_logprobs.whole() or {}

    def whole(self) -> dict[str, Any]:
        message = {"refusal": None} | fold(self._events)
        return self._choice("message", message, self._logprobs.whole(), self._finish)

    def chunks(self, arrived: Delta) -> list[dict[str, Any]]:
        """The first has the role alone. Why the answer is over is told with the last of its text, if that came now:
        RAGFlow takes that text's language for the one to tell the reader in that the answer was cut."""
        events, finish = self.read(arrived)
        logprobs = chat_logprobs(self._text, arrived.logprobs)
        deltas = [news for event in events if (news := delta(event)) is not None]
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        if finish and (not deltas or "tool_calls" in deltas[-1]):
            deltas.append({})
        chunks = [] if self._begun else [self._choice("delta", {"role": "assistant", "content": ""}, None, None)]
        self._begun = True
        last = len(deltas) - 1
        for n, news in enumerate(deltas):
            chunks.append(self._choice("delta", news, None if n else logprobs, finish if n == last else None))
        return chunks

    def _choice(self, kind: str, said: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        finish = self._reader.finish(finish)
        if self._legacy:
            said, finish = as_legacy(said, finish)
        return {"index": self._index, kind: said, "logprobs": logprobs, "finish_reason": finish}
