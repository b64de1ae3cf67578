"""Laws of Anthropic's Messages API, asked with Anthropic's own client."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.fields import parse
from server.http.errors import ApiError
from server.openai.anthropic import arguments
from server.openai.anthropic_request import MessageRequest, as_chat
from server.openai.requests import ChatRequest
from tests.clients.answers import ANSWERS, written
from tests.clients.model import QUESTIONS, scripted_model
from tests.live import BYTES, END, TEMPLATE, Address, Live, byte_tokenizer, eventually, live, scripted

Json = dict[str, Any]
HI: list[Json] = [{"role": "user", "content": "Hi"}]
BYE: Json = {"role": "user", "content": QUESTIONS["bye"]}
TOOLS: list[Json] = [{"name": name, "input_schema": {"type": "object"}} for name in "fg"]
FUNCTIONS: list[Json] = [{"type": "function", "function": {"name": n, "parameters": {"type": "object"}}} for n in "fg"]


def anthropic() -> Any:
    """Their library. It takes seconds, which every process that collects tests would wait for."""
    return pytest.importorskip("anthropic")


def asked(answer: Any) -> Json:
    return {"role": "user", "content": f"Go. [[{written(answer)}]]"}


@contextmanager
def client_of(service: Address, **options: Any) -> Iterator[Any]:
    with anthropic().Anthropic(**{"base_url": service.url, "api_key": "none", "max_retries": 0} | options) as client:
        yield client


@pytest.fixture(scope="module")
def talk() -> Iterator[tuple[Live, Any, list[str]]]:
    """A service that answers as it is asked to, a client, and the prompts that the model got."""
    seen: list[str] = []
    with live(scripted_model(seen)) as service, client_of(service) as client:
        yield service, client, seen


def create(client: Any, messages: Any, **fields: Any) -> Any:
    return client.messages.create(**{"model": "scripted", "max_tokens": 1024, "messages": messages} | fields)


def streamed(client: Any, messages: Any, **fields: Any) -> Any:
    with client.messages.stream(model="scripted", max_tokens=1024, messages=messages, **fields) as stream:
        return stream.get_final_message()


def post(service: Address, path: str = "/v1/messages", headers: Any = None, **fields: Any) -> httpx2.Response:
    return service.post(orjson.dumps({"messages": HI, "max_tokens": 1024} | fields), path, headers=headers)


def events_of(response: httpx2.Response) -> list[Json]:
    """The events of a stream, each of which has its type twice."""
    *blocks, rest = response.text.split("\n\n")
    assert rest == ""
    pairs = [re.fullmatch(r"event: (\w+)\ndata: (.*)", block) for block in blocks]
    events = [(pair[1], orjson.loads(pair[2])) for pair in pairs if pair]
    assert len(events) == len(blocks)
    assert all(kind == event["type"] for kind, event in events)
    return [event for _, event in events]


# Answers


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=ANSWERS)
def test_an_answer_is_the_same_whole_and_streamed(talk: Any, answer: Any) -> None:
    _, client, _ = talk
    thought, said, calls = answer
    whole, parts = (ask(client, [asked(answer)], tools=TOOLS) for ask in (create, streamed))

    def bare(message: Any) -> Any:
        blocks = [block.model_dump(include={"type", "text", "thinking", "name", "input"}) for block in message.content]
        return blocks, message.stop_reason, message.usage.input_tokens, message.usage.output_tokens

    assert bare(whole) == bare(parts)
    expected = [{"type": "thinking", "thinking": thought}] if thought else []
    expected += [{"type": "text", "text": said}] if said else []
    expected += [{"type": "tool_use", "name": name, "input": given_to} for name, given_to in calls]
    assert bare(whole)[0] == (expected or [{"type": "text", "text": ""}])
    assert whole.stop_reason == ("tool_use" if calls else "end_turn")


BLOCK = "(?:content_block_start (?:content_block_delta )*content_block_stop )"


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=ANSWERS)
def test_events_come_in_the_order_of_the_api(talk: Any, answer: Any) -> None:
    service, _, _ = talk
    events = events_of(post(service, messages=[asked(answer)], tools=TOOLS, stream=True))
    order = "".join(event["type"] + " " for event in events)
    assert re.fullmatch(f"message_start ping {BLOCK}+message_delta message_stop ", order)
    place, last = -1, ""
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == place + 1
            place, last = event["index"], event["content_block"]["type"]
        elif event["type"] == "content_block_delta":
            assert event["index"] == place
            kinds = {"thinking": ("thinking_delta", "signature_delta"), "text": ("text_delta",)}
            assert event["delta"]["type"] in kinds.get(last, ("input_json_delta",))
    assert events[0]["message"]["stop_reason"] is None
    assert events[-2]["usage"]["output_tokens"] == len(written(answer).strip().encode()) + 1


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=ANSWERS)
def test_any_answer_goes_back_as_the_prompt_that_a_chat_makes_of_it(talk: Any, answer: Any) -> None:
    service, client, seen = talk
    prompts = set()
    for ask in (create, streamed):
        message = ask(client, [asked(answer)], tools=TOOLS)
        ids = [block.id for block in message.content if block.type == "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": name, "content": "1"} for name in ids]
        told = [{"role": "user", "content": [*results, {"type": "text", "text": BYE["content"]}]}]
        for content in (message.content, [block.model_dump() for block in message.content]):
            history = [asked(answer), {"role": "assistant", "content": content}, *told]
            assert create(client, history, tools=TOOLS).content[0].text == "Goodbye!"
            prompts.add(seen[-1])
    chat = service.chat(messages=[asked(answer)], tools=FUNCTIONS, max_tokens=1024).json()["choices"][0]["message"]
    made = [{"role": "tool", "tool_call_id": call["id"], "content": "1"} for call in chat.get("tool_calls", [])]
    service.chat(messages=[asked(answer), chat, *made, BYE], tools=FUNCTIONS)
    assert prompts == {seen[-1]}


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_ends_the_answer_and_is_named(talk: Any, stream: bool) -> None:
    _, client, _ = talk
    ask = streamed if stream else create
    said = [{"role": "user", "content": "[[one two three]]"}]
    message = ask(client, said, stop_sequences=["three", " two"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " two")
    assert message.content[0].text == "one"
    message = ask(client, said, stop_sequences=["four"])
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_off_says_so_and_keeps_what_can_be_read(talk: Any, stream: bool) -> None:
    service, _, _ = talk
    call = '<tool_call>\n{"name": "f", "arguments": {"x": "a", "y": "'
    body: Json = {"messages": [{"role": "user", "content": f'[[{call}bc"}}}}\n</tool_call>]]'}], "tools": TOOLS}
    answer = post(service, **body, max_tokens=len(call) + 1, stream=stream)
    if stream:
        *_, end, _ = events_of(answer)
        assert end["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    else:
        assert answer.json()["stop_reason"] == "max_tokens"
        [block] = answer.json()["content"]
        assert (block["name"], block["input"]) == ("f", {"x": "a"})


@pytest.mark.parametrize(
    ("written_as", "given_to"),
    [
        ('{"x": "a", "y": True}', {}),
        ('{"x": "a\nb"}', {}),
        ('{"x": "a", "y": [1, {"z": null}]}', {"x": "a", "y": [1, {"z": None}]}),
    ],
)
def test_a_client_reads_a_streamed_call_whose_arguments_are_no_json(talk: Any, written_as: str, given_to: Json) -> None:
    """The same object comes whole and streamed: an error of the tool, which the model can mend."""
    _, client, _ = talk
    call = f'<tool_call>\n{{"name": "f", "arguments": {written_as}}}\n</tool_call>'
    for ask in (create, streamed):
        message = ask(client, [{"role": "user", "content": f"[[{call}]]"}], tools=TOOLS)
        [block] = message.content
        assert (block.name, block.input) == ("f", given_to)


@given(
    st.dictionaries(st.text(), st.recursive(st.integers() | st.text() | st.none(), st.lists, max_leaves=5)), st.data()
)
def test_the_arguments_of_a_call_that_is_cut_off_are_an_object(value: Any, data: Any) -> None:
    text = json.dumps(value)
    assert arguments(text) == value
    cut = arguments(text[: data.draw(st.integers(0, len(text)))])
    assert cut.keys() <= value.keys()


@pytest.mark.parametrize("text", ["", "nothing", "[1]", "{]", '{"a": NaN}', '{"a": "\\ud800"}', "[" * 5000])
def test_what_is_no_object_is_an_empty_one(text: str) -> None:
    assert arguments(text) == {}


# Requests


AS_SENT = str  # names as they are


def chat_of(**fields: Any) -> ChatRequest:
    return as_chat(parse(MessageRequest, orjson.dumps({"messages": HI, "max_tokens": 8} | fields))[0])


def shown(chat: ChatRequest) -> list[Any]:
    return [message.for_template(AS_SENT) for message in chat.messages]


def test_system_is_a_text_or_blocks_and_comes_first(talk: Any) -> None:
    said = {"role": "system", "content": "Be brief."}
    assert shown(chat_of(system="Be brief."))[0] == said
    assert shown(chat_of(system=[{"type": "text", "text": "Be brief.", "cache_control": {}}]))[0] == said
    two = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    assert shown(chat_of(system=two))[0]["content"] == "Be brief.\nBe kind."
    billed = {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=abc;"}
    assert shown(chat_of(system=[billed, *two])) == shown(chat_of(system=two))
    assert shown(chat_of(system=[billed])) == shown(chat_of())


def test_results_of_tools_are_messages_in_the_order_of_the_blocks() -> None:
    content = [
        {"type": "text", "text": "a"},
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "b"}]},
        {"type": "tool_result", "tool_use_id": "2", "content": "c", "is_error": True},
        {"type": "tool_result", "tool_use_id": "3"},
        {"type": "text", "text": "d"},
    ]
    turns = [
        (turn["role"], turn["content"]) for turn in shown(chat_of(messages=[{"role": "user", "content": content}]))
    ]
    assert turns == [("user", "a"), ("tool", "b"), ("tool", "Error: c"), ("tool", ""), ("user", "d")]


DOCUMENTS: list[tuple[Json, str]] = [
    (
        {
            "type": "search_result",
            "source": "https://example.org",
            "title": "Weather",
            "content": [{"type": "text", "text": "It rains."}],
        },
        "Weather\nhttps://example.org\nIt rains.",
    ),
    ({"source": {"type": "text", "media_type": "text/plain", "data": "It rains."}}, "It rains."),
    ({"source": {"type": "content", "content": "It rains."}, "citations": {"enabled": True}}, "It rains."),
    (
        {
            "source": {
                "type": "content",
                "content": [{"type": "text", "text": "It"}, {"type": "text", "text": "rains."}],
            },
            "title": "Weather",
            "context": "From May.",
            "cache_control": {"type": "ephemeral"},
        },
        "Weather\nFrom May.\nIt\nrains.",
    ),
]


@pytest.mark.parametrize(("document", "text"), DOCUMENTS)
def test_a_document_or_search_result_that_is_text_is_read(document: Json, text: str) -> None:
    block = {"type": "document"} | document
    asked: list[Json] = [block, {"type": "text", "text": "Does it?"}]
    [turn] = shown(chat_of(messages=[{"role": "user", "content": asked}]))
    assert turn["content"] == f"{text}\nDoes it?"
    result = {"type": "tool_result", "tool_use_id": "1", "content": [block]}
    [told] = shown(chat_of(messages=[{"role": "user", "content": [result]}]))
    assert told["content"] == text


@pytest.mark.parametrize(("kind", "what"), [("image", "an image"), ("document", "a document")])
def test_what_stands_beside_a_tool_s_result_is_replaced_as_in_it(kind: str, what: str) -> None:
    """Claude Code sends the pages of a PDF that its tool has read so."""
    result = {"type": "tool_result", "tool_use_id": "1", "content": "PDF file read: a.pdf"}
    pages = {"type": kind, "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}}
    body: Json = {"messages": [*HI, {"role": "user", "content": [result, pages]}], "max_tokens": 8}
    request, ignored = parse(MessageRequest, orjson.dumps(body))
    told = [(turn["role"], turn["content"]) for turn in shown(as_chat(request))[1:]]
    assert told == [
        ("tool", "PDF file read: a.pdf"),
        ("user", f"[Here was {what}, which this model cannot see.]"),
    ]
    assert ignored == (f"messages.{kind}",)


def test_what_anthropic_s_own_tools_did_is_skipped_and_named() -> None:
    """A conversation may have begun with a model of Anthropic's that can search."""
    content: list[Json] = [
        {"type": "server_tool_use", "id": "1", "name": "web_search", "input": {"query": "q"}},
        {"type": "text_editor_code_execution_tool_result", "tool_use_id": "1", "content": []},
        {"type": "text", "text": "It rains."},
    ]
    body: Json = {"messages": [*HI, {"role": "assistant", "content": content}, *HI], "max_tokens": 8}
    request, ignored = parse(MessageRequest, orjson.dumps(body))
    assert [turn["content"] for turn in shown(as_chat(request))] == ["Hi", "It rains.", "Hi"]
    assert ignored == ("messages.server_tool_use", "messages.text_editor_code_execution_tool_result")


