"""Laws of how long an answer may get that the request sets no length for."""

from typing import Any

import orjson
import pytest

from batching.types import Request
from server.__main__ import answers_of
from tests.live import live, scripted, settings_of
from tests.server.test_app import remembering

TOOL = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("path", "body", "whole"),
    [
        ("chat/completions", CHAT, False),
        ("chat/completions", CHAT | {"tools": []}, False),
        ("chat/completions", CHAT | {"tools": [TOOL], "tool_choice": "none"}, False),
        ("chat/completions", CHAT | {"response_format": {"type": "text"}}, False),
        ("completions", {"prompt": "Hi"}, False),
        ("chat/completions", CHAT | {"tools": [TOOL]}, True),
        ("chat/completions", CHAT | {"response_format": {"type": "json_object"}}, True),
        ("chat/completions", CHAT | {"response_format": SCHEMA}, True),
        ("responses", {"input": "Hi"}, True),
    ],
)
def test_an_answer_that_is_useless_if_cut_has_a_longer_default(path: str, body: dict[str, Any], whole: bool) -> None:
    seen: list[Request] = []
    name = "max_output_tokens" if path == "responses" else "max_tokens"

    def lengths(**settings: Any) -> list[int]:
        seen.clear()
        with live(scripted(remembering(seen, "{}")), **settings) as service:
            for fields in ({}, {name: None}, {name: 7}):
                assert service.post(orjson.dumps(body | fields), f"/v1/{path}").status_code == 200
        return [request.sampling.max_tokens for request in seen]

    assert lengths() == [1024 if whole else 128] * 2 + [7]
    assert lengths(default_max_tokens=2000) == [2000, 2000, 7]
    assert lengths(max_output_tokens=500) == [500 if whole else 128] * 2 + [7]


def test_a_default_of_nothing_is_what_fits_the_window_and_the_operator_s_limit() -> None:
    seen: list[Request] = []
    engine = scripted(remembering(seen), context_window=16_384)
    with live(engine, default_max_tokens=0, max_output_tokens=100_000) as service:
        service.chat()
        assert service.model.advertised_window == int(0.9 * (16_384 - 1543 - 1024))
    with live(scripted(remembering(seen)), default_max_tokens=0, max_output_tokens=300) as service:
        service.chat(tools=[TOOL])
    assert [request.total_tokens for request in seen] == [16_384, len(seen[1].prompt) + 300]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "128 tokens by default (1024 with tools or a format), 4096 at most"),
        ({"default_max_tokens": 1024}, "1024 tokens by default, 4096 at most"),
        ({"max_output_tokens": 500}, "128 tokens by default (500 with tools or a format), 500 at most"),
        ({"default_max_tokens": 0}, "as many tokens as fit the window by default, 4096 at most"),
    ],
)
def test_the_start_says_how_long_answers_are(settings: dict[str, int], words: str) -> None:
    assert answers_of(settings_of(**settings)) == words
