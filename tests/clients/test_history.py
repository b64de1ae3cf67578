"""The law of history: whatever is answered here can be sent back in any client's dump of it, and is the same prompt."""

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from openai import OpenAI

from tests.clients.answers import ANSWERS, written
from tests.clients.model import QUESTIONS, scripted_model
from tests.live import live

Json = dict[str, Any]
BYE: Json = {"role": "user", "content": QUESTIONS["bye"]}
TOOLS: Any = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fg"]


def plain(client: OpenAI, messages: Any) -> Any:
    return client.chat.completions.create(model="scripted", messages=messages, tools=TOOLS).choices[0].message


def streamed(client: OpenAI, messages: Any) -> Any:
    with client.chat.completions.stream(model="scripted", messages=messages, tools=TOOLS) as stream:
        return stream.get_final_completion().choices[0].message


DUMPS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda message: message,
    "nulls": lambda message: message.model_dump(),
    "without nulls": lambda message: message.model_dump(exclude_none=True),
    "as it came": lambda message: message.to_dict(),
    "json": lambda message: json.loads(message.model_dump_json()),
    "langchain": lambda message: through_langchain(message),
}


def through_langchain(message: Any) -> Any:
    """As LangChain keeps it and sends it back."""
    base: Any = import_module("langchain_openai.chat_models.base")
    return base._convert_message_to_dict(base._convert_dict_to_message(message.model_dump()))


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[OpenAI, list[str]]]:
    seen: list[str] = []
    with live(scripted_model(seen), default_max_tokens=1024) as found, found.openai() as client:
        yield client, seen


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=ANSWERS)
def test_any_answer_goes_back_in_any_dump_as_the_same_prompt(service: tuple[OpenAI, list[str]], answer: Any) -> None:
    client, seen = service
    asked: Json = {"role": "user", "content": f"Go. [[{written(answer)}]]"}
    prompts = set()
    for ask in (plain, streamed):
        message = ask(client, [asked])
        results = [{"role": "tool", "tool_call_id": call.id, "content": "1"} for call in message.tool_calls or ()]
        for dump in DUMPS.values():
            assert plain(client, [asked, dump(message), *results, BYE]).content == "Goodbye!"
            prompts.add(seen[-1])
    assert len(prompts) == 1, prompts


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=ANSWERS)
def test_any_response_goes_back_in_any_dump_as_the_same_prompt(service: tuple[OpenAI, list[str]], answer: Any) -> None:
    client, seen = service
    asked: Json = {"role": "user", "content": f"Go. [[{written(answer)}]]"}
    tools: Any = [{"type": "function"} | tool["function"] for tool in TOOLS]
    response = client.responses.create(model="scripted", input=[asked], tools=tools)  # type: ignore[list-item]
    with client.responses.stream(model="scripted", input=[asked], tools=tools) as stream:  # type: ignore[list-item]
        folded = stream.get_final_response()
    prompts = set()
    for found in (response, folded):
        calls = [item for item in found.output if item.type == "function_call"]
        results = [{"type": "function_call_output", "call_id": call.call_id, "output": "1"} for call in calls]
        for name in ("itself", "nulls", "without nulls", "as it came", "json"):
            items: Any = [asked, *map(DUMPS[name], found.output), *results, BYE]
            assert client.responses.create(model="scripted", input=items, tools=tools).output_text == "Goodbye!"
            prompts.add(seen[-1])
    chat = plain(client, [asked])
    made = [{"role": "tool", "tool_call_id": call.id, "content": "1"} for call in chat.tool_calls or ()]
    plain(client, [asked, chat, *made, BYE])
    assert prompts == {seen[-1]}
