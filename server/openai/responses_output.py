"""A response's output items, and the typed events that report their progress. Runs on the event loop."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count
from typing import ClassVar, Literal, TypeAlias

import orjson

from batching.stream import Stream
from batching.types import Delta, Finish
from server.http.errors import ApiError
from server.model.text import Text
from server.openai import responses_replies as replies
from server.openai.chat import EventReader
from server.openai.choices import usage
from server.openai.endpoint import Answer, Step
from server.openai.logprobs import chat_logprobs
from server.openai.responses_request import RESPONSE, UNENCRYPTED
from server.output.answer import one_by_one
from server.output.message import Event, Reasoning
from server.output.tool_calls import CallArguments, CallEnded, CallStarted, Content
from server.replies import FinishReason
from server.sse import framed

Status: TypeAlias = Literal["in_progress", "completed", "incomplete"]
Kind: TypeAlias = Literal[
    "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
]


@dataclass(frozen=True, slots=True)
class Shared:
    """What a response's items share: its id, which can be read from theirs, and the sequence numbers of the stream's
    events. `encrypted`: a thought is also in `encrypted_content`, the only form in which some clients send it back."""

    response: str
    encrypted: bool
    numbers: Iterator[int] = field(default_factory=count)


class Item(ABC):
    """One output item. It is opened once, grows by pieces of text, and is closed once.

    `opened`, `grown` and `closed` return the events for that, each built when it is requested, from the item's state
    then and with the next number.
    """

    prefix: ClassVar[str]

    def __init__(self, place: int, shared: Shared) -> None:
        self.status: Status = "in_progress"
        self._place = place
        self._shared = shared
        self._id = f"{self.prefix}_{shared.response.removeprefix(RESPONSE)}_{place}"
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def add(self, text: str, logprobs: Sequence[orjson.Fragment] = ()) -> None:
        """Add text and, where they are wanted, its tokens' log probabilities as JSON."""
        self._texts.append(text)

    @abstractmethod
    def json(self) -> replies.OutputItem: ...

    @abstractmethod
    def grown(self, text: str) -> Iterable[replies.ResponseEvent]: ...

    def opened(self) -> Iterable[replies.ResponseEvent]:
        yield self._whole("response.output_item.added")

    def closed(self) -> Iterable[replies.ResponseEvent]:
        yield self._whole("response.output_item.done")

    def _whole(self, kind: Literal["response.output_item.added", "response.output_item.done"]) -> replies.ResponseEvent:
        return {
            "type": kind,
            "sequence_number": next(self._shared.numbers),
            "output_index": self._place,
            "item": self.json(),
        }

    def _of_item(self) -> replies.OfItem:
        return {"sequence_number": next(self._shared.numbers), "item_id": self._id, "output_index": self._place}


class TextItem(Item):
    """An item with a single text part."""

    @abstractmethod
    def part(self) -> replies.OutputText | replies.ReasoningText: ...

    @abstractmethod
    def done(self) -> replies.TextDone | replies.ReasoningDone: ...

    def opened(self) -> Iterable[replies.ResponseEvent]:
        yield from super().opened()
        yield self._part("response.content_part.added")

    def closed(self) -> Iterable[replies.ResponseEvent]:
        yield self.done()
        yield self._part("response.content_part.done")
        yield from super().closed()

    def _part(self, kind: Literal["response.content_part.added", "response.content_part.done"]) -> replies.PartChanged:
        return {"type": kind, **self._of_part(), "part": self.part()}

    def _of_part(self) -> replies.OfPart:
        return {**self._of_item(), "content_index": 0}


class Reasoned(Item):
    """A thought, in one form or the other."""

    prefix = "rs"

    def json(self) -> replies.OutputReasoning:
        found: replies.OutputReasoning = {
            "id": self._id,
            "type": "reasoning",
            "status": self.status,
            "summary": [],
            "content": [],
        }
        if self._shared.encrypted and self.status != "in_progress":
            found["encrypted_content"] = UNENCRYPTED + self.text
        return found


