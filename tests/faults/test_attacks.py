"""One small request of a stranger's, made to hold up everybody: each gets its answer or its refusal, and nobody waits.

The loop guard of these tests fails them where the event loop stood.
"""

import threading
from collections.abc import Iterator
from typing import Any

import orjson
import psutil  # type: ignore[import-untyped]
import pytest

from benchmarks.attackers import LARGE, MIB, body, keys, many, of_schema, with_field
from benchmarks.mischief import CHAT
from server.fields import MAX_ITEMS
from server.http.errors import ApiError
from server.model.text import MAX_TOKENS, Text
from tests.live import BYTES, Live, byte_tokenizer, live, scripted, tokens_of

HALF = tokens_of("中")[0]
"""The first byte of a character that never comes to its end."""


REFUSED: dict[str, tuple[str, bytes]] = {
    "a million kinds of output": (CHAT, with_field("modalities", many("1"))),
    "a million tools": (CHAT, with_field("tools", many("{}"))),
    "a million messages": (CHAT, b'{"messages": ' + many("[]").encode() + b"}"),
    "a million bad parts": (CHAT, b'{"messages": [{"role": "user", "content": ' + many("7").encode() + b"}]}"),
    "a million biases": (CHAT, with_field("logit_bias", keys("1"))),
    "a million biases of no tokens": (CHAT, with_field("logit_bias", keys('"x"'))),
    "a million stop strings": (CHAT, with_field("stop", many('""'))),
    "a million negative tokens": ("/v1/completions", b'{"prompt": ' + many("-1").encode() + b"}"),
    "a million prompts": ("/v1/completions", b'{"prompt": ' + many("[]").encode() + b"}"),
    "a million items": ("/v1/responses", b'{"input": ' + many("{}").encode() + b"}"),
    "a million ids that are none": ("/detokenize", b'{"tokens": ' + many('""').encode() + b"}"),
    "a text longer than any window": (CHAT, body(messages=[{"role": "user", "content": "a" * LARGE}])),
}


REFUSED |= {
    "a schema that compiles for ever": (
        CHAT,
        of_schema({"allOf": [{"type": "string", "pattern": f"^.*x{n}.*$"} for n in range(39)]}),
    ),
    "a pattern of 32,000 brackets": (CHAT, of_schema({"type": "string", "pattern": "[^" + "[" * 32_000})),
    "a pattern of a million brackets": (CHAT, of_schema({"type": "string", "pattern": "[^" + "[" * MIB})),
    "a constant of 100,000 characters": (CHAT, of_schema({"const": "x" * 100_000})),
    "a schema of a million members": (CHAT, of_schema({"enum": [0] * MIB})),
    "a schema with a million names": (CHAT, of_schema({"properties": {str(n): {} for n in range(200_000)}})),
    "a schema of as many members as it may have": (CHAT, of_schema({"enum": ["x"] * 19_900, "minLength": -1})),
    "a schema that is not strict and compiles for ever": (
        CHAT,
        of_schema({"allOf": [{"type": "string", "pattern": f"^.*x{n}.*$"} for n in range(39)]}, strict=False),
    ),
}


@pytest.fixture(scope="module")
def service() -> Iterator[Live]:
    with live() as found:
        yield found


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_refused_without_holding_anybody_up(what: str, service: Live) -> None:
    path, sent = REFUSED[what]
    assert len(sent) <= 4 * MIB
    assert service.post(sent, path).status_code == 400
    assert service.get("/health/live").status_code == 200


@pytest.mark.parametrize("text", ["id,name,a:b,[x],{y}\n", 'f({"a": [1, 2], "b": "\\\\"});\n'], ids=["a table", "code"])
def test_a_chat_of_four_megabytes_is_answered_whatever_its_text_has_many_of(text: str) -> None:
    times = 3_900_000 // len(orjson.dumps(text))
    engine, one_token = scripted(context_window=2**23, token_budget=2**24), byte_tokenizer(tags=[text])
    with live(engine, tokenizer=one_token) as service:
        answer = service.chat(messages=[{"role": "user", "content": text * times}], max_tokens=8)
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] > times


def test_very_many_unknown_fields_are_counted_and_not_all_named(service: Live) -> None:
    few, more = (body()[:-1] + b"," + keys("1", size).encode()[1:] for size in (MIB, LARGE))
    assert service.post(more).status_code == 400
    answer = service.post(few)
    assert answer.status_code == 200
    assert len(answer.headers["x-ignored-fields"]) < 2000


@pytest.mark.parametrize("text", ["a" * MAX_TOKENS, "中" * 300_000, "<|end|>" * 300_000])
def test_a_long_text_is_tokenized_beside_everybody_else(text: str, service: Live) -> None:
    answer = service.post(orjson.dumps({"prompt": text}), "/tokenize")
    assert answer.status_code == 200
    assert answer.json()["count"] >= 300_000
    strings = service.post(orjson.dumps({"prompt": text, "return_token_strs": True}), "/tokenize")
    assert strings.status_code == 400
    tokens = answer.json()["tokens"][:MAX_ITEMS]
    assert service.post(orjson.dumps({"tokens": tokens}), "/detokenize").status_code == 200


def test_a_text_of_more_tokens_than_any_window_is_refused_with_their_number(service: Live) -> None:
    for path in ("/tokenize", "/v1/completions"):
        answer = service.post(orjson.dumps({"prompt": "a" * (MAX_TOKENS + 1)}), path)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert "1048.6k" in answer.json()["error"]["message"]


@pytest.mark.parametrize("text", ["a b ", "word ", "中"])
def test_the_memory_of_a_long_text_is_bounded(text: str) -> None:
    size, process, over = 2 * MIB, psutil.Process(), threading.Event()
    before, most = process.memory_info().rss, [0]

    def watch() -> None:
        while not over.wait(0.005):
            most.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises(ApiError, match="tokens"):
        Text(BYTES).encode(text * (size // len(text.encode())))
    over.set()
    watcher.join()
    assert max(most) - before < 200 * size


@pytest.mark.parametrize("fields", [{}, {"logprobs": True, "top_logprobs": 2}, {"stream": True}], ids=str)
def test_answers_of_halves_of_characters_are_read_as_they_come(fields: dict[str, Any]) -> None:
    with live(scripted(lambda request, position: HALF)) as service:
        answer = service.chat(n=16, max_tokens=2048, **fields)
    assert answer.status_code == 200
    assert answer.text.count("\ufffd") >= 16 * 2000
