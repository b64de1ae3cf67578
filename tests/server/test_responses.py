"""Laws of the Responses API, asked with OpenAI's own client."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import Any

import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI
from openai.types.responses import (
    Response,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseReasoningItem,
    ResponseStreamEvent,
)
from pydantic import BaseModel, TypeAdapter
from pydantic_core import to_json

from batching.events import Outcome
from batching.types import Request
from server.fields import parse
from server.model.defaults import Defaults
from server.openai.requests import ChatRequest
from server.openai.responses import head_of
from server.openai.responses_request import ITEM_LIST, ResponseRequest, as_chat
from tests.fakes import Script
from tests.live import BYTES, Live, eventually, live, says, scripted, tokens_of
from tests.server.test_reasoning import calls_in

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
            case "reasoning_summary_part.added":
                items[event["output_index"]]["summary"].append(dict(event["part"]))
            case "reasoning_summary_text.delta":
                items[event["output_index"]]["summary"][event["summary_index"]]["text"] += event["delta"]
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
        ask(service, reasoning_effort=effort)
        ask(service, reasoning={"summary": "auto"}, reasoning_effort=effort)
        ask(service, reasoning={"effort": effort}, reasoning_effort="none" if thinks else "high")
    assert [prompt_of(each).endswith("<think>") for each in seen] == [thinks] * 4


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
    assert answer.usage.output_tokens_details.reasoning_tokens == ANSWERS["thinking"].index("</think>") + len(
        "</think>"
    )


@pytest.mark.parametrize("name", ["thinking", "only thinking", "all"])
def test_a_thought_is_its_summary_where_one_is_wanted(name: str) -> None:
    """LangChain and the AI SDK read nothing but summaries; LlamaIndex would join text and summary."""
    fields: Json = {"tools": [TOOL, OTHER], "reasoning": {"summary": "auto"}}
    with live(scripted(ANSWERS[name])) as service:
        for length in (12, 500):
            events = events_of(service, max_output_tokens=length, **fields)
            check_fold(ask(service, max_output_tokens=length, **fields), events)
    response = events[-1]["response"]
    thought = response["output"][0]
    assert thought["content"] == []
    assert [part["text"] for part in thought["summary"]] == ["Hm." if name == "all" else "Hm, well."]
    assert response["reasoning"] == {"effort": None, "summary": "auto"}
    assert isinstance(Response.model_validate(response).output[0], ResponseReasoningItem)
    kinds = [event["type"].removeprefix("response.") for event in events if "reasoning" in event["type"]]
    assert [kind for kind, _ in groupby(kinds)] == [
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
    ]
    for event in events:
        if event["type"].startswith("response.reasoning_summary") and event["type"].endswith(".done"):
            assert thought["summary"] == [event.get("part") or {"type": "summary_text", "text": event["text"]}]


@pytest.mark.parametrize("summary", [None, "auto"])
def test_events_have_all_that_the_api_s_types_require(summary: str | None) -> None:
    with live(scripted(ANSWERS["all"])) as service:
        include = ["message.output_text.logprobs"]
        events = events_of(service, tools=[TOOL, OTHER], include=include, reasoning={"summary": summary})
    types: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    done = [types.validate_python(event) for event in events][-1]
    assert [item.type for item in done.response.output] == ["reasoning", "message", "function_call", "function_call"]


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


# What clients send beside, and send back

SEARCH: Json = {"type": "web_search", "external_web_access": False}
GROUP: Json = {"type": "namespace", "name": "mcp__city", "description": "Tools.", "tools": [TOOL]}
PATCH: Json = {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark"}}


def test_tools_of_other_types_are_not_offered_and_are_named() -> None:
    seen: list[Request] = []
    body: Json = {"input": "Hi", "tools": [SEARCH, TOOL, SEARCH, PATCH], "tool_choice": "auto", "made_up": 1}
    with live(scripted(remembering(seen))) as service:
        answer = service.post(orjson.dumps(body), "/v1/responses")
        alone = ask(service, tools=[TOOL])
        ask(service)
        assert ask(service, tools=[SEARCH])["tools"] == []
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "made_up, tools.web_search, tools.custom"
    assert answer.json()["tools"] == alone["tools"] == [TOOL]
    mixed, function, none, search = map(prompt_of, seen)
    assert mixed == function
    assert search == none


def test_functions_in_a_namespace_are_offered_and_called_as_such() -> None:
    """Codex offers the tools of MCP servers so."""
    seen: list[Request] = []
    tools: Any = [OTHER, {**GROUP, "tools": [TOOL, PATCH]}]
    with (
        live(scripted(remembering(seen, CALL.replace("weather", "mcp__city__weather") + SECOND))) as service,
        service.openai() as client,
    ):
        asks: Any = {"model": "scripted", "tools": tools, "max_output_tokens": 500}
        with client.responses.stream(input="Hi", **asks) as stream:
            folded = stream.get_final_response()
        answer = client.responses.create(input="Hi", **asks)
        sent: list[Any] = [item.to_dict() for item in answer.output]
        sent += [{"type": "function_call_output", "call_id": each["call_id"], "output": "Sunny."} for each in sent]
        client.responses.create(input=[{"role": "user", "content": "Hi"}, *sent], **asks)
    for found in (folded, answer):
        calls: list[Any] = list(found.output)
        assert [(call.namespace, call.name) for call in calls] == [("mcp__city", "weather"), (None, "time")]
        told: Any = found.tools[1]
        assert (told.name, told.tools[0].name) == ("mcp__city", "weather")
    assert '{"name":"mcp__city__weather","description":"Tells the weather."' in prompt_of(seen[0])
    assert f'{{"name":"mcp__city__weather","arguments":{ARGUMENTS}}}' in prompt_of(seen[-1])


@pytest.mark.parametrize(
    ("choice", "offered", "demanded"),
    [
        ({"name": "weather"}, 4, ["mcp__city__weather"]),
        ({"name": "weather", "namespace": "mcp__city"}, 4, ["mcp__city__weather"]),
        ({"name": "mcp__city__weather"}, 4, ["mcp__city__weather"]),
        ({"name": "time"}, 4, ["time"]),
        ({"name": "time", "namespace": "mcp__zone"}, 4, ["mcp__zone__time"]),
        ({"type": "allowed_tools", "tools": [{"type": "namespace", "name": "mcp__city"}]}, 2, []),
        ({"type": "allowed_tools", "tools": [{"type": "function", "name": "weather"}]}, 1, []),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"name": "time"}, {"name": "news"}]},
            2,
            ["mcp__city__news", "time"],
        ),
    ],
)
def test_a_choice_names_functions_in_a_namespace_as_calls_do(choice: Json, offered: int, demanded: list[str]) -> None:
    city, zone = GROUP | {"tools": [TOOL, OTHER | {"name": "news"}]}, GROUP | {"name": "mcp__zone", "tools": [OTHER]}
    body = {"input": "Hi", "tools": [city, OTHER, zone], "tool_choice": {"type": "function"} | choice}
    chat = as_chat(parse(ResponseRequest, orjson.dumps(body))[0])
    assert (len(chat.offered), sorted(tool.function.name for tool in chat.demanded)) == (offered, demanded)


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "name": "weather"},
        {"type": "function", "name": "weather", "namespace": "c"},
        {"type": "function", "name": "time", "namespace": "c"},
        {"type": "allowed_tools", "tools": [{"type": "function", "name": "made_up", "namespace": "a"}]},
    ],
)
def test_a_choice_that_could_be_any_or_is_none_is_refused(refusing: Live, choice: Json) -> None:
    tools = [GROUP | {"name": "a"}, GROUP | {"name": "b"}, TOOL | {"name": "time"}]
    assert "names a function that is not defined" in refusal(refusing, 400, tools=tools, tool_choice=choice)["message"]


def test_the_head_of_an_answer_costs_the_event_loop_no_more_for_many_tools() -> None:
    """Those of several MCP servers, 1 MiB in all, took 16 ms to encode."""
    cost = []
    for count in (1, 500):
        request, _ = parse(ResponseRequest, orjson.dumps({"input": "Hi", "tools": [GROUP] * count}))
        request.remember()
        assert len(head_of("m", request, Defaults())["tools"]) == count
        cost.append(calls_in(partial(head_of, "m", request, Defaults())))
    assert cost[1] == cost[0]


def test_names_in_a_namespace_may_be_as_long_as_others() -> None:
    """OpenAI allows 64 characters in each."""
    group = GROUP | {"name": "n" * 64, "tools": [TOOL | {"name": "f" * 64}]}
    with live(scripted(CALL.replace("weather", f"{'n' * 64}__{'f' * 64}"))) as service:
        for choice in ("auto", "required", {"type": "function", "name": "f" * 64}):
            fields: Json = {"tools": [group], "tool_choice": choice, "max_output_tokens": 500}
            [call] = ask(service, **fields)["output"]
            assert (call["namespace"], call["name"]) == ("n" * 64, "f" * 64)
            told = {"type": "function_call_output", "call_id": call["call_id"], "output": "Sunny."}
            assert ask(service, input=[call, told], **fields)["status"] == "completed"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL, SEARCH]}, "tools.web_search"),
        ({"input": [{"role": "user", "content": "Hi"}, {"type": "web_search_call"}]}, "input.web_search_call"),
    ],
)
def test_what_is_skipped_can_be_refused(fields: Json, param: str) -> None:
    with live(unknown_fields="refuse") as service:
        error = refusal(service, 400, **fields)
    assert (error["param"], error["code"]) == (param, "unsupported_field")


@pytest.mark.parametrize("field", ["prompt_logprobs", "logprob_token_ids", "return_token_ids"])
def test_reports_that_a_response_has_no_place_for_are_refused(field: str) -> None:
    with live() as service:
        error = refusal(service, 400, input="Hi", **{field: [1] if field == "logprob_token_ids" else 1})
    assert (error["param"], error["code"]) == (field, "unsupported_field")


def test_fields_without_effect_are_accepted() -> None:
    fields: Json = {
        "include": ["reasoning.encrypted_content", "web_search_call.action.sources"],
        "client_metadata": {"session_id": "a"},
        "text": {"verbosity": "low"},
        "reasoning": {"summary": "detailed", "generate_summary": "auto"},
        "max_tool_calls": 3,
        "stream_options": {"include_obfuscation": False},
        "truncation": "auto",
        "background": False,
        "store": True,
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "safety_identifier": "s",
        "service_tier": "scale",
        "metadata": {"a": 10**30, "b": None},
        "user": "u",
    }
    with live() as service:
        plain = service.post(orjson.dumps({"input": "Hi"}), "/v1/responses")
        answer = service.post(json.dumps({"input": "Hi"} | fields).encode(), "/v1/responses")
    assert answer.status_code == 200, answer.text
    assert "x-ignored-fields" not in answer.headers
    assert answer.json()["metadata"] == fields["metadata"]
    assert (answer.json()["max_tool_calls"], answer.json()["store"]) == (3, False)
    assert answer.json()["usage"] == plain.json()["usage"]


def test_null_is_a_field_left_out_wherever_it_is() -> None:
    fields: Json = dict.fromkeys(set(ResponseRequest.model_fields) - {"input"})
    nulls = dict.fromkeys(["id", "status", "phase", "name", "summary", "encrypted_content", "content"])
    items: list[Json] = [
        nulls | {"type": None, "role": "user", "content": [{"type": "input_text", "text": "Hi", "x": None}]},
        nulls | {"type": "reasoning"},
        nulls | {"type": "message", "role": "assistant"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": None, "id": None, "namespace": None},
        {"type": "function_call_output", "call_id": "c", "output": None, "id": None},
    ]
    with live() as service:
        answer = service.post(orjson.dumps(fields | {"input": items}), "/v1/responses")
        assert answer.status_code == 200, answer.text
        assert ask(service, tools=[dict.fromkeys(TOOL) | {"type": "function", "name": "f"}], text={"format": None})
    assert "x-ignored-fields" not in answer.headers


def test_what_chats_know_of_sampling_and_thinking_is_known_here() -> None:
    seen: list[Request] = []
    settings: Json = {
        **{"top_k": 5, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.5},
        **{"seed": 7, "logit_bias": {"3": 2}, "stop": ["o"], "min_tokens": 1, "max_tokens": 9},
    }
    with live(scripted(remembering(seen, "Hello!"))) as service:
        answer = ask(service, **settings)
        service.chat(**settings)
        for spelled in ({"chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": True}):
            ask(service, **spelled)
    one, other, *thinking = seen
    assert one.sampling == other.sampling
    assert one.sampling.seed == 7
    assert answer["output"][0]["content"][0]["text"] == "Hell"
    assert (answer["presence_penalty"], answer["frequency_penalty"]) == (0.5, 0.25)
    assert all(prompt_of(each).endswith("<think>") for each in thinking)


def called(name: str, arguments: Any, result: str = "done") -> list[Json]:
    return [
        {"type": "function_call", "call_id": "c", "name": name, "arguments": json.dumps(arguments)},
        {"type": "function_call_output", "call_id": "c", "output": result},
    ]


OF: Json = {"call_id": "c", "id": "x_1", "status": "completed"}
RAN: list[Any] = [{"stdout": "a", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]
TEXT_PARTS: list[Any] = [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b", "annotations": []}]
CITED: list[Any] = [
    {"type": "output_text", "text": "It is.", "annotations": [{"type": "url_citation"}], "logprobs": []}
]
SUMMARY: list[Any] = [{"type": "summary_text", "text": "s"}]
IT_IS: Json = {"role": "assistant", "content": "It is."}
SPELLINGS: dict[str, tuple[list[Json], list[Json]]] = {
    "a tool of free text": (
        [
            OF | {"type": "custom_tool_call", "name": "apply_patch", "input": "*** Begin"},
            OF | {"type": "custom_tool_call_output", "output": "done"},
        ],
        called("apply_patch", {"input": "*** Begin"}),
    ),
    "the local shell": (
        [
            OF | {"type": "local_shell_call", "action": {"type": "exec", "command": ["ls"]}},
            {"type": "local_shell_call_output", "id": "c", "output": "done"},
        ],
        called("local_shell", {"action": {"type": "exec", "command": ["ls"]}}),
    ),
    "a shell": (
        [
            OF | {"type": "shell_call", "action": {"commands": ["ls"]}},
            OF | {"type": "shell_call_output", "output": RAN},
        ],
        called("shell", {"action": {"commands": ["ls"]}}, json.dumps(RAN)),
    ),
    "parts of an output": (
        [called("f", {})[0], OF | {"type": "function_call_output", "output": TEXT_PARTS}],
        called("f", {}, "ab"),
    ),
    "arguments as an object": (
        [OF | {"type": "function_call", "name": "f", "arguments": {"a": 1}}],
        called("f", {"a": 1})[:1],
    ),
    "a text with sources": (
        [
            {"type": "web_search_call", "id": "ws_1", "action": {"type": "search", "query": "q"}},
            {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": CITED},
        ],
        [IT_IS],
    ),
    "a refusal": (
        [{"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}],
        [{"role": "assistant", "content": "No."}],
    ),
    "a thought that is encrypted": (
        [{"type": "reasoning", "id": "rs_1", "encrypted_content": "gAAA", "summary": SUMMARY}, IT_IS],
        [IT_IS],
    ),
    "a thought that came as its summary": (
        [{"type": "reasoning", "id": "rs_1", "content": [], "summary": SUMMARY}, IT_IS],
        [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "s"}], "summary": []}, IT_IS],
    ),
    "a turn of an unknown type": ([IT_IS | {"type": "agent_message", "author": "x"}], [IT_IS]),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_turns_in_any_spelling_are_the_same_prompt(name: str) -> None:
    seen: list[Request] = []
    user: Json = {"role": "user", "content": [{"type": "input_text", "text": "H"}, {"type": "text", "text": "i"}]}
    with live(scripted(remembering(seen))) as service:
        for items in SPELLINGS[name]:
            assert ask(service, input=[user, *items, user])["status"] == "completed"
    first, second = map(prompt_of, seen)
    assert first == second


def test_items_that_are_no_turns_are_skipped_and_named() -> None:
    items: list[Json] = [
        {"role": "user", "content": "Hi"},
        {"type": "web_search_call", "id": "a"},
        {"type": "mcp_list_tools"},
    ]
    with live() as service:
        answer = service.post(orjson.dumps({"input": items}), "/v1/responses")
    assert answer.headers["x-ignored-fields"] == "input.web_search_call, input.mcp_list_tools"


@pytest.mark.parametrize("kind", ["function_call_output", "custom_tool_call_output"])
def test_what_a_tool_returns_and_no_text_can_say_is_replaced_and_named(kind: str) -> None:
    """Codex offers a tool that shows an image to the model."""
    image = {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "high"}
    parts = [{"type": "input_text", "text": "a.png: "}, image, {"type": "input_file", "file_id": "file-1"}]
    items = [called("f", {})[0], OF | {"type": kind, "output": parts}]
    request, ignored = parse(ResponseRequest, orjson.dumps({"input": items}))
    told = "a.png: [Here was an image, which this model cannot see.][Here was a file, which this model cannot see.]"
    assert as_chat(request).messages[-1].content == told
    assert ignored == ("function_call_output.input_image", "function_call_output.input_file")
    assert ITEM_LIST.validate_json(to_json(request.input)) == request.input


TEXTS = st.text("ab ", min_size=1, max_size=5)
CALLED = st.tuples(st.sampled_from("fg"), st.dictionaries(TEXTS, st.integers(), max_size=2), TEXTS)
ASSISTANT = st.tuples(st.none() | TEXTS, st.none() | TEXTS, st.lists(CALLED, max_size=3))
TURNS = st.lists(st.tuples(TEXTS, ASSISTANT.filter(lambda turn: bool(turn[1] or turn[2]))), min_size=1, max_size=3)
KEPT: Any = st.fixed_dictionaries(
    {}, optional={"id": st.none() | TEXTS, "status": st.just("completed"), "phase": st.none(), "created_by": TEXTS}
)


@given(turns=TURNS, data=st.data())
def test_the_same_conversation_is_the_same_as_in_chats(turns: list[Any], data: st.DataObject) -> None:
    messages: list[Json] = [{"role": "system", "content": "Be brief."}]
    items: list[Json] = []
    for question, (thought, text, calls) in turns:
        messages.append({"role": "user", "content": question})
        items.append({"role": "user", "content": question})
        made: list[Json] = [
            {"id": str(n), "function": {"name": name, "arguments": json.dumps(arguments)}}
            for n, (name, arguments, _) in enumerate(calls)
        ]
        said: Json = {"role": "assistant", "content": text, "reasoning_content": thought, "tool_calls": made or None}
        messages.append(said)
        if thought:
            items.append({"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": thought}]})
        if text:
            items.append({"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]})
        items += [{"type": "function_call", "call_id": call["id"]} | call["function"] for call in made]
        for n, (*_, result) in enumerate(calls):
            messages.append({"role": "tool", "tool_call_id": str(n), "content": result})
            items.append({"type": "function_call_output", "call_id": str(n), "output": result})
    items = [data.draw(KEPT) | item for item in items]
    asked, _ = parse(ResponseRequest, orjson.dumps({"input": items, "instructions": "Be brief."}))
    assert as_chat(asked).messages == parse(ChatRequest, orjson.dumps({"messages": messages}))[0].messages


# Refusals


@pytest.fixture(scope="module")
def refusing() -> Iterator[Live]:
    """One server for all that it refuses before it has anything to run."""
    with live() as service:
        yield service
        assert not service.engine.batches


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("previous_response_id", "resp_1", "previous_response_id"),
        ("conversation", "conv_1", "conversation"),
        ("conversation", {"id": "conv_1"}, "conversation"),
        ("prompt", {"id": "pmpt_1"}, "prompt"),
    ],
)
def test_what_needs_stored_state_is_refused_by_name(refusing: Live, field: str, value: Any, param: str) -> None:
    error = refusal(refusing, 400, **{field: value})
    assert error["param"] == param
    assert "stored state is not kept here" in error["message"]


def test_who_wants_an_answer_later_is_told_to_wait_for_it(refusing: Live) -> None:
    error = refusal(refusing, 400, background=True)
    assert error["param"] == "background"
    assert "leave the field out" in error["message"]


@pytest.mark.parametrize("item", [{"type": "item_reference"}, {}, {"type": None}])
def test_who_refers_to_an_item_is_told_to_send_it(refusing: Live, item: Json) -> None:
    """The AI SDK's provider for OpenAI refers to all that was answered, unless it is told to store nothing."""
    error = refusal(refusing, 400, input=[{"role": "user", "content": "Hi"}, item | {"id": "msg_1"}])
    assert error["param"] == "input"
    assert "send the item itself" in error["message"]
    assert "store: false" in error["message"]