class Thought(Reasoned, TextItem):
    def json(self) -> replies.OutputReasoning:
        found = super().json()
        found["content"] = [] if self.status == "in_progress" else [self.part()]
        return found

    def part(self) -> replies.ReasoningText:
        return {"type": "reasoning_text", "text": self.text}

    def grown(self, text: str) -> Iterable[replies.ResponseEvent]:
        yield {"type": "response.reasoning_text.delta", **self._of_part(), "delta": text}

    def done(self) -> replies.ReasoningDone:
        return {"type": "response.reasoning_text.done", **self._of_part(), "text": self.text}


class Summary(Reasoned):
    """A thought as its own summary, the only form in which many clients read one."""

    def json(self) -> replies.OutputReasoning:
        found = super().json()
        found["summary"] = [] if self.status == "in_progress" else [self.part()]
        return found

    def part(self) -> replies.SummaryText:
        return {"type": "summary_text", "text": self.text}

    def opened(self) -> Iterable[replies.ResponseEvent]:
        yield from super().opened()
        yield {"type": "response.reasoning_summary_part.added", **self._of_part(), "part": self.part()}

    def grown(self, text: str) -> Iterable[replies.ResponseEvent]:
        yield {"type": "response.reasoning_summary_text.delta", **self._of_part(), "delta": text}

    def closed(self) -> Iterable[replies.ResponseEvent]:
        yield {"type": "response.reasoning_summary_text.done", **self._of_part(), "text": self.text}
        yield {"type": "response.reasoning_summary_part.done", **self._of_part(), "part": self.part()}
        yield from super().closed()

    def _of_part(self) -> replies.OfSummary:
        return {**self._of_item(), "summary_index": 0}


class Said(TextItem):
    """A message. Its log probabilities are encoded as they come, because they can reach megabytes."""

    prefix = "msg"

    def __init__(self, place: int, shared: Shared) -> None:
        super().__init__(place, shared)
        self._logprobs: list[orjson.Fragment] = []
        self._new: list[orjson.Fragment] = []  # those of the latest text

    def add(self, text: str, logprobs: Sequence[orjson.Fragment] = ()) -> None:
        super().add(text, logprobs)
        self._new = list(logprobs)
        self._logprobs += logprobs

    def json(self) -> replies.OutputMessage:
        content = [] if self.status == "in_progress" else [self.part()]
        return {"id": self._id, "type": "message", "status": self.status, "role": "assistant", "content": content}

    def part(self) -> replies.OutputText:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": [*self._logprobs]}

    def grown(self, text: str) -> Iterable[replies.ResponseEvent]:
        yield {"type": "response.output_text.delta", **self._of_part(), "delta": text, "logprobs": self._new}

    def done(self) -> replies.TextDone:
        kind: Literal["response.output_text.done"] = "response.output_text.done"
        return {"type": kind, **self._of_part(), "text": self.text, "logprobs": [*self._logprobs]}


class Call(Item):
    """A function call; its text is its arguments."""

    prefix = "fc"

    def __init__(self, place: int, shared: Shared, started: CallStarted, namespaced: tuple[str, str] | None) -> None:
        """`namespaced` are the function's namespace and its name there."""
        super().__init__(place, shared)
        self._started = started
        self._namespaced = namespaced

    def json(self) -> replies.OutputCall:
        call: replies.OutputCall = {
            "id": self._id,
            "type": "function_call",
            "status": self.status,
            "call_id": self._started.id,
            "name": self._started.name,
            "arguments": self.text,
        }
        if self._namespaced:
            call["namespace"], call["name"] = self._namespaced
        return call

    def grown(self, text: str) -> Iterable[replies.ResponseEvent]:
        yield {"type": "response.function_call_arguments.delta", **self._of_item(), "delta": text}

    def closed(self) -> Iterable[replies.ResponseEvent]:
        name = self.json()["name"]
        yield {"type": "response.function_call_arguments.done", **self._of_item(), "name": name, "arguments": self.text}
        yield from super().closed()