@pytest.mark.parametrize(
    ("choice", "demanded", "offered"),
    [
        (None, "", "fg"),
        ({"type": "auto"}, "", "fg"),
        ({"type": "any"}, "fg", "fg"),
        ({"type": "tool", "name": "g"}, "g", "fg"),
        ({"type": "none"}, "", ""),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_a_tool_choice_means_what_it_says(choice: Any, demanded: str, offered: str, alone: bool) -> None:
    chat = chat_of(tools=TOOLS, tool_choice=choice and choice | {"disable_parallel_tool_use": alone})
    assert "".join(tool.function.name for tool in chat.demanded) == demanded
    assert "".join(tool.function.name for tool in chat.offered) == offered
    assert chat.one_call == bool(choice and alone)


def test_a_tool_is_shown_as_a_chat_shows_it() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "string"}}}
    tool = {"name": "f", "description": "Does.", "input_schema": schema, "cache_control": {"type": "ephemeral"}}
    function = {"name": "f", "description": "Does.", "parameters": schema}
    search = {"type": "web_search_20250305", "name": "web_search"}
    request, ignored = parse(MessageRequest, orjson.dumps({"messages": HI, "max_tokens": 8, "tools": [tool, search]}))
    assert [each.for_template(AS_SENT)["function"] for each in as_chat(request).offered] == [function]
    assert ignored == ("tools.web_search_20250305",)


