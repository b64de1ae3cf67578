"""Laws of Llama's calls: which text is one, how soon the rest passes, what its template and a grammar make of them."""

import json
import re
from itertools import count
from typing import Any, cast

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching.padded import PaddedEngine
from server.model.text import Text
from server.openai.chat import encode
from server.openai.requests import ChatRequest
from server.output.call_parser import MAX_HELD, MAX_SPACE
from server.output.hermes import QwenFormat
from server.output.llama import TAG, LlamaFormat, LlamaParser
from server.output.model_format import QWEN, format_of, without_tools
from server.output.tool_calls import CallArguments, CallEnded, CallStarted, Content, ShownCall, Turn
from tests.live import QUESTION, Live, byte_tokenizer, live
from tests.llama import HEADERS, TEMPLATE, llama_tokenizer
from tests.server.test_reasoning import calls_in
from tests.server.test_text import split
from tests.server.test_tools import CUTS, JSON, feed, read
from tests.tiny import tiny_model

FRAGMENTS = [
    *('{"name": "f", "parameters": ', '{"name": "f", "arguments": ', '"name"', '"parameters"', '"arguments"', '"type"'),
    *('"function"', '"f"', '{"a": 1}', "{}", "null", '""', TAG, TAG[:9], "; ", ";", "\n", " ", "{", "}", "[", "]"),
    *('"', ",", ":", "a", "é", "1", "<", '{"answer": 42}', '{"name": "f", "parameters": {"a": "}; {"}}'),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=20).map("".join)
CALLS = st.lists(
    st.sampled_from(
        [
            '{"name": "f", "parameters": {"a": 1}}',
            '{"parameters": {"a": [1, {}]}, "name": "f"}; ',
            '{"type": "function", "name": "f", "parameters": null}\n',
            '{"name": "f", "parameters": {}, "type": "function"}',
            '{"name": "f", "parameters": {}, "id": 1}',
            f"{TAG}",
            *FRAGMENTS,
        ]
    ),
    max_size=6,
).map("".join)


def parser() -> LlamaParser:
    ids = count()
    return LlamaParser(lambda: f"call_{next(ids)}")


def one(arguments: str, name: str = "f") -> str:
    before, after = LlamaFormat().around(name)
    return before + arguments + after


# Which text is a call


@given(TEXTS | CALLS, CUTS)
def test_events_do_not_depend_on_how_the_text_was_cut(text: str, cuts: list[int]) -> None:
    whole = read([text], parser)
    assert read(split(text, cuts), parser) == whole
    assert read(list(text), parser) == whole


@given(TEXTS | CALLS, CUTS)
def test_text_without_a_call_passes_byte_for_byte(text: str, cuts: list[int]) -> None:
    text = text.replace('"name"', '"nam"')
    assert read(split(text, cuts), parser) == ([text] if text else [])


@given(st.sampled_from(["a", "So:", "[", "}", ";", "1", '{"a"']), TEXTS | CALLS, CUTS)
def test_what_begins_with_something_else_is_content_to_its_end(begin: str, text: str, cuts: list[int]) -> None:
    assert read(split(begin + text, cuts), parser) == [begin + text]


@given(st.data(), CUTS)
def test_what_was_written_is_what_is_read(data: st.DataObject, cuts: list[int]) -> None:
    text, expected = data.draw(st.sampled_from(["", "\n", " "])), []
    for n in range(data.draw(st.integers(1, 4))):
        arguments = json.dumps(data.draw(st.dictionaries(st.text(max_size=4), JSON, max_size=3)))
        key = data.draw(st.sampled_from(["parameters", "arguments"]))
        members = data.draw(
            st.permutations(['"name": "f"', f'"{key}":{arguments}']).map(tuple)
            | st.permutations(['"name" : "f"', f'"{key}" : {arguments}', '"type": "function"']).map(tuple)
        )
        if n:
            text += data.draw(st.sampled_from(["; ", ";", "\n", " ;\n", "", "} ;", "]\n"]))
        text += data.draw(st.sampled_from(["", TAG, f"{TAG} "])) + "{" + ", ".join(members) + "}"
        expected.append(["f", arguments, True])
    text += data.draw(st.sampled_from(["", "\n", ";", "}"]))
    for pieces in (split(text, cuts), list(text)):
        assert read(pieces, parser) == expected


