"""Schemas as people and libraries write them: each is answered, and what it can be held to it is held to."""

import json
from collections.abc import Coroutine, Iterator, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from pydantic import AnyUrl, BaseModel, ConfigDict, Field, TypeAdapter

from server.grammar.compiler import Grammars, TokenGrammar
from server.grammar.json_schema import MAX_LENGTH, MAX_LITERAL, MAX_MEMBERS, Schema, SchemaError, bound, written_out
from server.grammar.rewrite import closed, tidied
from server.grammar.source import Part
from server.openai.chat import ChatCompletions, Conversation
from server.openai.constraints import ResponseFormat
from server.openai.messages import names_in
from server.openai.requests import ChatRequest
from server.openai.tools import ToolUse
from server.output.model_format import QWEN
from server.output.reasoning import ThoughtState
from tests.grammars import INT, TEXT, Kit, around, kit_of, many, record, refusal, run, strict, valid

pytestmark = pytest.mark.model


@pytest.fixture
def demo() -> Kit:
    return kit_of("demo")


def loose(schema: Schema) -> Part:
    return Part(schema, False, "response_format")


# Models as Pydantic writes them


class Colour(Enum):
    RED = "red"
    GREEN = "green"


class Money(BaseModel):
    amount: Decimal
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")]


class Address(BaseModel):
    street: str
    zip: Annotated[str, Field(min_length=2, max_length=10)]
    country: str | None = None


class Line(BaseModel):
    sku: str
    quantity: Annotated[int, Field(gt=0, le=100)]
    price: Money
    discount: Annotated[Decimal, Field(max_digits=5, decimal_places=2)] = Decimal(0)


class Order(BaseModel):
    id: UUID
    placed: datetime
    due: date | None
    lines: list[Line]
    ship_to: Address
    bill_to: Address | None = None
    notes: dict[str, str] = {}
    status: Literal["new", "paid", "sent"]


class Comment(BaseModel):
    text: str
    replies: list["Comment"] = []


class Folder(BaseModel):
    name: str
    children: dict[str, "Folder"] = {}


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=0, le=9)]


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: set[str]


