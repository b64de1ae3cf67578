"""Laws of the Responses API, asked with OpenAI's own client."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import orjson
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage, ResponseReasoningItem
from pydantic import BaseModel

from batching.events import Outcome
from batching.types import Request
from tests.fakes import Script
from tests.live import BYTES, Live, eventually, live, says, scripted, tokens_of

Json = dict[str, Any]

TOOL: Json = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
OTHER: Json = {"type": "function", "name": "time", "parameters": {}, "strict": None}
ARGUMENTS = '{"city":"Rome"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
ANSWERS = {
    "text": "Hello!",
    "empty": "",
    "thinking": "<think>\nHm, well.\n</think>\n\nHello!",
    "only thinking": "<think>\nHm, well.\n</think>",
    "call": CALL,
    "all": f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL}\n{SECOND}",
    "broken call": CALL[:-20],
}


def ask(service: Live, **fields: Any) -> Json:
    """The JSON of a plain answer, or of a refusal."""
    answer: Json = service.post(json.dumps({"input": "Hi"} | fields).encode(), "/v1/responses").json()
    return answer


def refusal(service: Live, status: int, **fields: Any) -> Json:
    response = service.post(orjson.dumps({"input": "Hi"} | fields), "/v1/responses")
    assert response.status_code == status, response.text
    error: Json = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def events_of(service: Live, **fields: Any) -> list[Json]:
    """The events of a streamed answer. Each is framed with its type and numbered from 0."""
    response = service.post(orjson.dumps({"input": "Hi", "stream": True} | fields), "/v1/responses")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *framed, rest = response.text.split("\n\n")
    assert rest == ""
    found = []
    for number, one in enumerate(framed):
        kind, data = one.split("\n")
        event = orjson.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        assert event["sequence_number"] == number
        found.append(event)
    return found


def folded(events: list[Json]) -> list[Json]:
    """The output items as a client puts them together from the deltas alone, but for their last status."""
    items: list[Json] = []
    for event in events:
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert event["output_index"] == len(items)
                items.append(orjson.loads(orjson.dumps(event["item"])))
            case "content_part.added":
                items[event["output_index"]]["content"].append(dict(event["part"]))
            case "output_text.delta" | "reasoning_text.delta":
                assert event["delta"]
                items[event["output_index"]]["content"][event["content_index"]]["text"] += event["delta"]
            case "function_call_arguments.delta":
                items[event["output_index"]]["arguments"] += event["delta"]
            case "output_item.done":
                items[event["output_index"]]["status"] = event["item"]["status"]
    return items


def bare(response: Json) -> Json:
    """A response without what is another one's each time."""
    items = [{key: item[key] for key in item if key not in ("id", "call_id")} for item in response["output"]]
    return {key: response[key] for key in response if key not in ("id", "created_at", "completed_at")} | {
        "output": items
    }


def remembering(seen: list[Request], text: str = "ok") -> Script:
    script = says(text)

    def remember(request: Request, position: int) -> int:
        if not position:
            seen.append(request)
        return script(request, position)

    return remember


def prompt_of(request: Request) -> str:
    return str(BYTES.decode(list(request.prompt)))


# Answers