EXAMPLES: dict[str, tuple[str, list[object]]] = {
    "a call": (one('{"a": 1}'), [["f", '{"a": 1}', True]]),
    "a tag before it": (TAG + one("{}"), [["f", "{}", True]]),
    "parallel calls": (f"{one('{}')}; {one('{}', 'g')}", [["f", "{}", True], ["g", "{}", True]]),
    "calls in lines": (f"{one('{}')}\n{one('{}', 'g')}\n", [["f", "{}", True], ["g", "{}", True]]),
    "a name that was not offered": (one("{}", "search.docs_智"), [["search.docs_智", "{}", True]]),
    "an escaped name": (one("{}", r"\u0066"), [["f", "{}", True]]),
    "a name of surrogates": (one("{}", r"\ud83d\ude00" * 128), [["😀" * 128, "{}", True]]),
    "arguments of null": (one("null"), [["f", "{}", True]]),
    "arguments of an empty string": (one('""'), [["f", "{}", True]]),
    "signs in strings": (one('{"a": "}; {\\""}'), [["f", '{"a": "}; {\\""}', True]]),
    "cut in the arguments": (one('{"a": "x')[:-1], [["f", '{"a": "x', False]]),
    "cut before the last brace": (one("{}")[:-1], [["f", "{}", True]]),
    "cut in a member after them": (f'{one("{}")[:-1]}, "ty', [["f", "{}", True]]),
    "cut after a semicolon": (f"{one('{}')}; ", [["f", "{}", True]]),
    "one brace too many": (one("{}}"), [["f", "{}", True]]),
    "one brace too few": (f"{one('{}')[:-1]}; {one('{}', 'g')}", [["f", "{}", True], ["g", "{}", True]]),
    "content after a call": (f"{one('{}')}\nWell; {one('{}')}", [["f", "{}", True], f"\nWell; {one('{}')}"]),
    "an object after a call": (one("{}") + '; {"a": 1}', [["f", "{}", True], '; {"a": 1}']),
    "a half call after a call": (one("{}") + '; {"name": "g"', [["f", "{}", True], '; {"name": "g"']),
    "a member after the arguments": (one('{}, "x": 1'), [["f", "{}", True], ', "x": 1}']),
    "two semicolons": (f"{one('{}')};; {one('{}')}", [["f", "{}", True], f";; {one('{}')}"]),
}


@pytest.mark.parametrize(("text", "expected"), EXAMPLES.values(), ids=EXAMPLES)
def test_examples(text: str, expected: list[object]) -> None:
    assert read([text], parser) == expected
    assert read(list(text), parser) == expected


LOOKALIKES = {
    "an object": '{"answer": {"name": "f", "parameters": {}}}',
    "no arguments": '{"name": "f"}',
    "no name": '{"parameters": {}}',
    "an empty object": "{}",
    "an empty name": one("{}", ""),
    "a long name": one("{}", "f" * 131),
    "a very long name": one("{}", "f" * 2000),
    "a name of two lines": one("{}", "f\\nf"),
    "a number as name": '{"name": 1, "parameters": {}}',
    "arguments in a list": one("[]"),
    "arguments in words": one('"none"'),
    "arguments of false": one("false"),
    "another type": '{"type": "object", "name": "f", "parameters": {}}',
    "another member": '{"name": "f", "description": "", "parameters": {}}',
    "two names": '{"name": "f", "name": "f", "parameters": {}}',
    "arguments twice": '{"parameters": {}, "arguments": {}, "name": "f"}',
    "bad JSON before the name": '{"parameters": {"a": oops}, "name": "f"}',
    "deep arguments first": '{"parameters": ' + "{" * 2000 + "}" * 2000 + ', "name": "f"}',
    "single quotes": "{'name': 'f', 'parameters': {}}",
    "a list": f"[{one('{}')}]",
    "Python": f'{TAG}f.call(a="1")',
    "a tag alone": TAG,
    "two tags": TAG + TAG + one("{}"),
    "a semicolon": f"; {one('{}')}",
    "words before it": f"I call f.\n{one('{}')}",
    "a lone surrogate": one("{}", r"\ud800"),
    "white space": " \n",
}