class Home(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    others: list[Cat | Dog] = []


class Everything(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: dict[str, int]
    point: tuple[float, float]
    pair: tuple[int, str, bool]
    colour: Colour
    tags: frozenset[str]
    link: AnyUrl
    host: IPv4Address
    took: timedelta
    raw: bytes
    file: Path
    anything: Any
    price: Annotated[Decimal, Field(ge=0, multiple_of=Decimal("0.05"))]
    ratio: Annotated[float, Field(gt=0, lt=1)]
    either: int | str | None = None


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str


MODELS: Sequence[Any] = [
    Money,
    Address,
    Order,
    Comment,
    Folder,
    Home,
    Everything,
    Open,
    list[Order],
    dict[str, int],
    dict[str, Money],
    Cat | Dog,
    Decimal,
]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_every_schema_that_pydantic_writes_is_answered_by_what_it_validates(demo: Kit, model: Any) -> None:
    adapter = TypeAdapter(model)
    schema = adapter.json_schema()
    grammar = run(demo.grammars.of(loose(schema)))
    for seed in range(3):
        text = demo.walk(grammar, Random(seed), seed * 10)
        assert Draft202012Validator(without_patterns(schema)).is_valid(json.loads(text)), text


def without_patterns(node: Any) -> Any:
    """A schema but for what the grammar leaves to the model."""
    if isinstance(node, list):
        return [without_patterns(item) for item in node]
    if not isinstance(node, dict):
        return node
    dropped = ("uniqueItems", "pattern") if "(?" in str(node.get("pattern")) else ("uniqueItems",)
    return {key: without_patterns(value) for key, value in node.items() if key not in dropped}


# Closed objects


def test_objects_that_do_not_say_more_take_no_other_properties(demo: Kit) -> None:
    inner = {"type": "object", "properties": {"b": INT}}
    schema = {"type": "object", "properties": {"a": TEXT, "in": inner, "all": many(inner)}, "required": ["a", "z"]}
    for part in (strict(schema), loose(schema)):
        grammar = run(demo.grammars.of(part))
        assert demo.accepts(grammar, '{"a": "x", "in": {"b": 1}, "all": [{"b": 2}, {}], "z": null}')
        for text in (
            '{"a": "x", "z": 1, "y": 2}',
            '{"a": "x", "in": {"c": 1}, "z": 1}',
            '{"a": "x", "all": [{"c": 1}], "z": 1}',
        ):
            assert not demo.accepts(grammar, text), text


@pytest.mark.parametrize("more", [True, {}, INT])
def test_an_object_that_says_more_is_open(demo: Kit, more: Any) -> None:
    grammar = demo.schema({"type": "object", "properties": {"a": TEXT}, "additionalProperties": more})
    assert demo.accepts(grammar, '{"a": "x", "other": 1}')


def test_an_object_that_lists_nothing_is_open_and_one_with_an_empty_list_is_not(demo: Kit) -> None:
    assert demo.accepts(demo.schema({"type": "object"}), '{"a": 1}')
    assert not demo.accepts(demo.schema({"type": "object", "properties": {}}), '{"a": 1}')


PARTS: Schema = {
    "$defs": {"base": {"type": "object", "properties": {"id": INT}, "required": ["id"]}},
    "allOf": [{"$ref": "#/$defs/base"}, {"type": "object", "properties": {"name": TEXT}}],
}
CHOICE: Schema = {
    "type": "object",
    "properties": {"a": TEXT, "b": TEXT},
    "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
}
BESIDE: Schema = {
    "$defs": {"base": {"type": "object", "properties": {"id": INT}, "required": ["id"]}},
    "$ref": "#/$defs/base",
    "properties": {"name": TEXT},
}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (PARTS, ['{"id": 1}', '{"id": 1, "name": "x"}'], ['{"id": 1, "more": 2}', '{"name": "x"}']),
        (BESIDE, ['{"id": 1, "name": "x"}'], ['{"id": 1, "more": 2}']),
        (CHOICE, ['{"a": "x"}', '{"b": "x"}', '{"a": "x", "b": "y"}'], ["{}", '{"a": "x", "c": 1}']),
        (
            {"anyOf": [{"type": "object", "properties": {"a": INT}}, {"type": "object", "properties": {"b": INT}}]},
            ['{"a": 1}', '{"b": 1}', "{}"],
            ['{"a": 1, "b": 1}', '{"c": 1}'],
        ),
        (
            {"type": "object", "properties": {"a": INT}, "patternProperties": {"^x": INT}, "required": ["x1"]},
            ['{"a": 1, "x1": 2, "x2": 3}'],
            ['{"x1": 1, "y": 2}', '{"a": 1}'],
        ),
        ({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"properties": {"b": INT}}}}, ['{"b": 1}'], ['{"c": 1}']),
    ],
    ids=["all", "beside a reference", "beside a choice", "a choice", "patterns", "all of one"],
)
def test_parts_of_one_object_are_closed_together(demo: Kit, schema: Schema, good: list[str], bad: list[str]) -> None:
    grammar = demo.schema(schema)
    for text in good:
        assert demo.accepts(grammar, text), text
    for text in bad:
        assert not demo.accepts(grammar, text), text


def test_closing_only_ever_forbids() -> None:
    """What a closed schema takes, the schema as it was takes too, and nothing in it is lost."""
    for schema in (PARTS, CHOICE, BESIDE, TypeAdapter(Order).json_schema(), TypeAdapter(Home).json_schema()):
        for value in ({"id": 1, "name": "x"}, {"a": "x"}, {"b": "x", "c": 1}, {"pet": {"kind": "cat", "lives": 1}}):
            assert valid(schema, value) or not valid(closed(schema), value)


# What a grammar cannot hold

