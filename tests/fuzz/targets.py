"""What is fuzzed: functions of any bytes, each a law of one parser, scanner or writer. They raise where it is broken.

Byte 0xFF, which no UTF-8 text has, cuts a text into the pieces that it comes in; 0xFE ends a first part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import orjson
from pydantic import BaseModel

from batching.types import Delta
from server.fields import RequestBody, parse
from server.grammar.json_schema import Schema, SchemaError, bound
from server.grammar.rewrite import inline, rewrite
from server.grammar.source import Part
from server.http.errors import RETRIED, ApiError, bad_request
from server.model.text import Text
from server.openai import anthropic_request
from server.openai.anthropic_request import CountRequest
from server.openai.completions import CompletionRequest, TextAnswer
from server.openai.requests import ChatRequest
from server.openai.responses_replies import ResponseEvent
from server.openai.responses_request import ResponseRequest, as_chat
from server.openai.tokenize import DetokenizeRequest, TokenizeRequest
from server.output.answer import StopScanner
from server.output.detokenize import Detokenizer, Vocabulary
from server.output.hermes import QwenParser
from server.output.llama import LlamaParser
from server.output.message import MessageReader, delta, fold
from server.output.reasoning import ReasoningSplitter
from server.output.tool_calls import NAME
from server.replies import ChatMessage, TextChoice, TextChunkChoice
from server.sse import framed
from tests.fuzz.schemas import fuzz_pattern, fuzz_schema
from tests.live import BYTES, END
from tests.server.test_text import byte_fallback

KINDS: tuple[type[RequestBody], ...] = (
    ChatRequest,
    CompletionRequest,
    ResponseRequest,
    TokenizeRequest,
    DetokenizeRequest,
    CountRequest,
)
TEXT = Text(BYTES)
WORDS = byte_fallback()
LETTERS = frozenset(WORDS.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in b"the")
"""Bytes that are letters of words; among halves of characters they may be lost, as the tokenizer's own decoder does."""
PARSERS = (QwenParser, LlamaParser)
GOOD: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}],
    "input": "Hi",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
}
MEMBERS = (
    *("role", "content", "tool_calls", "tool_call_id", "id", "index", "type", "text", "name", "arguments", "function"),
    *("parameters", "description", "strict", "schema", "json_schema", "format", "call_id", "output", "summary"),
    *("enable_thinking", "budget_tokens", "include_usage", "properties", "items", "required", "pattern", "multipleOf"),
    *("$ref", "$defs", "anyOf", "allOf", "enum", "const", "minProperties", "additionalProperties", "1", "256", "a"),
    *("input", "input_schema", "thinking", "tool_use_id", "is_error"),
)
SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 16, 256, 257, 2**31, 2**63 - 1, 2**64 - 1, 0.0, 0.25, 1.0, 2.0, 1e-40, 1e300),
    *("", "a", "f", "x" * 300, "\u0000", "\ufeff", "429 server timeout", "rate-limit", "{}", '{"a": [1]}', "not JSON"),
    *(
        "user",
        "system",
        "assistant",
        "tool",
        "function",
        "text",
        "input_text",
        "output_text",
        "object",
        "string",
        "array",
    ),
    *("json_schema", "json_object", "message", "function_call", "function_call_output", "reasoning", "none"),
    *(
        "auto",
        "array",
        "required",
        "enabled",
        "disabled",
        "low",
        "#",
        "#/$defs/a",
        "#/properties/a",
        "^[^a]{2,3}$",
        "(a{99}){9}",
        "([",
    ),
)


def pieces_of(data: bytes) -> list[str]:
    return [piece.decode(errors="ignore") for piece in data.split(b"\xff")]


def fuzz_request(data: bytes) -> None:
    """A body is a request whose every part can be used, or a 400 in one sentence that no client takes for a passing
    trouble."""
    kind = KINDS[data[0] % len(KINDS)] if data else ChatRequest
    body = built(kind, data[1:]) if data[:1] >= b"\x80" else data[1:]
    if (error := _refusal(kind, body)) is None:
        return
    told = error.body()
    assert error.status == 400
    assert error.message.endswith(".")
    assert not RETRIED.search(told.decode()), told
    assert len(told) < 1000, told


