"""Responses that are kept, continued, shown and deleted; their log probabilities; and prompts that are counted."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from batching.types import Request
from server.openai.responses import MAX_LOGPROBS
from server.openai.responses_replies import Deleted, Response, ResponseEvent
from server.response_store import OVERHEAD, ResponseStore, StoredResponse
from tests.live import BYTES, END, QUESTION, Live, byte_tokenizer, eventually, live, scripted, tokens_of
from tests.server.test_app import error_of, remembering
from tests.server.test_choices import telling
from tests.server.test_openapi import assert_described, events
from tests.server.test_prefill import CALL, TAGS, TEMPLATES

KEPT: dict[str, Any] = {"stored_responses_mib": 1.0}
SEARCH = {"type": "function", "name": "f", "parameters": {"type": "object"}}


def respond(service: Live, key: str | None = None, path: str = "/v1/responses", **fields: Any) -> httpx2.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return service.post(orjson.dumps({"input": "Hi"} | fields), path, headers=headers)


# The store


def stored(size: int) -> StoredResponse:
    return StoredResponse(b"x" * size, b"")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from("abc"), st.integers(0, 5), st.integers(0, 3 * OVERHEAD), st.sampled_from([0, 0, 0, 1, 4])
    ),
    max_size=40,
)


@given(OPERATIONS)
def test_a_store_never_holds_more_or_older_than_allowed_and_each_client_s_alone(operations: list[Any]) -> None:
    async def law() -> None:
        clock = Clock()
        store = ResponseStore(8 * OVERHEAD, seconds=5, now=clock)
        added: dict[tuple[str, str], tuple[float, StoredResponse]] = {}
        for client, name, size, passed in operations:
            clock.now += passed
            one = stored(size)
            store.add(client, f"{client}{name}", one)
            added[client, f"{client}{name}"] = clock.now, one
            assert store.size <= store.most
            assert store.get(client, f"{client}{name}") is one, "the newest is there"
            for (owner, known), (since, kept) in added.items():
                found = store.get(owner, known)
                assert found in (None, kept)
                assert found is None or clock.now < since + 5
                assert all(store.get(other, known) is None for other in "abc" if other != owner)

    asyncio.run(law())


def test_a_client_s_flood_pushes_out_its_own_responses_and_not_another_s() -> None:
    async def main() -> None:
        store = ResponseStore(10 * OVERHEAD, seconds=60)
        for n in range(3):
            store.add("quiet", f"q{n}", stored(0))
        for n in range(100):
            store.add("loud", f"l{n}", stored(0))
        assert [name for n in range(3) if store.get("quiet", name := f"q{n}")] == ["q0", "q1", "q2"]
        assert [n for n in range(100) if store.get("loud", f"l{n}")] == list(range(93, 100))
        store.add("huge", "h", stored(10 * OVERHEAD))
        assert store.get("huge", "h") is None
        assert store.size == 10 * OVERHEAD

    asyncio.run(main())


# Conversations that go on


def test_a_response_continues_the_one_it_names_as_if_the_whole_conversation_was_sent() -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen, "Hello!")), **KEPT) as service, service.openai() as client:
        first = client.responses.create(model="scripted", input="one", instructions="Only once.")
        second = client.responses.create(model="scripted", input="two", previous_response_id=first.id)
        third = client.responses.create(model="scripted", input="three", previous_response_id=second.id)
        whole: Any = []
        for said in ("one", "two", "three"):
            whole += [{"role": "user", "content": said}, {"role": "assistant", "content": "Hello!"}]
        client.responses.create(model="scripted", input=whole[:-1])
        branch = client.responses.create(model="scripted", input="two", previous_response_id=first.id)
    assert (first.previous_response_id, second.previous_response_id) == (None, first.id)
    assert third.output_text == branch.output_text == "Hello!"
    assert seen[3].prompt == seen[2].prompt
    assert seen[4].prompt == seen[1].prompt


@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_thoughts_are_part_of_what_is_continued(stream: bool) -> None:
    seen: list[Request] = []
    answer = '<think>Hm.</think><tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    tokenizer = byte_tokenizer(TEMPLATES["shows thoughts"], TAGS)
    with live(telling(remembering(seen, answer)), tokenizer=tokenizer, **KEPT) as service:
        asked: dict[str, Any] = {"input": "one", "tools": [SEARCH], "include": ["message.output_text.logprobs"]}
        first = respond(service, stream=stream, **asked)
        response = events(first.text)[-1]["response"] if stream else first.json()
        assert [item["type"] for item in response["output"]] == ["reasoning", "function_call"]
        result = {"type": "function_call_output", "call_id": response["output"][1]["call_id"], "output": "7"}
        respond(service, input=[result], tools=[SEARCH], previous_response_id=response["id"])
        items = [{"role": "user", "content": "one"}, *response["output"], result]
        respond(service, input=items, tools=[SEARCH])
    assert seen[1].prompt == seen[2].prompt


@pytest.mark.parametrize("stream", [False, True])
def test_a_reference_means_the_item_of_a_stored_response(stream: bool) -> None:
    """The AI SDK's provider for OpenAI sends references to what was answered, beside calls as they were."""
    seen: list[Request] = []
    answer = '<think>Hm.</think>So:<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    tokenizer = byte_tokenizer(TEMPLATES["shows thoughts"], TAGS)
    with live(telling(remembering(seen, answer)), tokenizer=tokenizer, **KEPT) as service:
        asked = {"role": "user", "content": "one"}
        first = respond(service, input=[asked], tools=[SEARCH], stream=stream)
        output = (events(first.text)[-1]["response"] if stream else first.json())["output"]
        result = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "7"}
        thought, said, _ = ({"type": "item_reference", "id": item["id"]} for item in output)
        referring = respond(service, input=[asked, thought, said, output[2], result], tools=[SEARCH]).json()
        respond(service, input=[asked, *output, result], tools=[SEARCH])
        assert seen[1].prompt == seen[2].prompt
        respond(service, input="two", tools=[SEARCH], previous_response_id=referring["id"])
        whole = [asked, *output, result, *referring["output"], {"role": "user", "content": "two"}]
        respond(service, input=whole, tools=[SEARCH])
        assert seen[3].prompt == seen[4].prompt


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reasoning", [{}, {"summary": "auto"}])
def test_a_thought_can_come_back_as_its_encrypted_content_alone(stream: bool, reasoning: dict[str, str]) -> None:
    """The AI SDK's provider for OpenAI sends back no other where nothing is stored."""
    seen: list[Request] = []
    answer = '<think>Hm.</think><tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    tokenizer = byte_tokenizer(TEMPLATES["shows thoughts"], TAGS)
    with live(telling(remembering(seen, answer)), tokenizer=tokenizer) as service:
        asked: dict[str, Any] = {"tools": [SEARCH], "reasoning": reasoning}
        assert "encrypted_content" not in respond(service, **asked).json()["output"][0]
        asked["include"] = ["reasoning.encrypted_content"]
        first = respond(service, stream=stream, **asked)
        thought, call = (events(first.text)[-1]["response"] if stream else first.json())["output"]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "7"}
        sealed = {"type": "reasoning", "summary": [], "encrypted_content": thought["encrypted_content"]}
        read = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
        for sent in (thought, sealed, read):
            respond(service, input=[{"role": "user", "content": "Hi"}, sent, call, result], tools=[SEARCH])
    assert "Hm." in BYTES.decode(list(seen[-1].prompt))
    assert seen[-1].prompt == seen[-2].prompt == seen[-3].prompt