@pytest.mark.parametrize("text", LOOKALIKES.values(), ids=LOOKALIKES)
def test_what_only_looks_like_a_call_is_content(text: str) -> None:
    assert read([text], parser) == read(list(text), parser) == [text]


# How soon


def is_call(text: str) -> bool:
    """By the whole text and Python's own JSON."""
    if not (text := text.strip().removeprefix(TAG).strip()).startswith("{"):
        return False
    try:
        pairs: list[tuple[str, Any]] = json.loads(text, object_pairs_hook=list)
    except ValueError:
        return False
    keys = ["arguments" if key == "parameters" else key for key, _ in pairs]
    named = dict(zip(keys, (value for _, value in pairs), strict=True))
    return (
        sorted(keys) in (["arguments", "name"], ["arguments", "name", "type"])
        and bool(named["name"])
        and isinstance(named["name"], str)
        and (isinstance(named["arguments"], list) or named["arguments"] in (None, ""))
        and named.get("type", "function") == "function"
    )


WHOLE = [
    *(one("{}"), f"{TAG}{one('{}')}", one("null"), one('""'), '{"arguments": {}, "name": "f"}'),
    '{"parameters": {}, "name": "f"}',
    *('{"type": "function", "name": "f", "parameters": {}}', '{"name": "f", "type": "function", "arguments": {}}'),
]
REST = sorted({whole[at:] for whole in WHOLE for at in range(len(whole))})
PLAIN = [fragment for fragment in FRAGMENTS if "\\" not in fragment and "[" not in fragment]


@settings(max_examples=60)
@given(st.lists(st.sampled_from(PLAIN), max_size=8).map("".join))
def test_what_is_held_back_can_still_become_a_call_and_all_else_has_passed(text: str) -> None:
    reader, passed = parser(), ""
    for at, char in enumerate(text):
        found = reader.push(char)
        if any(isinstance(event, CallStarted) for event in found):
            return
        passed += "".join(event.text for event in found if isinstance(event, Content))
        seen = text[: at + 1]
        if re.match(rf'\s*({re.escape(TAG)})?\s*{{[^{{]*"(parameters|arguments)"\s*:\s*{{', seen):
            return  # arguments before their name are looked at when they are whole
        assert passed in ("", seen)
        assert (passed == "") == any(is_call(seen + rest) for rest in REST), seen


def test_arguments_stream_as_they_come() -> None:
    reader = parser()
    assert reader.push('{"name": "f", "parameters": ') == ()
    assert reader.push('{"ci') == (CallStarted(0, "call_0", "f"), CallArguments(0, '{"ci'))
    assert reader.push('ty": "Rome"') == (CallArguments(0, 'ty": "Rome"'),)
    assert reader.push("}") == (CallArguments(0, "}"), CallEnded(0))
    assert reader.push("}; ") == reader.flush() == ()


def test_an_object_that_is_no_call_streams_from_its_first_key() -> None:
    reader = parser()
    assert reader.push('{"') == ()
    assert reader.push("answ") == (Content('{"answ'),)
    assert reader.push('er": {"name": ') == (Content('er": {"name": '),)


def test_a_name_that_goes_on_in_another_line_is_none_at_once() -> None:
    reader = parser()
    assert reader.push('{"name": "Rome') == ()
    assert reader.push("\nis") == (Content('{"name": "Rome\nis'),)


HOSTILE = {
    "tags": ("", TAG),
    "half a tag": ("", TAG[:5]),
    "spaces": ("", " "),
    "spaces in a frame": ("{", " "),
    "frames": ("", "{"),
    "an endless key": ('{"', "a"),
    "an endless name": ('{"name": "', "a"),
    "escapes in a name": ('{"name": "', "\\"),
    "endless arguments first": ('{"parameters": {"a": [', "[],"),
    "deep arguments first": ('{"parameters": ', '{"a":'),
    "endless arguments": ('{"name": "f", "parameters": {"a": "', "a"),
    "escapes in arguments": ('{"name": "f", "parameters": {"a": "', '\\"'),
    "deep arguments": ('{"name": "f", "parameters": ', '{"a":'),
    "calls": ("", f"{one('{}')}; "),
    "unclosed calls": ("", one("{}")[:-1]),
    "calls in reverse": ("", '{"parameters": {}, "name": "f"}'),
    "members after arguments": ('{"name": "f", "parameters": {}', ', "type": "function"'),
    "braces after a call": (one("{}"), "}"),
    "spaces after a call": (one("{}"), " "),
}