Change: TypeAlias = Callable[[], Iterable[replies.ResponseEvent]]
"""A change to an output: builds the stream's events for it, and is only called if there is a stream."""


class Output:
    """Folds an answer's events into items, change by change: each change must be used before the next is requested.

    Only the last item grows. A call without a `CallEnded` was cut off or is malformed, and is incomplete.
    """

    def __init__(self, shared: Shared, namespaced: Mapping[str, tuple[str, str]], *, summarized: bool) -> None:
        """`namespaced`: the namespace and the name there of functions that have one. `summarized`: thoughts are sent as
        summaries."""
        self._shared = shared
        self._namespaced = namespaced
        self._thought: type[Thought | Summary] = Summary if summarized else Thought
        self._items: list[Item] = []

    def json(self) -> list[replies.OutputItem]:
        return [item.json() for item in self._items]

    def push(self, event: Event, logprobs: Sequence[orjson.Fragment] = ()) -> Iterator[Change]:
        """`logprobs` are those of an event that is content."""
        match event:
            case Reasoning():
                yield from self._write(self._thought, event.text)
            case Content():
                yield from self._write(Said, event.text, logprobs)
            case CallStarted():
                namespaced = self._namespaced.get(event.name)
                yield from self._open(Call(len(self._items), self._shared, event, namespaced))
            case CallArguments():
                yield self._grow(event.text)
            case CallEnded():
                yield self._close("completed")

    def end(self, *, cut: bool) -> Iterator[Change]:
        """Finish the output; `cut` if the answer reached its length limit. Without any item it gets an empty text."""
        if not self._items:
            yield from self._open(Said(0, self._shared))
        yield from self._settle(cut)

    def _write(
        self, kind: type[Thought | Summary | Said], text: str, logprobs: Sequence[orjson.Fragment] = ()
    ) -> Iterator[Change]:
        if not isinstance(self._growing, kind):
            yield from self._open(kind(len(self._items), self._shared))
        yield self._grow(text, logprobs)

    def _open(self, item: Item) -> Iterator[Change]:
        yield from self._settle(cut=False)
        self._items.append(item)
        yield item.opened

    def _grow(self, text: str, logprobs: Sequence[orjson.Fragment] = ()) -> Change:
        item = self._items[-1]
        item.add(text, logprobs)
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


Keep: TypeAlias = Callable[[replies.Response], None]

SizedLogprob: TypeAlias = tuple[int, orjson.Fragment]
"""The number of a token's bytes, and its log probability as JSON."""