@pytest.mark.parametrize(
    ("thinking", "thinks", "budget"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, True, 1024),
        ({"type": "disabled"}, False, None),
        ({"type": "adaptive"}, None, None),
        (None, None, None),
    ],
)
def test_thinking_is_the_switch_and_the_budget_of_chats(thinking: Any, thinks: Any, budget: Any) -> None:
    chat = chat_of(thinking=thinking)
    assert (chat.thinks, chat.budget) == (thinks, budget)


@given(st.lists(st.sampled_from(["asked", "told", "noted", "called"]), min_size=1))
def test_between_tools_thinks_only_where_a_tool_has_just_returned_something(kinds: list[str]) -> None:
    turns = {
        "asked": {"role": "user", "content": "a"},
        "told": {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "b"}]},
        "noted": {"role": "system", "content": "c"},
        "called": {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
    }
    messages = [turns[kind] for kind in ["asked", "called", *kinds, "noted"]]
    news = kinds[len(kinds) - kinds[::-1].index("called") :] if "called" in kinds else kinds
    chat = chat_of(messages=messages, thinking={"type": "between_tools"})
    assert chat.thinks is (None if "told" in news else False)


def test_a_thought_ends_at_its_budget() -> None:
    forced = []

    def script(request: Any, position: int) -> int:
        forced.append(request.sampling.forced)
        return END

    with live(scripted(script), tokenizer=byte_tokenizer(tags=("<think>", "</think>"))) as service:
        post(service, thinking={"type": "enabled", "budget_tokens": 3})
        post(service, thinking={"type": "disabled"})
    assert [end and end.after for end in forced] == [3, None]


