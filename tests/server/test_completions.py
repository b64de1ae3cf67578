"""Laws of `POST /v1/completions`: prompts as they are, each with as many answers as asked for."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import orjson
import pytest
from tokenizers import decoders

from batching.events import Outcome
from batching.types import Request
from server.openai.completions import MAX_PROMPTS
from server.openai.requests import MAX_CHOICES
from tests.fakes import Script
from tests.live import BYTES, END, Live, frames, live, says, scripted, tokens_of
from tests.server.test_app import error_of, remembering
from tests.server.test_choices import telling
from tests.server.test_text import SPACES, with_byte_tokens


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def complete(service: Live, prompt: Any = "Hi", **fields: Any) -> httpx2.Response:
    headers = fields.pop("headers", None)
    return service.post(orjson.dumps({"prompt": prompt} | fields), "/v1/completions", headers=headers)


def echoing(seen: list[Request] | None = None) -> Script:
    """Every answer is "re:" and the text of its own prompt."""

    def script(request: Request, position: int) -> int:
        if seen is not None and request not in seen:
            seen.append(request)
        answer = [*tokens_of("re:"), *request.prompt, END]
        return answer[min(position, len(answer) - 1)]

    return script


# Prompts


def test_a_text_is_continued_as_it_is() -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen, "there"))) as service, service.openai() as client:
        answer = client.completions.create(model="scripted", prompt="Hi", temperature=0.5, seed=3, max_tokens=9)
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", "scripted")
    [choice] = answer.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, "there", "stop", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 6, 8)
    [request] = seen
    assert list(request.prompt) == tokens_of("Hi")  # no template, and nothing around it
    assert (request.sampling.temperature, request.sampling.seed, request.sampling.max_tokens) == (0.5, 3, 9)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("Hi", ["Hi"]),
        (["Hi"], ["Hi"]),
        (["one", "two", "three"], ["one", "two", "three"]),
        (tokens_of("ids"), ["ids"]),
        ([tokens_of("ids")], ["ids"]),
        ([tokens_of("some"), tokens_of("ids")], ["some", "ids"]),
        (["text", tokens_of("ids")], ["text", "ids"]),
        (["same", "same"], ["same", "same"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_text_or_ids_one_or_several(prompt: Any, texts: list[str], stream: bool) -> None:
    with live(scripted(echoing())) as service:
        response = complete(service, prompt, stream=stream)
        assert [len(batch) for batch in service.engine.batches] == [len(texts)]
    assert said(response, stream) == [f"re:{text}" for text in texts]
    if not stream:
        usage = response.json()["usage"]
        assert usage["prompt_tokens"] == sum(map(len, texts))
        assert usage["completion_tokens"] == sum(len(text) + 4 for text in texts)


def said(response: httpx2.Response, stream: bool) -> list[str]:
    """The text of each choice, in order."""
    assert response.status_code == 200, response.text
    if not stream:
        choices = response.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        return [choice["text"] for choice in choices]
    *chunks, done = frames(response)
    assert done == "[DONE]"
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return [found[index] for index in range(len(found))]


def test_choices_stand_in_openai_s_order_and_count_each_prompt_once() -> None:
    seen: list[Request] = []
    with live(scripted(echoing(seen))) as service, service.openai() as client:
        answer = client.completions.create(model="scripted", prompt=["a", "bc"], n=3, seed=5)
    assert [choice.text for choice in answer.choices] == ["re:a"] * 3 + ["re:bc"] * 3
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [request.sampling.seed for request in seen] == [5, 6, 7] * 2
    assert len({request.id for request in seen}) == 6
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.completion_tokens == 3 * (5 + 6)


def test_prompts_times_n_have_a_limit() -> None:
    with live() as service:
        assert len(complete(service, ["x"] * MAX_PROMPTS).json()["choices"]) == MAX_PROMPTS
        assert len(complete(service, ["x"] * (MAX_CHOICES // 2), n=2).json()["choices"]) == MAX_CHOICES
        batches = len(service.engine.batches)
        assert error_of(complete(service, ["x"] * MAX_PROMPTS, n=2), 400, None)["param"] == "n"
        assert error_of(complete(service, ["x"] * (MAX_CHOICES // 2 + 1), n=2), 400, None)["param"] == "n"
        assert error_of(complete(service, ["x"] * (MAX_PROMPTS + 1)), 400, None)["param"] == "prompt"
        error_of(complete(service, "x", n=MAX_CHOICES + 1), 400, None)
        assert len(service.engine.batches) == batches


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [""],
        [[]],
        ["a", ""],
        [[5], []],
        None,
        7,
        {},
        True,
        [True],
        [1, True],
        [1.0],
        [1, "a"],
        ["a", 7],
        ["a", None],
        [[1, [2]]],
        [-1],
        [[3, -1]],
        [257],
        [[5], [6, 257]],
        [2**31],
        [2**63],
        [2**64 - 1],
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused_before_the_queue(prompt: Any) -> None:
    with live() as service:
        error = error_of(complete(service, prompt), 400, None)
        assert error["param"].startswith("prompt")
        assert error["param"].count(".") <= 1, "the types of ours are nobody's business"
        assert not service.engine.batches
        assert said(complete(service, [256]), False) == ["Hello!"]


def test_a_prompt_that_leaves_no_room_is_refused_as_a_prompt() -> None:
    with live(scripted(context_window=512)) as service:
        for prompt in ("x" * 512, ["fits", "x" * 600], [5] * 1000):
            error = error_of(complete(service, prompt), 400, "context_length_exceeded")
            assert error["param"] == "prompt"
        assert not service.engine.batches


def test_what_a_completion_has_no_meaning_for_is_refused_by_name() -> None:
    with live() as service, service.openai() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="scripted", prompt="def f(", suffix="return 1")
        assert caught.value.param == "suffix"
        assert "best_of" in error_of(complete(service, best_of=2), 400, None)["message"]
        for field, value in {"messages": [{}], "tools": [{}], "max_completion_tokens": 3}.items():
            assert error_of(complete(service, **{field: value}), 400, "unsupported_field")["param"] == field
        assert said(complete(service, suffix="", best_of=1, tools=[], logprobs=None, echo=None), False) == ["Hello!"]


# Answers


def test_a_streamed_completion_is_the_plain_one_in_chunks() -> None:
    with live(scripted("Hello!", stepped=True)) as service, service.openai() as client:
        service.engine.release()
        options: Any = {"include_usage": True}
        with client.completions.create(model="scripted", prompt="Hi", stream=True, stream_options=options) as stream:
            chunks = []
            for chunk in stream:
                chunks.append(chunk)
                service.engine.release()
    *chunks, last = chunks
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in [*chunks, last]}) == 1
    assert last.object == "text_completion"
    assert [chunk.choices[0].text for chunk in chunks] == [*"Hello!", ""]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 6 + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (2, 7)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_its_prompt_if_that_was_asked_for(stream: bool) -> None:
    with live(scripted(echoing())) as service:
        response = complete(service, ["one ", tokens_of("é ")], echo=True, n=2, stream=stream)
    assert said(response, stream) == ["one re:one "] * 2 + ["é re:é "] * 2


@pytest.mark.parametrize(("fields", "text"), [({}, "one "), ({"include_stop_str_in_output": True}, "one END")])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_it_and_one_in_the_prompt_does_not(fields: dict[str, Any], text: str, stream: bool) -> None:
    with live(scripted("one END two")) as service:
        response = complete(service, "END:", stop="END", echo=True, stream=stream, **fields)
    assert said(response, stream) == ["END:" + text]


def test_a_client_that_leaves_cancels_every_row_of_its_prompts() -> None:
    with live(scripted(stepped=True)) as service:
        body = orjson.dumps({"prompt": ["a", "b"], "n": 2})
        with service.connect() as bare:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            bare.sendall(head.encode() + body)
            service.wait_running(4)
        assert [event.outcome for event in service.wait_ended(4)] == [Outcome.CANCELLED] * 4


def test_prompts_are_accepted_all_or_none(pool: ThreadPoolExecutor) -> None:
    with live(scripted(stepped=True), queue_size=3, max_batch_size=1) as service:
        running = pool.submit(complete, service)
        service.wait_running()
        waiting = pool.submit(complete, service)
        service.wait_queued(1)
        error_of(complete(service, ["a", "b", "c"]), 429, "queue_full")
        error_of(complete(service, ["a", "b"], n=2), 400, "too_large")
        assert service.sample("microbatch_queue_depth") == 1
        fits = pool.submit(complete, service, ["a", "b"])
        service.wait_queued(3)
        service.engine.release(1000)
        assert [answer.result().status_code for answer in (running, waiting, fits)] == [200] * 3


# Log probabilities


def logprobs_of(response: httpx2.Response, stream: bool) -> dict[str, list[Any]]:
    """What is told of the first choice's tokens, the chunks of a stream put together."""
    if not stream:
        return dict(response.json()["choices"][0]["logprobs"])
    told = [choice["logprobs"] for chunk in frames(response)[:-1] for choice in chunk["choices"]]
    found = [each for each in told if each is not None]
    return {name: [entry for each in found for entry in each[name]] for name in found[0]}