def _refusal(kind: type[RequestBody], body: bytes) -> ApiError | None:
    try:
        _use(parse(kind, body)[0])
    except ApiError as error:
        return error
    return None


def built(kind: type[RequestBody], data: bytes) -> bytes:
    """A body whose fields are known ones and whose values the bytes choose, because few bytes at random are JSON."""
    choices = iter(data)
    names = [*kind.model_fields, *MEMBERS]
    fields = {name: GOOD[name] for name in kind.model_fields if name in GOOD}
    while (choice := next(choices, None)) is not None:
        fields[names[choice % len(names)]] = _value(choices, depth=0)
    return orjson.dumps(fields)


def _value(choices: Iterator[int], depth: int) -> Any:
    choice = next(choices, 0)
    kind, size = choice % 8, choice // 8 % 4 if depth < 6 else 0
    if kind < 3:
        return {MEMBERS[next(choices, 0) % len(MEMBERS)]: _value(choices, depth + 1) for _ in range(size)}
    if kind == 3:
        return [_value(choices, depth + 1) for _ in range(size)]
    return SCALARS[next(choices, 0) % len(SCALARS)]


def _use(asked: BaseModel) -> None:
    """What the handlers do with a request before its tokens. Raises `ApiError`."""
    if isinstance(asked, ResponseRequest):
        asked = as_chat(asked)
    elif isinstance(asked, CountRequest):
        asked = anthropic_request.as_chat(asked)
    if not isinstance(asked, ChatRequest):
        return
    orjson.dumps([message.for_template(str) for message in asked.messages])
    for tool in asked.offered:
        orjson.dumps(tool.for_template(str))
        _compile(tool.function.parameters or {}, strict=False)
    if isinstance(form := asked.constraint, Part):
        _compile(form.schema, form.strict)
    assert asked.wanted_tokens is None or asked.wanted_tokens >= 1
    assert asked.thinks in (None, True, False)


def _compile(schema: Schema, strict: bool) -> None:
    try:
        bound(schema)
        inline(rewrite(schema, strict), strict)
    except SchemaError as error:
        raise bad_request(str(error)) from None


def fuzz_stop(data: bytes) -> None:
    """An answer ends where the first complete stop string starts, or with it, however its text was cut."""
    head, _, tail = data.partition(b"\xfe")
    stops = [stop[:256] for stop in pieces_of(head)[:16] if stop]
    pieces = pieces_of(tail)
    text = "".join(pieces)[:4096]
    for inclusive in (False, True):
        expected = _up_to_first_stop(text, stops, inclusive)
        assert _scanned(pieces, stops, inclusive, len(text)) == expected
        assert _scanned(list(text), stops, inclusive, len(text)) == expected


def _up_to_first_stop(text: str, stops: Sequence[str], inclusive: bool) -> str:
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    if not ends:
        return text
    end, start = min(ends)
    return text[: end if inclusive else start]


def _scanned(pieces: Sequence[str], stops: Sequence[str], inclusive: bool, length: int) -> str:
    scanner, out, left = StopScanner(stops, inclusive=inclusive), "", length
    for piece in pieces:
        safe, stopped = scanner.push(piece[:left])
        left -= len(piece[:left])
        out += safe
        if stopped:
            return out
    return out + scanner.flush()


def fuzz_detokenize(data: bytes) -> None:
    """Tokens, one by one, become the text that they decode to, but for an unfinished character at the end."""
    ids = [byte if byte != 0xFE else END for byte in data]
    whole = BYTES.backend_tokenizer.decode(ids, skip_special_tokens=True)
    detokenizer = Detokenizer(Vocabulary(BYTES.backend_tokenizer))
    out = "".join(detokenizer.push([token]) for token in ids)
    assert whole.startswith(out)
    assert out == whole or whole.endswith("\ufffd")
    plain = [token for token in ids if token != END]
    assert b"".join(map(TEXT.vocabulary.bytes_of, plain)).decode(errors="replace") == TEXT.decode(plain)


