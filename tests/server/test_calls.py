"""Laws of tools over HTTP: what is offered, what of it is skipped, and in which form a call is answered."""

from contextlib import AbstractContextManager
from typing import Any

import orjson
import pytest
from transformers import PreTrainedTokenizerFast

from batching.types import Request
from server.model.text import Text
from server.settings import parse
from tests.live import BYTES, QUESTION, Live, byte_tokenizer, frames, live, scripted, tokens_of
from tests.llama import llama_tokenizer
from tests.server.test_app import error_of, remembering
from tests.server.test_choices import telling

ODD = 'say "hi" <|end|>'
KNOWING = "{% for t in tools or [] %}<tool_call>{{ t.function.name }}\n{% endfor %}" + (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    '{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "{% endfor %}<|end|>{% endfor %}<assistant>"
)
"""A template that knows tools, and writes names as they are."""


def function(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | fields}


def calls(*names: str, tokenizer: PreTrainedTokenizerFast = BYTES) -> str:
    """Calls as a model of this tokenizer writes them."""
    tools = Text(tokenizer).format.tools
    return tools.separator.join('{"a": 1}'.join(tools.around(name)) for name in names)


def choice_of(service: Live, **fields: Any) -> dict[str, Any]:
    response = service.chat(**fields)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def deltas_of(service: Live, **fields: Any) -> tuple[list[dict[str, Any]], str]:
    """What the chunks of a streamed answer say, and why it ended."""
    choices = [chunk["choices"][0] for chunk in frames(service.chat(stream=True, **fields))[:-1]]
    return [choice["delta"] for choice in choices], choices[-1]["finish_reason"]


def prompt_of(request: Request) -> str:
    return str(BYTES.decode(list(request.prompt)))


TOKENIZERS = {
    "told in words": BYTES,
    "its own template": byte_tokenizer(KNOWING),
    "Llama's template": llama_tokenizer(),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]


def saying(
    text: str, tokenizer: PreTrainedTokenizerFast = BYTES, seen: list[Request] | None = None
) -> AbstractContextManager[Live]:
    """A server whose model says this; `seen` keeps the requests."""
    engine = scripted(remembering([] if seen is None else seen, text))
    return live(engine, tokenizer=tokenizer, default_max_tokens=500)


# Which calls are calls


@pytest.mark.parametrize("name", ["f", "other", "智能体_0", "search.docs_0", "x" * 128])
def test_a_call_is_one_whether_its_function_was_offered_or_not(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    tools = [function("f"), function("智能体_0")]
    with saying(calls(name, "f", tokenizer=tokenizer), tokenizer) as service:
        choice = choice_of(service, tools=tools)
        deltas, finish = deltas_of(service, tools=tools)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == [name, "f"]
    called = [call["function"] for delta in deltas for call in delta.get("tool_calls", []) if "id" in call]
    assert ([call["name"] for call in called], finish) == ([name, "f"], "tool_calls")


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": [function("f")], "tool_choice": "none"}])
def test_without_tools_to_call_a_call_is_text(tokenizer: PreTrainedTokenizerFast, fields: dict[str, Any]) -> None:
    said = calls("f", tokenizer=tokenizer)
    with saying(said, tokenizer) as service:
        choice = choice_of(service, **fields)
    assert (choice["message"]["content"], choice["finish_reason"]) == (said, "stop")
    assert "tool_calls" not in choice["message"]


def test_a_name_that_the_format_cannot_carry_is_another_one_inside_and_itself_outside(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    seen: list[Request] = []
    inside = "say _hi_ __end___1"
    tool = function(ODD, parameters={"type": "object", "properties": {}})
    tools = [function("f"), tool]
    with saying(calls(inside, "f", tokenizer=tokenizer), tokenizer, seen) as service:
        message = choice_of(service, tools=tools)["message"]
        result = {"role": "tool", "tool_call_id": "", "name": ODD, "content": "done"}
        choice_of(service, tools=tools, messages=[*QUESTION, message, result])
        choice_of(service, tools=tools, tool_choice={"type": "function", "function": {"name": ODD}})
    assert [call["function"]["name"] for call in message["tool_calls"]] == [ODD, "f"]
    assert [prompt_of(request).count(inside) for request in seen] == [1, 2, 1]
    assert not any('"hi"' in prompt_of(request) for request in seen)
    assert seen[2].grammar is not None


# What is offered


def test_tools_that_are_no_functions_are_named_in_a_header_and_not_offered() -> None:
    seen: list[Request] = []
    others: list[Any] = [{"type": "web_search"}, {"type": "custom", "custom": {"name": "x"}}, {"type": "web_search"}]
    with live(scripted(remembering(seen))) as service:
        with_others = service.chat(tools=[*others, function("f")], more=1)
        only_others = service.chat(tools=others)
        without = service.chat(tools=[function("f")])
        assert with_others.headers["x-ignored-fields"] == "more, tools.web_search, tools.custom"
        assert only_others.headers["x-ignored-fields"] == "tools.web_search, tools.custom"
        assert "x-ignored-fields" not in without.headers
        assert service.sample("microbatch_ignored_fields_total") == 5
        error_of(service.chat(tools=others, tool_choice="required"), 400, None)
    first, second, third = map(prompt_of, seen)
    assert first == third
    assert "web_search" not in first + second


def test_tools_that_are_no_functions_can_be_refused_by_name() -> None:
    strict = parse(["--unknown-fields", "refuse"]).unknown_fields
    with live(unknown_fields=strict) as service:
        refused = error_of(service.chat(tools=[{"type": "custom"}]), 400, "unsupported_field")
        assert refused["param"] == "tools.custom"
        assert service.chat(tools=[function("f")]).status_code == 200


def test_only_the_tools_that_are_allowed_are_shown_and_demanded() -> None:
    seen: list[Request] = []
    one = {"type": "function", "function": {"name": "second"}}
    tools = [function("first"), function("second")]
    flat = [{"type": "function", "name": name} for name in ("first", "second")]
    with saying(calls("second"), seen=seen) as service:
        for mode in ("auto", "required"):
            choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [one]}}
            choice_of(service, tools=tools, tool_choice=choice)
            told = {"type": "allowed_tools", "mode": mode, "tools": [flat[1]]}
            body = {"input": "Hi", "tools": flat, "tool_choice": told, "max_output_tokens": 500}
            answer = service.post(orjson.dumps(body), "/v1/responses").json()
            assert answer["tool_choice"] == told
    assert all("second" in prompt_of(request) and "first" not in prompt_of(request) for request in seen)
    assert [request.grammar is not None for request in seen] == [False, False, True, True]
    assert len({request.prompt for request in seen}) == 1


