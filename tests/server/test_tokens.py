"""Laws of `POST /tokenize` and `POST /detokenize`."""

from typing import Any

import httpx2
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from batching.types import Request
from server.fields import MAX_ITEMS
from tests.live import BYTES, END, QUESTION, Live, byte_tokenizer, live, scripted, tokens_of
from tests.server.test_app import error_of, remembering


def tokenize(service: Live, prefix: str = "", **fields: Any) -> httpx2.Response:
    return service.post(orjson.dumps(fields), f"{prefix}/tokenize")


def detokenize(service: Live, tokens: Any, prefix: str = "") -> httpx2.Response:
    return service.post(orjson.dumps({"tokens": tokens}), f"{prefix}/detokenize")


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_a_text_has_the_ids_that_a_completion_of_it_has(prefix: str) -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen), context_window=777)) as service:
        found = tokenize(service, prefix, prompt="é <|end|>", model="scripted").json()
        service.post(orjson.dumps({"prompt": "é <|end|>"}), "/v1/completions")
    assert found["tokens"] == list(seen[0].prompt) == [*tokens_of("é "), END]
    assert (found["count"], found["max_model_len"]) == (4, 777)
    assert "token_strs" not in found


def test_a_conversation_has_the_ids_that_a_chat_of_it_has() -> None:
    seen: list[Request] = []
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    for thinking in (False, True):
        with live(scripted(remembering(seen)), thinking=thinking) as service:
            found = tokenize(service, messages=messages).json()
            service.chat(messages=messages)
        assert found["tokens"] == list(seen[-1].prompt)
        assert found["count"] == len(found["tokens"])


def test_each_token_is_told_as_the_vocabulary_spells_it_if_asked_for() -> None:
    with live() as service:
        found = tokenize(service, prompt="aé <|end|>", return_token_strs=True).json()
    assert found["token_strs"] == ["a", "Ã", "©", "Ġ", "<|end|>"]
    assert found["token_strs"] == BYTES.convert_ids_to_tokens(found["tokens"])


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
AS_CHATS: list[dict[str, Any]] = [
    {"tools": [TOOL]},
    {"tools": [TOOL], "tool_choice": "none"},
    {"add_generation_prompt": False},
    {"continue_final_message": True},
    {"enable_thinking": True},
    {"chat_template_kwargs": {"enable_thinking": True}},
    {"reasoning_effort": "high"},
]


@pytest.mark.parametrize("fields", AS_CHATS)
def test_what_shapes_a_chat_s_prompt_shapes_what_is_counted(fields: dict[str, Any]) -> None:
    seen: list[Request] = []
    messages = [*QUESTION, {"role": "assistant", "content": "Well, "}]
    with live(scripted(remembering(seen))) as service:
        found = tokenize(service, messages=messages, **fields).json()["tokens"]
        plain = tokenize(service, messages=messages).json()["tokens"]
        service.chat(messages=messages, **fields)
    assert found == list(seen[0].prompt)
    assert (found == plain) is (fields.get("tool_choice") == "none")


def test_what_the_tokenizer_puts_around_a_text_is_added_to_a_prompt_and_not_to_messages_unless_told_otherwise() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", END)]
    )
    switches: list[dict[str, Any]] = [
        {"add_special_tokens": False},
        {"add_special_tokens": True},
        {"add_special_tokens": None},
        {},
    ]
    with live(tokenizer=tokenizer) as service:
        texts = [tokenize(service, prompt="a", **switch).json()["tokens"] for switch in switches]
        chats = [tokenize(service, messages=QUESTION, **switch).json()["tokens"] for switch in switches]
    assert texts == [tokens_of("a")] + [[END, *tokens_of("a")]] * 3
    bare = [*tokens_of("<user>Hi"), END, *tokens_of("<assistant>")]
    assert chats == [bare, [END, *bare], bare, bare]


def test_ids_are_turned_back_into_text() -> None:
    with live() as service:
        assert detokenize(service, [*tokens_of("Hé 😀"), END]).json() == {"prompt": "Hé 😀<|end|>"}
        assert detokenize(service, tokens_of("x"), "/v1").json() == {"prompt": "x"}
        assert detokenize(service, []).json() == {"prompt": ""}
        assert tokenize(service, prompt="").json()["tokens"] == []


def test_any_text_survives_the_round_trip() -> None:
    with live() as service, service.http() as client:

        @settings(max_examples=50)
        @given(st.text())
        def law(text: str) -> None:
            tokens = client.post("/tokenize", content=orjson.dumps({"prompt": text})).json()["tokens"]
            back = client.post("/detokenize", content=orjson.dumps({"tokens": tokens})).json()
            assert back == {"prompt": text}

        law()


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "x", "messages": QUESTION},
        {"prompt": None},
        {"prompt": 7},
        {"prompt": ["x"]},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://192.0.2.1"}}]}]},
        {"messages": [{"role": "user", "content": "refuse me"}]},
        {"prompt": "x", "chat_template": "{{ 1 }}"},
        {"prompt": "x", "add_special_tokens": 1},
    ],
)
def test_what_is_no_text_and_no_conversation_is_refused(body: dict[str, Any]) -> None:
    with live() as service:
        response = tokenize(service, **body)
        error_of(response, 400, "unsupported_field" if "chat_template" in body else None)


@pytest.mark.parametrize("tokens", [[257], [-1], [2**31], [2**63], [True], [1.5], ["1"], [None], None, 7, "x", [[1]]])
def test_what_is_no_list_of_the_model_s_ids_is_refused(tokens: Any) -> None:
    with live() as service:
        assert error_of(detokenize(service, tokens), 400, None)["param"].startswith("tokens")


def test_they_have_the_limits_of_every_request() -> None:
    with live(max_body_mib=0.01, api_keys=("secret",)) as service:
        key = {"authorization": "Bearer secret"}
        for path in ("/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize"):
            error_of(service.post(b"{}", path), 401, "unknown_api_key")
            error_of(service.post(b"{}".ljust(20_000), path, headers=key), 413, "body_too_large")
            error_of(service.get(path, headers=key), 405, "unknown_method")
    with live() as service:
        error_of(tokenize(service, prompt="x", model="other"), 404, "model_not_found")
        error_of(service.post(b'{"model": "other", "tokens": []}', "/detokenize"), 404, "model_not_found")
        error_of(detokenize(service, [1] * (MAX_ITEMS + 1)), 400, None)
    with live(ready=False) as service:
        error_of(tokenize(service, prompt="x"), 503, "service_starting")
        error_of(detokenize(service, [1]), 503, "service_starting")


def test_a_text_longer_than_the_window_is_counted_all_the_same() -> None:
    with live(scripted(context_window=100)) as service:
        found = tokenize(service, prompt="x" * 5000).json()
    assert (found["count"], found["max_model_len"]) == (5000, 100)