def test_a_plain_answer_has_all_that_openai_s_client_reads() -> None:
    with live(scripted("Hello!")) as service, service.openai() as client:
        answer = client.responses.create(model="scripted", input="Hi", metadata={"a": "b"}, user="me", store=True)
    assert isinstance(answer, Response)
    Response.model_validate(answer.model_dump(), strict=True)
    assert answer.id.startswith("resp_")
    assert answer.created_at > 1_700_000_000
    assert (answer.object, answer.model, answer.status) == ("response", "scripted", "completed")
    assert (answer.error, answer.incomplete_details, answer.instructions) == (None, None, None)
    assert (answer.temperature, answer.top_p, answer.tools, answer.tool_choice) == (1.0, 1.0, [], "auto")
    assert (answer.metadata, answer.user, answer.parallel_tool_calls) == ({"a": "b"}, "me", True)
    assert answer.model_extra == {"store": False, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert answer.text is not None
    assert answer.text.format is not None
    assert answer.text.format.type == "text"
    [message] = answer.output
    assert isinstance(message, ResponseOutputMessage)
    assert (message.role, message.status, message.id[:4]) == ("assistant", "completed", "msg_")
    assert answer.output_text == "Hello!"
    assert answer.usage is not None
    prompt = len(tokens_of("<user>Hi<|end|><assistant>"))
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (prompt, 7)
    assert answer.usage.total_tokens == prompt + 7
    assert answer.usage.output_tokens_details.reasoning_tokens == 0


def test_what_was_asked_is_told_again() -> None:
    asked: Json = {
        "instructions": "Be brief.",
        "temperature": 0.5,
        "top_p": 0.3,
        "max_output_tokens": 9,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "weather"},
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low", "summary": None},
    }
    with live(scripted(CALL)) as service:
        told = ask(service, **asked)
        assert {key: told[key] for key in asked} == asked
        schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 10**30}}}
        form = {"type": "json_schema", "name": "n", "schema": schema, "strict": False, "description": "A number."}
        assert ask(service, text={"format": form})["text"] == {"format": form, "verbosity": None}


def test_the_request_reaches_the_row_and_the_template() -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen)), request_timeout_s=77.0) as service:
        ask(service, instructions="Be brief.", temperature=0.5, top_p=0.3, max_output_tokens=9)
        ask(service, input=[{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Hi"}])
    first, second = seen
    assert prompt_of(first) == "<system>Be brief.<|end|><user>Hi<|end|><assistant>"
    assert prompt_of(second) == "<system>Be kind.<|end|><user>Hi<|end|><assistant>"
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.max_tokens) == (0.5, 0.3, 9)
    assert first.time_limit == 77.0


@pytest.mark.parametrize(("effort", "thinks"), [("none", False), ("minimal", False), ("low", True), ("high", True)])
def test_effort_turns_thinking_on_or_off(effort: str, thinks: bool) -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen))) as service:
        ask(service, reasoning={"effort": effort, "summary": "auto"})
    assert prompt_of(seen[0]).endswith("<think>") is thinks


def test_thinking_is_an_item_of_its_own() -> None:
    with live(scripted(ANSWERS["thinking"])) as service, service.openai() as client:
        answer = client.responses.create(model="scripted", input="Hi")
    thought, message = answer.output
    assert isinstance(thought, ResponseReasoningItem)
    assert thought.content is not None
    assert [part.text for part in thought.content] == ["Hm, well."]
    assert (thought.summary, thought.status, message.status) == ([], "completed", "completed")  # type: ignore[union-attr]
    assert answer.output_text == "Hello!"
    assert answer.usage is not None
    assert answer.usage.output_tokens_details.reasoning_tokens == len("Hm, well.")


@pytest.mark.parametrize("name", ANSWERS)
def test_folded_events_are_the_plain_answer(name: str) -> None:
    with live(scripted(ANSWERS[name])) as service:
        for length in (500, 1, 12, 40):
            fields: Json = {"tools": [TOOL, OTHER], "max_output_tokens": length}
            check_fold(ask(service, **fields), events_of(service, **fields))


def check_fold(plain: Json, events: list[Json]) -> None:
    first, second, *_, last = events
    assert [first["type"], second["type"]] == ["response.created", "response.in_progress"]
    assert first["response"] == second["response"]
    begun: Json = {
        "status": "in_progress",
        "output": [],
        "usage": None,
        "incomplete_details": None,
        "completed_at": None,
    }
    assert {key: first["response"][key] for key in begun} == begun
    assert last["type"] == f"response.{plain['status']}"
    assert folded(events) == last["response"]["output"]
    assert bare(last["response"]) == bare(plain)
    Response.model_validate(last["response"])