def test_a_reference_to_what_is_not_the_key_s_or_stands_there_already_is_refused() -> None:
    with live(scripted("Hello!"), api_keys=("one", "two"), max_body_mib=0.01, **KEPT) as service:
        [item] = respond(service, "one").json()["output"]
        reference = {"type": "item_reference", "id": item["id"]}
        assert respond(service, "one", input=[reference]).status_code == 200
        assert respond(service, "one", "/v1/responses/input_tokens", input=[reference]).status_code == 200
        past_the_end = reference | {"id": item["id"].removesuffix("0") + "1"}
        wrong = [[reference, reference], [past_the_end], [reference | {"id": "msg"}], [reference | {"id": ""}]]
        for answer in [respond(service, "two", input=[reference])] + [
            respond(service, "one", input=it) for it in wrong
        ]:
            assert error_of(answer, 400, None)["param"] == "input"


def test_a_conversation_is_not_longer_than_a_body_because_it_refers_to_items() -> None:
    with live(scripted("x" * 600), max_body_mib=1500 / 2**20, **KEPT) as service:
        items = [respond(service).json()["output"][0]["id"] for _ in range(2)]
        references = [{"type": "item_reference", "id": name} for name in items]
        assert respond(service, input=references[:1]).status_code == 200
        error_of(respond(service, input=references), 400, "too_large")