class ResponseAnswer(Answer):
    """A response, generated by one row. `head` is the part that is known from the start."""

    def __init__(
        self,
        stream: Stream,
        reader: EventReader,
        text: Text,
        head: replies.Response,
        namespaced: Mapping[str, tuple[str, str]],
        *,
        encrypted: bool,
        keep: Keep | None = None,
    ) -> None:
        """`encrypted` as in `Shared`. `keep` is called with the ended response, if it is to be stored."""
        self.streams = [stream]
        self._reader = reader
        self._text = text
        self._head = head
        self._keep = keep
        self._shared = Shared(head["id"], encrypted)
        self._output = Output(self._shared, namespaced, summarized=head["reasoning"]["summary"] is not None)
        self._waiting = deque[SizedLogprob]()  # of tokens whose text has not come yet
        self._finish: FinishReason | None = None
        self._begun = False

    def _changes(self, arrived: Delta) -> Iterator[Change]:
        # Each alone, so that a log probability finds the text that its token completes.
        deltas = one_by_one(arrived) if arrived.logprobs else [arrived]
        for left, delta in zip(range(len(deltas) - 1, -1, -1), deltas, strict=True):
            self._waiting += told(self._text, delta)
            events, self._finish = self._reader.push(delta)
            tokens = self._shown(events) if self._waiting and events else deque[SizedLogprob]()
            for event in events:
                yield from self._output.push(event, covering(tokens, event))
            if self._finish:
                self.streams[0].stop(unread=left)
                return

    def _shown(self, events: Sequence[Event]) -> deque[SizedLogprob]:
        """The waiting tokens of these events' content. Those whose text is held back go on waiting, and those before
        the content, of tags around a thought or a call, are dropped."""
        tokens, self._waiting = self._waiting, deque()
        held = self._reader.held
        while tokens and tokens[-1][0] <= held:
            held -= tokens[-1][0]
            self._waiting.appendleft(tokens.pop())
        spare = sum(size for size, _ in tokens) - held - sum(map(content_bytes, events))
        while tokens and tokens[0][0] <= spare:
            spare -= tokens.popleft()[0]
        return tokens

    def _end(self) -> Iterator[Change]:
        return self._output.end(cut=self._finish == "length")

    def add(self, row: int, arrived: Delta) -> None:
        for _ in self._changes(arrived):
            pass

    async def whole(self) -> bytes:
        for _ in self._end():
            pass
        return orjson.dumps(self._ended())

    def frames(self, step: Step) -> bytes:
        [(_, arrived)] = step
        return framed([*self._opening(), *built(self._changes(arrived))])

    def last(self) -> Iterator[bytes]:
        for event in chain(self._opening(), built(self._end())):
            yield framed([event])
        response = self._ended()
        yield b""  # storing it has taken long enough
        kind: Kind = "response.completed" if response["status"] == "completed" else "response.incomplete"
        yield framed([self._changed(kind, response)])

    def failed(self, error: ApiError) -> bytes:
        for _ in self._output.end(cut=True):
            pass
        events = self._opening()
        response = self._response("failed")
        response["error"] = {"code": error.type, "message": error.message}
        return framed([*events, self._changed("response.failed", response)])

    def _opening(self) -> list[replies.ResponseEvent]:
        """The first events of a stream, returned once."""
        kinds: list[Kind] = [] if self._begun else ["response.created", "response.in_progress"]
        self._begun = True
        return [self._changed(kind, self._response("in_progress")) for kind in kinds]

    def _changed(self, kind: Kind, response: replies.Response) -> replies.ResponseEvent:
        return {"type": kind, "sequence_number": next(self._shared.numbers), "response": response}

    def _ended(self) -> replies.Response:
        if self._finish == "length":
            response = self._response("incomplete")
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response = self._response("completed")
            response["completed_at"] = int(time.time())
        response["usage"] = self._usage()
        if self._keep:
            self._keep(response)
        return response

    def _response(self, status: Status | Literal["failed"]) -> replies.Response:
        """The response so far."""
        response = self._head.copy()
        response["status"] = status
        response["output"] = self._output.json()
        return response

    def _usage(self) -> replies.ResponseUsage:
        counts = usage(self.streams)
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._reader.thought_tokens},
            "total_tokens": counts["total_tokens"],
        }


def told(text: Text, arrived: Delta) -> list[SizedLogprob]:
    """Those of all tokens but special ones, which the text leaves out, and one that stopped the model."""
    if arrived.finish is Finish.STOP:
        return []
    shown = [entry for entry in arrived.logprobs if entry.token not in text.vocabulary.special]
    found = chat_logprobs(text, shown)
    return [(len(entry["bytes"]), orjson.Fragment(orjson.dumps(entry))) for entry in found["content"]] if found else []


def content_bytes(event: Event) -> int:
    return len(event.text.encode()) if isinstance(event, Content) else 0


def covering(tokens: deque[SizedLogprob], event: Event) -> list[orjson.Fragment]:
    """Takes the log probabilities of as few of the tokens as cover an event's content."""
    found, size = [], content_bytes(event)
    while tokens and size > 0:
        covered, encoded = tokens.popleft()
        size -= covered
        found.append(encoded)
    return found


def built(changes: Iterable[Change]) -> Iterator[replies.ResponseEvent]:
    return (event for change in changes for event in change())