@pytest.mark.parametrize("name", ANSWERS)
def test_done_events_have_what_the_deltas_add_up_to(name: str) -> None:
    with live(scripted(ANSWERS[name])) as service:
        events = events_of(service, tools=[TOOL, OTHER], max_output_tokens=500)
    items = folded(events)
    for event in events:
        match event["type"].removeprefix("response."):
            case "output_item.done":
                assert event["item"] == items[event["output_index"]]
            case "content_part.done":
                assert event["part"] == items[event["output_index"]]["content"][0]
            case "output_text.done" | "reasoning_text.done":
                assert event["text"] == items[event["output_index"]]["content"][0]["text"]
            case "function_call_arguments.done":
                assert event["arguments"] == items[event["output_index"]]["arguments"]
        if "item_id" in event:
            assert event["item_id"] == items[event["output_index"]]["id"]


def test_the_events_of_a_text_come_in_openai_s_order_as_its_tokens_do() -> None:
    with live(scripted("Hi", stepped=True)) as service, service.openai() as client:
        service.engine.release()
        kinds = []
        with client.responses.create(model="scripted", input="Hi", stream=True) as stream:
            for event in stream:
                kinds.append(event.type.removeprefix("response."))
                if event.type == "response.output_text.delta":
                    service.engine.release()
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]


@pytest.mark.parametrize("name", ["text", "all"])
def test_the_client_s_own_accumulator_agrees(name: str) -> None:
    tools: Any = [TOOL, OTHER | {"strict": True}]
    with live(scripted(ANSWERS[name])) as service, service.openai() as client:
        with client.responses.stream(model="scripted", input="Hi", tools=tools, max_output_tokens=500) as stream:
            snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
            final = stream.get_final_response()
        plain = client.responses.create(model="scripted", input="Hi", tools=tools, max_output_tokens=500)
    assert snapshots[-1] == final.output_text == plain.output_text
    assert [item.type for item in final.output] == [item.type for item in plain.output]


def test_an_answer_that_is_cut_is_incomplete() -> None:
    with live(scripted("Hello!")) as service, service.openai() as client:
        answer = client.responses.create(model="scripted", input="Hi", max_output_tokens=3)
    assert answer.output_text == "Hel"
    assert (answer.status, answer.output[0].status) == ("incomplete", "incomplete")  # type: ignore[union-attr]
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"


def test_the_asynchronous_client_is_answered_alike() -> None:
    async def both(url: str) -> tuple[str, str]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            plain = await client.responses.create(model="scripted", input="Hi")
            stream = await client.responses.create(model="scripted", input="Hi", stream=True)
            deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        return plain.output_text, "".join(deltas)

    with live(scripted("Hello!")) as service:
        assert asyncio.run(both(service.url)) == ("Hello!", "Hello!")


def test_a_typed_answer_is_parsed_by_the_client() -> None:
    class Person(BaseModel):
        name: str

    with live(scripted('{"name": "Ada"}')) as service, service.openai() as client:
        answer = client.responses.parse(model="scripted", input="Hi", text_format=Person)
        assert ask(service, text={"format": {"type": "json_object"}})["status"] == "completed"
    assert answer.output_parsed == Person(name="Ada")


# Tools