X_OF_TEXT: Json = {"type": "object", "properties": {"x": {"type": "string"}}}
FORMAT: Json = {"type": "json_schema", "schema": X_OF_TEXT}


@pytest.mark.parametrize(
    "fields",
    [
        {"output_config": {"effort": "high", "format": FORMAT}},
        {"output_config": {"effort": "high"}, "output_format": FORMAT},
    ],
)
def test_a_format_is_the_response_format_of_chats(fields: Json) -> None:
    chat = chat_of(**fields)
    assert chat.response_format is not None
    assert chat.response_format.json_schema is not None
    assert chat.response_format.json_schema.schema_ == X_OF_TEXT
    assert chat.thinks is None


UNKNOWN: Json = {
    "metadata": {"user_id": "me"},
    "service_tier": "auto",
    "context_management": {"edits": []},
    "cache_control": {"type": "ephemeral"},
    "betas": ["x-1"],
    "container": "c",
    "made_up": 1,
}


def test_unknown_fields_and_headers_change_nothing(talk: Any) -> None:
    service, _, seen = talk
    asks: Json = {"messages": [{"role": "user", "content": QUESTIONS["hello"]}]}
    headers = {"anthropic-version": "2099-01-01", "anthropic-beta": "x-1,y-2"}
    plain, other = post(service, **asks), post(service, "/messages?beta=true", headers, **asks, **UNKNOWN)
    assert plain.json()["content"] == other.json()["content"] == [{"type": "text", "text": "Hello!"}]
    assert seen[-1] == seen[-2]
    assert other.headers["x-ignored-fields"] == "container, made_up"


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_of_tools_has_the_whole_conversation_in_each_request(talk: Any, stream: bool) -> None:
    """The client would rather have the service keep it, and learns that it does not."""
    _, client, seen = talk

    @anthropic().beta_tool  # type: ignore[untyped-decorator]
    def weather(city: str) -> str:
        """The weather in a city."""
        return f"Sunny in {city}."

    rome: Json = {"role": "user", "content": QUESTIONS["rome"]}
    asks: Json = {"model": "scripted", "max_tokens": 1024, "tools": [weather], "messages": [rome], "stream": stream}
    run = client.beta.messages.tool_runner(system="Be brief.", **asks)
    assert run.until_done().content[0].text == "It said: Sunny in Rome."
    assert "<system>" in seen[-1]
    assert "It said" in seen[-1]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}])
