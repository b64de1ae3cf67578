"""Laws of what a chat request may ask of its rows: several choices, log probabilities, where answers end, priority."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import orjson
import pytest

from batching.engine import NO_LOGPROBS, Steps
from batching.events import Outcome
from batching.stream import Row
from batching.types import PromptLogprob, Request, TokenLogprob
from server.openai.requests import MAX_CHOICES
from tests.fakes import Script, ScriptedEngine
from tests.live import (
    END,
    QUESTION,
    Live,
    eventually,
    frames,
    live,
    raw_request,
    says,
    scripted,
    tokens_of,
)
from tests.server.test_app import babble, error_in, error_of, fails_at, remembering

HI = len(tokens_of("<user>Hi<|end|><assistant>"))
THREE: Any = {"model": "scripted", "messages": QUESTION, "n": 3}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def in_chapters(*texts: str, seen: list[Request] | None = None) -> Script:
    """Choice i of a request says text i; `seen` keeps the requests."""
    scripts = [says(text) for text in texts]

    def script(request: Request, position: int) -> int:
        if seen is not None and request not in seen:
            seen.append(request)
        _, _, choice = request.id.partition(".")
        return scripts[int(choice or 0)](request, position)

    return script


class TellingSteps:
    """`Steps` that adds log probabilities for the rows that ask."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def emit(
        self, rows: Sequence[Row], tokens: Sequence[int], logprobs: Mapping[int, TokenLogprob] = NO_LOGPROBS
    ) -> list[bool]:
        asked = [row.request.sampling.top_logprobs for row in rows]
        told = {
            place: TokenLogprob(token, -token / 8, likeliest(token)[:top])
            for place, (token, top) in enumerate(zip(tokens, asked, strict=True))
            if top is not None
        }
        return self._steps.emit(rows, tokens, told)

    def emit_prompt(self, row: Row, start: int, logprobs: Sequence[PromptLogprob | None]) -> bool:
        return self._steps.emit_prompt(row, start, logprobs)

    def admit(self) -> list[Row]:
        return self._steps.admit()


class TellingEngine(ScriptedEngine):
    """A scripted engine whose log probability of a token is minus an eighth of its id."""

    def run(self, rows: Sequence[Row], steps: Steps) -> None:
        super().run(rows, TellingSteps(steps))


def likeliest(token: int) -> tuple[tuple[int, float], ...]:
    """The token itself and those after it, the last of them impossible."""
    others = [(token + n) % END for n in range(20)]
    possible = [(other, -token / 8 - n) for n, other in enumerate(others[:-1])]
    return (*possible, (others[-1], -float("inf")))


def telling(script: Script | str, **options: Any) -> TellingEngine:
    made = scripted(script)
    return TellingEngine(says(script) if isinstance(script, str) else script, info=made.info, **options)


# Several choices


