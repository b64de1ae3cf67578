"""Laws of the way from an answer's text to its message."""

import json
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any
from unittest.mock import Mock

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessage

from batching.types import Delta, Finish
from server.fields import parse
from server.model.text import Text
from server.openai.chat import EventReader, encode
from server.openai.requests import ChatRequest
from server.output.hermes import QwenParser
from server.output.message import Event, MessageReader, Reasoning, complete_call, delta, fold
from server.output.reasoning import ReasoningSplitter
from server.output.tool_calls import CallArguments, CallEnded, CallStarted, Content
from tests.live import BYTES, END, QUESTION, tokens_of
from tests.server.test_calls import function
from tests.server.test_text import split
from tests.server.test_tools import CALLS, CUTS, TEXTS, one

THOUGHTS = st.sampled_from(
    ["", "<think>", "<think>\na\n</think>\n\n", "<think>\n\n</think>\n\n", "a\n</think>\n", "<th"]
)
TEXT = Text(BYTES)
ANSWERS = st.tuples(THOUGHTS, TEXTS | CALLS).map("".join)


def reader(thinks: bool = True, tools: bool = True, started: bool = False) -> MessageReader:
    ids = count()
    return MessageReader(
        ReasoningSplitter(started=started) if thinks else None,
        QwenParser(lambda: f"call_{next(ids)}") if tools else None,
    )


def read(pieces: list[str], **options: bool) -> tuple[list[Event], bool]:
    """The events of an answer in pieces, and whether a call is complete among them."""
    message = reader(**options)
    events = [event for piece in pieces for event in message.push(piece)] + message.flush()
    return events, complete_call(events)


def merged(deltas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A message as clients put it together from a stream."""
    message: dict[str, Any] = {"content": ""}
    for change in deltas:
        for key in ("content", "reasoning_content"):
            if key in change:
                message[key] = message.get(key, "") + change[key]
        for call in change.get("tool_calls", []):
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                calls.append(json.loads(json.dumps(call)))
            else:
                assert set(call) == {"index", "function"}
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return message


@given(ANSWERS, CUTS, st.booleans(), st.booleans(), st.booleans())
def test_a_message_does_not_depend_on_how_its_text_was_cut(
    text: str, cuts: list[int], thinks: bool, tools: bool, started: bool
) -> None:
    whole, called = read([text], thinks=thinks, tools=tools, started=started)
    for pieces in (split(text, cuts), list(text)):
        events, other = read(pieces, thinks=thinks, tools=tools, started=started)
        assert (fold(events), other) == (fold(whole), called)


@given(ANSWERS, CUTS)
def test_a_stream_adds_up_to_the_plain_message(text: str, cuts: list[int]) -> None:
    events, _ = read(split(text, cuts))
    deltas = [change for event in events if (change := delta(event)) is not None]
    plain = fold(events)
    assert merged(deltas) == {key: value or "" for key, value in plain.items() if key not in ("role", "refusal")}
    for change in deltas:
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        choice = {"index": 0, "delta": change, "finish_reason": None}
        ChatCompletionChunk.model_validate(chunk | {"choices": [choice]})
    ChatCompletionMessage.model_validate(plain)


@given(ANSWERS, CUTS)
def test_content_is_null_only_in_place_of_calls(text: str, cuts: list[int]) -> None:
    message = fold(read(split(text, cuts))[0])
    assert message["content"] != "" or "tool_calls" not in message
    assert message["content"] is not None or message["tool_calls"]
    assert all(message[key] for key in ("reasoning_content", "tool_calls") if key in message)


@given(ANSWERS, CUTS)
def test_without_splitter_and_parser_all_text_is_content(text: str, cuts: list[int]) -> None:
    events, called = read(split(text, cuts), thinks=False, tools=False)
    assert fold(events) == {"role": "assistant", "content": text, "refusal": None}
    assert not called


def test_a_whole_answer() -> None:
    events, called = read([f'<think>\nhm\n</think>\n\nLook:\n{one("{}")}\n{one("""{"a": 1}""")}'])
    assert fold(events) == {
        "role": "assistant",
        "content": "Look:",
        "refusal": None,
        "reasoning_content": "hm",
        "tool_calls": [
            {"index": 0, "id": "call_0", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            {"index": 1, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        ],
    }
    assert called


def test_calls_alone_have_no_content_not_even_white_space() -> None:
    events, _ = read(list(f"<think>\nhm\n</think>\n\n{one('{}')}\n{one('{}')}\n"))
    assert fold(events)["content"] is None
    assert not any(isinstance(event, Content) for event in events)


def test_an_empty_answer_has_empty_content() -> None:
    assert fold([]) == {"role": "assistant", "content": "", "refusal": None}


def test_a_call_in_a_thought_is_a_thought() -> None:
    events, called = read([f"<think>{one('{}')}</think>No."])
    thought = one("{}")
    assert fold(events) == {"role": "assistant", "content": "No.", "refusal": None, "reasoning_content": thought}
    assert not called


BROKEN = one('{"a": 1}')[: -len("}}\n</tool_call>")]


@pytest.mark.parametrize(
    ("said", "one_call", "end", "expected"),
    [
        (one("{}"), False, Finish.STOP, "tool_calls"),
        (one("{}"), False, Finish.LENGTH, "length"),
        (one("{}"), True, Finish.LENGTH, "tool_calls"),  # the rest is not waited for
        (BROKEN, False, Finish.STOP, "stop"),
        (one("{}") + BROKEN, False, Finish.STOP, "tool_calls"),
        (BROKEN + "</tool_call>" + one("{}"), False, Finish.STOP, "tool_calls"),
        (BROKEN + "</tool_call>" + one("{}"), True, Finish.STOP, "stop"),
        ("Hi", False, Finish.STOP, "stop"),
    ],
)
@given(cuts=CUTS)
def test_the_reason_is_calls_only_when_a_complete_one_is_returned(
    said: str, one_call: bool, end: Finish, expected: str, cuts: list[int]
) -> None:
    fields = {"messages": QUESTION, "tools": [function("f")], "parallel_tool_calls": not one_call}
    events = EventReader(Mock(), TEXT, encode(TEXT, parse(ChatRequest, orjson.dumps(fields))[0], thinking=False))
    deltas = [Delta(tuple(tokens_of(piece)), None, ()) for piece in split(said, cuts)]
    last = Delta((END,), end, ()) if end is Finish.STOP else Delta((), end, ())
    reasons = (events.push(delta)[1] for delta in [*deltas, last])
    assert next(filter(None, reasons)) == expected


def test_deltas() -> None:
    function = {"name": "f", "arguments": ""}
    assert delta(Reasoning("a")) == {"reasoning_content": "a"}
    assert delta(Content("a")) == {"content": "a"}
    assert delta(CallStarted(1, "call_1", "f")) == {
        "tool_calls": [{"index": 1, "id": "call_1", "type": "function", "function": function}]
    }
    assert delta(CallArguments(1, "{")) == {"tool_calls": [{"index": 1, "function": {"arguments": "{"}}]}
    assert delta(CallEnded(1)) is None