@pytest.mark.parametrize("size", [1, 5, 2**30])
@pytest.mark.parametrize("shape", HOSTILE.values(), ids=HOSTILE)
def test_work_grows_with_the_length_of_the_text_and_no_faster(shape: tuple[str, str], size: int) -> None:
    start, unit = shape
    text = start + unit * (4000 // len(unit))
    longer = start + unit * (8000 // len(unit))
    assert calls_in(lambda: feed(longer, size, parser)) <= 2.1 * calls_in(lambda: feed(text, size, parser)) + 200


@pytest.mark.parametrize("shape", HOSTILE.values(), ids=HOSTILE)
def test_no_more_is_held_back_than_the_bound(shape: tuple[str, str]) -> None:
    start, unit = shape
    most = feed(start + unit * (2**18 // len(unit)), 1000, parser)
    if not any(isinstance(part, list) for part in read([start + unit * 1000], parser)):
        assert most <= MAX_HELD + MAX_SPACE + 1000


@pytest.mark.parametrize(("bound", "before"), [(MAX_SPACE, ""), (MAX_HELD, one("{}")[:-3])])
def test_more_than_the_bound_is_content_wherever_it_was_cut(bound: int, before: str) -> None:
    for over in (-1, 0, 1):
        text = before + " " * (bound - len(before) + over) + one("{}").removeprefix(before)
        whole = read([text], parser)
        assert (whole == [["f", "{}", True]]) == (over < 0)
        assert read([text[: bound - 100], *text[bound - 100 :]], parser) == whole


# The template


def test_the_format_is_known_by_the_template() -> None:
    def found(template: str) -> tuple[type[object], bool]:
        known = format_of(template, (), lambda text: (0,))
        return type(known.tools), known.renders_tools

    assert found(TEMPLATE) == (LlamaFormat, True)
    assert found(TEMPLATE + "<tool_call>") == (QwenFormat, True)
    assert found(TEMPLATE + "<function=f>") == found("{{ messages }}") == (QwenFormat, False)
    assert found("<tool_call>\n<function=f>") == (QwenFormat, False)


def call(id: str, name: str = "f") -> ShownCall:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": {"id": id}}}


IDS = st.sampled_from(["", "1", "2", "3"])
TURNS = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.just("x")}),
    st.fixed_dictionaries({"role": st.just("tool"), "content": st.just("7"), "tool_call_id": IDS}),
    st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "content": st.sampled_from(["", "y"]),
            "tool_calls": st.lists(IDS.map(call), min_size=1, max_size=4),
        }
    ),
)


@given(st.lists(TURNS, max_size=8))
def test_a_history_has_one_call_a_turn_and_loses_nothing(messages: list[Turn]) -> None:
    turns = LlamaFormat().turns(messages)
    assert all(len(turn.get("tool_calls", [0])) == 1 for turn in turns)
    assert not any(turn["content"] for turn in turns if "tool_calls" in turn)

    def parts(turns: list[Turn], role: str) -> list[Any]:
        calls = [("call", made) for turn in turns for made in turn.get("tool_calls", ())]
        said = [turn["content"] for turn in turns if turn["role"] == role and turn["content"]]
        return calls + said

    for role in ("user", "assistant"):
        assert parts(turns, role) == parts(messages, role)
    results = [[turn["tool_call_id"] for turn in each if turn["role"] == "tool"] for each in (turns, messages)]
    assert sorted(results[0]) == sorted(results[1])


