"""Laws of the HTTP service, on a live server with an engine that says what a script tells it to."""

import ast
import contextlib
import functools
import json
import logging
import operator
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx2
import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import server.grammar.compiler
import server.http.request
import server.observe.live
import server.threads
from batching.errors import ModelError, OutOfMemory
from batching.events import REFUSALS, Outcome, State
from batching.types import Request
from server.http.errors import RETRIED
from server.observe.log import JsonFormatter
from server.replies import BUSY, FAULTS
from tests.fakes import Script, ScriptedEngine
from tests.live import (
    BYTES,
    END,
    QUESTION,
    Live,
    eventually,
    frames,
    live,
    raw_request,
    says,
    scripted,
    text_of,
    tokens_of,
)

FOREVER = 10**6


def babble(request: Request, position: int) -> int:
    """An answer without an end."""
    return tokens_of("x")[0]


def error_of(response: httpx2.Response, status: int, code: str | None) -> dict[str, Any]:
    """The error object of a response, which has OpenAI's shape and no word that misleads a client."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return error_in(response.json(), status, code)


def error_in(body: dict[str, Any], status: int, code: str | None) -> dict[str, Any]:
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    text = orjson.dumps(body).decode()
    if status < 500 and status not in (408, 429):
        assert not RETRIED.search(text), text
    if status in (429, 503):
        assert not any(word in text.lower() for word in ("invalid", "capacity", "quota"))
    return error


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


def remembering(seen: list[Request], text: str = "ok") -> Script:
    """A script that keeps every request it is asked for."""
    script = says(text)

    def remember(request: Request, position: int) -> int:
        if request not in seen:
            seen.append(request)
        return script(request, position)

    return remember


# Answers


def test_a_plain_answer_has_all_that_openai_clients_read() -> None:
    with live(scripted("Hello!")) as service, service.openai() as client:
        answer = client.chat.completions.create(model="scripted", messages=QUESTION)
        other = client.chat.completions.create(model="scripted", messages=QUESTION)
    assert answer.id.startswith("chatcmpl-")
    assert answer.id != other.id
    assert (answer.object, answer.model) == ("chat.completion", "scripted")
    assert answer.created > 1_700_000_000
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content, choice.message.tool_calls) == ("assistant", "Hello!", None)
    assert answer.usage is not None
    prompt = len(tokens_of("<user>Hi<|end|><assistant>"))
    assert answer.usage.prompt_tokens == prompt
    assert answer.usage.completion_tokens == len("Hello!") + 1  # the end token was generated too
    assert answer.usage.total_tokens == prompt + len("Hello!") + 1


def test_a_streamed_answer_is_the_plain_one_in_chunks() -> None:
    with live(scripted("Hello!", stepped=True)) as service, service.openai() as client:
        service.engine.release()
        with client.chat.completions.create(model="scripted", messages=QUESTION, stream=True) as stream:
            chunks = []
            for chunk in stream:
                chunks.append(chunk)
                if chunk.choices[0].delta.content:
                    service.engine.release()
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", *"Hello!", None]
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_in_one_trailing_chunk_if_it_was_asked_for() -> None:
    with live() as service, service.openai() as client:
        options: Any = {"include_usage": True}
        with client.chat.completions.create(
            model="scripted", messages=QUESTION, stream=True, stream_options=options
        ) as stream:
            *chunks, last = stream
        plain = client.chat.completions.create(model="scripted", messages=QUESTION)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    assert last.usage == plain.usage


SO_FAR = {"include_usage": True, "continuous_usage_stats": True}


def test_usage_so_far_comes_in_every_chunk_if_it_was_asked_for() -> None:
    with live(scripted("Hello!", stepped=True)) as service:
        service.engine.release(100)
        *chunks, last = frames(service.chat(stream=True, stream_options=SO_FAR))
        plain = service.chat().json()
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert last == "[DONE]"
    assert [bool(chunk["choices"]) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert chunks[-1]["usage"] == plain["usage"]


def choices_in(response: httpx2.Response) -> list[dict[str, Any]]:
    """The choices of a stream with one choice a chunk."""
    return [chunk["choices"][0] for chunk in frames(response)[:-1]]


@pytest.mark.parametrize("fields", [{}, {"logprobs": True}, {"tools": [{"function": {"name": "f"}}]}])
@pytest.mark.parametrize("text", ["Hello!", "", "<think>hm</think>Yes.", '<tool_call>{"name": "f"}</tool_call>'])
def test_the_first_chunk_has_the_role_alone_and_no_other_has_it(text: str, fields: dict[str, Any]) -> None:
    with live(scripted(text)) as service:
        first, *others = choices_in(service.chat(stream=True, **fields))
    role = {"role": "assistant", "content": ""}
    assert first == {"index": 0, "delta": role, "logprobs": None, "finish_reason": None}
    assert others
    assert all("role" not in choice["delta"] for choice in others)


@pytest.mark.parametrize(
    ("text", "fields", "kind", "tail"),
    [
        ("被截断的回答", {"max_tokens": 9}, "content", "断"),
        ("<think>被截断", {"max_tokens": 13}, "reasoning_content", "截"),
        ("one EN", {"stop": "END", "max_tokens": 6}, "content", "EN"),
        ("Hello!", {"logprobs": True, "max_tokens": 3}, "content", "l"),
    ],
)
def test_that_an_answer_is_cut_is_told_with_the_last_of_its_text(
    text: str, fields: dict[str, Any], kind: str, tail: str
) -> None:
    with live(scripted(text)) as service:
        *before, end = choices_in(service.chat(stream=True, **fields))
    assert end["delta"][kind].endswith(tail)
    assert (list(end["delta"]), end["finish_reason"]) == ([kind], "length")
    assert all(choice["finish_reason"] is None for choice in before)


@pytest.mark.parametrize("text", ["Hello!", "", '<tool_call>{"name": "f", "arguments": {}}'])
@pytest.mark.parametrize("fields", [{}, {"logprobs": True}])
def test_why_an_answer_is_over_is_told_once_and_not_with_a_call(text: str, fields: dict[str, Any]) -> None:
    with live(scripted(text)) as service:
        *before, end = choices_in(service.chat(stream=True, tools=[{"function": {"name": "f"}}], **fields))
    assert end["finish_reason"] == ("tool_calls" if "tool_call" in text else "stop")
    assert "tool_calls" not in end["delta"]
    assert all(choice["finish_reason"] is None for choice in before)


def test_usage_so_far_without_usage_at_the_end_is_none() -> None:
    with live() as service:
        for option in ({}, {"include_usage": False}):
            options = {"continuous_usage_stats": True} | option
            *chunks, _ = frames(service.chat(stream=True, stream_options=options))
            assert text_of(chunks) == "Hello!"
            assert all("usage" not in chunk for chunk in chunks)


def test_a_stream_is_framed_for_proxies_and_ends_with_done() -> None:
    with live() as service:
        response = service.chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    assert frames(response)[-1] == "[DONE]"
    assert b"\n\n" not in b"".join(response.content.split(b"\n\n"))


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_an_answer_that_is_cut_says_so(field: str) -> None:
    with live(scripted("Hello!")) as service:
        plain = service.chat(**{field: 3}).json()
        chunks = frames(service.chat(**{field: 3}, stream=True))
    assert plain["choices"][0]["message"]["content"] == text_of(chunks) == "Hel"
    assert plain["choices"][0]["finish_reason"] == chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert plain["usage"]["completion_tokens"] == 3


def test_the_length_is_the_default_the_limit_or_what_fits_the_window() -> None:
    prompt = len(tokens_of("<user>Hi<|end|><assistant>"))
    with live(scripted(babble, context_window=prompt + 9), default_max_tokens=5, max_output_tokens=7) as service:
        lengths = [
            service.chat(**fields).json()["usage"]["completion_tokens"] for fields in ({}, {"max_tokens": 10**9})
        ]
        assert lengths == [5, 7]
    with live(scripted(babble, context_window=prompt + 2), default_max_tokens=5) as service:
        assert service.chat().json()["usage"]["completion_tokens"] == 2


def test_a_prompt_that_leaves_no_room_is_refused_with_its_size() -> None:
    with live(scripted(context_window=512)) as service:
        response = service.chat(messages=[{"role": "user", "content": "x" * 500_000}])
        error = error_of(response, 400, "context_length_exceeded")
        assert service.sample("microbatch_rejected_requests_total", reason="context_length_exceeded") == 1
    assert error["param"] == "messages"
    assert "0.5k" in error["message"]


TEXT = "one END two"


@pytest.mark.parametrize(
    ("stop", "text", "finish"),
    [
        ("END", "one ", "stop"),
        (["nowhere", "ND"], "one E", "stop"),
        (["END two, and more"], TEXT, "stop"),
        (["one"], "", "stop"),
        ([], TEXT, "stop"),
    ],
)
def test_a_stop_string_ends_the_answer_and_never_shows(stop: Any, text: str, finish: str) -> None:
    with live(scripted(TEXT)) as service:
        plain = service.chat(stop=stop).json()
        chunks = frames(service.chat(stop=stop, stream=True))
    assert plain["choices"][0]["message"]["content"] == text_of(chunks) == text
    assert plain["choices"][0]["finish_reason"] == chunks[-2]["choices"][0]["finish_reason"] == finish


def test_a_stop_string_ends_its_row_too() -> None:
    with live(scripted(says("a STOP" + "x" * FOREVER), stepped=True), max_output_tokens=FOREVER) as service:
        service.engine.release(len("a STOP"))
        answer = service.chat(stop="STOP", max_tokens=FOREVER).json()
        [ended] = service.wait_ended()
        assert answer["usage"]["completion_tokens"] == len("a STOP")
        assert (ended.outcome, ended.finish, ended.output_tokens) == (Outcome.ANSWERED, "stop", len("a STOP"))
        service.engine.release()
        eventually(lambda: service.sample("microbatch_batch_duration_seconds_count") == 1, "the batch ended")


def test_what_was_held_back_for_a_stop_string_comes_at_the_end() -> None:
    with live(scripted("one EN")) as service:
        assert text_of(frames(service.chat(stop="END", stream=True))) == "one EN"
        assert text_of(frames(service.chat(stop="END", stream=True, max_tokens=6))) == "one EN"


def test_characters_of_several_tokens_are_never_cut() -> None:
    with live(scripted("é😀中")) as service:
        response = service.chat(stream=True)
    assert text_of(frames(response)) == "é😀中"
    assert "\ufffd" not in response.text


def test_an_answer_cut_inside_a_character_ends_before_it() -> None:
    with live(scripted("a😀")) as service:
        assert service.chat(max_tokens=3).json()["choices"][0]["message"]["content"] == "a"


def test_an_empty_answer_is_an_empty_string() -> None:
    with live(scripted("")) as service:
        assert service.chat().json()["choices"][0]["message"]["content"] == ""
        chunks = frames(service.chat(stream=True))
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:-1]] == [{"role": "assistant", "content": ""}, {}]
    assert chunks[1]["choices"][0]["finish_reason"] == "stop"


def test_a_request_s_settings_reach_its_row() -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen)), request_timeout_s=77.0) as service:
        service.chat(
            temperature=0.5,
            top_p=0.3,
            top_k=7,
            min_p=0.1,
            presence_penalty=0.4,
            frequency_penalty=0.7,
            repetition_penalty=1.2,
            seed=-5,
            max_tokens=9,
            headers={"x-request-id": "mine"},
        )
    [request] = seen
    assert (request.id, request.time_limit) == ("mine", 77.0)
    assert BYTES.backend_tokenizer.decode(list(request.prompt), skip_special_tokens=False) == (
        "<user>Hi<|end|><assistant>"
    )
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.3, 7, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.4, 0.7, 1.2)
    assert (sampling.seed, sampling.max_tokens, sampling.stop_token_ids) == (-5, 9, frozenset({END}))


def test_what_a_request_leaves_open_has_openai_s_defaults_and_a_seed_of_its_own() -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen))) as service:
        service.chat()
        service.chat(temperature=None, top_p=None, top_k=-1, seed=None, stop=None)
    first, second = (request.sampling for request in seen)
    assert (first.temperature, first.top_p, first.top_k, first.min_p, first.penalised) == (1.0, 1.0, 0, 0.0, False)
    assert (second.temperature, second.top_p, second.top_k) == (1.0, 1.0, 0)
    assert first.seed != second.seed
    assert min(first.seed, second.seed) >= 0


@pytest.mark.parametrize(
    ("fields", "greedy"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 1e-40}, True),
        ({"temperature": 0.009}, True),
        ({"temperature": 0.01}, False),
        ({"top_p": 0}, True),
        ({"do_sample": False}, True),
        ({"do_sample": True}, False),
        ({}, False),
    ],
)
def test_what_leaves_no_choice_is_a_greedy_row(fields: dict[str, Any], greedy: bool) -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen))) as service:
        assert service.chat(**fields).status_code == 200
    assert seen[0].sampling.greedy is greedy


def test_a_stop_token_that_has_a_text_does_not_show() -> None:
    with live(scripted("one!two", stop_token=tokens_of("!")[0])) as service:
        plain = service.chat().json()
        chunks = frames(service.chat(stream=True))
    assert plain["choices"][0]["message"]["content"] == text_of(chunks) == "one"
    assert plain["choices"][0]["finish_reason"] == "stop"
    assert plain["usage"]["completion_tokens"] == 4


def test_end_tokens_can_be_ignored() -> None:
    with live(scripted("Hi")) as service:
        answer = service.chat(ignore_eos=True, max_tokens=9).json()
    assert answer["usage"]["completion_tokens"] == 9
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"] == "Hi"


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize(
    ("fields", "asked"),
    [({}, None), ({"enable_thinking": True}, True), ({"thinking": {"type": "disabled"}}, False)],
)
def test_thinking_is_what_the_request_says_or_else_the_setting(
    default: bool, fields: dict[str, Any], asked: bool | None
) -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen)), thinking=default) as service:
        service.chat(**fields)
    assert BYTES.decode(list(seen[0].prompt)).endswith("<think>") is (default if asked is None else asked)  # type: ignore[union-attr]


# Names, paths and ids


def test_a_model_is_found_by_each_of_its_names_with_or_without_a_provider() -> None:
    with live(name=("first", "org/second")) as service:
        for name, shown in {"first": "first", "org/second": "org/second", "first___OpenAI-API": "first"}.items():
            assert service.chat(model=name).json()["model"] == shown
            assert service.get(f"/v1/models/{name}").json()["id"] == shown
        assert service.chat().json()["model"] == "first"
        assert [card["id"] for card in service.get("/v1/models").json()["data"]] == ["first", "org/second"]


def test_an_unknown_model_is_not_found() -> None:
    with live() as service, service.openai() as client:
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="gpt-500", messages=QUESTION)
        assert caught.value.code == "model_not_found"
        error_of(service.chat(model="gpt-500"), 404, "model_not_found")
        error_of(service.get("/v1/models/gpt-500"), 404, "model_not_found")


def test_the_name_of_a_model_opens_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model")  # whoever opened it would wait for ever
    with live() as service:
        for name in (str(tmp_path / "model"), f"../../../..{tmp_path}/model", f"file://{tmp_path}/model"):
            error_of(service.chat(model=name), 404, "model_not_found")


def test_models_say_how_long_their_window_is_with_and_without_a_prefix() -> None:
    with live(scripted(context_window=1234)) as service, service.openai() as client:
        [card] = client.models.list()
        assert (card.id, card.object, card.owned_by) == ("scripted", "model", "microbatch")
        assert client.models.retrieve("scripted") == card
        with service.http() as http:
            listed = http.request("GET", "/models", content=b"{}").json()
        assert listed == service.get("/v1/models").json()
        assert listed["object"] == "list"
        [listed_card] = listed["data"]
        assert listed_card["max_model_len"] == 1234
        # Lower, because who fills it counts with another tokenizer, and adds to the prompt after cutting it.
        assert listed_card["context_length"] == service.model.advertised_window < 1234


def test_paths_without_a_prefix_are_the_same() -> None:
    with live() as service:
        body = orjson.dumps({"messages": QUESTION})
        assert service.post(body, "/chat/completions").json()["object"] == "chat.completion"
        assert service.get("/models/scripted").json() == service.get("/v1/models/scripted").json()
        assert set(service.get("/version").json()) == {"version", "sampling"}


def test_unknown_paths_and_methods_are_refused_in_openai_s_shape() -> None:
    with live() as service:
        error_of(service.get("/v1/nothing"), 404, "unknown_url")
        error_of(service.get("/server/500"), 404, "unknown_url")
        wrong = service.get("/v1/chat/completions")
        error_of(wrong, 405, "unknown_method")
        assert wrong.headers["allow"] == "POST"
        error_of(service.post(b"", "/v1/models"), 405, "unknown_method")


@pytest.mark.parametrize("asked", ["a", "x" * 64, "3f2b:1.5-A_z"])
def test_a_request_id_is_returned(asked: str) -> None:
    with live() as service:
        assert service.chat(headers={"x-request-id": asked}).headers["x-request-id"] == asked
        assert service.wait_ended()[0].id == asked


@pytest.mark.parametrize("asked", [b"", b"a b", b"x" * 65, b"a/b", b"\xc3\xa9", b"\x1b[31m", b'"', b"a\tb"])
def test_an_odd_request_id_is_replaced(asked: bytes) -> None:
    with live() as service, service.connect() as bare:
        body = orjson.dumps({"messages": QUESTION})
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
        bare.sendall(head.encode() + b"X-Request-Id: " + asked + b"\r\n\r\n" + body)
        answer = b"".join(iter(functools.partial(bare.recv, 65536), b""))
        if asked != b"\x1b[31m":  # the HTTP parser refuses that by itself
            assert len(service.wait_ended()[0].id) == 16
    assert asked == b"" or b"id: " + asked not in answer
    assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))


def test_every_answer_has_an_id_of_its_own() -> None:
    with live() as service:
        responses = [service.get("/health"), service.get("/nothing"), service.chat(), service.chat(), service.chat(n=9)]
    assert len({response.headers["x-request-id"] for response in responses}) == len(responses)


# Refusals


def test_what_is_wrong_with_a_body_is_a_400_that_openai_s_client_understands() -> None:
    with live() as service, service.openai() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="scripted", messages=QUESTION, temperature=9)
        assert caught.value.param == "temperature"
        error_of(service.post(b"{"), 400, "invalid_json")
        error_of(service.post(b""), 400, "invalid_json")
        error_of(service.post(b"\xff"), 400, "invalid_json")
        error_of(service.chat(audio={"voice": "alloy"}), 400, "unsupported_field")
        refused = error_of(service.chat(messages=[{"role": "user", "content": "refuse me"}]), 400, None)
        assert "refused" in refused["message"]
        assert not service.engine.batches


def test_ignored_fields_are_named_in_the_answer_and_counted() -> None:
    with live() as service:
        answer = service.chat(foo=1, **{"bär": 2, "x-y": 3, "nothing": None})
        assert answer.status_code == 200
        assert answer.headers["x-ignored-fields"] == "foo, ?, x-y"
        assert service.chat(stream=True, foo=1).headers["x-ignored-fields"] == "foo"
        assert "x-ignored-fields" not in service.chat().headers
        assert len(service.chat(**{f"f{n}": n for n in range(1000)}).headers["x-ignored-fields"].split(", ")) == 20
        assert service.sample("microbatch_ignored_fields_total") == 3 + 1 + 1000


def test_unknown_fields_are_refused_where_the_operator_wants_it() -> None:
    with live(unknown_fields="refuse") as service:
        assert error_of(service.chat(foo=1), 400, "unsupported_field")["param"] == "foo"
        assert service.chat(foo=None).status_code == 200


def test_a_large_body_is_as_good_as_a_small_one() -> None:
    with live() as service:
        assert service.chat(user="x" * 200_000, foo=1).headers["x-ignored-fields"] == "foo"
        error_of(service.chat(user="x" * 200_000, n="many"), 400, None)


def test_text_that_is_odd_is_answered() -> None:
    odd = ["", "\x00", "<|end|>", "😀" * 100, "\u202e", "\ufffd", "a\r\nb"]
    with live() as service:
        assert [service.chat(messages=[{"role": "user", "content": text}]).status_code for text in odd] == [200] * 7


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_in_every_transfer(chunked: bool) -> None:
    with live(max_body_mib=0.1) as service:
        body = orjson.dumps({"messages": [{"role": "user", "content": "x" * 300_000}]})
        content = iter([body[start : start + 1000] for start in range(0, len(body), 1000)]) if chunked else body
        error_of(service.post(content), 413, "body_too_large")
        fits = orjson.dumps({"messages": QUESTION}).ljust(int(0.1 * 2**20))
        assert service.post(iter([fits]) if chunked else fits).status_code == 200
        error_of(service.post(fits + b" "), 413, "body_too_large")


def test_a_body_that_comes_too_slowly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.http.request, "READ_SECONDS", 0.01)
    with live() as service, service.connect() as bare:
        bare.sendall(raw_request(b"{", length=100))
        assert bare.recv(65536).startswith(b"HTTP/1.1 408")


def test_more_requests_than_the_queue_holds_are_told_when_to_come_back(pool: ThreadPoolExecutor) -> None:
    with live(scripted(stepped=True), queue_size=1, max_batch_size=1) as service:
        running = pool.submit(service.chat)
        service.wait_running()
        waiting = pool.submit(service.chat)
        service.wait_queued(1)
        for stream in (False, True):
            refused = service.chat(stream=stream)
            error_of(refused, 429, "queue_full")
            assert 1 <= int(refused.headers["retry-after"]) <= 60
        with service.openai() as client, pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="scripted", messages=QUESTION)
        assert service.sample("microbatch_rejected_requests_total", reason="queue_full") == 3
        service.engine.release(100)
        assert running.result().status_code == waiting.result().status_code == 200


def test_while_the_model_loads_the_service_lives_and_is_not_ready() -> None:
    with live(ready=False) as service:
        assert service.get("/health/live").json() == {"state": "starting"}
        for path in ("/health", "/health/ready"):
            probe = service.get(path)
            assert (probe.status_code, probe.json()) == (503, {"state": "starting"})
            assert probe.headers["retry-after"]
        refused = service.chat()
        error_of(refused, 503, "service_starting")
        assert int(refused.headers["retry-after"]) > 0
        [card] = service.get("/v1/models").json()["data"]
        assert service.get("/v1/models/scripted").json() == card
        assert (card["id"], card.keys() & {"max_model_len", "context_length"}) == ("scripted", set())
        assert service.sample("microbatch_state", state="starting") == 1
        assert service.sample("microbatch_rejected_requests_total", reason="not_ready") == 1
        service.loader.may_load.set()
        service.wait_state(State.READY)
        assert service.get("/health/ready").status_code == 200
        assert service.chat().status_code == 200
        assert service.sample("microbatch_state", state="starting") == 0


def test_a_model_that_cannot_be_loaded_is_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with live(ready=False) as service:
        service.loader.error = ModelError("there is no such model")
        service.loader.may_load.set()
        eventually(service.service.stopped.is_set, "the service gave up")
        assert service.service.exit_code == 1
        assert service.get("/health/live").status_code == 503
        error_of(service.chat(), 503, "service_failed")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == [
        "there is no such model"
    ]


# Draining


def test_a_drain_finishes_what_was_accepted_and_takes_nothing_new(pool: ThreadPoolExecutor) -> None:
    with live(scripted(stepped=True), max_batch_size=1) as service:
        accepted = [pool.submit(service.chat, stream=True)]
        service.wait_running()
        accepted.append(pool.submit(service.chat))
        service.wait_queued(1)
        service.drain()
        service.wait_state(State.DRAINING)
        refused = service.chat()
        error_of(refused, 503, "service_draining")
        assert refused.headers["retry-after"]
        assert service.get("/health/ready").status_code == 503
        assert service.get("/health/live").status_code == 200
        assert not service.service.stopped.is_set()
        service.engine.release(100)
        assert text_of(frames(accepted[0].result())) == "Hello!"
        assert accepted[1].result().json()["choices"][0]["message"]["content"] == "Hello!"
        eventually(service.service.stopped.is_set, "the service stopped")
        assert service.service.exit_code == 0
        assert [event.outcome for event in service.ended()] == [Outcome.ANSWERED] * 2


def test_a_drain_that_takes_too_long_fails_what_is_left(pool: ThreadPoolExecutor) -> None:
    with live(scripted(babble, stepped=True), drain_timeout_s=0.0) as service:
        streamed = pool.submit(service.chat, stream=True)
        service.wait_running()
        service.engine.release()
        eventually(lambda: service.sample("microbatch_output_tokens_total") == 1, "the first token is out")
        plain = pool.submit(service.chat)
        service.wait_queued(1)
        service.drain()
        error_of(plain.result(), 503, "stopping")
        assert plain.result().headers["retry-after"]  # when another process may answer
        *chunks, last = frames(streamed.result())
        assert text_of(chunks) == "x"
        error_in(last, 503, "stopping")
        assert {event.outcome for event in service.ended()} == {Outcome.DRAINED}


# Failures after acceptance


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_before_the_first_byte_is_a_504(stream: bool, pool: ThreadPoolExecutor) -> None:
    with live(scripted(stepped=True), request_timeout_s=0.2, max_batch_size=1) as service:
        # One is in a batch that never steps, the other one waits behind it.
        for answer in [pool.submit(service.chat, stream=stream), pool.submit(service.chat, stream=stream)]:
            error_of(answer.result(), 504, "deadline_exceeded")
        assert [event.outcome for event in service.wait_ended(2)] == [Outcome.DEADLINE] * 2


def test_a_deadline_after_the_first_byte_is_an_error_frame() -> None:
    with live(scripted(babble, stepped=True), request_timeout_s=2.0) as service, service.openai() as client:
        service.engine.release(2)
        with client.chat.completions.create(model="scripted", messages=QUESTION, stream=True) as stream:
            assert next(stream).choices[0].delta.role
            with pytest.raises(openai.APIError) as caught:
                list(stream)
        assert caught.value.code == "deadline_exceeded"


def fails_at(step: int, error: Exception) -> Callable[[int], None]:
    def before_step(number: int) -> None:
        if number == step:
            raise error

    return before_step


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("kernel"), "engine_error"), (OutOfMemory("full"), "out_of_memory")]
)
def test_an_engine_that_fails_at_once_is_a_500(error: Exception, code: str, stream: bool) -> None:
    with live(scripted(before_step=fails_at(0, error))) as service:
        told = error_of(service.chat(stream=stream), 500, code)
        assert "kernel" not in told["message"]
        assert service.wait_ended()[0].outcome is Outcome.ERROR
        eventually(lambda: service.sample("microbatch_running_rows") == 0, "no row runs")
        assert service.get("/health/ready").status_code == 200


def test_an_engine_that_fails_later_is_an_error_frame_without_done() -> None:
    with live(scripted("Hello!", before_step=fails_at(3, RuntimeError("kernel")))) as service:
        *chunks, last = frames(service.chat(stream=True))
        assert text_of(chunks) == "Hel"
        error_in(last, 500, "engine_error")
        error_of(service.chat(), 500, "engine_error")


def test_a_bug_of_ours_is_a_500_that_tells_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("secret detail")

    with live() as service:
        monkeypatch.setattr(service.model.text, "render", broken)
        response = service.chat(headers={"x-request-id": "unlucky"})
        error_of(response, 500, "internal_error")
        assert "secret detail" not in response.text
        assert response.headers["x-request-id"] == "unlucky"
        monkeypatch.undo()
        assert service.chat().status_code == 200
    assert any("unlucky" in record.getMessage() for record in caplog.records)


# Clients that leave


def leave(service: Live, stream: bool, when: Callable[[], object]) -> None:
    """Send a request, wait, and close the connection."""
    with service.connect() as bare:
        bare.sendall(raw_request(orjson.dumps({"messages": QUESTION, "stream": stream, "max_tokens": 1000})))
        when()
        if stream and service.engine.steps:
            received = bare.recv(65536)
            while b"data: " not in received:
                more = bare.recv(65536)
                assert more, received
                received += more


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_gives_its_place_back(stream: bool, pool: ThreadPoolExecutor) -> None:
    with live(scripted(stepped=True), max_batch_size=1) as service:
        running = pool.submit(service.chat)
        service.wait_running()
        leave(service, stream, lambda: service.wait_queued(1))
        [ended] = service.wait_ended()
        assert (ended.outcome, ended.queue_wait, ended.output_tokens) == (Outcome.CANCELLED, None, 0)
        service.wait_queued(0)
        service.engine.release(100)
        assert running.result().status_code == 200
        assert sum(map(len, service.engine.batches)) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_an_answer_ends_its_row(stream: bool) -> None:
    with live(scripted(babble, stepped=True)) as service:

        def first_token() -> None:
            service.wait_running()
            service.engine.release()
            eventually(lambda: service.sample("microbatch_output_tokens_total") == 1, "the first token is out")

        leave(service, stream, first_token)
        [ended] = service.wait_ended()
        assert (ended.outcome, ended.finish) == (Outcome.CANCELLED, "cancelled")
        service.engine.release()
        eventually(lambda: service.sample("microbatch_batch_duration_seconds_count") == 1, "the batch ended")
        assert service.sample("microbatch_running_rows") == service.sample("microbatch_queue_depth") == 0
        assert service.sample("microbatch_cancelled_requests_total") == 1
        assert service.engine.steps == 2


def test_a_client_that_leaves_does_not_disturb_its_neighbours(pool: ThreadPoolExecutor) -> None:
    with live(scripted("Hello!", stepped=True), batch_window_ms=10_000.0, max_batch_size=2) as service:
        neighbour = pool.submit(service.chat)
        service.wait_queued(1)

        def two_tokens() -> None:
            service.wait_running(2)
            service.engine.release(2)
            eventually(lambda: service.engine.steps == 2, "two steps")

        leave(service, True, two_tokens)
        service.wait_ended()
        service.engine.release(100)
        assert neighbour.result().json()["choices"][0]["message"]["content"] == "Hello!"
        assert sorted(event.outcome for event in service.wait_ended(2)) == [Outcome.ANSWERED, Outcome.CANCELLED]


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with live() as service:
        with service.connect() as bare:
            bare.sendall(raw_request(b'{"messages":', length=1000))
            eventually(lambda: any(each.answering for each in service.connections), "the request is being read")
        eventually(lambda: not service.connections, "the connection is closed")
        assert service.chat().status_code == 200
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(("path", "right"), [("/v1/tokenize/?a=b%26", "/v1/tokenize?a=b%26"), ("/docs/", "/docs")])
def test_a_slash_too_many_stays_on_the_client_s_side_of_a_proxy(path: str, right: str) -> None:
    with live() as service:
        location = service.get(path).headers["location"]
    # The proxy ends TLS, and its paths have a prefix.
    assert urljoin(f"https://proxy.example/llm{path}", location) == f"https://proxy.example/llm{right}"


def test_a_slash_too_many_does_not_cost_the_answer() -> None:
    with live() as service, service.http(follow_redirects=True) as client:
        body = orjson.dumps({"messages": QUESTION})
        assert client.post("/v1/chat/completions/", content=body).json()["choices"][0]["message"]["content"] == "Hello!"
        assert client.get("/v1/models/").json() == client.get("/v1/models").json()
        for path in ("/nothing/", "/v1/nothing/"):
            error_of(client.get(path), 404, "unknown_url")


# Who may ask


KEYS = ("secret-one", "zwei-é")


@pytest.mark.parametrize(
    "given",
    [None, b"", b"Bearer", b"Bearer wrong", b"Bearer \xe9", "Bearer é".encode(), b"Basic secret-one",
     b"secret-one", b"Bearer secret-one,zwei-\xc3\xa9", b"Bearer secret-on"],
)  # fmt: skip
def test_without_a_known_key_nothing_is_answered(given: bytes | None) -> None:
    with live(api_keys=KEYS) as service, service.http() as client:
        headers = [] if given is None else [(b"authorization", given)]
        for response in (
            client.post("/v1/chat/completions", content=orjson.dumps({"messages": QUESTION}), headers=headers),
            client.get("/v1/models", headers=headers),
            client.get("/nothing", headers=headers),
        ):
            error_of(response, 401, "unknown_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert not service.engine.batches
        assert service.sample("microbatch_rejected_requests_total", reason="unknown_api_key") == 3


@pytest.mark.parametrize("given", [b"Bearer secret-one", b"bearer  secret-one", "Bearer zwei-é".encode()])
def test_each_known_key_opens_the_service(given: bytes) -> None:
    with live(api_keys=KEYS) as service, service.http() as client:
        headers = [(b"authorization", given)]
        assert client.post("/v1/chat/completions", content=b'{"messages": []}', headers=headers).status_code == 400
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_probes_and_scrapers_need_no_key() -> None:
    with live(api_keys=KEYS) as service:
        paths = ("/health", "/health/live", "/health/ready", "/metrics")
        assert [service.get(path).status_code for path in paths] == [200] * 4
        with service.http(follow_redirects=True) as client:
            assert [client.get(f"{path}/").status_code for path in (*paths, "/docs")] == [200] * 5
            assert client.get("/v1/models/").status_code == 401
        assert service.get("/healthy").status_code == service.get("/metricsx").status_code == 401


def test_openai_s_client_sends_its_key() -> None:
    with live(api_keys=KEYS) as service:
        with service.openai(api_key="secret-one") as client:
            assert client.models.list().data[0].id == "scripted"
        with service.openai(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


ORIGIN = {"origin": "https://app.example"}


def test_no_web_page_may_call_unless_a_setting_allows_its_origin() -> None:
    with live() as service:
        assert "access-control-allow-origin" not in service.chat(headers=ORIGIN).headers
    with live(cors_origins=("https://app.example",), api_keys=KEYS) as service, service.http() as client:
        key = {"authorization": "Bearer secret-one"}
        allowed = service.chat(headers=ORIGIN | key)
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        exposed = set(allowed.headers["access-control-expose-headers"].split(", "))
        assert exposed >= {"x-request-id", "request-id", "x-ignored-fields", "retry-after"}
        assert "access-control-allow-origin" not in service.chat(headers={"origin": "https://b.example"} | key).headers
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = client.options("/v1/chat/completions", headers=ORIGIN | asks)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        # A page must be able to read that its key is wrong.
        assert service.chat(headers=ORIGIN).headers["access-control-allow-origin"] == "https://app.example"
    with live(cors_origins=("*",)) as service:
        assert service.chat(headers=ORIGIN).headers["access-control-allow-origin"] == "*"


# Metrics

CONTRACT = {
    "microbatch_state": "gauge",
    "microbatch_build_info": "gauge",
    "microbatch_queue_depth": "gauge",
    "microbatch_queue_limit": "gauge",
    "microbatch_queue_prompt_tokens": "gauge",
    "microbatch_running_rows": "gauge",
    "microbatch_batch_limit_rows": "gauge",
    "microbatch_batches": "counter",
    "microbatch_batch_size_rows": "histogram",
    "microbatch_step_size_rows": "histogram",
    "microbatch_joined_requests": "counter",
    "microbatch_batch_padding_ratio": "histogram",
    "microbatch_batch_window_wait_seconds": "histogram",
    "microbatch_batch_duration_seconds": "histogram",
    "microbatch_queue_wait_seconds": "histogram",
    "microbatch_time_to_first_token_seconds": "histogram",
    "microbatch_time_per_output_token_seconds": "histogram",
    "microbatch_request_duration_seconds": "histogram",
    "microbatch_request_prompt_tokens": "histogram",
    "microbatch_request_output_tokens": "histogram",
    "microbatch_prompt_tokens": "counter",
    "microbatch_ignored_fields": "counter",
    "microbatch_reused_prompt_tokens": "counter",
    "microbatch_scored_prompt_tokens": "counter",
    "microbatch_preemptions": "counter",
    "microbatch_drafted_tokens": "counter",
    "microbatch_accepted_tokens": "counter",
    "microbatch_output_tokens": "counter",
    "microbatch_finished_requests": "counter",
    "microbatch_cancelled_requests": "counter",
    "microbatch_rejected_requests": "counter",
    "microbatch_device_memory_bytes": "gauge",
    "microbatch_device_memory_total_bytes": "gauge",
    "microbatch_tasks": "gauge",
    "microbatch_loop_lag_seconds": "histogram",
    "microbatch_worker_seconds_since_progress": "gauge",
    "process_start_time_seconds": "gauge",
    "process_cpu_seconds": "counter",
    "process_resident_memory_bytes": "gauge",
    "process_virtual_memory_bytes": "gauge",
    "process_open_fds": "gauge",
    "process_max_fds": "gauge",
}
"""What dashboards and alerts rely on: a change here is a breaking one, and belongs in the CHANGELOG."""

LABELS = {
    "microbatch_state": {"state"},
    "microbatch_build_info": {"version", "python", "model", "device", "dtype"},
    "microbatch_request_duration_seconds": {"outcome"},
    "microbatch_finished_requests": {"reason"},
    "microbatch_rejected_requests": {"reason"},
}


def test_metrics_keep_their_names_types_and_labels() -> None:
    with live() as service:
        service.chat()
        service.chat(n=0)
        response = service.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = [each for each in text_string_to_metric_families(response.text) if not each.name.endswith("_created")]
    assert {family.name: family.type for family in families} == CONTRACT
    for family in families:
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert labels == LABELS.get(family.name, set()), family.name
        assert family.documentation.endswith(".")


def test_a_refusal_has_a_series_before_the_first_one() -> None:
    with live() as service:
        samples = service.samples()
    for reason in (*REFUSALS, *BUSY, *FAULTS, "bad_request"):
        assert samples["microbatch_rejected_requests_total", (("reason", reason),)] == 0.0


def codes_in(tree: ast.AST) -> Iterator[str]:
    """The codes that calls of `ApiError` and `bad_request` name, by their place or by their name."""
    places = {"ApiError": 3, "bad_request": 2}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in places:
            place = places[call.func.id]
            named = [*call.args[place : place + 1], *(each.value for each in call.keywords if each.arg == "code")]
            yield from (each.value for each in named if isinstance(each, ast.Constant) and isinstance(each.value, str))


def test_each_reason_of_a_refusal_has_its_series() -> None:
    codes = {code for file in Path("server").rglob("*.py") for code in codes_in(ast.parse(file.read_text()))}
    of_accepted_requests = {"stopping", "deadline_exceeded", "out_of_memory", "engine_error", "internal_error"}
    of_starlette = {"unknown_url", "unknown_method"}
    assert codes | of_starlette == {*FAULTS, *BUSY, "queue_full", "too_busy"} | of_accepted_requests


@pytest.mark.parametrize("code", BUSY)
def test_each_refusal_of_a_busy_server_is_counted_once_and_logged(
    code: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chat = raw_request(orjson.dumps({"messages": QUESTION}))
    monkeypatch.setattr(server.threads, "WAITING", 0 if code == "tokenizer_busy" else 1)
    monkeypatch.setattr(server.grammar.compiler, "MAX_WAITING", 0)
    monkeypatch.setattr(server.observe.live, "MOST_LISTENERS", 0)
    # A batch waits until it is full, so that all connections have a request in it.
    batches: dict[str, Any] = {"max_batch_size": 4, "batch_window_ms": 10_000.0}
    engine = scripted(stepped=True)
    with caplog.at_level(logging.INFO), live(engine, max_connections=4, max_bodies_mib=0.5, **batches) as service:
        with contextlib.ExitStack() as stack:
            match code:
                case "too_many_listeners":
                    refused = service.get("/internal/live")
                case "service_bodies_full":
                    refused = service.chat(messages=QUESTION * 50_000)
                case "service_connections_full":
                    for _ in range(4):
                        stack.enter_context(service.connect()).sendall(chat)
                    service.wait_running(4)
                    refused = service.chat()
                    service.engine.release(1000)
                case _:
                    refused = service.chat(response_format={"type": "json_object"})
        assert refused.status_code in (429, 503)
        assert refused.json()["error"]["code"] == code
        eventually(lambda: not service.connections, "all have left")
        assert service.get("/health").status_code == 200, "it has room for others"
        counted = {
            labels: value
            for (name, labels), value in service.samples().items()
            if name == "microbatch_rejected_requests_total" and value
        }
    assert counted == {(("reason", code),): 1.0}
    assert sum("refused" in line and code in line for line in caplog.messages) == 1


def test_every_state_is_shown_and_exactly_one_is_on() -> None:
    with live() as service:
        assert [service.sample("microbatch_state", state=state) for state in State] == [
            float(state is State.READY) for state in State
        ]


def test_memory_is_shown_before_anything_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedEngine, "memory", lambda self: 77)
    with live() as service:
        eventually(lambda: service.sample("microbatch_device_memory_bytes") == 77, "the loaded model's memory is shown")


def test_metrics_add_up_after_a_load(pool: ThreadPoolExecutor) -> None:
    with live(scripted("Hello!"), max_batch_size=4, batch_window_ms=20.0) as service:
        answers = [pool.submit(service.chat, stream=False, max_tokens=3 + n % 5) for n in range(24)]
        usages = [answer.result().json()["usage"] for answer in answers]
        refused = [service.chat(n=0) for _ in range(3)]
        begun = service.sample("microbatch_batches_total")
        eventually(lambda: service.sample("microbatch_batch_duration_seconds_count") == begun, "the last batch ended")
        samples = {name: value for (name, labels), value in service.samples().items() if not labels}
        by_reason = [service.sample("microbatch_finished_requests_total", reason=why) for why in ("stop", "length")]
        answered = service.sample("microbatch_request_duration_seconds_count", outcome="answered")
        rejected = service.sample("microbatch_rejected_requests_total", reason="bad_request")
        batches = service.engine.batches
    assert answered == 24
    assert by_reason == [4, 20]
    assert rejected == len(refused)
    assert samples["microbatch_prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in usages)
    assert samples["microbatch_output_tokens_total"] == sum(usage["completion_tokens"] for usage in usages)
    assert samples["microbatch_batches_total"] == samples["microbatch_batch_size_rows_count"] == len(batches)
    assert samples["microbatch_batch_duration_seconds_count"] == len(batches)
    assert samples["microbatch_batch_size_rows_sum"] == sum(map(len, batches)) == 24
    assert max(map(len, batches)) <= 4
    for name in ("queue_wait_seconds", "time_to_first_token_seconds", "request_prompt_tokens", "request_output_tokens"):
        assert samples[f"microbatch_{name}_count"] == 24
    assert samples["microbatch_queue_depth"] == samples["microbatch_queue_prompt_tokens"] == 0
    assert samples["microbatch_cancelled_requests_total"] == 0


def test_a_row_ends_exactly_once(pool: ThreadPoolExecutor) -> None:
    with live(scripted(says("Hello!")), max_batch_size=8) as service:
        ids = [f"row-{n}" for n in range(32)]
        done = [
            pool.submit(service.chat, stream=n % 2 == 0, headers={"x-request-id": id_}) for n, id_ in enumerate(ids)
        ]
        assert [answer.result().status_code for answer in done] == [200] * 32
        assert sorted(event.id for event in service.wait_ended(32)) == sorted(ids)


def test_rows_of_one_batch_get_each_their_own_answer(pool: ThreadPoolExecutor) -> None:
    script = says("", **{f"id{n}": f"answer {n} " * n for n in range(8)})
    with live(scripted(script), max_batch_size=8, batch_window_ms=10_000.0) as service:
        answers = [pool.submit(service.chat, stream=n % 2 == 0, headers={"x-request-id": f"id{n}"}) for n in range(8)]
        for n, answer in enumerate(map(operator.methodcaller("result"), answers)):
            text = text_of(frames(answer)) if n % 2 == 0 else answer.json()["choices"][0]["message"]["content"]
            assert text == f"answer {n} " * n
        assert len(service.engine.batches) == 1


# The log


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the service logged, as opposed to the clients in these tests."""
    return [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore", "openai"))]


def test_each_request_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture, pool: ThreadPoolExecutor) -> None:
    caplog.set_level(logging.INFO)
    with live(scripted(stepped=True), request_timeout_s=0.5) as service:
        service.engine.release(100)
        service.chat(headers={"x-request-id": "answered"})
        service.chat(headers={"x-request-id": "streamed"}, stream=True)
        service.chat(headers={"x-request-id": "refused"}, n=9)
        service.get("/nothing", headers={"x-request-id": "nowhere"})
    with live(scripted(stepped=True), request_timeout_s=0.1) as service:
        service.chat(headers={"x-request-id": "late"})
    with live(scripted(before_step=fails_at(0, RuntimeError("kernel")))) as service:
        service.chat(headers={"x-request-id": "failed"})
    with live(api_keys=KEYS) as service:
        service.chat(headers={"x-request-id": "stranger"})
    with live(ready=False) as service:
        service.chat(headers={"x-request-id": "early"})
    lines = [record.getMessage() for record in ours(caplog)]
    for name in ("answered", "streamed", "refused", "nowhere", "late", "failed", "stranger", "early"):
        [line] = [line for line in lines if f"id={name} " in line]
        assert "outcome=" in line or "status=" in line


