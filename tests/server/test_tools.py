"""Laws of tools: what may be offered, and which text is a call."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer

from server.fields import explain
from server.grammar.json_schema import MAX_DEPTH, MAX_LENGTH
from server.http.errors import RETRIED
from server.model.text import Text
from server.openai.messages import MAX_CALLS, Message, ToolNames
from server.openai.tools import MAX_TOOLS_LENGTH, ToolUse
from server.output.call_parser import MAX_HELD, MAX_SPACE
from server.output.detokenize import Detokenizer, Vocabulary
from server.output.hermes import QwenFormat, QwenParser
from server.output.prefix_tree import any_of
from server.output.tool_calls import (
    NAME,
    CallArguments,
    CallEnded,
    CallStarted,
    Content,
    ShownTool,
    ToolEvent,
    ToolParser,
    new_call_id,
    quotable,
)
from tests.server.test_reasoning import calls_in
from tests.server.test_text import split

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "get_weather"}}


def tool(parameters: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


AS_SENT = str  # names as they are


def use(**fields: Any) -> ToolUse:
    return ToolUse.model_validate_json(json.dumps(fields))


def refused(type_: type[ToolUse] | type[Message], body: str) -> str:
    """The sentence that a body is refused with, which no client takes for a passing trouble."""
    with pytest.raises(ValidationError) as caught:
        type_.model_validate_json(body)
    error = explain(caught.value)
    assert not RETRIED.search(error.body().decode())
    assert error.message.endswith(".")
    assert len(error.message) < 300
    return error.message


# What a request may offer.


def test_definitions_reach_the_template_as_they_were_sent_but_for_strict() -> None:
    sent = WEATHER | {"function": WEATHER["function"] | {"strict": True}}
    assert [offered.for_template(AS_SENT) for offered in use(tools=[sent]).offered] == [WEATHER]
    bare = {"type": "function", "function": {"name": "now"}}
    asked = use(tools=[bare])
    assert [offered.for_template(AS_SENT) for offered in asked.offered] == [bare]
    assert ToolUse(tools=asked.tools) == asked


@pytest.mark.parametrize(
    ("choice", "offered", "demanded"),
    [
        (None, ["get_weather", "f"], []),
        ("auto", ["get_weather", "f"], []),
        ("none", [], []),
        ("required", ["get_weather", "f"], ["get_weather", "f"]),
        (NAMED, ["get_weather", "f"], ["get_weather"]),
    ],
)
def test_a_choice_says_what_is_offered_and_what_is_demanded(choice: object, offered: object, demanded: object) -> None:
    asked = use(tools=[WEATHER, tool({})], tool_choice=choice)
    assert [tool.function.name for tool in asked.offered] == offered
    assert [tool.function.name for tool in asked.demanded] == demanded


SEARCH = {"type": "web_search", "user_location": {"city": "Rome"}}
OTHERS: list[Any] = [SEARCH, {"type": "custom", "custom": {"name": "x", "format": {}}}, {"type": "mcp", "function": 7}]


def allowed(mode: str, *names: str, **fields: Any) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools} | fields}


@pytest.mark.parametrize(
    ("choice", "offered", "demanded"),
    [
        (allowed("auto", "f"), ["f"], []),
        (allowed("required", "f"), ["f"], ["f"]),
        (allowed("required", "f", "get_weather"), ["get_weather", "f"], ["get_weather", "f"]),
        (allowed("auto"), [], []),
        (allowed("auto", tools=[*OTHERS, NAMED]), ["get_weather"], []),
    ],
)
def test_a_choice_may_allow_some_of_the_tools(choice: object, offered: object, demanded: object) -> None:
    asked = use(tools=[WEATHER, *OTHERS, tool({})], tool_choice=choice)
    assert [tool.function.name for tool in asked.offered] == offered
    assert [tool.function.name for tool in asked.demanded] == demanded


def test_tools_that_are_no_functions_are_skipped_and_named() -> None:
    asked = use(tools=[*OTHERS, WEATHER, SEARCH])
    assert [offered.for_template(AS_SENT) for offered in asked.offered] == [WEATHER]
    assert asked.skipped == ("tools.web_search", "tools.custom", "tools.mcp")
    assert use(tools=OTHERS, tool_choice="auto").offered == ()


def test_a_tool_without_a_type_is_a_function() -> None:
    assert use(tools=[{"function": WEATHER["function"]}], tool_choice={"function": {"name": "get_weather"}}) == use(
        tools=[WEATHER], tool_choice=NAMED
    )


def test_what_is_not_known_in_a_definition_changes_nothing() -> None:
    more = WEATHER["function"] | {"cache_control": {"type": "ephemeral"}}
    choice: dict[str, Any] = {"type": "function", "x": 1, "function": {"name": "get_weather", "x": 1}}
    assert use(tools=[WEATHER | {"x": 1, "function": more}], tool_choice=choice) == use(
        tools=[WEATHER], tool_choice=NAMED
    )


@pytest.mark.parametrize(
    ("chosen", "choice"), [(None, None), ("auto", "auto"), ("none", "none"), ({"name": "get_weather"}, NAMED)]
)
def test_functions_are_tools_in_an_older_form(chosen: object, choice: object) -> None:
    old = use(functions=[WEATHER["function"], {"name": "f"}], function_call=chosen)
    new = use(tools=[WEATHER, {"function": {"name": "f"}}], tool_choice=choice)
    assert (old.offered, old.demanded, old.named) == (new.offered, new.demanded, new.named)
    assert (old.is_legacy, old.one_call, new.is_legacy, new.one_call) == (True, True, False, False)


def test_without_any_functions_there_is_no_older_form() -> None:
    assert not use(functions=[]).is_legacy
    assert not use(functions=[], tools=[WEATHER]).is_legacy
    assert not use(function_call="auto").is_legacy


@pytest.mark.parametrize("choice", [None, "auto", "none", "required", NAMED])
def test_an_empty_list_of_tools_means_none_whatever_the_choice(choice: object) -> None:
    asked = use(tools=[], tool_choice=choice)
    assert asked.offered == asked.demanded == ()


def test_a_choice_that_cannot_be_met_is_refused_in_a_sentence() -> None:
    named: dict[str, Any] = {"type": "function", "function": {"name": "other"}}
    for choice in (named, allowed("auto", "get_weather", "other")):
        body = json.dumps({"tools": [WEATHER], "tool_choice": choice})
        assert refused(ToolUse, body) == "The field tool_choice names a function that is not defined."
    for demand in ("required", named, allowed("required", "f")):
        assert "there is no field tools" in refused(ToolUse, json.dumps({"tool_choice": demand}))
        skipped = json.dumps({"tools": OTHERS, "tool_choice": demand})
        assert "no function may be called" in refused(ToolUse, skipped)
    assert use(tool_choice="auto").offered == use(tool_choice=allowed("auto", "f")).offered == ()
    body = json.dumps({"functions": [{"name": "f"}], "function_call": {"name": "other"}})
    assert refused(ToolUse, body) == "The field function_call names a function that is not defined."
    assert "there is no field functions" in refused(ToolUse, json.dumps({"function_call": {"name": "f"}}))
    assert "send only one" in refused(ToolUse, json.dumps({"functions": [{"name": "f"}], "tools": [WEATHER]}))


SECRET = "sesame-503-server"


@pytest.mark.parametrize(
    "choice",
    [
        *(SECRET, 7, True, [], {}, {"type": "function"}, {"type": "function", "name": SECRET}, OTHERS[1]),
        *({"type": "allowed_tools"}, allowed("none", "f"), allowed("auto", SECRET * 20), allowed("auto", tools={})),
    ],
)
def test_another_choice_is_refused_and_not_repeated(choice: object) -> None:
    message = refused(ToolUse, json.dumps({"tools": [WEATHER], "tool_choice": choice}))
    assert message.startswith("tool_choice: must be")
    assert SECRET not in message


def nested(depth: int) -> object:
    value: object = {}
    for _ in range(depth - 1):
        value = {"not": value}
    return value


BAD_TOOLS = {
    "a type that is a list": {"type": [SECRET], "function": {"name": "f"}},
    "no object": SECRET,
    "no function": {"type": "function"},
    "no name": {"type": "function", "function": {}},
    "an empty name": {"type": "function", "function": {"name": ""}},
    "a long name": {"type": "function", "function": {"name": "f" * 131}},
    "a name with a newline": {"type": "function", "function": {"name": f"{SECRET}\n"}},
    "a name with an escape": {"type": "function", "function": {"name": "\x1b[31m"}},
    "a number as name": {"type": "function", "function": {"name": 1}},
    "a description that is none": {"type": "function", "function": {"name": "f", "description": 7}},
    "strict as a word": {"type": "function", "function": {"name": "f", "strict": "true"}},
    "parameters in a string": tool("{}"),
    "parameters in a list": tool([]),
    "parameters of a scalar": tool({"type": "string"}),
    "too deep": tool(nested(MAX_DEPTH + 1)),
    "very deep": tool(nested(150)),
    "too long": tool({"description": "x" * MAX_LENGTH}),
    "infinite": tool({"maximum": float("inf")}),
    "no number": tool({"enum": [float("nan")]}),
}


@pytest.mark.parametrize("bad", BAD_TOOLS.values(), ids=BAD_TOOLS)
def test_a_bad_definition_is_refused_and_not_repeated(bad: object) -> None:
    message = refused(ToolUse, json.dumps({"tools": [SEARCH, WEATHER, bad]}))
    assert message.startswith(("tools.2", "tools: the schema is "))
    assert SECRET not in message


def test_what_is_wrong_with_a_function_is_told_by_its_field() -> None:
    with pytest.raises(ValidationError) as caught:
        use(tools=[SEARCH, {"type": "function", "function": {"name": 7}}])
    assert explain(caught.value).param == "tools.1.function.name"


def test_what_only_looks_bad_is_accepted() -> None:
    use(tools=[tool(nested(MAX_DEPTH - 4))])  # which is as deep as parameters stand in a list of tools
    use(tools=[tool({"type": "object", "properties": {"type": {"type": ["string", "null"]}, "pattern": True}})])
    use(tools=[tool({"properties": {"a": {"default": {"type": "anything"}, "enum": [{"type": 7}]}}})])
    use(tools=[tool({"properties": {"a": {"pattern": r"^\p{L}+$", "maximum": 2**64}}})])


def test_all_definitions_together_are_bounded_before_they_are_looked_at() -> None:
    large = tool({"description": "x" * (MAX_TOOLS_LENGTH // 4 - 100)})
    assert len(use(tools=[large] * 3).offered) == 3
    cost = calls_in(lambda: refused(ToolUse, json.dumps({"tools": [large] * 5})))
    assert calls_in(lambda: refused(ToolUse, json.dumps({"tools": [large] * 50}))) < cost + 100


NAMES = st.text(min_size=1, max_size=128) | st.text('a_ "<\\', min_size=1, max_size=128)


@given(NAMES)
def test_a_name_is_any_text_of_a_line(name: str) -> None:
    fits = bool(re.fullmatch(NAME, name))
    assert fits == (name.splitlines() == [name] and not re.search(r"[\x00-\x1f\x7f-\x9f]", name))
    body = json.dumps({"tools": [{"function": {"name": name}}]}, ensure_ascii=False)
    if fits:
        assert [tool.function.name for tool in ToolUse.model_validate_json(body).offered] == [name]
    else:
        refused(ToolUse, body)


@pytest.mark.parametrize("name", ["智能体_0", "search.docs_0", "get weather", "mcp:a/b-c", "é" * 128, "😀"])
def test_a_name_that_calls_can_have_as_it_is_is_shown_as_it_is(name: str) -> None:
    assert ToolNames([name]).shown(name) == name


@given(st.lists(NAMES, max_size=6))
def test_every_name_is_shown_as_one_that_calls_can_have_and_is_found_again(names: list[str]) -> None:
    known = ToolNames(names)
    shown = [known.shown(name) for name in names]
    assert all(map(quotable, shown))
    assert [known.meant(name) for name in shown] == names
    assert shown == list(map(ToolNames(names).shown, names))
    assert all(known.shown(name) == name for name in names if quotable(name))
    made_up = "".join(shown) + "x"
    assert known.meant(made_up) == made_up


def test_names_with_the_same_start_take_work_in_proportion_to_their_number() -> None:
    def work(names: int) -> int:
        return lines_in(lambda: ToolNames([f"[{'x' * 60}{n}" for n in range(names)]))

    assert work(400) <= 2.1 * work(200)


def lines_in(function: Callable[[], object]) -> int:
    """How many lines run while this one does, those of a loop each time."""
    lines = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return lines


def test_a_name_is_the_same_in_definitions_calls_and_results() -> None:
    odd, plain = 'say "hi"', "f"
    known = ToolNames([plain, odd, "say _hi__1"])
    shown = known.shown(odd)
    assert shown == "say _hi__2"  # the first like it is another function's own
    calls = [{"function": {"name": name}} for name in (odd, plain)]
    called = Message.model_validate({"role": "assistant", "tool_calls": calls}).for_template(known.shown)
    assert [made["function"]["name"] for made in called["tool_calls"]] == [shown, plain]
    results = [Message(role=role, name=odd).for_template(known.shown) for role in ("tool", "function", "user")]
    assert [turn["name"] for turn in results] == [shown, shown, odd]
    [tool] = use(tools=[{"function": {"name": odd}}]).offered
    assert tool.for_template(known.shown)["function"] == {"name": shown}


def test_there_may_be_as_many_tools_as_several_mcp_servers_have_and_no_more() -> None:
    described = {"function": WEATHER["function"] | {"description": "x" * 1500}}
    assert len(use(tools=[described] * 512).offered) == 512
    message = refused(ToolUse, json.dumps({"tools": [WEATHER] * 513}))
    assert message == "tools: list should have at most 512 items after validation, not 513."


# What the history may hold.


def call(arguments: object, **fields: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}} | fields


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": [1, "é"], "b": 18446744073709551616}', {"a": [1, "é"], "b": 2**64}),
        ("", {}),
        (None, {}),
        ({"a": [1]}, {"a": [1]}),
        (" \n", {}),
        ("[1]", "[1]"),
        ('"a"', '"a"'),
        ("null", "null"),
        ('{"a": ', '{"a": '),
        ('{"a": NaN}', '{"a": NaN}'),
        ('{"a": ' * 100 + "1" + "}" * 100, '{"a": ' * 100 + "1" + "}" * 100),
        ("[" * 100_000, "[" * 100_000),
        ('{"a": ' + "9" * 5000 + "}", '{"a": ' + "9" * 5000 + "}"),
    ],
)
def test_arguments_become_an_object_where_they_are_one(arguments: object, expected: object) -> None:
    turn = Message.model_validate_json(json.dumps({"role": "assistant", "tool_calls": [call(arguments)]}))
    assert turn.for_template(AS_SENT)["tool_calls"] == [call(expected)]


def test_the_index_that_a_client_sends_back_is_accepted_and_not_shown() -> None:
    turn = Message.model_validate_json(json.dumps({"role": "assistant", "tool_calls": [call("{}", index=0)]}))
    assert turn.for_template(AS_SENT)["tool_calls"] == [call({})]


def test_a_tool_message_carries_the_id_of_its_call() -> None:
    turn = Message.model_validate_json(json.dumps({"role": "tool", "tool_call_id": "call_1"}))
    assert turn.for_template(AS_SENT) == {"role": "tool", "content": "", "tool_call_id": "call_1"}
    assert Message(role="assistant", tool_calls=[]).for_template(AS_SENT) == {"role": "assistant", "content": ""}
    assert Message(role="tool").for_template(AS_SENT) == {"role": "tool", "content": ""}
    assert Message(role="user", tool_call_id="call_1").for_template(AS_SENT) == {"role": "user", "content": ""}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "tool", "tool_call_id": 7},
        {"role": "user", "tool_calls": [call("{}")]},
        {"role": "tool", "tool_call_id": "call_1", "tool_calls": [call("{}")]},
        {"role": "assistant", "tool_calls": [call([])]},
        {"role": "assistant", "tool_calls": [call(7)]},
        {"role": "assistant", "tool_calls": [call("{}", type="other")]},
        {"role": "assistant", "tool_calls": [call("{}", function={"name": SECRET + "\n", "arguments": "{}"})]},
        {"role": "assistant", "tool_calls": [call("{}")] * (MAX_CALLS + 1)},
    ],
)
def test_a_turn_that_cannot_be_is_refused_and_not_repeated(turn: object) -> None:
    assert SECRET not in refused(Message, json.dumps(turn))


# Which text is a call.

FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<tool_call>\n", "\n</tool_call>", "<tool", "_call>", "</", "<"),
    *('{"name": "f", "arguments": ', '{"name": "other", ', '"name"', '"arguments"', '"f"', '{"a": 1}', r'"{\"a\": 1}"'),
    *("{", "}", "[", "]", '"', "\\", ",", ":", "\n", "\n\n", " ", "\t", "a", "é", "1", "-1e5", "true", "\u2028"),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)
CALLS = st.lists(
    st.sampled_from(
        [
            '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>"}}\n</tool_call>',
            '<tool_call>{"arguments": {"a": [1, {}]}, "id": 1, "name": "f"}</tool_call>',
            '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
            '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>',
            '<tool_call>{"name": "f", "arguments": {}}, "x": 7}',
            '<tool_call>{"name": "f", "arguments": {}, "x": [}]',
            *FRAGMENTS,
        ]
    ),
    max_size=8,
).map("".join)
CUTS = st.lists(st.integers(0, 250))


def parser() -> QwenParser:
    ids = count()
    return QwenParser(lambda: f"call_{next(ids)}")


def events(pieces: list[str], parser: Callable[[], ToolParser] = parser) -> list[ToolEvent]:
    reader = parser()
    return [event for piece in pieces for event in reader.push(piece)] + list(reader.flush())


def read(pieces: list[str], parser: Callable[[], ToolParser] = parser) -> list[object]:
    """An answer as a list: content as strings, calls as [name, arguments, whether it ended]."""
    out: list[Any] = []
    calls: list[Any] = []
    for event in events(pieces, parser):
        match event:
            case Content():
                assert event.text
                if out and isinstance(out[-1], str):
                    out[-1] += event.text
                else:
                    out.append(event.text)
            case CallStarted():
                assert (event.index, event.id) == (len(calls), f"call_{len(calls)}")
                calls.append([event.name, "", False])
                out.append(calls[-1])
            case CallArguments():
                assert event.text
                assert event.index == len(calls) - 1
                assert out[-1] is calls[-1]
                calls[-1][1] += event.text
            case CallEnded():
                assert event.index == len(calls) - 1
                assert out[-1] is calls[-1]
                calls[-1][2] = True
    return out


def content_of(found: list[object]) -> str:
    return "".join(part for part in found if isinstance(part, str))


@given(TEXTS | CALLS, CUTS)
def test_events_do_not_depend_on_how_the_text_was_cut(text: str, cuts: list[int]) -> None:
    whole = read([text])
    assert read(split(text, cuts)) == whole
    assert read(list(text)) == whole


@given(TEXTS | CALLS, CUTS)
def test_text_without_a_call_passes_byte_for_byte(text: str, cuts: list[int]) -> None:
    text = text.replace('"name"', '"nam"').replace('"f"', '"\\n"')
    assert read(split(text, cuts)) == ([text] if text else [])


@given(TEXTS | CALLS)
def test_every_call_stands_in_the_text_and_complete_ones_have_whole_arguments(text: str) -> None:
    found = read([text])
    if all(isinstance(part, str) for part in found):
        assert found == ([text] if text else [])
    for part in found:
        if isinstance(part, list):
            name, arguments, ended = part
            assert name in ("f", "other", "a", "é")
            assert arguments[0] == "{"
            assert arguments == "{}" or arguments in text or json.dumps(arguments)[1:-1] in text
            assert not ended or arguments[-1] in "]}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=4) | st.just("</tool_call>"), JSON, max_size=3)
WORDS = st.text("ab<{}\n ", max_size=6).map(lambda text: text.strip())


@given(st.data(), CUTS)
def test_what_was_written_is_what_is_read(data: st.DataObject, cuts: list[int]) -> None:
    text, expected = "", []
    for words in data.draw(st.lists(WORDS, min_size=1, max_size=4)):
        arguments = json.dumps(data.draw(OBJECTS), ensure_ascii=data.draw(st.booleans()))
        form = data.draw(st.sampled_from(["name first", "name last", "in a string", "with more"]))
        members = {
            "name first": f'"name": "f", "arguments": {arguments}',
            "name last": f'"arguments" : {arguments}, "name":"f"',
            "in a string": f'"name": "f", "arguments": {json.dumps(arguments)}',
            "with more": f'"id": [1, "}}"], "name": "\\u0066", "arguments": {arguments}, "x": {{"y": "</tool_call>"}}',
        }[form]
        text += f"{words}\n<tool_call>\n{{{members}}}\n</tool_call>\n"
        expected += [words, ["f", arguments, True]]
    for pieces in (split(text, cuts), list(text)):
        found = read(pieces)
        assert [part for part in found if isinstance(part, list)] == expected[1::2]
        assert "".join(content_of(found).split()) == "".join("".join(map(str, expected[0::2])).split())


def one(arguments: str, name: str = "f") -> str:
    before, after = QwenFormat().around(name)
    return before + arguments + after


EXAMPLES: dict[str, tuple[str, list[object]]] = {
    "a call": (one('{"a": 1}'), [["f", '{"a": 1}', True]]),
    "content before": (f"Let me see.\n\n{one('{}')}", ["Let me see.", ["f", "{}", True]]),
    "parallel calls": (f"{one('{}')}\n{one('{}', 'get_weather')}", [["f", "{}", True], ["get_weather", "{}", True]]),
    "content between": (f"a\n{one('{}')}\nb\n{one('{}')}\n", ["a", ["f", "{}", True], "\nb", ["f", "{}", True]]),
    "no white space": ('<tool_call>{"name":"f","arguments":{}}</tool_call>', [["f", "{}", True]]),
    "an escaped name": (r'<tool_call>{"n\u0061me":"\u0066","arguments":{}}</tool_call>', [["f", "{}", True]]),
    "a name that was not offered": (one("{}", "search.docs_智"), [["search.docs_智", "{}", True]]),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', [["f", "{}", True]]),
    "no arguments but more": ('<tool_call>{"name": "f", "id": {"a": 1}\n}\n</tool_call>', [["f", "{}", True]]),
    "arguments of null": (one("null"), [["f", "{}", True]]),
    "arguments of an empty string": (one('""'), [["f", "{}", True]]),
    "arguments of white space": (one('" "'), [["f", "{}", True]]),
    "null before the name": ('<tool_call>{"arguments": null, "name": "f"}</tool_call>', [["f", "{}", True]]),
    "no arguments, cut in the tag": ('<tool_call>{"name": "f"}</tool', [["f", "{}", True]]),
    "no arguments, twice": (
        '<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "f"}</tool_call>',
        [["f", "{}", True], ["f", "{}", True]],
    ),
    "duplicate keys after it": (
        '<tool_call>{"name":"f","arguments":{},"name":"g"}</tool_call>',
        [["f", "{}", True]],
    ),
    "tags in strings": (
        one('{"a": "<tool_call></tool_call>\\""}'),
        [["f", '{"a": "<tool_call></tool_call>\\""}', True]],
    ),
    "cut in the arguments": ('<tool_call>{"name": "f", "arguments": {"a": "x', [["f", '{"a": "x', False]]),
    "cut in the closing tag": (one("{}")[:-3], [["f", "{}", True]]),
    "cut before the last brace": ('<tool_call>{"name": "f", "arguments": {}', [["f", "{}", True]]),
    "one brace too many": (one("{}}"), [["f", "{}", True]]),
    "one brace too few": (one('{"a": {}'), [["f", '{"a": {}}', True]]),
    "two braces too few": (one('{"a": {"b": {}'), [["f", '{"a": {"b": {}}\n', False]]),
    "broken off by the tag": (f"{one('{[')}\nBut", [["f", "{[}\n", False], "\nBut"]),
    "a broken one and a good one": (
        '<tool_call>{"name": "f", "arguments": {"a"</tool_call>' + one("{}"),
        [["f", '{"a"', False], ["f", "{}", True]],
    ),
    "no closing tag": (f"{one('{}')[:-12]}{one('{}')}", [["f", "{}", True], ["f", "{}", True]]),
    "content instead of a tag": (f"{one('{}')[:-12]}Well", [["f", "{}", True], "Well"]),
    "half a tag": (f"{one('{}')[:-5]} Well", [["f", "{}", True], "</tool_ Well"]),
    "a comma and content": ('<tool_call>{"name":"f","arguments":{}}, yes', [["f", "{}", True], ", yes"]),
    "a bare newline in a string": (one('{"a": "\n"}'), [["f", '{"a": "\n"}', True]]),
    "after a broken one": (f'<tool_call>{{"name": f}}{one("{}")}', ['<tool_call>{"name": f}', ["f", "{}", True]]),
    "a tag before the tag": (f"<tool_call>{one('{}')}", ["<tool_call>", ["f", "{}", True]]),
}


@pytest.mark.parametrize(("text", "expected"), EXAMPLES.values(), ids=EXAMPLES)
def test_examples(text: str, expected: list[object]) -> None:
    assert read([text]) == expected
    assert read(list(text)) == expected


LOOKALIKES = {
    "no name": '<tool_call>{"arguments": {}}</tool_call>',
    "an empty name": one("{}", ""),
    "a long name": one("{}", "f" * 131),
    "a name of two lines": one("{}", "f\\nf"),
    "no arguments, cut before the brace": '<tool_call>{"name": "f"',
    "a number as name": '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
    "arguments in a list": one("[]"),
    "arguments in words": one('"none"'),
    "arguments of false": one("false"),
    "a list in a string": one('"[]"'),
    "null in a string": one('"null"'),
    "two names": '<tool_call>{"name": "f", "name": "f", "arguments": {}}</tool_call>',
    "twice arguments first": '<tool_call>{"arguments": {}, "arguments": {}, "name": "f"}</tool_call>',
    "bad JSON before the name": '<tool_call>{"arguments": {"a": oops}, "name": "f"}</tool_call>',
    "a bad member": '<tool_call>{"x": 01, "name": "f", "arguments": {}}</tool_call>',
    "single quotes": "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
    "XML": "<tool_call>\n<function=f>\n</function>\n</tool_call>",
    "unterminated": '<tool_call>\n{"name": "f", "arguments": ',
    "a tag alone": "<tool_call>\n",
    "an empty object": "<tool_call>{}</tool_call>",
    "a list": "<tool_call>[]</tool_call>",
    "half a tag": "a <tool_cal",
    "a comma at the end": '<tool_call>{"name": "f",}</tool_call>',
    "deep arguments first": '<tool_call>{"arguments": ' + "{" * 2000 + "}" * 2000 + ', "name": "f"}</tool_call>',
    "a lone surrogate": r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>',
}


@pytest.mark.parametrize("text", LOOKALIKES.values(), ids=LOOKALIKES)
def test_what_only_looks_like_a_call_is_content(text: str) -> None:
    text = f"a\n\n{text} \n"
    assert read([text]) == read(list(text)) == [text]


def test_arguments_stream_as_they_come() -> None:
    reader = parser()
    assert reader.push('<tool_call>\n{"name": "f", "arguments": ') == ()
    assert reader.push('{"ci') == (CallStarted(0, "call_0", "f"), CallArguments(0, '{"ci'))
    assert reader.push('ty": "Rome"') == (CallArguments(0, 'ty": "Rome"'),)
    assert reader.push("}") == (CallArguments(0, "}"), CallEnded(0))
    assert reader.push("}\n</tool_call>") == reader.flush() == ()


def test_content_streams_as_it_comes() -> None:
    reader = parser()
    assert reader.push("Is a <") == (Content("Is a"),)
    assert reader.push(" b?") == (Content(" < b?"),)


def test_ids_are_unlike() -> None:
    assert new_call_id() != new_call_id()
    assert new_call_id().removeprefix("call_").isalnum()
    assert len(new_call_id()) == len("call_") + 24


# What hostile text costs.

HOSTILE = {
    "tags": ("", "<tool_call>"),
    "half tags": ("", "<tool_call"),
    "less-than signs": ("", "<"),
    "closing tags": ("", "</tool_call>"),
    "spaces": ("", " "),
    "spaces after a tag": ("<tool_call>", " "),
    "frames": ("", "<tool_call>{"),
    "keys": ("", '<tool_call>{"'),
    "an endless key": ('<tool_call>{"', "a"),
    "an endless escape": ('<tool_call>{"', "\\"),
    "an endless list": ('<tool_call>{"a": [', "[],"),
    "endless members": ("<tool_call>{", '"a": 1, '),
    "an endless number": ('<tool_call>{"a": ', "1"),
    "deep members": ("<tool_call>{", '"a": {'),
    "endless arguments": ('<tool_call>{"name": "f", "arguments": {"a": "', "a"),
    "escapes in arguments": ('<tool_call>{"name": "f", "arguments": {"a": "', '\\"'),
    "deep arguments": ('<tool_call>{"name": "f", "arguments": ', '{"a":'),
    "tags in arguments": ('<tool_call>{"name": "f", "arguments": {', "</tool_cal"),
    "calls": ("", one("{}")),
    "unclosed calls": ("", '<tool_call>{"name": "f", "arguments": {}'),
    "broken calls": ("", '<tool_call>{"name": "f", "arguments": {</tool_call>'),
    "calls in reverse": ("", '<tool_call>{"arguments": {"a": "{}"}, "name": "f"}'),
    "members after arguments": ('<tool_call>{"name": "f", "arguments": {}', ', "a": 1'),
}


def feed(text: str, size: int, parser: Callable[[], ToolParser] = parser) -> int:
    """Feeds the text in pieces of a size. Returns the most characters that were not passed on at once."""
    reader, pushed, passed, most = parser(), 0, 0, 0
    for at in range(0, len(text), size):
        piece = text[at : at + size]
        pushed += len(piece)
        for event in reader.push(piece):
            passed += len(event.text) if isinstance(event, Content | CallArguments) else 0
        most = max(most, pushed - passed)
    reader.flush()
    return most


@pytest.mark.parametrize("size", [1, 5, 2**30])
@pytest.mark.parametrize("shape", HOSTILE.values(), ids=HOSTILE)
def test_work_grows_with_the_length_of_the_text_and_no_faster(shape: tuple[str, str], size: int) -> None:
    start, unit = shape
    text = start + unit * (4000 // len(unit))
    longer = start + unit * (8000 // len(unit))
    assert calls_in(lambda: feed(longer, size)) <= 2.1 * calls_in(lambda: feed(text, size)) + 200


@pytest.mark.parametrize("shape", HOSTILE.values(), ids=HOSTILE)
def test_a_megabyte_costs_little_and_holds_back_no_more_than_the_bound(shape: tuple[str, str]) -> None:
    start, unit = shape
    text = start + unit * (2**20 // len(unit))
    most = feed(text, 1000)
    if not any(isinstance(event, CallStarted) for event in events([text[: 10**5]])):
        assert most <= MAX_HELD + MAX_SPACE + 1000


def test_more_than_the_bound_is_content_wherever_it_was_cut() -> None:
    for over in (-1, 0, 1):
        padding = " " * (MAX_HELD + over - len('<tool_call>{"name":"f","arguments":'))
        text = f'<tool_call>{{"name":"f","arguments":{padding}{{}}}}</tool_call>'
        whole = read([text])
        assert (whole == [["f", "{}", True]]) == (over < 0)
        assert read([text[:65_000], *text[65_000:]]) == whole


# The real template and tokenizer.


def rendered(folder: str, messages: list[Message], tools: Sequence[ShownTool] = ()) -> str:
    text = Text.load(folder)
    ids = text.encode(text.render([message.for_template(AS_SENT) for message in messages], tools))
    return str(tokenizer(folder).decode(list(ids), skip_special_tokens=False))


def tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


def test_definitions_calls_and_results_go_through_the_template(thinking_tokenizer: str) -> None:
    calls = [call('{"city":"Rome"}'), call("oops", id="call_2")]
    asked = Message.model_validate_json(json.dumps({"role": "assistant", "tool_calls": calls}))
    told = [Message(role="tool", content=weather, tool_call_id="call_1") for weather in ("sunny", "rainy")]
    messages = [Message(role="user", content="Weather?"), asked, *told]
    tools = [offered.for_template(AS_SENT) for offered in use(tools=[WEATHER]).offered]
    text = rendered(thinking_tokenizer, messages, tools)
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in text
    assert f"<|im_start|>assistant\n{one(json.dumps({'city': 'Rome'}))}\n{one('oops')}<|im_end|>\n" in text
    responses = "\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nrainy\n</tool_response>"
    assert f"<|im_start|>user{responses}<|im_end|>\n<|im_start|>assistant\n" in text


def test_no_tools_leave_the_prompt_as_it_was(thinking_tokenizer: str) -> None:
    messages = [Message(role="user", content="Hi")]
    assert rendered(thinking_tokenizer, messages, []) == rendered(thinking_tokenizer, messages)


def test_the_template_is_known_to_write_this_format(thinking_tokenizer: str) -> None:
    found = Text.load(thinking_tokenizer).format
    assert (type(found.tools), found.renders_tools) == (QwenFormat, True)


def test_tags_survive_decoding(thinking_tokenizer: str) -> None:
    text = f"<think>\nhm\n</think>\n\nSo:\n{one(json.dumps({'city': 'Köln 🌧'}, ensure_ascii=False))}"
    encoded = tokenizer(thinking_tokenizer).encode(text, add_special_tokens=False)
    assert {"<think>", "</think>", "<tool_call>", "</tool_call>"} <= set(encoded.tokens)
    detokenizer = Detokenizer(Vocabulary(tokenizer(thinking_tokenizer)))
    pieces = [detokenizer.push([token]) for token in encoded.ids]
    assert "".join(pieces) == text
    assert read([piece for piece in pieces if piece])[-1] == ["f", '{"city": "Köln 🌧"}', True]


# Patterns of many texts


@given(st.lists(st.text("ab<", max_size=5), min_size=1), st.text("ab<", max_size=30))
def test_a_prefix_tree_finds_what_a_list_with_the_longest_first_finds(texts: list[str], text: str) -> None:
    listed = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    assert [found.span() for found in re.finditer(any_of(texts), text)] == [
        found.span() for found in re.finditer(listed, text)
    ]


def test_a_prefix_tree_is_no_deeper_for_long_texts() -> None:
    texts = ["x" * 5_000, "x" * 4_000 + "y"]
    assert all(re.fullmatch(any_of(texts), text) for text in texts)