@pytest.mark.parametrize("kind", ["compaction", "context_compaction"])
def test_a_conversation_that_only_another_service_can_read_is_refused(refusing: Live, kind: str) -> None:
    error = refusal(refusing, 400, input=[{"type": kind, "encrypted_content": "x"}, {"role": "user", "content": "Hi"}])
    assert error["param"] == "input.0"
    assert kind in error["message"]


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
        ({"input": [{"type": "computer_call"}]}, "input"),
        ({"input": [{"type": {"a": 1}}]}, "input.0"),
        ({"text": {"format": {"type": ["a"]}}}, "text.format"),
        ({"input": [{"role": "robot", "content": "Hi"}]}, "input.0.message.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.message.content"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.message.content"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": ""}]}, "input.0.function_call.call_id"),
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, "input"),
        ({"input": [{"role": "user", "content": "refuse me"}]}, "input"),
        ({"input": "x" * 5000}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": True}, "max_output_tokens"),
        ({"temperature": 9}, "temperature"),
        ({"top_p": "1"}, "top_p"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"stream": 1}, "stream"),
        ({"seed": "7"}, "seed"),
        ({"top_k": -2}, "top_k"),
        ({"n": 2}, "n"),
        ({"background": 0}, "background"),
        ({"tools": [{"type": 5, "name": "f"}]}, "tools.0.type"),
        ({"tools": [TOOL | {"parameters": {"type": "array"}}]}, "tools.0.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name"),
        ({"tools": [TOOL], "tool_choice": "weather"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "tools": [{"name": "f", "namespace": ""}]}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "json_schema": {"schema": {}}}}}, "text.format.schema"),
        ({"text": {"format": "json"}}, "text.format"),
        ({"reasoning": {"effort": "extreme"}}, "reasoning.effort"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    ],
)
def test_what_is_wrong_is_refused_with_the_field_s_name(refusing: Live, fields: Json, param: str) -> None:
    assert refusal(refusing, 400, **fields)["param"] == param


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice"),
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