def test_a_call_is_an_item_and_its_result_goes_back() -> None:
    seen: list[Request] = []
    tools: Any = [TOOL]
    with live(scripted(remembering(seen, CALL))) as service, service.openai() as client:
        answer = client.responses.create(model="scripted", input="Rome?", tools=tools, tool_choice="required")
        [call] = answer.output
        assert isinstance(call, ResponseFunctionToolCall)
        assert (call.name, call.arguments, call.status) == ("weather", ARGUMENTS, "completed")
        assert call.call_id.startswith("call_")
        history: Any = [
            {"role": "user", "content": "Rome?"},
            *answer.output,
            {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."},
        ]
        client.responses.create(model="scripted", input=history, tools=tools)
        history[1] = call.model_dump()
        history[2]["output"] = [{"type": "input_text", "text": "Sunny."}]
        client.responses.create(model="scripted", input=history, tools=tools)
    first, second, third = map(prompt_of, seen)
    assert "Tells the weather." in first
    assert "Sunny." not in first
    assert "Rome?" in second
    assert ARGUMENTS in second
    assert "Sunny." in second
    assert second == third


def test_all_items_of_an_answer_can_be_sent_back() -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen, ANSWERS["all"]))) as service, service.openai() as client:
        tools: Any = [TOOL, OTHER]
        answer = client.responses.create(model="scripted", input="Hi", tools=tools, max_output_tokens=500)
        assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
        for items in ([item.model_dump() for item in answer.output], [item.to_dict() for item in answer.output]):
            history: Any = [{"role": "user", "content": "Hi"}, *items]
            history += [
                {"type": "function_call_output", "call_id": item["call_id"], "output": "Done."}
                for item in items
                if "call_id" in item
            ]
            client.responses.create(model="scripted", input=history)
    first, second = map(prompt_of, seen[1:])
    assert first == second
    assert first.count("Done.") == 2
    assert "Hm." not in first
    assert first.count("<assistant>") == 2  # one turn with its text and calls, and the one to be written


def test_an_answer_ends_with_its_call_where_only_one_is_allowed() -> None:
    with live(scripted(CALL + SECOND, stepped=True)) as service:
        service.engine.release(len(tokens_of(CALL)))
        answer = ask(service, tools=[TOOL, OTHER], parallel_tool_calls=False, max_output_tokens=500)
    assert [item["name"] for item in answer["output"]] == ["weather"]
    assert answer["status"] == "completed"


def test_tools_that_may_not_be_called_are_not_offered() -> None:
    with live(scripted(CALL)) as service:
        answer = ask(service, tools=[TOOL], tool_choice="none")
    assert [item["type"] for item in answer["output"]] == ["message"]
    assert answer["output"][0]["content"][0]["text"] == CALL


# Refusals


@pytest.fixture(scope="module")
def refusing() -> Iterator[Live]:
    """One server for all that it refuses before it has anything to run."""
    with live() as service:
        yield service
        assert not service.engine.batches


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("conversation", {"id": "conv_1"}),
        ("prompt", {"id": "pmpt_1"}),
        ("background", True),
        ("include", ["reasoning.encrypted_content"]),
        ("truncation", "auto"),
        ("input", [{"type": "item_reference", "id": "msg_1"}]),
        ("input", [{"id": "msg_1"}]),
    ],
)
def test_what_needs_stored_state_is_refused_by_name(refusing: Live, field: str, value: Any) -> None:
    error = refusal(refusing, 400, **{field: value})
    assert error["param"] == field
    assert "stored state is not kept here" in error["message"]


def test_what_asks_for_no_stored_state_is_answered() -> None:
    none: Json = dict.fromkeys(
        ["previous_response_id", "conversation", "prompt", "include", "text", "reasoning", "tools"]
    )
    with live() as service:
        assert ask(service, **none)["status"] == "completed"
        assert ask(service, background=False, include=[], truncation="disabled", top_logprobs=0)["store"] is False


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [7]}, "input.0"),
        ({"input": [{"type": "computer_call"}]}, "input.0"),
        ({"input": [{"type": {"a": 1}}]}, "input.0"),
        ({"text": {"format": {"type": ["a"]}}}, "text.format"),
        ({"input": [{"role": "robot", "content": "Hi"}]}, "input.0.message.role"),
        ({"input": [{"role": "user"}]}, "input.0.message.content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.message.content"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.message.content"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f"}]}, "input.0.function_call.arguments"),
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, "input"),
        ({"input": [{"role": "user", "content": "refuse me"}]}, "input"),
        ({"input": "x" * 5000}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": True}, "max_output_tokens"),
        ({"temperature": 9}, "temperature"),
        ({"top_p": "1"}, "top_p"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"stream": 1}, "stream"),
        ({"seed": 7}, "seed"),
        ({"background": 0}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.name"),
        ({"tools": [TOOL | {"parameters": {"type": "array"}}]}, "tools.0.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name"),
        ({"tools": [TOOL], "tool_choice": "weather"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.json_schema.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"effort": "extreme"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ],
)
def test_what_is_wrong_is_refused_with_the_field_s_name(refusing: Live, fields: Json, param: str) -> None:
    assert refusal(refusing, 400, **fields)["param"] == param


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "required", "text": {"format": {"type": "json_object"}}}, "text.format"),
    ],
)
def test_fields_that_do_not_agree_are_refused(refusing: Live, fields: Json, words: str) -> None:
    assert words in refusal(refusing, 400, **fields)["message"]