def test_a_line_names_the_key_and_never_shows_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with live(api_keys=KEYS) as service:
        for fields in ({}, {"n": 0}):
            service.chat(headers={"authorization": "Bearer secret-one"}, **fields)
        service.chat(headers={"authorization": "Bearer unknown"})
    lines = [record.getMessage() for record in ours(caplog)]
    assert sum(" key=key-1 " in line for line in lines) == 2
    assert not any(secret in line for line in lines for secret in ("secret-one", "unknown "))


def test_what_clients_write_is_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with live(scripted("my-answer"), api_keys=("my-key",)) as service:
        key = {"authorization": "Bearer my-key"}
        for fields in ({}, {"stream": True}, {"n": 5}, {"stop": ["my-stop", ""]}, {"my-field": "my-value"}):
            service.chat(messages=[{"role": "user", "content": "my-prompt"}], headers=key, **fields)
        service.chat(messages=[{"role": "user", "content": "my-prompt"}], headers={"authorization": "Bearer my-guess"})
    text = "\n".join(JsonFormatter().format(record) for record in ours(caplog))
    assert "state ready" in text
    assert not any(secret in text for secret in ("my-prompt", "my-answer", "my-key", "my-stop", "my-guess", "my-value"))


@pytest.mark.parametrize(
    "path", ["/v1/models/a%0Ab", "/v1/models/a%0Db", "/v1/models/a%1B%5B31mb", "/a%00b", "/%C3%A9"]
)
def test_no_path_can_forge_a_line_of_the_log(path: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with live() as service:
        assert service.get(path).status_code == 404
    lines = [record.getMessage() for record in ours(caplog)]
    assert any("status=404" in line for line in lines)
    assert all(line.isprintable() for line in lines)


@given(st.text(st.characters() | st.characters(categories=["Cs"])))
def test_every_message_is_a_line_of_json_that_stderr_can_write(message: str) -> None:
    record = logging.LogRecord("test", logging.ERROR, __file__, 1, message, None, None)
    written = JsonFormatter().format(record).encode(errors="backslashreplace")  # as stderr does
    assert b"\n" not in written
    read = json.loads(written)["message"]
    assert read.encode("utf-16", "surrogatepass") == message.encode("utf-16", "surrogatepass")


def test_the_log_s_json_form_has_every_fact_as_a_field(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with live(scripted(before_step=fails_at(0, RuntimeError("kernel")))) as service:
        service.chat(headers={"x-request-id": "one"})
        service.chat(headers={"x-request-id": "two"}, n=0)
    lines = [orjson.loads(JsonFormatter().format(record)) for record in ours(caplog)]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert all("\n" not in JsonFormatter().format(record) for record in ours(caplog))
    ended, refused = (next(line for line in lines if line.get("id") == name) for name in ("one", "two"))
    assert (ended["outcome"], ended["level"], ended["output_tokens"]) == ("error", "warning", 0)
    assert (refused["status"], refused["path"]) == (400, "/v1/chat/completions")
    assert any("kernel" in line.get("exception", "") for line in lines)