def fuzz_words(data: bytes) -> None:
    """In a vocabulary of words and of bytes, no word is lost or comes twice, whatever bytes are around it."""
    at = data[0] % len(data) if data else 0
    detokenizer = Detokenizer(WORDS, after=data[:at])
    found = "".join(detokenizer.push([token]) for token in data[at:])
    expected = b"".join(map(WORDS.bytes_of, data[at:])).decode(errors="replace")
    words = [re.sub("[^the]", "", text) for text in (found, expected)]
    assert len(found.replace("\ufffd", "")) <= len(expected)
    assert words[0] == words[1] or set(data[at:]) & LETTERS


def fuzz_tools(data: bytes) -> None:
    """In every format a message does not depend on how its text was cut; without a call no character is lost."""
    started, pieces = bool(data[:1] and data[0] & 1), pieces_of(data[1:])
    text = "".join(pieces)
    for parser in PARSERS:
        whole = _message([text], started, parser)
        assert _message(pieces, started, parser) == whole
        assert _message(list(text), started, parser) == whole
        reader = MessageReader(tools=parser(lambda: "call"))
        found = fold(reader.push(text) + reader.flush())
        assert found.get("tool_calls") or found["content"] == text
        for call in whole.get("tool_calls", ()):
            assert re.fullmatch(NAME, call["function"]["name"])
            assert call["function"]["arguments"].startswith("{")
        orjson.dumps(whole)


def _message(pieces: Sequence[str], started: bool, parser: type[QwenParser | LlamaParser]) -> ChatMessage:
    reader = MessageReader(ReasoningSplitter(started=started), parser(lambda: "call"))
    events = [event for piece in pieces for event in reader.push(piece)] + reader.flush()
    message = fold(events)
    shown = [news for event in events if (news := delta(event)) is not None]
    assert "".join(news.get("content", "") for news in shown) == (message["content"] or "")
    assert "".join(news.get("reasoning_content", "") for news in shown) == message.get("reasoning_content", "")
    return message


def fuzz_sse(data: bytes) -> None:
    """Whatever the text, an event stream read by the standard's rules has the events that were written."""
    texts = pieces_of(data)
    choice = Told(texts)
    answer = TextAnswer("model", "fp_0", [], [choice], CompletionRequest(prompt=["Hi"]))
    *chunks, done = _events(answer.frames([(0, Delta((), None, ()))]) + b"".join(answer.last()))
    assert done == ("message", "[DONE]")
    assert [orjson.loads(payload)["choices"] for _, payload in chunks] == [[chunk] for chunk in choice.told]
    typed: list[ResponseEvent] = [
        {
            "type": "response.reasoning_text.delta",
            "sequence_number": number,
            "item_id": "rs_1",
            "output_index": 0,
            "content_index": 0,
            "delta": text,
        }
        for number, text in enumerate(texts)
    ]
    found = _events(framed(typed))
    assert [(kind, orjson.loads(payload)) for kind, payload in found] == [(one["type"], one) for one in typed]


class Told:
    """A `Choice` that says these texts at once."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.told: list[TextChunkChoice] = [
            {"index": 0, "text": text, "logprobs": None, "finish_reason": None} for text in texts
        ]

    def add(self, arrived: Delta) -> None:
        pass

    def whole(self) -> TextChoice:
        return {
            "index": 0,
            "text": "".join(each["text"] for each in self.told),
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }

    def chunks(self, arrived: Delta) -> list[TextChunkChoice]:
        return self.told


def _events(stream: bytes) -> list[tuple[str, str]]:
    """Type and data of each event, by the rules of WHATWG HTML, section 9.2.6."""
    text = stream.decode().replace("\r\n", "\n").replace("\r", "\n")
    found, kind, payload = [], "message", list[str]()
    for line in text.split("\n"):
        if not line:
            if payload:
                found.append((kind, "\n".join(payload)))
            kind, payload = "message", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "data":
                payload.append(value)
            case "event":
                kind = value
    assert not payload, "the stream ends within an event"
    return found


TARGETS: dict[str, Callable[[bytes], None]] = {
    "request": fuzz_request,
    "stop": fuzz_stop,
    "detokenize": fuzz_detokenize,
    "words": fuzz_words,
    "tools": fuzz_tools,
    "sse": fuzz_sse,
    "schema": fuzz_schema,
    "pattern": fuzz_pattern,
}