def test_errors_are_the_client_s_exceptions() -> None:
    with live() as service, service.openai() as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.responses.create(model="gpt-500", input="Hi")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            client.responses.create(model="scripted", input="Hi", previous_response_id="resp_1")
        assert wrong.value.param == "previous_response_id"
        assert service.post(b"{", "/v1/responses").json()["error"]["code"] == "invalid_json"


def test_no_response_is_stored() -> None:
    with live() as service, service.openai() as client:
        stored = client.responses.create(model="scripted", input="Hi", store=True)
        for look in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError, match="not stored here"):
                look(stored.id)
        assert service.get(f"/responses/{stored.id}").json()["error"]["code"] == "response_not_found"


def test_the_path_without_a_prefix_is_the_same() -> None:
    with live() as service:
        assert service.post(b'{"input": "Hi"}', "/responses").json()["object"] == "response"


# Failures


@pytest.mark.parametrize("stream", [False, True])
def test_failures_before_the_first_piece_have_a_status(stream: bool) -> None:
    def fail(step: int) -> None:
        raise RuntimeError("kernel")

    with live(scripted(before_step=fail)) as service:
        assert refusal(service, 500, stream=stream)["code"] == "engine_error"
    with live(scripted(stepped=True), request_timeout_s=0.1) as service:
        assert refusal(service, 504, stream=stream)["code"] == "deadline_exceeded"
    with live(ready=False) as service:
        assert refusal(service, 503, stream=stream)["code"] == "service_starting"


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_told_by_status(stream: bool) -> None:
    with (
        live(scripted(stepped=True), queue_size=1, max_batch_size=1) as service,
        ThreadPoolExecutor(2) as pool,
    ):
        running = pool.submit(ask, service)
        service.wait_running()
        waiting = pool.submit(ask, service)
        service.wait_queued(1)
        assert refusal(service, 429, stream=stream)["code"] == "queue_full"
        service.engine.release(100)
        assert running.result()["status"] == waiting.result()["status"] == "completed"


def test_a_failure_after_the_first_piece_is_the_last_event() -> None:
    def fail(step: int) -> None:
        if step == 3:
            raise RuntimeError("kernel")

    with live(scripted("Hello!", before_step=fail)) as service:
        *events, last = events_of(service)
        assert refusal(service, 500)["code"] == "engine_error"
        with service.openai() as client, client.responses.create(model="scripted", input="Hi", stream=True) as stream:
            final = list(stream)[-1]
    assert final.type == "response.failed"
    assert final.response.error is not None
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "The model failed on this request."}
    [item] = last["response"]["output"]
    assert (item["content"][0]["text"], item["status"]) == ("Hel", "incomplete")
    assert folded(events)[0]["content"] == item["content"]
    assert "kernel" not in str(last)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_row(stream: bool) -> None:
    body = orjson.dumps({"input": "Hi", "stream": stream, "max_output_tokens": 1000})
    head = f"POST /v1/responses HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n"
    with live(scripted("x" * 1000, stepped=True)) as service:
        with service.connect() as wire:
            wire.sendall(head.encode() + body)
            service.wait_running()
            service.engine.release()
            eventually(lambda: service.sample("microbatch_output_tokens_total") == 1, "the first token is out")
            if stream:
                assert b"event: response.created\n" in wire.recv(65536)
        [ended] = service.wait_ended()
        assert ended.outcome is Outcome.CANCELLED
        service.engine.release()
        eventually(lambda: service.sample("microbatch_running_rows") == 0, "no row runs")