def test_a_chain_has_no_more_turns_than_a_conversation_may_have() -> None:
    turns = [{"role": "user", "content": "x"}] * 2046
    with live(scripted("Hi", context_window=10**6, token_budget=10**7), **KEPT) as service:
        first = respond(service, input=turns).json()
        answer = respond(service, input=turns[:2], previous_response_id=first["id"])
        error = error_of(answer, 400, None)
        assert error["param"] == "input"
        assert error["message"].startswith("input: ")


# Showing and deleting


@pytest.mark.parametrize("stream", [False, True])
def test_a_stored_response_is_shown_as_it_was_until_it_is_deleted(stream: bool) -> None:
    with live(scripted("Hello!"), **KEPT) as service, service.openai() as client:
        answer = respond(service, stream=stream, max_output_tokens=4)
        response = events(answer.text)[-1]["response"] if stream else answer.json()
        assert (response["status"], response["store"]) == ("incomplete", True)
        for prefix in ("", "/v1"):
            assert service.get(f"{prefix}/responses/{response['id']}").json() == response
        assert client.responses.retrieve(response["id"]).output_text == "Hell"
        assert_described(Response, response)
        error_of(service.get(f"/v1/responses/{response['id']}?stream=true"), 400, None)
        with service.http() as http:
            gone = http.delete(f"/v1/responses/{response['id']}")
            assert gone.json() == {"id": response["id"], "object": "response", "deleted": True}
            assert_described(Deleted, gone.json())
            error_of(http.delete(f"/v1/responses/{response['id']}"), 404, "response_not_found")
        with pytest.raises(openai.NotFoundError, match="No such response"):
            client.responses.retrieve(response["id"])
        again = respond(service, previous_response_id=response["id"])
        assert error_of(again, 400, "previous_response_not_found")["param"] == "previous_response_id"


def test_no_key_sees_continues_or_deletes_another_s_responses() -> None:
    with live(scripted("Hello!"), api_keys=("one", "two"), **KEPT) as service:
        name = respond(service, "one").json()["id"]
        other = {"authorization": "Bearer two"}
        error_of(service.get(f"/v1/responses/{name}", headers=other), 404, "response_not_found")
        with service.http() as http:
            error_of(http.delete(f"/v1/responses/{name}", headers=other), 404, "response_not_found")
        error_of(respond(service, "two", previous_response_id=name), 400, "previous_response_not_found")
        counted = respond(service, "two", "/v1/responses/input_tokens", previous_response_id=name)
        error_of(counted, 400, "previous_response_not_found")
        error_of(service.get(f"/v1/responses/{name}"), 401, "unknown_api_key")
        assert respond(service, "one", previous_response_id=name).status_code == 200
        assert service.get(f"/v1/responses/{name}", headers={"authorization": "Bearer one"}).status_code == 200