LEFT: dict[str, tuple[Schema, str, str]] = {
    "a look-ahead": (TEXT | {"pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}, '"1.5"', "1"),
    "a look-behind": (TEXT | {"pattern": r"(?<=a)b"}, '"b"', "1"),
    "a word's end": (TEXT | {"pattern": r"\bcat\b"}, '"a cat"', "1"),
    "a back-reference": (TEXT | {"pattern": r"(a)\1"}, '"aa"', "1"),
    "no pattern": (TEXT | {"pattern": "("}, '"x"', "1"),
    "a pattern that is a number": (TEXT | {"pattern": 5}, '"x"', "1"),
    "a pattern that repeats": (TEXT | {"pattern": "(((a{100}){100}){100}){100}"}, '"x"', "1"),
    "a long pattern": (TEXT | {"pattern": "[^" + "[" * 32_000}, '"x"', "1"),
    "patterns without a common text": (
        TEXT | {"allOf": [{"pattern": f".*{c}.*{c}.*{c}"} for c in "abcdefghijkl"]},
        '"x"',
        "1",
    ),
    "a name's bad pattern": ({"type": "object", "patternProperties": {"(": INT}}, '{"a": "x"}', "1"),
    "names' overlapping patterns": (
        {"type": "object", "patternProperties": {"^a": INT, "^ab": TEXT}, "additionalProperties": False},
        '{"abc": null}',
        "1",
    ),
    "another document": ({"type": "object", "properties": {"a": {"$ref": "https://example.org/x"}}}, '{"a": 1}', "1"),
    "a file": (many({"$ref": "other.json#/a"}), "[1]", "1"),
    "a missing definition": (many({"$ref": "#/$defs/gone"}), "[1]", "1"),
    "a missing anchor": (many({"$ref": "#gone"}), "[1]", "1"),
    "data by reference": (many({"$ref": "#/default"}) | {"default": {"const": 1}}, "[2]", "1"),
    "a circle": (
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "type": ["string", "null"]}}}
        | many({"$ref": "#/$defs/a"}),
        "[null]",
        "1",
    ),
    "a draft by another name": ({"$schema": "https://json-schema.org/draft-07/schema"} | INT, "1", '"x"'),
    "a draft nobody knows": ({"$schema": "https://example.org/my-schema"} | INT, "1", '"x"'),
    "an id that is none": ({"$id": "no uri %"} | INT, "1", '"x"'),
    "an empty choice": (record(a=INT | {"enum": []}), '{"a": 1}', "1"),
    "required as a flag": (record(a=INT | {"required": True}), '{"a": 1}', "1"),
    "limits in strings": (INT | {"minimum": "1"}, "0", '"x"'),
    "limits beyond all": (INT | {"minimum": -(2**200)}, "0", '"x"'),
    "nulls": (INT | {"enum": None, "minimum": None, "description": None}, "0", '"x"'),
    "steps too fine": ({"type": "number", "multipleOf": 1e-20}, "1.5", '"x"'),
    "a long constant": (TEXT | {"const": "x" * (MAX_LITERAL + 1)}, '"y"', "1"),
    "unknown keywords": (many(INT) | {"uniqueItems": True, "contains": INT, "if": {}, "nullable": True}, "[1,1]", "1"),
    "an unknown format": (TEXT | {"format": "color"}, '"x"', "1"),
    "types of other languages": (record(a={"type": "str"}, b={"type": "List[int]"}), '{"a": "x", "b": [1]}', "1"),
}
ALSO_STRICT = ("a draft by another name", "a draft nobody knows", "nulls")


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_held_to_is_left_to_the_model_unless_strict(demo: Kit, name: str) -> None:
    schema, good, bad = LEFT[name]
    grammar = run(demo.grammars.of(loose(schema)))
    assert demo.accepts(grammar, good)
    assert not demo.accepts(grammar, bad)
    if name in ALSO_STRICT:
        assert demo.accepts(run(demo.grammars.of(strict(schema))), good)
    else:
        assert refusal(demo.grammars.of(strict(schema))).code == "unsupported_schema"