def test_results_stand_after_their_calls_in_the_prompt() -> None:
    text = Text(llama_tokenizer())
    calls = [{**call(str(n)), "function": {"name": f"f{n}", "arguments": f'{{"a": {n}}}'}} for n in range(3)]
    results = [{"role": "tool", "tool_call_id": str(n), "content": f"r{n}"} for n in (2, 0)]
    said = {"role": "assistant", "content": "Wait.", "tool_calls": calls}
    chat = ChatRequest.model_validate({"messages": [*QUESTION, said, *results, {"role": "user", "content": "So?"}]})
    prompt = text.decode(encode(text, chat, thinking=False).tokens)
    turns = re.findall(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(.*?)(?:<\|eot_id\|>|\Z)", prompt, re.DOTALL)
    assert turns[1:] == [
        ("assistant", "Wait."),
        ("assistant", '{"name": "f0", "parameters": {"a": 0}}'),
        ("ipython", '"r0"'),
        ("assistant", '{"name": "f1", "parameters": {"a": 1}}'),
        ("assistant", '{"name": "f2", "parameters": {"a": 2}}'),
        ("ipython", '"r2"'),
        ("user", "So?"),
        ("assistant", ""),
    ]


def test_the_template_is_given_the_tools() -> None:
    text = Text(llama_tokenizer())
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    chat = ChatRequest.model_validate({"messages": QUESTION, "tools": tools})
    prompt = text.decode(encode(text, chat, thinking=False).tokens)
    assert json.dumps(tools[0], indent=4) in prompt
    assert "<tool_call>" not in prompt


# What is demanded

SCHEMA = {
    "type": "object",
    "properties": {"sure": {"enum": ["yes", "no"]}},
    "required": ["sure"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("智能体.0", "g")]


def choice_of(service: Live, **fields: Any) -> dict[str, Any]:
    answer = service.chat(max_tokens=900, tools=TOOLS, **fields)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def test_what_was_demanded_is_the_answer() -> None:
    engine = PaddedEngine(tiny_model(max_position_embeddings=4096), token_budget=16384)
    with live(engine, tokenizer=llama_tokenizer(), default_max_tokens=900) as service:
        for fields, names in (
            ({"tool_choice": "required"}, {"智能体.0", "g"}),
            ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, {"g"}),
            ({"tool_choice": "required", "parallel_tool_calls": False}, {"智能体.0", "g"}),
            ({"tool_choice": "auto", "response_format": FORMAT}, {"智能体.0", "g"}),
        ):
            counts = set()
            for seed in range(4):
                choice = choice_of(service, seed=seed, **fields)
                message = choice["message"]
                called = [made["function"] for made in message.get("tool_calls", ())]
                counts.add(len(called))
                assert {function["name"] for function in called} <= names
                assert all(orjson.loads(function["arguments"])["sure"] in ("yes", "no") for function in called)
                assert (choice["finish_reason"], message["content"] is None) == (
                    ("tool_calls", True) if called else ("stop", False)
                )
                if not called:
                    assert orjson.loads(message["content"])["sure"] in ("yes", "no")
            if "response_format" not in fields:
                assert 0 not in counts
            if "parallel_tool_calls" in fields or names == {"g"}:
                assert counts == {1}


def test_the_described_format_is_qwens() -> None:
    assert format_of("{{ messages }}", (), lambda text: (0,)).tools is QWEN


def test_in_words_the_results_of_parallel_calls_are_one_turn_so_that_roles_alternate() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call | {"id": "a"}, call | {"id": "b"}]}
    results = [{"role": "tool", "content": text, "tool_call_id": text} for text in ("a", "b")]
    question = {"role": "user", "content": "?"}
    turns = without_tools(cast("list[Turn]", [question, asked, *results, {"role": "assistant", "content": "!"}]), [])
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant"]
    assert [turns[2]["content"].count(f"<tool_response>\n{text}\n</tool_response>") for text in ("a", "b")] == [1, 1]


NO_SYSTEM = """
{%- for message in messages %}
    {%- if message.role == "system" %}REFUSAL
    {%- else %}{{- "<|start_header_id|>" + message.role + "<|end_header_id|>" + message.content + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
"""


@pytest.mark.parametrize("refusal", ["{{- raise_exception('no system role') }}", ""])
def test_where_the_template_has_no_system_message_tools_are_described_in_the_first_question(refusal: str) -> None:
    text = Text(byte_tokenizer(NO_SYSTEM.replace("REFUSAL", refusal), HEADERS))
    prompt = text.render(
        [{"role": "user", "content": "Rain?"}], [{"type": "function", "function": {"name": "weather"}}]
    )
    assert prompt.index('{"name":"weather"}') < prompt.index("Rain?")
    assert prompt.count("<|start_header_id|>") == 1
