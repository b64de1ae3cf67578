"""A response's output items, and the typed events that tell of them as they grow. Runs on the event loop."""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, count
from typing import Any, ClassVar, Literal, TypeAlias

import orjson

from batching.stream import Stream
from batching.types import Delta, Finish
from server import sse
from server.chat import EventReader
from server.choices import usage
from server.endpoint import Answer, Step
from server.errors import ApiError
from server.message import Event, Reasoning
from server.tool_format import CallArguments, CallEnded, CallStarted, Content

Json: TypeAlias = dict[str, Any]
Status: TypeAlias = Literal["in_progress", "completed", "incomplete"]

CUT = {"reason": "max_output_tokens"}
"""`incomplete_details` of an answer that its length has ended."""


class Item:
    """One output item. It is opened, grows by pieces of text, and is closed once.

    `opened`, `grown` and `closed` are the events that tell of that, made from the item as it is then.
    """

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

    def add(self, text: str) -> None:
        self._texts.append(text)

    def grown(self, text: str) -> list[Json]:
        raise NotImplementedError

    def closed(self) -> list[Json]:
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

    def grown(self, text: str) -> list[Json]:
        return [self._within(f"{self.part}.delta", delta=text, **self.of_event)]

    def closed(self) -> list[Json]:
        done = self._within(f"{self.part}.done", text=self.text, **self.of_event)
        return [done, self._within("content_part.done", part=self._part()), *super().closed()]

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

    def grown(self, text: str) -> list[Json]:
        return [self._event("function_call_arguments.delta", delta=text)]

    def closed(self) -> list[Json]:
        return [self._event("function_call_arguments.done", arguments=self.text), *super().closed()]


Change: TypeAlias = Callable[[], list[Json]]
"""Something that happened to an output: what a stream says of it, made only if there is a stream."""


class Output:
    """Folds an answer's events into items, change by change: each must be used before the next is asked for.

    Only the last item grows. A call that no `CallEnded` has closed was cut off or broken, and is incomplete.
    """

    def __init__(self) -> None:
        self._items: list[Item] = []

    def json(self) -> list[Json]:
        return [item.json() for item in self._items]

    def push(self, event: Event) -> Iterator[Change]:
        match event:
            case Reasoning():
                yield from self._write(Thought, event.text)
            case Content():
                yield from self._write(Said, event.text)
            case CallStarted():
                yield from self._open(Call(len(self._items), event))
            case CallArguments():
                yield self._grow(event.text)
            case CallEnded():
                yield self._close("completed")

    def end(self, *, cut: bool) -> Iterator[Change]:
        """The answer is over; `cut` is whether its length was what ended it. One without any item is an empty text."""
        if not self._items:
            yield from self._open(Said(0))
        yield from self._settle(cut)

    def _write(self, kind: type[TextItem], text: str) -> Iterator[Change]:
        if not isinstance(self._growing, kind):
            yield from self._open(kind(len(self._items)))
        yield self._grow(text)

    def _open(self, item: Item) -> Iterator[Change]:
        yield from self._settle(cut=False)
        self._items.append(item)
        yield item.opened

    def _grow(self, text: str) -> Change:
        item = self._items[-1]
        item.add(text)
        return partial(item.grown, text)

    def _settle(self, cut: bool) -> Iterator[Change]:
        if (growing := self._growing) is not None:
            yield self._close("incomplete" if cut or isinstance(growing, Call) else "completed")

    def _close(self, status: Status) -> Change:
        item = self._items[-1]
        item.status = status
        return item.closed

    @property
    def _growing(self) -> Item | None:
        return self._items[-1] if self._items and self._items[-1].status == "in_progress" else None


class ResponseAnswer(Answer):
    """A response, which one row writes. `head` is all of it that is known from the start."""

    def __init__(self, stream: Stream, reader: EventReader, head: Json) -> None:
        self.streams = [stream]
        self._reader = reader
        self._head = head
        self._output = Output()
        self._finish: str | None = None
        self._begun = False
        self._numbers = count()

    def _changes(self, arrived: Delta) -> Iterator[Change]:
        events, self._finish = self._reader.push(arrived)
        return chain.from_iterable(map(self._output.push, events))

    def _end(self) -> Iterator[Change]:
        return self._output.end(cut=self._finish == Finish.LENGTH)

    def add(self, row: int, arrived: Delta) -> None:
        for _ in self._changes(arrived):
            pass

    def whole(self) -> bytes:
        for _ in self._end():
            pass
        return orjson.dumps(self._ended())

    def frames(self, step: Step) -> bytes:
        [(_, arrived)] = step
        return self._frames([*self._opening(), *told(self._changes(arrived))])

    def last(self) -> bytes:
        events = [*self._opening(), *told(self._end())]
        response = self._ended()
        return self._frames([*events, {"type": f"response.{response['status']}", "response": response}])

    def failed(self, error: ApiError) -> bytes:
        for _ in self._output.end(cut=True):
            pass
        details = {"code": error.type, "message": error.message}
        return self._frames([*self._opening(), self._as_event("failed", "failed", error=details)])

    def _opening(self) -> list[Json]:
        """The first events of a stream, once."""
        kinds = [] if self._begun else ["created", "in_progress"]
        self._begun = True
        return [self._as_event(kind, "in_progress") for kind in kinds]

    def _ended(self) -> Json:
        if self._finish == Finish.LENGTH:
            return self._response("incomplete", incomplete_details=CUT, usage=self._usage())
        return self._response("completed", completed_at=int(time.time()), usage=self._usage())

    def _usage(self) -> Json:
        counts = usage(self.streams)
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._reader.thought_tokens},
            "total_tokens": counts["total_tokens"],
        }

    def _response(self, status: str, **fields: Any) -> Json:
        return self._head | {"status": status, "output": self._output.json()} | fields

    def _as_event(self, kind: str, status: str, **fields: Any) -> Json:
        return {"type": f"response.{kind}", "response": self._response(status, **fields)}

    def _frames(self, events: list[Json]) -> bytes:
        return b"".join(frame(event | {"sequence_number": next(self._numbers)}) for event in events)


def told(changes: Iterable[Change]) -> list[Json]:
    return [event for change in changes for event in change()]


def frame(event: Json) -> bytes:
    """An event as it is sent: its type is told twice, in the frame and in the JSON."""
    kind: str = event["type"]
    return b"event: " + kind.encode() + b"\n" + sse.event(orjson.dumps(event))
