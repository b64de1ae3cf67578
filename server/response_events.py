"""A response's output items, and the typed events that tell of them as they grow. Runs on the event loop."""

import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from itertools import count
from typing import Any, ClassVar, Literal, TypeAlias

import orjson

from batching.errors import BatchingError
from batching.stream import Stream
from batching.types import Finish
from server import sse
from server.caller import Caller
from server.chat import ChatChoice
from server.errors import from_batching
from server.message import Event, MessageReader, Reasoning
from server.respond import usage
from server.schema import ChatRequest
from server.service import Service
from server.tool_format import CallArguments, CallEnded, CallStarted, Content

Json: TypeAlias = dict[str, Any]
Status: TypeAlias = Literal["in_progress", "completed", "incomplete"]

CUT = {"reason": "max_output_tokens"}
"""`incomplete_details` of an answer that its length has ended."""


class Item:
    """One output item. It is opened, grows by pieces of text, and is closed once."""

    kind: ClassVar[str]
    prefix: ClassVar[str]

    def __init__(self, place: int) -> None:
        self.status: Status = "in_progress"
        self._place = place
        self._id = f"{self.prefix}_{secrets.token_hex(12)}"
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def json(self) -> Json:
        return {"id": self._id, "type": self.kind, "status": self.status}

    def opened(self) -> list[Json]:
        return [self._whole("added")]

    def more(self, text: str) -> list[Json]:
        self._texts.append(text)
        return []

    def closed(self, status: Status) -> list[Json]:
        self.status = status
        return [self._whole("done")]

    def _whole(self, when: str) -> Json:
        return {"type": f"response.output_item.{when}", "output_index": self._place, "item": self.json()}

    def _event(self, kind: str, **fields: Any) -> Json:
        return {"type": f"response.{kind}", "item_id": self._id, "output_index": self._place} | fields


class TextItem(Item):
    """An item with one part, which is text."""

    part: ClassVar[str]
    of_item: ClassVar[Json]
    of_part: ClassVar[Json]
    of_event: ClassVar[Json]

    def json(self) -> Json:
        content = [] if self.status == "in_progress" else [self._part()]
        return super().json() | self.of_item | {"content": content}

    def opened(self) -> list[Json]:
        return [*super().opened(), self._within("content_part.added", part=self._part())]

    def more(self, text: str) -> list[Json]:
        return [*super().more(text), self._within(f"{self.part}.delta", delta=text, **self.of_event)]

    def closed(self, status: Status) -> list[Json]:
        done = self._within(f"{self.part}.done", text=self.text, **self.of_event)
        return [done, self._within("content_part.done", part=self._part()), *super().closed(status)]

    def _part(self) -> Json:
        return {"type": self.part, "text": self.text} | self.of_part

    def _within(self, kind: str, **fields: Any) -> Json:
        return self._event(kind, content_index=0, **fields)


class Thought(TextItem):
    kind = "reasoning"
    prefix = "rs"
    part = "reasoning_text"
    of_item: ClassVar[Json] = {"summary": []}
    of_part: ClassVar[Json] = {}
    of_event: ClassVar[Json] = {}


class Said(TextItem):
    kind = "message"
    prefix = "msg"
    part = "output_text"
    of_item: ClassVar[Json] = {"role": "assistant"}
    of_part: ClassVar[Json] = {"annotations": [], "logprobs": []}
    of_event: ClassVar[Json] = {"logprobs": []}


class Call(Item):
    """A function call; its text is that of its arguments."""

    kind = "function_call"
    prefix = "fc"

    def __init__(self, place: int, started: CallStarted) -> None:
        super().__init__(place)
        self._started = started

    def json(self) -> Json:
        return super().json() | {"call_id": self._started.id, "name": self._started.name, "arguments": self.text}

    def more(self, text: str) -> list[Json]:
        return [*super().more(text), self._event("function_call_arguments.delta", delta=text)]

    def closed(self, status: Status) -> list[Json]:
        return [self._event("function_call_arguments.done", arguments=self.text), *super().closed(status)]