def test_several_choices_are_rows_of_one_batch_and_count_their_prompt_once() -> None:
    with live(scripted(in_chapters("one", "second", "3"))) as service, service.openai() as client:
        answer = client.chat.completions.create(**THREE)
        assert [len(batch) for batch in service.engine.batches] == [3]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == ["one", "second", "3"]
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == HI
    assert answer.usage.completion_tokens == len("one") + len("second") + len("3") + 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_choices_come_mixed_and_each_in_order() -> None:
    texts = ["one", "second", "3"]
    with live(scripted(in_chapters(*texts), stepped=True)) as service, service.openai() as client:
        service.engine.release()
        options: Any = {"include_usage": True}
        with client.chat.completions.create(**THREE, stream=True, stream_options=options) as stream:
            chunks = []
            for chunk in stream:
                chunks.append(chunk)
                service.engine.release()
    *chunks, last = chunks
    assert len({(chunk.id, chunk.created) for chunk in [*chunks, last]}) == 1
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (HI, len("one") + len("second") + len("3") + 3)
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)
    for index, text in enumerate(texts):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == text
        assert [choice.delta.role for choice in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
    order = [chunk.choices[0].index for chunk in chunks]
    assert order != sorted(order)  # a choice does not wait for the one before it


@pytest.mark.parametrize("stream", [False, True])
def test_choice_i_has_the_seed_plus_i_and_the_request_s_other_settings(stream: bool) -> None:
    seen: list[Request] = []
    with live(scripted(in_chapters("a", "b", "c", seen=seen))) as service:
        assert service.chat(n=3, seed=7, temperature=0.5, stream=stream).status_code == 200
        assert service.chat(n=2, seed=2**63 - 1, stream=stream).status_code == 200
    first, second = seen[:3], seen[3:]
    assert [request.sampling.seed for request in first] == [7, 8, 9]
    assert len({request.id for request in first}) == 3
    assert len({(request.prompt, request.sampling.temperature) for request in first}) == 1
    assert [request.sampling.seed for request in second] == [2**63 - 1, -(2**63)]  # the next one in 64 bits


def test_choices_without_a_seed_differ_in_it() -> None:
    seen: list[Request] = []
    with live(scripted(in_chapters("a", "b", "c", seen=seen))) as service:
        service.chat(n=3)
    assert len({request.sampling.seed for request in seen}) == 3


def test_there_are_as_many_choices_as_allowed_and_no_more() -> None:
    with live() as service:
        assert len(service.chat(n=MAX_CHOICES).json()["choices"]) == MAX_CHOICES
        error_of(service.chat(n=MAX_CHOICES + 1), 400, None)


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_accepted_all_or_none(stream: bool, pool: ThreadPoolExecutor) -> None:
    with live(scripted(stepped=True), queue_size=3, max_batch_size=1) as service:
        running = pool.submit(service.chat)
        service.wait_running()
        waiting = pool.submit(service.chat)
        service.wait_queued(1)
        error_of(service.chat(n=3, stream=stream), 429, "queue_full")
        assert service.sample("microbatch_queue_depth") == 1
        fits = pool.submit(service.chat, n=2, stream=stream)
        service.wait_queued(3)
        service.engine.release(100)
        assert [answer.result().status_code for answer in (running, waiting, fits)] == [200] * 3
        assert len(service.wait_ended(4)) == 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("queued", [False, True])
def test_a_client_that_leaves_cancels_all_of_its_choices(stream: bool, queued: bool, pool: ThreadPoolExecutor) -> None:
    with live(scripted(babble, stepped=True), max_batch_size=3) as service:
        mate = pool.submit(service.chat, max_tokens=5) if queued else None
        if queued:
            service.wait_running()
        with service.connect() as bare:
            body = {"messages": QUESTION, "n": 3, "stream": stream, "max_tokens": 1000}
            bare.sendall(raw_request(orjson.dumps(body)))
            if queued:
                service.wait_queued(3)
            else:
                service.wait_running(3)
                service.engine.release()
                eventually(lambda: service.sample("microbatch_output_tokens_total") == 3, "the first tokens are out")
                if stream:
                    assert b"data: " in bare.recv(65536)
        ended = service.wait_ended(3)
        assert [(event.outcome, event.finish) for event in ended] == [(Outcome.CANCELLED, "cancelled")] * 3
        service.engine.release(5)
        if mate is not None:
            assert mate.result().json()["choices"][0]["message"]["content"] == "xxxxx"
        eventually(lambda: service.sample("microbatch_batch_duration_seconds_count") == 1, "the batch ended")
        assert service.sample("microbatch_queue_depth") == service.sample("microbatch_running_rows") == 0


def test_what_a_step_says_of_all_choices_is_one_write() -> None:
    with live(scripted("ab", stepped=True)) as service, service.connect() as bare:
        body = {"messages": QUESTION, "n": 3, "stream": True, "stream_options": {"include_usage": True}}
        bare.sendall(raw_request(orjson.dumps(body)))
        reader = bare.makefile("rb")
        service.engine.release()
        while reader.readline() != b"\r\n":
            pass
        writes = []
        for _ in range(4):
            writes.append(reader.read(int(reader.readline(), 16)))
            assert reader.readline() == b"\r\n"
            service.engine.release()
    events = [write.count(b"data: ") for write in writes]
    assert events == [6, 3, 3, 2]  # the role and "a" of each, "b" of each, why each is over, counts and the end
    assert writes[0].count(b'"content":"a"') == 3
    assert writes[2].count(b'"finish_reason":"stop"') == 3
    assert writes[3].endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_choices_that_fail_together_are_one_error(
    stream: bool, caplog: pytest.LogCaptureFixture, pool: ThreadPoolExecutor
) -> None:
    with live(scripted(stepped=True), drain_timeout_s=0.0) as service:
        answer = pool.submit(service.chat, n=3, stream=stream)
        service.wait_running(3)
        service.drain()
        error_of(answer.result(), 503, "stopping")
        assert [event.outcome for event in service.wait_ended(3)] == [Outcome.DRAINED] * 3
    del service
    gc.collect()  # an exception that nobody looked at is told when its task is forgotten
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


def test_choices_that_fail_later_end_their_stream_with_one_error_frame() -> None:
    with live(scripted("Hello!", before_step=fails_at(2, RuntimeError("kernel")))) as service:
        *chunks, last = frames(service.chat(n=3, stream=True))
        error_in(last, 500, "engine_error")
        assert all("error" not in chunk for chunk in chunks)
        assert [event.outcome for event in service.wait_ended(3)] == [Outcome.ERROR] * 3


# Log probabilities


def expected_token(token: int, logprob: float, text: str | None = None) -> dict[str, Any]:
    byte = bytes([byte_of(token)])
    return {"token": text or byte.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(byte)}


def byte_of(token: int) -> int:
    """The byte that a token of the tests' vocabulary stands for."""
    return BYTE_OF[token]


BYTE_OF = {token: byte for byte in range(128) for token in tokens_of(chr(byte))} | {
    tokens_of(char)[0]: char.encode()[0] for char in ("é", "中", "😀")
}
BYTE_OF |= {
    token: byte for char in ("é", "中", "😀") for token, byte in zip(tokens_of(char), char.encode(), strict=True)
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["Hello!", "é😀中"])
def test_each_token_is_told_with_its_bytes_and_its_log_probability(text: str, stream: bool) -> None:
    with live(telling(text)) as service:
        response = service.chat(logprobs=True, stream=stream)
    told = logprobs_in(response, stream)
    *visible, end = told
    assert [entry["bytes"] for entry in visible] == [[byte] for byte in text.encode()]
    assert b"".join(bytes(entry["bytes"]) for entry in visible).decode() == text
    assert [entry["logprob"] for entry in visible] == [-token / 8 for token in tokens_of(text)]
    assert [entry["token"] for entry in visible] == [bytes([b]).decode(errors="replace") for b in text.encode()]
    assert end["token"] == "<|end|>"
    assert end["bytes"] == list(b"<|end|>")
    assert all(entry["top_logprobs"] == [] for entry in told)


def logprobs_in(response: Any, stream: bool) -> list[dict[str, Any]]:
    """Every token's entry, in order, of a plain or streamed answer with one choice."""
    if not stream:
        found = response.json()["choices"][0]["logprobs"]
        assert set(found) == {"content", "refusal"}
        return list(found["content"])
    choices = [choice for chunk in frames(response)[:-1] for choice in chunk["choices"]]
    return [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]


@pytest.mark.parametrize("stream", [False, True])
def test_the_likeliest_tokens_are_told_in_their_order(stream: bool) -> None:
    with live(telling("Hi")) as service:
        told = logprobs_in(service.chat(logprobs=True, top_logprobs=3, stream=stream), stream)
        widest = logprobs_in(service.chat(logprobs=True, top_logprobs=20, stream=stream), stream)
    for entry, token in zip(told, tokens_of("Hi"), strict=False):
        own = {name: entry[name] for name in ("token", "logprob", "bytes")}
        assert own == expected_token(token, -token / 8)
        assert entry["top_logprobs"] == [expected_token(token + n, -token / 8 - n) for n in range(3)]
    assert widest[0]["top_logprobs"][-1]["logprob"] == -9999.0  # JSON has no minus infinity


def test_the_openai_client_reads_log_probabilities_of_each_choice() -> None:
    with live(telling(in_chapters("one", "é", "3"))) as service, service.openai() as client:
        plain = client.chat.completions.create(**THREE, logprobs=True, top_logprobs=1)
        with client.chat.completions.create(**THREE, logprobs=True, top_logprobs=1, stream=True) as stream:
            chunks = [choice for chunk in stream for choice in chunk.choices]
    for choice in plain.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert choice.logprobs.refusal is None
        mine = [each.logprobs for each in chunks if each.index == choice.index and each.logprobs]
        streamed = [entry for logprobs in mine for entry in logprobs.content or []]
        assert [entry.model_dump() for entry in streamed] == [entry.model_dump() for entry in choice.logprobs.content]
        assert all(len(entry.top_logprobs) == 1 for entry in choice.logprobs.content)
        data = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content[:-1])
        assert data.decode() == choice.message.content