def test_a_conversation_that_the_service_would_have_to_keep_is_refused(talk: Any, path: str, thread: Json) -> None:
    service, _, _ = talk
    refused = post(service, path, thread=thread)
    assert "thread is not supported" in error_in(refused, 400, "invalid_request_error")
    details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert refused.json()["error"]["details"] == details


def test_tokens_are_counted_as_a_request_has_them(talk: Any) -> None:
    _, client, _ = talk
    asks: Json = {"system": "Be brief.", "tools": TOOLS, "messages": [{"role": "user", "content": QUESTIONS["hello"]}]}
    for begun in ([], [{"role": "assistant", "content": "[[Yes]]"}]):
        messages = asks["messages"] + begun
        counted = client.messages.count_tokens(model="scripted", **asks | {"messages": messages})
        assert counted.input_tokens == create(client, **asks | {"messages": messages}).usage.input_tokens


@pytest.mark.parametrize("cut", [{"truncate_prompt_tokens": 5}, {"truncate_prompt_tokens": -1, "max_tokens": 4090}])
def test_only_the_tokens_of_a_prompt_that_are_kept_are_counted(cut: Json) -> None:
    with live(scripted("Hello!")) as service:
        counted = post(service, "/v1/messages/count_tokens", **cut).json()
        assert counted["input_tokens"] == post(service, **cut).json()["usage"]["input_tokens"]


def test_many_short_messages_do_not_keep_the_event_loop(talk: Any) -> None:
    """They take the longest of all bodies to check for their size."""
    service, _, _ = talk
    turns = [{"role": "user", "content": ""}] * 2046
    assert post(service, messages=[*turns, asked(("", "Yes.", []))]).status_code == 200