# The older form

FUNCTIONS = [{"name": "f", "description": "Does it."}, {"name": "g"}]


def test_functions_are_answered_in_their_own_form() -> None:
    with saying(calls("f", "g")) as service:
        choice = choice_of(service, functions=FUNCTIONS)
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "function_call": {"name": "f", "arguments": '{"a": 1}'},
    }
    assert choice["finish_reason"] == "function_call"


def test_functions_are_answered_in_their_own_form_streamed() -> None:
    with saying(calls("f", "g")) as service:
        deltas, finish = deltas_of(service, functions=FUNCTIONS, function_call="auto")
    role, begun, *others, end = deltas
    assert role == {"role": "assistant", "content": ""}
    assert begun == {"function_call": {"name": "f", "arguments": ""}}
    assert all(list(delta) == ["function_call"] and list(delta["function_call"]) == ["arguments"] for delta in others)
    assert "".join(delta["function_call"]["arguments"] for delta in others) == '{"a": 1}'
    assert (end, finish) == ({}, "function_call")


def test_an_older_client_reads_its_call_and_sends_the_result_back() -> None:
    fields: Any = {"functions": FUNCTIONS}
    with saying(calls("f")) as service, service.openai() as client:
        answer = client.chat.completions.create(model="scripted", messages=QUESTION, **fields)
        message = answer.choices[0].message
        assert message.function_call is not None
        assert message.function_call.name == "f"
        history: Any = [*QUESTION, message, {"role": "function", "name": "f", "content": "7"}]
        again = client.chat.completions.create(model="scripted", messages=history, **fields)
    assert again.choices[0].finish_reason == "function_call"


def test_functions_that_are_not_called_leave_a_plain_answer() -> None:
    with saying("Hello!") as service:
        choice = choice_of(service, functions=FUNCTIONS)
        assert choice["message"] == {"role": "assistant", "content": "Hello!", "refusal": None}
        assert (choice["finish_reason"], deltas_of(service, functions=FUNCTIONS)[1]) == ("stop", "stop")


def test_functions_reach_the_model_as_tools_do() -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen))) as service:
        service.chat(functions=FUNCTIONS)
        service.chat(tools=[{"type": "function", "function": each} for each in FUNCTIONS])
        service.chat(functions=FUNCTIONS, function_call={"name": "g"})
        service.chat(functions=FUNCTIONS, function_call="none")
        service.chat()
    assert seen[0].prompt == seen[1].prompt == seen[2].prompt
    assert seen[3].prompt == seen[4].prompt
    assert [request.grammar is not None for request in seen] == [False, False, True, False, False]


@pytest.mark.parametrize("fields", [{"functions": FUNCTIONS}, {"tools": [function("f")], "parallel_tool_calls": False}])
def test_what_arrives_with_the_only_call_and_comes_after_it_is_no_part_of_the_answer(fields: dict[str, Any]) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {}'
    asked = fields | {"logprobs": True, "return_token_ids": True}
    with live(telling(call + "}\n</tool_call>\n" + calls("f"))) as service:
        answer = service.chat(**asked).json()
        *chunks, _ = frames(service.chat(stream=True, **asked, stream_options={"include_usage": True}))
    [choice] = answer["choices"]
    streamed = [choice for chunk in chunks for choice in chunk["choices"]]
    assert choice["token_ids"] == [token for piece in streamed for token in piece.get("token_ids", [])]
    assert choice["token_ids"] == tokens_of(call)
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == call
    assert answer["usage"]["completion_tokens"] == chunks[-1]["usage"]["completion_tokens"] == len(call)


BROKEN = '<tool_call>\n{"name": "f", "arguments": {"a": </tool_call>\n'


@pytest.mark.parametrize("fields", [{"functions": FUNCTIONS}, {"tools": [function("f")], "parallel_tool_calls": False}])
def test_where_one_call_is_allowed_one_that_breaks_off_is_the_only_one(fields: dict[str, Any]) -> None:
    with saying(BROKEN + calls("f", "f")) as service:
        said = orjson.dumps([delta for delta in deltas_of(service, **fields)[0]]).decode()
        message = choice_of(service, **fields)["message"]
    assert said.count('"name"') == 1
    made = message["function_call"] if "functions" in fields else message["tool_calls"][0]["function"]
    assert made == {"name": "f", "arguments": '{"a": '}
    assert len(message.get("tool_calls", [0])) == 1
