"""RAGFlow as a client: the requests of both of its generations, and the answers and errors that it can live with."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import APIStatusError

import server.http.errors
import server.http.request
from batching.errors import (
    BatchingError,
    DeadlineExceeded,
    Drained,
    EngineError,
    NotReady,
    OutOfMemory,
    QueueFull,
    TooBusy,
    TooLarge,
)
from batching.events import Outcome, State
from batching.types import Request
from server.fields import parse
from server.http.errors import ApiError, bad_request, from_batching, internal, not_ready
from server.openai.completions import CompletionRequest
from server.openai.requests import ChatRequest
from server.openai.tokenize import DetokenizeRequest, TokenizeRequest
from tests.fakes import Script
from tests.live import BYTES, Live, frames, live, says, scripted, text_of
from tests.server.test_app import babble, error_of, fails_at, remembering

DIALOG: dict[str, Any] = {"temperature": 0.1, "top_p": 0.3, "presence_penalty": 0.4, "frequency_penalty": 0.7}
HI: list[Any] = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "search", "description": "Finds.", "parameters": {"type": "object"}}}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def python(service: Live, **fields: Any) -> httpx2.Response:
    """As the Python generation asks: through the OpenAI client, so `Accept: application/json` even for a stream."""
    headers = {"authorization": "Bearer x", "accept": "application/json", "user-agent": "OpenAI/Python 2.41.0"}
    body = {"model": "scripted", "messages": HI} | DIALOG | fields
    return service.post(orjson.dumps(body), "/v1/chat/completions", headers=headers)


def rewritten(service: Live, **fields: Any) -> httpx2.Response:
    """As the rewrite in Go asks: without a version in the path."""
    headers = {"authorization": "Bearer x", "accept": "text/event-stream", "content-type": "application/json"}
    body = {"model": "scripted", "messages": HI, "max_tokens": 40, "do_sample": True} | DIALOG | fields
    return service.post(orjson.dumps(body), "/chat/completions", headers=headers)


GO_STREAM = {"stream": True, "stream_options": {"include_usage": True}}


# Requests


def test_both_generations_get_their_answer_plain_and_streamed() -> None:
    with live(scripted("Hello!")) as service:
        plain = [ask(service, stream=False).json() for ask in (python, rewritten)]
        streams = [frames(python(service, stream=True)), frames(rewritten(service, **GO_STREAM))]
    assert [answer["choices"][0]["message"]["content"] for answer in plain] == ["Hello!"] * 2
    assert [text_of(stream) for stream in streams] == ["Hello!"] * 2
    assert [stream[-1] for stream in streams] == ["[DONE]"] * 2


def test_what_its_dialogs_set_reaches_the_row() -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen)), default_max_tokens=77) as service:
        python(service)  # which never says how long an answer may be
        python(service, max_completion_tokens=9)
        rewritten(service, max_tokens=8)
        rewritten(service, do_sample=False)
    for request in seen[:3]:
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p) == (0.1, 0.3)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.4, 0.7)
    assert [request.sampling.max_tokens for request in seen] == [77, 9, 8, 40]
    assert [request.sampling.greedy for request in seen] == [False, False, False, True]


def thinking(request: Request, position: int) -> int:
    """Thinks where its prompt says so, and answers."""
    prompt = BYTES.backend_tokenizer.decode(list(request.prompt), skip_special_tokens=False)
    return THOUGHT(request, position) if prompt.endswith("<think>") else ANSWER(request, position)


THOUGHT: Script = says("hm\n</think>\n\nHi.")
ANSWER: Script = says("Hi.")


@pytest.mark.parametrize(
    "switch",
    [
        lambda on: {"enable_thinking": on},
        lambda on: {"chat_template_kwargs": {"enable_thinking": on}},
        lambda on: {"thinking": {"type": "enabled" if on else "disabled"}},
    ],
    ids=["python", "newer python", "go"],
)
@pytest.mark.parametrize("default", [False, True])
def test_each_of_its_switches_turns_thinking_on_and_off(
    switch: Callable[[bool], dict[str, Any]], default: bool
) -> None:
    with live(scripted(thinking), thinking=default) as service:
        for on in (True, False):
            message = python(service, **switch(on)).json()["choices"][0]["message"]
            assert message.get("reasoning_content") == ("hm" if on else None)
            assert message["content"] == "Hi."
            chunks = frames(rewritten(service, **GO_STREAM, **switch(on)))
            deltas = [choice["delta"] for chunk in chunks[:-1] for choice in chunk["choices"]]
            assert "".join(delta.get("reasoning_content", "") for delta in deltas) == ("hm" if on else "")
            assert text_of(chunks) == "Hi."
            assert not any("think>" in str(delta) for delta in deltas)


def test_a_budget_for_thinking_says_nothing_where_there_is_none() -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen))) as service:
        for fields in (
            {"thinking": {"type": "disabled", "budget_tokens": 5}},
            {"thinking_budget": 5},
            {"enable_thinking": False, "thinking_budget": 5},
        ):
            assert python(service, **fields).status_code == 200
    assert [request.sampling.forced for request in seen] == [None] * 3


HISTORIES: dict[str, list[Any]] = {
    "no system message": HI,
    "two user turns in a row": [*HI, {"role": "user", "content": "Are you there?"}],
    "an assistant of null": [*HI, {"role": "assistant", "content": None}, *HI],
    "an assistant of null and no calls": [*HI, {"role": "assistant", "content": None, "tool_calls": []}, *HI],
    "an assistant without content": [*HI, {"role": "assistant"}, *HI],
    "parts of text": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}],
    "an empty system message": [{"role": "system", "content": ""}, *HI],
    "a long history": [{"role": role, "content": "x"} for role in ("user", "assistant") * 50],
}


@pytest.mark.parametrize("what", HISTORIES)
def test_its_histories_are_answered(what: str) -> None:
    with live() as service:
        for ask in (python, rewritten):
            answer = ask(service, messages=HISTORIES[what])
            assert answer.json()["choices"][0]["message"]["content"] == "Hello!"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tools", [{}, {"tools": []}, {"tools": [TOOL]}])
@pytest.mark.parametrize("text", ["Hello!", ""])
def test_tools_that_may_be_used_and_are_not_leave_a_text(stream: bool, tools: dict[str, Any], text: str) -> None:
    with live(scripted(text)) as service:
        answer = python(service, **tools, tool_choice="auto", stream=stream)
    if stream:
        choices = [choice for chunk in frames(answer)[:-1] for choice in chunk["choices"]]
        assert text_of(frames(answer)) == text
        assert all(choice["delta"].get("content", "") is not None for choice in choices)
        assert choices[-1]["finish_reason"] == "stop"
    else:
        [choice] = answer.json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
        assert not choice["message"].get("tool_calls")


def test_a_name_may_carry_its_provider() -> None:
    with live(name=("qwen3-4b-local",)) as service:
        for model in ("qwen3-4b-local___OpenAI-API", "qwen3-4b-local___OpenAI-API-Compatible", "qwen3-4b-local"):
            for ask in (python, rewritten):
                assert ask(service, model=model).json()["model"] == "qwen3-4b-local"
        error_of(python(service, model="other___OpenAI-API"), 404, "model_not_found")


def test_models_are_listed_with_a_body_and_a_window_below_the_true_one() -> None:
    with live(scripted(context_window=32_768)) as service, service.http() as http:
        for path in ("/models", "/v1/models"):
            [card] = http.request("GET", path, content=b"{}").json()["data"]
            assert card["id"] == "scripted"
            windows = [card.get(name) for name in ("max_tokens", "context_length", "max_model_len")]
            first = next(window for window in windows if window)
            # It fills 95% of the window counted its own way, and adds a guide after that.
            assert 0.95 * first + 1543 + service.service.settings.default_max_tokens < 32_768
            assert card["max_model_len"] == 32_768


def test_models_are_listed_while_they_load_because_it_takes_a_refusal_for_an_empty_list() -> None:
    with live(ready=False, name=("qwen3-4b-local",)) as service:
        assert [card["id"] for card in service.get("/v1/models").json()["data"]] == ["qwen3-4b-local"]


@pytest.mark.parametrize("fields", [{}, {"enable_thinking": False}, {"thinking": {"type": "disabled"}}])
def test_its_verification_hears_a_first_word_and_leaves(fields: dict[str, Any]) -> None:
    with live(scripted(babble, stepped=True)) as service, service.openai(api_key="x") as client:
        service.engine.release()
        with client.chat.completions.create(
            model="scripted", messages=HI, temperature=0.9, stream=True, extra_body=fields
        ) as stream:
            assert next(chunk.choices[0].delta.content for chunk in stream if chunk.choices[0].delta.content) == "x"
        [ended] = service.wait_ended()
        assert ended.outcome is Outcome.CANCELLED
        service.engine.release(1000)
        assert python(service, max_completion_tokens=2).json()["choices"][0]["message"]["content"] == "xx"


# Answers


def test_usage_comes_in_one_trailing_chunk_and_never_with_content() -> None:
    with live(scripted("Hello!")) as service:
        quiet = frames(python(service, stream=True))[:-1]
        *chunks, last, _ = frames(rewritten(service, **GO_STREAM))
    assert not any(chunk.get("usage") for chunk in [*quiet, *chunks])
    assert all(chunk["choices"] for chunk in [*quiet, *chunks])
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len("Hello!") + 1


def test_only_an_answer_that_was_cut_is_called_so() -> None:
    with live(scripted("Hello!")) as service:
        for fields, reason in (({}, "stop"), ({"max_completion_tokens": 3}, "length")):
            assert python(service, **fields).json()["choices"][0]["finish_reason"] == reason
            last = frames(python(service, stream=True, **fields))[-2]
            assert last["choices"][0]["finish_reason"] == reason


def test_a_request_that_fails_is_never_an_empty_stream(pool: ThreadPoolExecutor) -> None:
    with live(scripted(before_step=fails_at(0, RuntimeError("kernel")))) as service:
        error_of(rewritten(service, **GO_STREAM), 500, "engine_error")
    with live(scripted(stepped=True), max_batch_size=1, queue_size=1, request_timeout_s=0.5) as service:
        waiting = [pool.submit(python, service, stream=True)]
        service.wait_running()
        waiting.append(pool.submit(python, service, stream=True))
        service.wait_queued(1)
        error_of(python(service, stream=True), 429, "queue_full")
        for answer in waiting:
            error_of(answer.result(), 504, "deadline_exceeded")
    with live(scripted(context_window=64)) as service:
        error_of(python(service, stream=True, messages=HI * 50), 400, "context_length_exceeded")


# Errors

RETRIED = re.compile(
    "429|500|502|503|504|rate.?limit|too many requests|server|timeout|timed out|unavailable|connection|network",
    re.IGNORECASE,
)
"""What it takes for a passing trouble, anywhere in the text of an error: it then tries again for minutes."""
GIVEN_UP = re.compile("invalid|capacity|quota", re.IGNORECASE)
"""What it takes for a lasting one."""

NUMBERS = st.integers(0, 10**7) | st.sampled_from([429, 500, 502, 503, 504, 4290, 42_900, 50_300, 429_000, 5_000_000])
WORDS = st.lists(
    st.sampled_from(
        ["429", "50", "0", "2", "503", "rate", " ", "_", "limit", "server", "Server", "time", "out", "timeout",
         "invalid", "quota", "capacity", "retry", "too many", "unavailable", "x", "é", ".", "-"]
    ),
    min_size=1,
    max_size=6,
).map("".join)  # fmt: skip


def told_well(error: ApiError) -> None:
    body = error.body().decode()
    told = orjson.loads(body)["error"]
    assert set(told) == {"message", "type", "param", "code"}
    assert told["message"]
    if error.status < 500 and error.status not in (408, 429):
        assert not RETRIED.search(body), body
    else:
        assert not GIVEN_UP.search(body), body
    if error.status in (408, 429, 503):
        assert not GIVEN_UP.search(body), body
    if error.status >= 500:
        assert RETRIED.search(body), "a passing trouble must look like one"


BATCHING: st.SearchStrategy[BatchingError] = st.one_of(
    st.builds(QueueFull, st.floats(1, 10_000)),
    st.builds(TooBusy, st.floats(1, 60)),
    st.builds(NotReady, st.sampled_from([state.value for state in State if state is not State.READY])),
    *(
        st.builds(kind, WORDS)
        for kind in (TooLarge, DeadlineExceeded, Drained, EngineError, OutOfMemory, BatchingError)
    ),
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("engine", "limits", "status", "tries"),
    [
        ({"before_step": fails_at(0, OutOfMemory("full"))}, {}, 500, 1),
        ({"stepped": True}, {"request_timeout_s": 0.2}, 504, 1),
        ({"before_step": fails_at(0, RuntimeError("kernel"))}, {}, 500, 3),
    ],
    ids=["out of memory", "too late", "failed"],
)
def test_its_sdk_sends_again_what_may_go_well_and_not_what_would_end_the_same_way(
    engine: dict[str, Any], limits: dict[str, Any], status: int, tries: int, stream: bool
) -> None:
    with live(scripted(**engine), **limits) as service, service.openai(max_retries=2) as client:
        with pytest.raises(APIStatusError) as refused:
            client.chat.completions.create(model="scripted", messages=HI, stream=stream)
        assert refused.value.status_code == status
        assert len(service.wait_ended(tries)) == tries


@given(BATCHING)
def test_what_goes_wrong_after_the_queue_is_told_well(error: BatchingError) -> None:
    told_well(from_batching(error))


def test_every_error_that_has_no_detail_is_told_well() -> None:
    names = [found.name for found in pkgutil.iter_modules(server.__path__) if found.name != "__main__"]
    modules = [importlib.import_module(f"server.{name}") for name in names]
    makers = {
        value
        for module in modules
        for value in vars(module).values()
        if inspect.isfunction(value) and value.__annotations__.get("return") in (ApiError, "ApiError")
    }
    plain = [maker for maker in makers if not inspect.signature(maker).parameters]
    assert internal in plain
    for maker in plain:
        told_well(maker())


@given(st.sampled_from([state.value for state in State if state is not State.READY]))
def test_a_service_that_is_not_ready_is_told_well(state: str) -> None:
    told_well(not_ready(state))


@given(WORDS, WORDS | st.none(), NUMBERS)
def test_a_refusal_is_told_well_whatever_it_repeats(message: str, param: str | None, number: int) -> None:
    told_well(bad_request(f"{message} {number}", param))
    told_well(ApiError(404, f"{number}{message}", code="model_not_found"))


@given(NUMBERS, NUMBERS)
def test_sizes_are_told_well(limit: int, tokens: int) -> None:
    told_well(server.http.request._too_large(limit))
    told_well(bad_request(f"The prompt has {server.http.errors.thousands(tokens)} tokens.", "messages"))


KINDS = [ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest]
VALUE: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(WORDS, values, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong_with_a_body_is_told_well(kind: type[Any]) -> None:
    names = st.sampled_from(sorted(kind.model_fields)) | WORDS

    @given(st.dictionaries(names, VALUE, max_size=4))
    def law(fields: dict[str, Any]) -> None:
        told = None
        try:
            parse(kind, orjson.dumps({"messages": HI} | fields))
        except ApiError as error:
            told = error
        if told is not None:
            assert told.status == 400
            told_well(told)

    law()


def test_no_refusal_of_a_live_service_looks_like_a_passing_trouble() -> None:
    with (
        live(scripted(context_window=512), name=("server-429",), max_body_mib=0.005) as service,
        service.http() as http,
    ):

        @settings(max_examples=60)
        @given(st.dictionaries(st.sampled_from(sorted(ChatRequest.model_fields)), VALUE, max_size=2), WORDS, NUMBERS)
        def law(fields: dict[str, Any], words: str, number: int) -> None:
            body = {"messages": [{"role": "user", "content": words * (number % 300)}], "max_tokens": 1}
            tries = [
                http.post("/v1/chat/completions", content=orjson.dumps(body | fields)),
                http.post("/v1/chat/completions", content=orjson.dumps(body | {"model": f"{words}-{number}"})),
                http.post("/v1/completions", content=orjson.dumps({"prompt": [number], "model": words})),
                http.post("/detokenize", content=orjson.dumps({"tokens": [number]})),
                http.get(f"/v1/models/{number}"),
                http.get(f"/{number}/server"),
                http.put("/v1/chat/completions"),
            ]
            for answer in tries:
                assert answer.status_code < 500
                assert answer.status_code < 400 or not RETRIED.search(answer.text), answer.text

        law()


def test_words_of_a_template_are_told_well() -> None:
    with live() as service:
        refused = python(service, messages=[{"role": "user", "content": "refuse me"}])
        error_of(refused, 400, None)
        assert not RETRIED.search(refused.text)