# An answer that the client begins


@given(text=st.text("ab<|end|>é ", max_size=12))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_last_turn_of_the_assistant_is_continued_as_text(talk: Any, text: str) -> None:
    _, client, seen = talk
    hello = {"role": "user", "content": QUESTIONS["hello"]}
    create(client, [hello])
    open_prompt = seen[-1]
    assert create(client, [hello, {"role": "assistant", "content": text}]).content[0].text == "Hello!"
    assert seen[-1].startswith(open_prompt)
    assert seen[-1].count("<|end|>") == open_prompt.count("<|end|>") + text.count("<|end|>")


def test_what_a_client_begins_holds_no_special_token() -> None:
    prompts = []

    def script(request: Any, position: int) -> int:
        prompts.append(request.prompt)
        return END

    with live(scripted(script)) as service:
        for begun in ("a", "a<|end|>b"):
            post(service, messages=[*HI, {"role": "assistant", "content": begun}])
    assert [prompt.count(END) for prompt in prompts] == [1, 1]
    assert str(BYTES.decode(prompts[1])).endswith("<assistant>a<|end|>b")


def test_what_a_client_begins_is_said_even_if_the_template_opens_a_thought() -> None:
    template = TEMPLATE.replace("{% if enable_thinking %}<think>{% endif %}", "<think>")
    with live(scripted("Hello!"), tokenizer=byte_tokenizer(template, ("<think>", "</think>"))) as service:
        answer = post(service, messages=[*HI, {"role": "assistant", "content": "Well: "}])
    assert answer.json()["content"] == [{"type": "text", "text": "Hello!"}]


# Errors