class Output:
    """Folds an answer's events into items. Every step returns what a stream tells of it.

    Only the last item grows. A call that no `CallEnded` has closed was cut off or broken, and is incomplete.
    """

    def __init__(self) -> None:
        self._items: list[Item] = []

    def json(self) -> list[Json]:
        return [item.json() for item in self._items]

    @property
    def thought(self) -> str:
        """All of the thinking."""
        return "".join(item.text for item in self._items if isinstance(item, Thought))

    def push(self, event: Event) -> list[Json]:
        match event:
            case Reasoning():
                return self._say(Thought, event.text)
            case Content():
                return self._say(Said, event.text)
            case CallStarted():
                return self._open(Call(len(self._items), event))
            case CallArguments():
                return self._items[-1].more(event.text)
            case CallEnded():
                return self._items[-1].closed("completed")

    def end(self, *, cut: bool) -> list[Json]:
        """The answer is over; `cut` is whether its length was what ended it. One without any item is an empty text."""
        opened = [] if self._items else self._open(Said(0))
        return opened + self._settle(cut)

    def _say(self, kind: type[TextItem], text: str) -> list[Json]:
        growing = self._growing
        if isinstance(growing, kind):
            return growing.more(text)
        return [*self._open(kind(len(self._items))), *self._items[-1].more(text)]

    def _open(self, item: Item) -> list[Json]:
        settled = self._settle(cut=False)
        self._items.append(item)
        return settled + item.opened()

    def _settle(self, cut: bool) -> list[Json]:
        growing = self._growing
        if growing is None:
            return []
        return growing.closed("incomplete" if cut or isinstance(growing, Call) else "completed")

    @property
    def _growing(self) -> Item | None:
        return self._items[-1] if self._items and self._items[-1].status == "in_progress" else None


def frame(event: Json) -> bytes:
    """An event as it is sent: its type is told twice, in the frame and in the JSON."""
    kind: str = event["type"]
    return b"event: " + kind.encode() + b"\n" + sse.event(orjson.dumps(event))


class ResponseChoice(ChatChoice):
    """`Choice` of a response. Its news are typed events, and a plain answer is the response in the last of them.

    `head` is all of the response that is known from the start.
    """

    def __init__(self, service: Service, stream: Stream, chat: ChatRequest, reader: MessageReader, head: Json) -> None:
        super().__init__(0, stream, service.text, chat, reader)
        self._service = service
        self._head = head
        self._output = Output()
        self._numbers = count()

    async def response(self) -> Json:
        """The whole of a plain answer."""
        response: Json = {}
        async for news in self.news():
            response = news[-1].get("response", response)
        return response

    async def frames(self, first: list[Json], rest: AsyncIterator[list[Json]]) -> AsyncIterator[bytes]:
        """The frames of a streamed answer, those that came together in one write.

        An error after the first becomes a last event, `response.failed`.
        """
        yield self._frames(first)
        try:
            async for news in rest:
                yield self._frames(news)
        except BatchingError as error:
            self.stream.cancel()
            told = from_batching(error)
            self._output.end(cut=True)
            failed = self._as_event("failed", "failed", error={"code": told.type, "message": told.message})
            yield self._frames([failed])

    async def news(self) -> AsyncIterator[list[Json]]:
        """The events of each step that has some."""
        finish = None
        opening = [self._as_event(kind, "in_progress") for kind in ("created", "in_progress")]
        async for arrived in self.stream:
            events, finish = self.read(arrived)
            news = opening + [told for event in events for told in self._output.push(event)]
            opening = []
            if news:
                yield news
        yield [*self._output.end(cut=finish == Finish.LENGTH), await self._ended(finish)]

    async def _ended(self, finish: str | None) -> Json:
        fields: Json = {"usage": await self._usage()}
        if finish == Finish.LENGTH:
            return self._as_event("incomplete", "incomplete", incomplete_details=CUT, **fields)
        return self._as_event("completed", "completed", completed_at=int(time.time()), **fields)

    async def _usage(self) -> Json:
        counts = usage([self])
        output = counts["completion_tokens"]
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": min(await self._thought_tokens(), output)},
            "total_tokens": counts["total_tokens"],
        }

    async def _thought_tokens(self) -> int:
        """The tokens of the thinking's text, which may have been generated as a few more or less."""
        thought = self._output.thought
        if not thought:
            return 0
        request = self.stream.row.request
        work = partial(self._text.encode, thought)
        return len(await self._service.encoders.run(work, len(thought), Caller(request.id, request.client)))

    def _as_event(self, kind: str, status: str, **fields: Any) -> Json:
        response = self._head | {"status": status, "output": self._output.json()} | fields
        return {"type": f"response.{kind}", "response": response}

    def _frames(self, events: list[Json]) -> bytes:
        return b"".join(frame(event | {"sequence_number": next(self._numbers)}) for event in events)