@pytest.mark.parametrize("stream", [False, True])
def test_each_token_is_told_with_where_its_text_starts(stream: bool) -> None:
    with live(telling("Hi you")) as service:
        told = logprobs_of(complete(service, logprobs=2, stream=stream), stream)
    tokens = [*tokens_of("Hi you"), END]
    assert set(told) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert told["tokens"] == [*"Hi you", "<|end|>"]
    assert told["token_logprobs"] == [-token / 8 for token in tokens]
    assert told["text_offset"] == [0, 1, 2, 3, 4, 5, 6]
    assert told["top_logprobs"][0] == {"H": -tokens[0] / 8, "I": -tokens[0] / 8 - 1}
    *among_likeliest, end = told["top_logprobs"]
    assert all(len(top) == 2 for top in among_likeliest)
    assert len(end) == 3
    for top, token, value in zip(told["top_logprobs"], told["tokens"], told["token_logprobs"], strict=True):
        assert top[token] == value, "a token has its place there though others are likelier"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["Hi", "é!", "a😀b中", "éé"])
@pytest.mark.parametrize("echo", [False, True])
def test_an_offset_is_where_the_token_s_text_stands_in_the_answer(text: str, echo: bool, stream: bool) -> None:
    with live(telling(text)) as service:
        response = complete(service, "é: ", logprobs=0, echo=echo, stream=stream)
        [whole] = said(response, stream)
        told = logprobs_of(response, stream)
    assert len(told["tokens"]) == len(whole.encode()) + 1
    starts = [place for place, char in enumerate(whole) for _ in char.encode()]
    assert told["text_offset"] == [*starts, len(whole)]
    for word, start in zip(told["tokens"], told["text_offset"], strict=True):
        assert word.startswith(("bytes:", "<|end|>")) or whole[start : start + 1] == word