def test_what_is_not_to_be_stored_or_has_not_ended_well_is_not() -> None:
    with live(scripted("Hello!", context_window=100), **KEPT) as service:
        response = respond(service, store=False).json()
        assert response["store"] is False
        error_of(service.get(f"/v1/responses/{response['id']}"), 404, "response_not_found")
        error_of(respond(service, input="x" * 200), 400, "context_length_exceeded")
        assert service.service.responses.size == 0
        respond(service)
        assert service.service.responses.size > 0


def test_other_paths_of_a_response_lead_nowhere() -> None:
    with live(scripted("Hello!"), **KEPT) as service:
        name = respond(service).json()["id"]
        error_of(service.post(b"{}", f"/v1/responses/{name}/cancel"), 404, "response_not_found")
        error_of(service.get(f"/v1/responses/{name}/input_items"), 404, "response_not_found")


def test_what_is_too_old_is_removed_though_nobody_asks() -> None:
    with live(scripted("Hello!"), stored_responses_s=0.01, **KEPT) as service:
        name = respond(service).json()["id"]
        eventually(lambda: service.service.responses.size == 0, "the response is removed")
        error_of(service.get(f"/v1/responses/{name}"), 404, "response_not_found")


# Log probabilities


@pytest.mark.parametrize(
    "said", ["Hé!", "<think>Hm</think>Yes", "<think></think>\n\nYes", "", "<b>", "ab</s>c", "a</sc"]
)
@pytest.mark.parametrize("top", [0, 2])
def test_the_text_s_log_probabilities_are_those_of_its_tokens(said: str, top: int) -> None:
    tokenizer = byte_tokenizer(TEMPLATES["shows thoughts"], TAGS)
    content = said.rpartition("</think>")[2].strip().partition("</s>")[0]
    asked: dict[str, Any] = {"stop": "</s>", "include": ["message.output_text.logprobs"], "top_logprobs": top}
    with live(telling(said), tokenizer=tokenizer) as service:
        whole = respond(service, **asked).json()
        found = events(respond(service, stream=True, **asked).text)
    part = whole["output"][-1]["content"][0]
    assert (part["text"], whole["top_logprobs"]) == (content, top)
    assert b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]).decode() == content
    assert all(len(entry["top_logprobs"]) == top for entry in part["logprobs"])
    deltas = [entry for event in found if event["type"] == "response.output_text.delta" for entry in event["logprobs"]]
    [done] = [event for event in found if event["type"] == "response.output_text.done"]
    assert (
        deltas == done["logprobs"] == found[-1]["response"]["output"][-1]["content"][0]["logprobs"] == part["logprobs"]
    )
    for event in found:
        assert_described(ResponseEvent, event)


PIECES = ["a", "aa", "b", "é", " ", "\n", "<", "<think>", "</think>", "<tool_call>", "</tool_call>", CALL]
STOPS = ["aab", "a\n", "é a", "<b", "</s>"]


@pytest.fixture(scope="module")
def talk() -> Iterator[tuple[Live, list[int]]]:
    """A service, and the tokens that it answers with, one at a time."""
    said = [END]
    tokenizer = byte_tokenizer(TEMPLATES["shows thoughts"], TAGS)
    with live(telling(lambda request, position: said[min(position, len(said) - 1)]), tokenizer=tokenizer) as service:
        yield service, said