def test_added_tokens_are_gone_through_once_per_model_not_per_tool(demo: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(dict[str, int]):
        times = 0

        def __iter__(self) -> Iterator[str]:
            self.times += 1
            return super().__iter__()

    added = Counted(demo.tokenizer.get_added_vocab())
    monkeypatch.setattr(demo.tokenizer, "get_added_vocab", lambda: added)
    grammars = Grammars(demo.tokenizer)
    before = added.times
    assert before > 0
    assert run(grammars.tool_calls([(f"tool_{n}", None) for n in range(100)], QWEN))
    assert added.times == before


def test_what_is_left_out_of_one_schema_is_kept_in_the_others(demo: Kit) -> None:
    tools: list[tuple[str, Schema | None]] = [
        ("f", record(a=TEXT | {"pattern": "("}, b=TEXT | {"pattern": "^x$"})),
        ("g", {"type": "object", "patternProperties": {"^a": INT, "^ab": INT}}),
        ("h", {"type": "object", "patternProperties": {"^a": INT}}),
    ]
    grammar = run(demo.grammars.tool_calls(tools, QWEN))

    def accepts(name: str, arguments: str) -> bool:
        before, after = around(name)
        return demo.accepts(grammar, before + arguments + after)

    assert accepts("f", '{"a": "(", "b": "x"}')
    assert not accepts("f", '{"a": "(", "b": "y"}')
    assert accepts("g", '{"ab": "y"}')
    assert accepts("h", '{"ab": 1}')
    assert not accepts("h", '{"ab": "y"}')


# Sizes


def test_limits_count_characters_as_they_were_sent(demo: Kit) -> None:
    values = [f"{chr(0x4E00 + n)}国人民大学出版社的第{n}本书" * 4 for n in range(2000)]
    assert len(json.dumps(values)) > MAX_LENGTH
    assert demo.accepts(demo.schema({"enum": values}), json.dumps(values[-1], ensure_ascii=False))


def test_as_many_properties_as_are_allowed_may_all_be_optional(demo: Kit) -> None:
    grammar = demo.schema({"type": "object", "properties": {f"p{n}": INT for n in range(1000)}})
    assert demo.accepts(grammar, '{"p0": 1, "p500": 2, "p999": 3}')


class Counted(list[Any]):
    """A list that knows how many of its items were looked at."""

    looked_at = 0

    def __iter__(self) -> Any:
        for item in super().__iter__():
            self.looked_at += 1
            yield item


def test_what_is_too_large_is_refused_before_it_is_read() -> None:
    items = Counted([0] * (MAX_MEMBERS + 1))
    with pytest.raises(SchemaError, match="more members"):
        bound({"enum": items})
    assert items.looked_at == 0
    texts = Counted(["x" * 1000] * 1000)
    with pytest.raises(SchemaError, match="too large"):
        bound({"enum": texts})
    with pytest.raises(SchemaError, match="too long"):
        bound({"const": 1 << 10_000})


def test_no_pattern_is_read_more_than_once() -> None:
    """A quadratic search through the last of these would take minutes."""
    for start in ("[^", "[", "(", "{1", "{1,", "\\", "a{"):
        for repeated in ("[", "{", "1", "[^", "(", "\\"):
            assert written_out(start + repeated * 4000) >= 0


# Tools as small models' authors write them


def offered(parameters: Any) -> Schema:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    [found] = ToolUse.model_validate({"tools": [tool]}).offered
    assert found.function.parameters is not None
    return found.function.parameters


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("float", "number"),
        ("OBJECT", "object"),
        ("STRING", "string"),
        ("int", "integer"),
        ("Integer", "integer"),
        ("dict", "object"),
        ("list", "array"),
        ("List[str]", "array"),
        ("Array<string>", "array"),
        ("string[]", "array"),
        ("int[2][3]", "array"),
        ("tuple", "array"),
        ("bool", "boolean"),
        ("None", "null"),
        ("date", "string"),
        (["str", "None"], ["string", "null"]),
        (["string", "string[]"], ["string", "array"]),
        (["string", None], ["string", "null"]),
        (["int", "integer"], ["integer"]),
    ],
)
def test_types_become_the_nearest_in_the_prompt_and_in_the_grammar(demo: Kit, written: Any, meant: Any) -> None:
    parameters = {"type": "OBJECT", "properties": {"a": {"type": written, "description": "d"}}, "required": ["a"]}
    shown = {"type": "object", "properties": {"a": {"type": meant, "description": "d"}}, "required": ["a"]}
    assert offered(parameters) == shown
    before, after = around("f")
    grammar = run(demo.grammars.tool_calls([("f", offered(parameters))], QWEN))
    examples = {"string": '"x"', "number": "1.5", "integer": "2", "boolean": "true", "null": "null"}
    examples |= {"object": '{"b": 1}', "array": "[1]"}
    for kind, text in examples.items():
        taken = kind in (meant if isinstance(meant, list) else [meant]) or (kind, meant) == ("integer", "number")
        assert demo.accepts(grammar, f'{before}{{"a": {text}}}{after}') is taken, kind