def error_in(response: httpx2.Response, status: int, kind: str) -> str:
    """The message of an error, which has the form of the API."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body["type"] == "error"
    assert set(body) == {"type", "error", "request_id"}
    assert body["error"]["type"] == kind
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    return str(body["error"]["message"])


INVALID: list[tuple[Json, str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "only reads text.* type image"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "only reads text.* type document"),
    (
        {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "base64", "data": "a"}}]}]},
        "only reads text.* type document",
    ),
    ({"messages": [{"role": "user", "content": [{"type": 1}]}]}, "only reads text.* type other"),
    ({"messages": [{"role": "user", "content": [1]}]}, "only reads text.* type other"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f"}]}]}, "role assistant"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "1"}]}]}, "role user"),
    ({"system": [{"type": "image"}]}, "only reads text.* type image"),
    ({"tools": [{"name": "f", "input_schema": {"type": "string"}}]}, "tools.0.*object"),
    ({"tools": [{"name": ""}]}, "tools.0"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "h"}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "needs a name"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"messages": [{"role": "assistant", "content": ""}]}, "a message before"),
    ({"messages": [*HI, {"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}]}]}, "but text"),
    ({"messages": [*HI, {"role": "assistant", "content": "a"}], "thinking": {"type": "enabled"}}, "With thinking"),
    (
        {
            "messages": [*HI, {"role": "assistant", "content": "a"}],
            "output_config": {"format": {"type": "json_schema", "schema": {}}},
        },
        "With a format",
    ),
    ({"messages": [*HI, {"role": "assistant", "content": "a"}], "output_format": FORMAT}, "With a format"),
    ({"output_config": {"format": FORMAT}, "output_format": FORMAT}, "only one of the two"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stop": ["a"]}, "stop is not supported"),
    ({"messages": [{"role": "user", "content": "a" * 2**17}]}, "^Prompt is too long"),
]


@pytest.mark.parametrize(("fields", "said"), INVALID)
def test_a_request_at_fault_is_refused_in_words(talk: Any, fields: Json, said: str) -> None:
    service, _, _ = talk
    assert re.search(said, error_in(post(service, **fields), 400, "invalid_request_error"))


@given(
    st.dictionaries(st.sampled_from(["type", "text", "content", "input", "id", "name"]), st.text() | st.integers(-9, 9))
)
def test_any_block_is_refused_with_its_place_unless_it_has_a_known_type(block: Any) -> None:
    with pytest.raises(ApiError) as caught:
        chat_of(messages=[{"role": "assistant", "content": [block]}, *HI])
    assert caught.value.status == 400
    assert (caught.value.param or "").startswith("messages.0.content.0")


def test_errors_have_the_form_and_the_class_of_the_api() -> None:
    with live(scripted("Hello!"), api_keys=("secret",), max_body_mib=0.01) as service:
        key = {"x-api-key": "secret"}
        assert "Bearer" in error_in(post(service), 401, "authentication_error")
        assert "scripted" in error_in(post(service, headers=key, model="claude"), 404, "not_found_error")
        error_in(post(service, "/v1/messages/batches", key), 404, "not_found_error")
        error_in(service.get("/v1/messages", headers=key), 405, "invalid_request_error")
        error_in(post(service, headers=key, system="a" * 20_000), 413, "request_too_large")
        error_in(service.post(b"{", "/v1/messages", headers=key), 400, "invalid_request_error")
        error_in(post(service, "/v1/messages/count_tokens", key, messages=[]), 400, "invalid_request_error")
        with client_of(service) as client, pytest.raises(anthropic().AuthenticationError):
            create(client, HI)
        with client_of(service, api_key="secret") as client, pytest.raises(anthropic().NotFoundError) as caught:
            create(client, HI, model="claude")
        assert caught.value.request_id == caught.value.body["request_id"]
    with live(ready=False) as service:
        error_in(post(service), 503, "overloaded_error")


@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_queue_have_the_form_of_the_api(stream: bool) -> None:
    with (
        live(scripted(stepped=True), queue_size=1, max_batch_size=1) as service,
        ThreadPoolExecutor(2) as pool,
    ):
        running = pool.submit(post, service)
        service.wait_running()
        waiting = pool.submit(post, service)
        service.wait_queued(1)
        error_in(post(service, stream=stream), 429, "rate_limit_error")
        service.engine.release(100)
        assert running.result().status_code == waiting.result().status_code == 200
    with live(scripted(stepped=True), request_timeout_s=0.1) as service:
        error_in(post(service, stream=stream), 504, "timeout_error")
        service.engine.release(100)


def fails(step: int) -> None:
    if step == 3:
        raise RuntimeError("kernel")


def test_an_answer_that_fails_midway_ends_with_an_error_event() -> None:
    with live(scripted("Hello!", before_step=fails)) as service:
        error_in(post(service), 500, "api_error")
        answer = post(service, stream=True)
        *events, last = events_of(answer)
        with client_of(service) as client, pytest.raises(anthropic().APIStatusError, match="failed"):
            streamed(client, HI)
    assert "message_stop" not in {event["type"] for event in events}
    said = "The model failed on this request."
    assert last == {
        "type": "error",
        "error": {"type": "api_error", "message": said},
        "request_id": answer.headers["request-id"],
    }


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions"])
def test_a_key_may_come_in_either_header(path: str, tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text("alice one\nbob two 2\n")
    good: list[Json] = [{"x-api-key": "one"}, {"authorization": "Bearer two"}, {"X-API-Key": "two"}]
    good += [{"x-api-key": "one", "authorization": "Bearer none"}, {"x-api-key": "none", "authorization": "Bearer one"}]
    bad: list[Json] = [{}, {"x-api-key": ""}, {"x-api-key": "Bearer one"}, {"x-api-key": "alice"}]
    with live(api_keys_file=file) as service:
        assert {post(service, path, headers).status_code for headers in good} == {200}
        assert {post(service, path, headers).status_code for headers in bad} == {401}
        assert {ended.client for ended in service.wait_ended(len(good))} == {"alice", "bob"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_row(stream: bool) -> None:
    body = orjson.dumps({"messages": HI, "stream": stream, "max_tokens": 1000})
    head = f"POST /v1/messages HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n"
    with live(scripted("x" * 1000, stepped=True)) as service:
        with service.connect() as wire:
            wire.sendall(head.encode() + body)
            service.wait_running()
        service.engine.release()
        [ended] = service.wait_ended()
        assert ended.outcome == "cancelled"
        service.engine.release()
        eventually(lambda: service.sample("microbatch_running_rows") == 0, "no row runs")