def test_who_does_not_ask_is_told_nothing(pool: ThreadPoolExecutor) -> None:
    with live(telling("Hello!"), max_batch_size=3, batch_window_ms=10_000.0) as service:
        asked, quiet, streamed = (
            pool.submit(service.chat, **fields)
            for fields in ({"logprobs": True}, {"logprobs": False}, {"stream": True})
        )
        assert asked.result().json()["choices"][0]["logprobs"]["content"]
        assert quiet.result().json()["choices"][0]["logprobs"] is None
        assert all(chunk["choices"][0]["logprobs"] is None for chunk in frames(streamed.result())[:-1])


def test_a_whole_answer_s_log_probabilities_are_those_of_its_stream() -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "n": 2, "max_tokens": 5}
    with live(telling("Hello!")) as service:
        plain = service.chat(**fields).json()["choices"]
        chunks = [one for chunk in frames(service.chat(stream=True, **fields))[:-1] for one in chunk["choices"]]
    for choice in plain:
        told = [one["logprobs"] for one in chunks if one["index"] == choice["index"] and one["logprobs"]]
        content = [entry for one in told for entry in one["content"]]
        assert choice["logprobs"] == {"content": content, "refusal": None}
        assert len(choice["logprobs"]["content"]) == 5


def test_more_log_probabilities_than_an_answer_may_hold_are_refused() -> None:
    with live(scripted(context_window=8192)) as service:
        fields = {"logprobs": True, "top_logprobs": 20, "max_tokens": 4096}
        assert error_of(service.chat(n=4, **fields), 400, None)["param"] == "logprobs"
        assert service.chat(n=3, **fields).status_code == 200
        assert service.chat(n=16, max_tokens=4096).status_code == 200


