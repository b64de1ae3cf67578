"""Laws of tools: what may be offered, and which text is a call."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer

from server.errors import RETRIED
from server.formats import FORMATS, find_format
from server.qwen import MAX_HELD, MAX_SPACE, QwenFormat, ToolCallParser
from server.schema import explain
from server.schema_check import MAX_DEPTH, MAX_LENGTH
from server.text import Detokenizer, Text
from server.tool_format import CallArguments, CallEnded, CallStarted, Content, ToolEvent, new_call_id
from server.tools import MAX_TOOLS, NamedChoice, ToolTurn, ToolUse
from tests.server.test_reasoning import calls_in
from tests.server.test_text import split

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def tool(parameters: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def use(**fields: Any) -> ToolUse:
    return ToolUse.model_validate_json(json.dumps(fields))


def refused(type_: type[ToolUse] | type[ToolTurn], body: str) -> str:
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
    sent = WEATHER | {"function": WEATHER["function"] | {"strict": True}}  # type: ignore[operator]
    assert [offered.for_template() for offered in use(tools=[sent]).offered] == [WEATHER]
    bare = {"type": "function", "function": {"name": "now"}}
    asked = use(tools=[bare])
    assert [offered.for_template() for offered in asked.offered] == [bare]
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


@pytest.mark.parametrize("choice", [None, "auto", "none", "required", NAMED])
def test_an_empty_list_of_tools_means_none_whatever_the_choice(choice: object) -> None:
    asked = use(tools=[], tool_choice=choice)
    assert asked.offered == asked.demanded == ()


def test_a_choice_that_cannot_be_met_is_refused_in_a_sentence() -> None:
    named = {"type": "function", "function": {"name": "other"}}
    body = json.dumps({"tools": [WEATHER], "tool_choice": named})
    assert refused(ToolUse, body) == "The field tool_choice names other, which is not one of the tools."
    for choice in ("required", named):
        assert "there is no field tools" in refused(ToolUse, json.dumps({"tool_choice": choice}))
    assert use(tool_choice="auto").offered == ()


SECRET = "sesame-503-server"


@pytest.mark.parametrize(
    "choice", [SECRET, 7, True, [], {}, {"type": "function"}, NAMED | {"x": 1}, {"type": "function", "name": SECRET}]
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
    "no type": {"function": {"name": "f"}},
    "another type": {"type": SECRET, "function": {"name": "f"}},
    "no function": {"type": "function"},
    "no name": {"type": "function", "function": {}},
    "an empty name": {"type": "function", "function": {"name": ""}},
    "a long name": {"type": "function", "function": {"name": "f" * 65}},
    "a name with spaces": {"type": "function", "function": {"name": f"{SECRET} f"}},
    "a name with a newline": {"type": "function", "function": {"name": "f\n"}},
    "a name beyond ASCII": {"type": "function", "function": {"name": "é"}},
    "a number as name": {"type": "function", "function": {"name": 1}},
    "a description that is none": {"type": "function", "function": {"name": "f", "description": 7}},
    "strict as a word": {"type": "function", "function": {"name": "f", "strict": "true"}},
    "an unknown field": {"type": "function", "function": {"name": "f", "secret field": SECRET}},
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
    assert SECRET not in refused(ToolUse, json.dumps({"tools": [WEATHER, bad]}))


def test_what_only_looks_bad_is_accepted() -> None:
    use(tools=[tool(nested(MAX_DEPTH - 4))])  # which is as deep as parameters stand in a list of tools
    use(tools=[tool({"type": "object", "properties": {"type": {"type": ["string", "null"]}, "pattern": True}})])
    use(tools=[tool({"properties": {"a": {"default": {"type": "anything"}, "enum": [{"type": 7}]}}})])
    use(tools=[tool({"properties": {"a": {"pattern": r"^\p{L}+$", "maximum": 2**64}}})])


def test_all_definitions_together_are_bounded_before_they_are_looked_at() -> None:
    large = tool({"description": "x" * (MAX_LENGTH // 4 - 100)})
    assert len(use(tools=[large] * 3).offered) == 3
    cost = calls_in(lambda: refused(ToolUse, json.dumps({"tools": [large] * 5})))
    assert calls_in(lambda: refused(ToolUse, json.dumps({"tools": [large] * 50}))) < cost + 100


def test_at_most_128_tools() -> None:
    assert len(use(tools=[WEATHER] * MAX_TOOLS).offered) == MAX_TOOLS
    refused(ToolUse, json.dumps({"tools": [WEATHER] * (MAX_TOOLS + 1)}))


# What the history may hold.


def call(arguments: object, **fields: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}} | fields


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": [1, "é"], "b": 18446744073709551616}', {"a": [1, "é"], "b": 2**64}),
        ("", {}),
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
def test_arguments_become_an_object_where_they_are_one(arguments: str, expected: object) -> None:
    turn = ToolTurn.model_validate_json(json.dumps({"role": "assistant", "tool_calls": [call(arguments)]}))
    assert turn.tool_fields()["tool_calls"] == [call(expected)]


def test_the_index_that_a_client_sends_back_is_accepted_and_not_shown() -> None:
    turn = ToolTurn.model_validate_json(json.dumps({"role": "assistant", "tool_calls": [call("{}", index=0)]}))
    assert turn.tool_fields()["tool_calls"] == [call({})]


def test_a_tool_message_carries_the_id_of_its_call() -> None:
    turn = ToolTurn.model_validate_json(json.dumps({"role": "tool", "tool_call_id": "call_1"}))
    assert turn.tool_fields() == {"tool_call_id": "call_1"}
    assert ToolTurn(role="assistant", tool_calls=[]).tool_fields() == {}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "tool"},
        {"role": "tool", "tool_call_id": ""},
        {"role": "tool", "tool_call_id": "x" * 257},
        {"role": "tool", "tool_call_id": 7},
        {"role": "user", "tool_call_id": "call_1"},
        {"role": "user", "tool_calls": [call("{}")]},
        {"role": "tool", "tool_call_id": "call_1", "tool_calls": [call("{}")]},
        {"role": "assistant", "tool_calls": [call({})]},
        {"role": "assistant", "tool_calls": [call(None)]},
        {"role": "assistant", "tool_calls": [call("{}", type="other")]},
        {"role": "assistant", "tool_calls": [call("{}", id="")]},
        {"role": "assistant", "tool_calls": [call("{}", index=-1)]},
        {"role": "assistant", "tool_calls": [call("{}", extra=1)]},
        {"role": "assistant", "tool_calls": [call("{}", function={"name": SECRET + " ", "arguments": "{}"})]},
        {"role": "assistant", "tool_calls": [call("{}")] * (MAX_TOOLS + 1)},
    ],
)
def test_a_turn_that_cannot_be_is_refused_and_not_repeated(turn: object) -> None:
    assert SECRET not in refused(ToolTurn, json.dumps(turn))


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


def parser(names: tuple[str, ...] | None = ("f", "get_weather")) -> ToolCallParser:
    ids = count()
    return ToolCallParser(names, lambda: f"call_{next(ids)}")


def events(pieces: list[str], names: tuple[str, ...] | None = ("f", "get_weather")) -> list[ToolEvent]:
    reader = parser(names)
    return [event for piece in pieces for event in reader.push(piece)] + list(reader.flush())


def read(pieces: list[str], names: tuple[str, ...] | None = ("f", "get_weather")) -> list[object]:
    """An answer as a list: content as strings, calls as [name, arguments, whether it ended]."""
    out: list[Any] = []
    calls: list[Any] = []
    for event in events(pieces, names):
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
def test_text_without_a_known_call_passes_byte_for_byte(text: str, cuts: list[int]) -> None:
    assert content_of(read(split(text, cuts), names=())) == text


@given(TEXTS | CALLS)
def test_every_call_stands_in_the_text_and_complete_ones_have_whole_arguments(text: str) -> None:
    found = read([text])
    if all(isinstance(part, str) for part in found):
        assert found == ([text] if text else [])
    for part in found:
        if isinstance(part, list):
            name, arguments, ended = part
            assert name == "f"
            assert arguments[0] == "{"
            assert arguments in text or json.dumps(arguments)[1:-1] in text
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
    "an unknown name": one("{}", "other"),
    "no name": '<tool_call>{"arguments": {}}</tool_call>',
    "no arguments": '<tool_call>{"name": "f"}</tool_call>',
    "a number as name": '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
    "arguments in a list": one("[]"),
    "arguments in words": one('"none"'),
    "no arguments at all": one("null"),
    "a list in a string": one('"[]"'),
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


def test_without_names_any_fitting_name_is_known() -> None:
    assert read([one("{}", "other")], names=None) == [["other", "{}", True]]
    assert read([one("{}", "no name")], names=None) == [one("{}", "no name")]


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


def feed(text: str, size: int) -> int:
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


def rendered(folder: str, messages: list[dict[str, Any]], **options: Any) -> str:
    text = Text.load(folder)
    ids = text.encode(text.render(messages, options))
    return str(tokenizer(folder).decode(list(ids), skip_special_tokens=False))


def tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


def test_definitions_calls_and_results_go_through_the_template(thinking_tokenizer: str) -> None:
    calls = [call('{"city":"Rome"}'), call("oops", id="call_2")]
    asked = ToolTurn.model_validate_json(json.dumps({"role": "assistant", "tool_calls": calls}))
    told = ToolTurn(role="tool", tool_call_id="call_1")
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", **asked.tool_fields()},
        {"role": "tool", "content": "sunny", **told.tool_fields()},
        {"role": "tool", "content": "rainy", **told.tool_fields()},
    ]
    tools = [offered.for_template() for offered in use(tools=[WEATHER]).offered]
    text = rendered(thinking_tokenizer, messages, tools=tools, enable_thinking=False)
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in text
    assert f"<|im_start|>assistant\n{one(json.dumps({'city': 'Rome'}))}\n{one('oops')}<|im_end|>\n" in text
    responses = "\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nrainy\n</tool_response>"
    assert f"<|im_start|>user{responses}<|im_end|>\n<|im_start|>assistant\n" in text


def test_no_tools_leave_the_prompt_as_it_was(thinking_tokenizer: str) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert rendered(thinking_tokenizer, messages, tools=[]) == rendered(thinking_tokenizer, messages)


def test_the_template_is_known_to_write_this_format(thinking_tokenizer: str) -> None:
    config = orjson.loads((Path(thinking_tokenizer) / "tokenizer_config.json").read_bytes())
    assert find_format(config["chat_template"]) is FORMATS[0]
    assert find_format("{{ messages }}") is None
    assert find_format("<tool_call>\n<function=f>") is None


def test_tags_survive_decoding(thinking_tokenizer: str) -> None:
    text = f"<think>\nhm\n</think>\n\nSo:\n{one(json.dumps({'city': 'Köln 🌧'}, ensure_ascii=False))}"
    encoded = tokenizer(thinking_tokenizer).encode(text, add_special_tokens=False)
    assert {"<think>", "</think>", "<tool_call>", "</tool_call>"} <= set(encoded.tokens)
    detokenizer = Detokenizer(tokenizer(thinking_tokenizer))
    pieces = [detokenizer.push([token]) for token in encoded.ids]
    assert "".join(pieces) == text
    assert read([piece for piece in pieces if piece])[-1] == ["f", '{"city": "Köln 🌧"}', True]


def test_a_named_choice_is_a_type_of_its_own() -> None:
    assert isinstance(use(tools=[WEATHER], tool_choice=NAMED).tool_choice, NamedChoice)