@given(
    said=st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    stop=st.lists(st.sampled_from(STOPS), max_size=2, unique=True),
    ended=st.booleans(),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(said="aaab", stop=["aab"], ended=True)
@example(said="aa", stop=["aab"], ended=False)
@example(said="a <a", stop=[], ended=True)
def test_a_message_has_the_log_probabilities_of_its_tokens_however_long_its_text_was_held_back(
    talk: Any, said: str, stop: list[str], ended: bool
) -> None:
    service, answer = talk
    answer[:] = [*tokens_of(said), END]
    asked: dict[str, Any] = {"stop": stop, "tools": [SEARCH], "include": ["message.output_text.logprobs"]}
    length = 500 if ended else max(1, len(tokens_of(said)))
    found = events(respond(service, stream=True, max_output_tokens=length, **asked).text)
    for kind in ("response.output_text.delta", "response.output_text.done"):
        for event in (event for event in found if event["type"] == kind):
            text = event["delta" if "delta" in event else "text"]
            assert b"".join(bytes(entry["bytes"]) for entry in event["logprobs"]).decode() == text


def test_a_special_token_that_the_text_leaves_out_takes_no_other_token_s_place(talk: Any) -> None:
    service, answer = talk
    answer[:] = [*tokens_of("ab"), END, *tokens_of("cd"), END]
    asked: dict[str, Any] = {"stop": "bX", "ignore_eos": True, "include": ["message.output_text.logprobs"]}
    part = respond(service, max_output_tokens=6, **asked).json()["output"][0]["content"][0]
    assert part["text"] == "abcd"
    assert [bytes(entry["bytes"]) for entry in part["logprobs"]] == [b"a", b"b", b"c", b"d"]


def test_the_end_of_a_stream_with_the_most_log_probabilities_does_not_keep_the_event_loop() -> None:
    length = MAX_LOGPROBS // 21
    limits: dict[str, Any] = {"max_output_tokens": length, "default_max_tokens": 16, "stored_responses_mib": 32.0}
    with live(telling("a" * length), **limits) as service:
        found = events(respond(service, stream=True, top_logprobs=20, max_output_tokens=length).text)
    assert len(found[-1]["response"]["output"][0]["content"][0]["logprobs"]) == length


def test_without_being_asked_for_there_are_none() -> None:
    with live(telling("Hi")) as service:
        assert respond(service).json()["output"][0]["content"][0]["logprobs"] == []


def test_no_response_has_more_log_probabilities_than_allowed() -> None:
    limits: dict[str, Any] = {"max_output_tokens": MAX_LOGPROBS, "default_max_tokens": 16}
    with live(telling("Hi"), **limits) as service:
        assert respond(service, top_logprobs=20, max_output_tokens=MAX_LOGPROBS // 21).status_code == 200
        answer = respond(service, top_logprobs=20, max_output_tokens=MAX_LOGPROBS // 21 + 1)
        assert error_of(answer, 400, None)["param"] == "top_logprobs"


# Counting


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"instructions": "Be brief."},
        {"tools": [SEARCH]},
        {"reasoning": {"effort": "high"}},
        {"input": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
        {"stream": True},
        {"truncate_prompt_tokens": 5},
        {"truncate_prompt_tokens": -1, "max_output_tokens": 4090},
    ],
)
def test_input_tokens_are_those_that_the_response_says(fields: dict[str, Any]) -> None:
    with live(scripted("Hello!"), **KEPT) as service:
        first = respond(service).json()["id"]
        for chain in ({}, {"previous_response_id": first}):
            counted = respond(service, path="/v1/responses/input_tokens", **fields, **chain).json()
            answer = respond(service, **fields | chain | {"stream": False}).json()
            assert counted == {"object": "response.input_tokens", "input_tokens": answer["usage"]["input_tokens"]}


def test_the_client_counts_and_is_told_what_is_wrong() -> None:
    with live() as service, service.openai() as client:
        counted = client.responses.input_tokens.count(model="scripted", input="Hi")
        rendered = BYTES.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
        assert counted.input_tokens == len(tokens_of(str(rendered)))
        with pytest.raises(openai.BadRequestError) as wrong:
            client.responses.input_tokens.count(model="scripted", input="refuse me")
        assert wrong.value.param == "input"
        assert not service.engine.batches