@pytest.mark.parametrize("written", ["any", "Any", "anything else", 7, None, {"a": 1}, [], ["string", "any"], ""])
def test_a_type_that_is_none_is_no_constraint(demo: Kit, written: Any) -> None:
    shown = offered({"properties": {"a": {"type": written, "minimum": 1}}, "required": ["a"]})
    assert shown == {"properties": {"a": {"minimum": 1}}, "required": ["a"]}
    before, after = around("f")
    grammar = run(demo.grammars.tool_calls([("f", shown)], QWEN))
    for text in ('"x"', "1.5", "null", "[true]", "{}"):
        assert demo.accepts(grammar, f'{before}{{"a": {text}}}{after}')


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"type": "str"}, {"type": ["string", "null"]}),
        ({"type": ["string", "null"]}, {"type": ["string", "null"]}),
        ({"type": "string", "enum": ["x"]}, {"type": ["string", "null"], "enum": ["x", None]}),
        ({"enum": ["x"]}, {"enum": ["x", None]}),
        ({"allOf": [TEXT], "title": "A"}, {"title": "A", "anyOf": [{"allOf": [TEXT]}, {"type": "null"}]}),
    ],
)
def test_what_openapi_calls_nullable_may_be_null(demo: Kit, written: Schema, meant: Schema) -> None:
    schema = {"type": "object", "properties": {"a": written | {"nullable": True}}, "required": ["a"]}
    assert offered(schema)["properties"] == {"a": meant}
    assert tidied(tidied(schema)) == tidied(schema)
    grammar = run(demo.grammars.of(loose(schema)))
    for text, taken in {'"x"': True, "null": True, "1": False}.items():
        assert demo.accepts(grammar, f'{{"a": {text}}}') is taken, text
    never = {"properties": {"a": TEXT | {"nullable": False}}}
    assert offered(never) == never


def test_a_property_may_be_its_type_alone() -> None:
    assert offered({"properties": {"a": "string", "b": "any"}}) == {"properties": {"a": {"type": "string"}, "b": {}}}


def test_what_is_data_stays_as_it_was_sent() -> None:
    data = {"type": "float", "a": None}
    schema = {"properties": {"type": {"const": data}, "a": {"enum": [data], "default": None, "x": data}}}
    assert offered(schema) == schema
    assert tidied(tidied(schema)) == tidied(schema)


# Formats


def test_a_schema_may_stand_beside_the_type_as_in_other_servers(demo: Kit) -> None:
    schema = record(a=INT)
    for kind in ("json_object", "json_schema"):
        form = ResponseFormat.model_validate({"type": kind, "schema": schema}).constraint
        assert form is not None
        assert demo.accepts(run(demo.grammars.of(form)), '{"a": 1}')
        assert not demo.accepts(run(demo.grammars.of(form)), '{"b": 1}')