@pytest.mark.parametrize("stream", [False, True])
def test_text_that_is_held_back_for_a_stop_string_does_not_move_an_offset(stream: bool) -> None:
    with live(telling("a EN b END")) as service:
        told = logprobs_of(complete(service, logprobs=1, stop="END", stream=stream), stream)
    assert told["text_offset"][:9] == list(range(9))


def test_parts_of_characters_are_told_apart() -> None:
    with live(telling("é")) as service:
        told = logprobs_of(complete(service, logprobs=5), False)
    assert told["tokens"][:2] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert all(len(top) == 5 for top in told["top_logprobs"][:2])


def test_openai_s_client_reads_log_probabilities() -> None:
    with live(telling("Hi")) as service, service.openai() as client:
        [choice] = client.completions.create(model="scripted", prompt="x", logprobs=1).choices
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["H", "i", "<|end|>"]
    assert choice.logprobs.text_offset == [0, 1, 2]


def test_log_probabilities_have_a_bound_and_are_not_told_unasked() -> None:
    with live(telling("Hi")) as service:
        for wrong in (21, -1, True, "1", 10**6):
            assert error_of(complete(service, logprobs=wrong), 400, None)["param"] == "logprobs"
        assert complete(service).json()["choices"][0]["logprobs"] is None
        assert complete(service, logprobs=0).json()["choices"][0]["logprobs"]["top_logprobs"] == [
            {word: -token / 8} for word, token in zip(["H", "i", "<|end|>"], [*tokens_of("Hi"), END], strict=True)
        ]


def test_rows_of_completions_and_chats_share_a_batch(pool: ThreadPoolExecutor) -> None:
    script = says("chat", **{"mine": "text"})
    with live(scripted(script), max_batch_size=2, batch_window_ms=10_000.0) as service:
        chat = pool.submit(service.chat)
        text = pool.submit(complete, service, headers={"x-request-id": "mine"})
        assert chat.result().json()["choices"][0]["message"]["content"] == "chat"
        assert said(text.result(), False) == ["text"]
        assert [len(batch) for batch in service.engine.batches] == [2]


def test_ids_of_special_tokens_are_a_prompt_like_any_other() -> None:
    assert BYTES.convert_ids_to_tokens(END) == "<|end|>"
    with live(scripted("ok")) as service:
        response = complete(service, [END, *tokens_of("x")], echo=True)
    assert said(response, False) == ["<|end|>xok"]


@pytest.mark.parametrize("prompt", ["the a", [0, 0, 0]], ids=["text", "ids"])
@pytest.mark.parametrize("echo", [False, True])
def test_the_space_between_prompt_and_answer_is_the_answer_s(prompt: str | list[int], echo: bool) -> None:
    tokenizer = with_byte_tokens(decoders.Sequence(SPACES["stripped"]))
    [word] = tokenizer.backend_tokenizer.encode("the").ids
    ids = [word] * 3 if isinstance(prompt, list) else prompt
    with live(telling(lambda request, position: word), tokenizer=tokenizer) as service:
        fields = {"prompt": ids, "max_tokens": 2, "logprobs": 0, "echo": echo}
        [found] = service.post(orjson.dumps(fields), "/v1/completions").json()["choices"]
    before = "" if not echo else prompt if isinstance(prompt, str) else "the the the"
    assert found["text"] == before + " the the"
    assert found["logprobs"]["text_offset"][-2:] == [len(before), len(before) + 4]