def test_log_probabilities_need_their_switch_and_have_a_bound() -> None:
    with live(telling("Hi")) as service:
        for fields in ({"top_logprobs": 2}, {"top_logprobs": 2, "logprobs": False}):
            assert "top_logprobs" in error_of(service.chat(**fields), 400, None)["message"]
        error_of(service.chat(logprobs=True, top_logprobs=21), 400, None)


@pytest.mark.parametrize("text", ["one END two", "é END two"])
def test_a_stream_with_stop_strings_tells_of_the_same_tokens_as_a_plain_answer(text: str) -> None:
    with live(telling(text, stepped=True)) as service:
        service.engine.release(1000)
        plain = logprobs_in(service.chat(logprobs=True, stop="END"), False)
        streamed = logprobs_in(service.chat(logprobs=True, stop="END", stream=True), True)
    shorter, longer = sorted([plain, streamed], key=len)
    assert longer[: len(shorter)] == shorter  # a step or two may be on their way when the string is found
    assert len(shorter) >= len(tokens_of(text.partition(" two")[0]))


# Where an answer ends


@pytest.mark.parametrize(("included", "text"), [(True, "one END"), (False, "one "), (None, "one ")])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_shows_if_that_was_asked_for(included: bool | None, text: str, stream: bool) -> None:
    with live(scripted("one END two")) as service:
        response = service.chat(stop=["END"], include_stop_str_in_output=included, stream=stream)
    assert said(response, stream) == (text, "stop")


def said(response: Any, stream: bool) -> tuple[str, str]:
    """Text and finish reason of an answer with one choice."""
    if not stream:
        choice = response.json()["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]
    choices = [choice for chunk in frames(response)[:-1] for choice in chunk["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices), choices[-1]["finish_reason"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_token_of_the_request_s_own_ends_its_answer_alone(stream: bool, pool: ThreadPoolExecutor) -> None:
    stop = tokens_of("!")
    with live(scripted("one!two"), max_batch_size=2, batch_window_ms=10_000.0) as service:
        mate = pool.submit(service.chat, stream=stream)
        stopped = pool.submit(service.chat, stream=stream, stop_token_ids=stop)
        assert said(mate.result(), stream) == ("one!two", "stop")
        assert said(stopped.result(), stream) == ("one", "stop")


def test_a_request_s_stop_tokens_join_the_model_s_unless_those_are_ignored() -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen))) as service:
        for fields in ({"stop_token_ids": [5]}, {"stop_token_ids": [5], "ignore_eos": True}, {"ignore_eos": True}):
            assert service.chat(max_tokens=9, **fields).status_code == 200
    assert [request.sampling.stop_token_ids for request in seen] == [{END, 5}, {5}, frozenset()]