@pytest.mark.parametrize("name", ["my schema", "名字", "x" * 100, "", None])
def test_a_schema_may_have_any_name_or_none(name: Any) -> None:
    form = ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"name": name, "schema": {}}})
    assert form.constraint == Part({}, False, "response_format")


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema"},
        {"type": "text", "schema": {}},
        {"type": "json_object", "json_schema": {"name": "x", "schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}, "schema": {}},
    ],
)
def test_a_format_has_the_one_schema_that_its_type_needs(form: Any) -> None:
    with pytest.raises(ValueError, match="json_schema"):
        ResponseFormat.model_validate(form)


# Calls or a format


def calls_or(demo: Kit, form: Part | None, **options: Any) -> TokenGrammar:
    tools: list[tuple[str, Schema | None]] = [("now", None), ("get", record(city=TEXT))]
    return run(demo.grammars.tool_calls(tools, QWEN, otherwise=form, **options))


def test_where_calls_are_offered_an_answer_is_calls_or_of_the_format(demo: Kit) -> None:
    grammar = calls_or(demo, strict(record(a=INT)))
    call = "{}".join(around("now"))
    for text in ('{"a": 1}', call, f"{call}\n{call}"):
        assert demo.accepts(grammar, text)
    for text in ("", "hello", '{"b": 1}', call + '{"a": 1}', '{"a": 1}' + call, '{"a": 1}\n' + call):
        assert not demo.accepts(grammar, text)
    assert demo.accepts(calls_or(demo, strict(record(a=INT)), parallel=False), call)


def test_an_error_names_the_field_that_its_schema_came_in(demo: Kit) -> None:
    nothing = {"properties": {"a": {"enum": [1], "type": "null"}}, "required": ["a"]}
    assert refusal(demo.grammars.tool_calls([("f", nothing)], QWEN, otherwise=strict(INT))).param == "tools"
    form = strict({"type": "string", "format": "color"})
    assert refusal(demo.grammars.tool_calls([("f", None)], QWEN, otherwise=form)).param == "response_format"


@pytest.mark.parametrize(
    ("choice", "takes_call", "takes_format"),
    [("auto", True, True), (None, True, True), ("required", True, False), ("none", False, True)],
)
def test_a_call_that_is_demanded_comes_before_the_format(
    demo: Kit, choice: str | None, takes_call: bool, takes_format: bool
) -> None:
    grammar: Any = run(
        grammar_of_chat(
            demo,
            tools=[{"type": "function", "function": {"name": "now"}}],
            tool_choice=choice,
            response_format={"type": "json_object"},
        )
    )
    assert demo.accepts(grammar, "{}".join(around("now"))) is takes_call
    assert demo.accepts(grammar, '{"a": 1}') is takes_format


def grammar_of_chat(demo: Kit, **fields: Any) -> Coroutine[Any, Any, Any]:
    chat = ChatRequest.model_validate({"messages": [{"role": "user", "content": "Hi"}]} | fields)
    service: Any = SimpleNamespace(grammars=demo.grammars, text=SimpleNamespace(format=SimpleNamespace(tools=QWEN)))
    names = names_in((), chat.offered)
    return ChatCompletions().grammar(service, chat, Conversation(chat, (), ThoughtState.CLOSED, names), "")


def test_of_several_functions_only_the_named_one_is_called_and_once(demo: Kit) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("now", "then")]
    choice = {"type": "function", "function": {"name": "then"}}
    grammar: Any = run(grammar_of_chat(demo, tools=tools, tool_choice=choice))
    now, then = ("{}".join(around(name)) for name in ("now", "then"))
    assert [demo.accepts(grammar, text) for text in (then, now, f"{then}\n{then}")] == [True, False, False]


def test_an_error_names_the_field_that_a_function_came_in(demo: Kit) -> None:
    nothing = {"properties": {"a": {"enum": [1], "type": "null"}}, "required": ["a"]}
    function = {"name": "f", "parameters": nothing}
    newer = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    older = {"functions": [function], "function_call": {"name": "f"}}
    assert refusal(grammar_of_chat(demo, **newer)).param == "tools"
    assert refusal(grammar_of_chat(demo, **older)).param == "functions"