def test_a_least_length_reaches_the_row_and_is_at_most_its_greatest() -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen))) as service:
        for fields in ({"min_tokens": 3}, {"min_tokens": 10**9, "max_tokens": 7}, {"min_tokens": 0}, {}):
            assert service.chat(**fields).status_code == 200
    assert [request.sampling.min_tokens for request in seen] == [3, 7, 0, 0]


@pytest.mark.parametrize("stream", [False, True])
def test_ends_that_are_ignored_do_not_show_and_do_not_end(stream: bool) -> None:
    with live(scripted("Hi")) as service:
        response = service.chat(ignore_eos=True, max_tokens=9, stream=stream)
    assert said(response, stream) == ("Hi", "length")


# Biases


def test_a_bias_reaches_the_row() -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen))) as service, service.openai() as client:
        client.chat.completions.create(model="scripted", messages=QUESTION, logit_bias={"5": 7})
        client.chat.completions.create(model="scripted", messages=QUESTION, logit_bias={"256": -100, "0": 1})
    assert [dict(request.sampling.logit_bias) for request in seen] == [{5: 7.0}, {256: -100.0, 0: 1.0}]


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {"257": 1}},
        {"logit_bias": {"5": 1, "999999999": 1}},
        {"stop_token_ids": [257]},
        {"stop_token_ids": [5, 2**31 - 1]},
    ],
)
def test_an_id_beyond_the_vocabulary_is_refused_before_the_queue(fields: dict[str, Any]) -> None:
    with live() as service:
        error = error_of(service.chat(**fields), 400, None)
        assert error["param"] == next(iter(fields))
        assert "vocabulary" in error["message"]
        assert not service.engine.batches
        assert service.chat(logit_bias={"256": 1}, stop_token_ids=[256]).status_code == 200


def test_an_id_beyond_the_vocabulary_is_a_bad_request_to_the_openai_client() -> None:
    with live() as service, service.openai() as client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="scripted", messages=QUESTION, logit_bias={"100000": 1})
    assert caught.value.param == "logit_bias"


# Priority


def submit_in_order(service: Live, pool: ThreadPoolExecutor, *requests: dict[str, Any]) -> list[Any]:
    """Requests that wait behind one that runs, each there before the next one comes."""
    answers = [pool.submit(service.chat, headers={"x-request-id": "first"})]
    service.wait_running()
    for place, fields in enumerate(requests, 1):
        answers.append(pool.submit(service.chat, **fields))
        service.wait_queued(place)
    return answers


def test_a_request_of_higher_priority_is_served_before_those_that_came_earlier(pool: ThreadPoolExecutor) -> None:
    def named(name: str, priority: int | None) -> dict[str, Any]:
        return {"headers": {"x-request-id": name}, "priority": priority}

    with live(scripted(stepped=True), max_batch_size=1) as service:
        waiting = [named("low", 4), named("usual", None), named("high", -4)]
        answers = submit_in_order(service, pool, *waiting)
        service.engine.release(1000)
        assert [answer.result().status_code for answer in answers] == [200] * 4
        assert service.engine.batches == [["first"], ["high"], ["usual"], ["low"]]


def test_requests_of_one_priority_are_served_as_they_came(pool: ThreadPoolExecutor) -> None:
    with live(scripted(stepped=True), max_batch_size=1) as service:
        names = [f"id{n}" for n in range(4)]
        answers = submit_in_order(
            service, pool, *({"headers": {"x-request-id": name}, "priority": -3} for name in names)
        )
        service.engine.release(1000)
        assert [answer.result().status_code for answer in answers] == [200] * 5
        assert service.engine.batches == [["first"], *([name] for name in names)]


def test_no_stream_of_urgent_requests_starves_a_patient_one(pool: ThreadPoolExecutor) -> None:
    with live(scripted("ok", stepped=True), max_batch_size=1) as service:
        urgent: list[dict[str, Any]] = [{"priority": -1, "headers": {"x-request-id": f"u{n}"}} for n in range(6)]
        patient = {"priority": 1, "headers": {"x-request-id": "patient"}}
        answers = submit_in_order(service, pool, *urgent[:1], patient, *urgent[1:])
        service.engine.release(1000)
        assert [answer.result().status_code for answer in answers] == [200] * 8
        order = [batch[0] for batch in service.engine.batches]
    assert order.index("patient") < len(order) - 1
