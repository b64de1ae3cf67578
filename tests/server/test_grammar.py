"""Structured output against real tokenizers: whatever is drawn under the mask parses, validates and comes to an end."""

import json
import re
import string
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from batching.errors import ModelError
from batching.sampling import Sampler
from batching.types import TokenBitmask
from server.grammar.json_schema import Schema, written_out
from server.grammar.rewrite import terminates
from server.grammar.source import Part
from server.model.text import Text
from server.output.llama import LlamaFormat
from server.output.model_format import FORMATS, QWEN
from server.output.reasoning import ThoughtState
from server.output.tool_calls import CallEnded, CallStarted, Content
from tests.batching.conftest import request
from tests.conftest import TEST_TOKENIZER
from tests.grammars import ANY_OBJECT, INT, TEXT, Kit, kit_of, many, record, refusal, run, strict, valid

Case = tuple[Schema, Any]
"""A schema, and an instance of it with its properties in the schema's order."""

TREE = {
    "$defs": {"node": record(name=TEXT, children=many({"$ref": "#/$defs/node"}))},
    "$ref": "#/$defs/node",
}
LINKED = record("value", value=INT, next={"anyOf": [{"$ref": "#"}, {"type": "null"}]})
PAGED = record(
    items=many(record(id=INT, tags=many(TEXT, maxItems=3)), minItems=1, maxItems=2),
    cursor={"type": ["string", "null"]},
)

APPLICATIONS: list[Case] = [
    (record(city=TEXT, unit={"enum": ["celsius", "fahrenheit"]}), {"city": "Zürich", "unit": "celsius"}),
    (record(final_answer=TEXT, steps=many(record(explanation=TEXT, output=TEXT))), {"final_answer": "4", "steps": []}),
    (
        record(name=TEXT, date={"type": "string", "format": "date"}, participants=many(TEXT)),
        {"name": "Fair", "date": "2024-02-29", "participants": ["Ann", "Bob"]},
    ),
    (TREE, {"name": "a", "children": [{"name": "b", "children": []}]}),
    (LINKED, {"value": 1, "next": {"value": 2, "next": None}}),
    (PAGED, {"items": [{"id": 7, "tags": ["x"]}], "cursor": None}),
    (
        record(
            sentiment={"enum": ["positive", "neutral", "negative"]},
            confidence={"type": "number", "minimum": 0, "maximum": 1},
        ),
        {"sentiment": "neutral", "confidence": 0.5},
    ),
    (record(keywords=many(TEXT, minItems=1, maxItems=5)), {"keywords": ["graph", "index"]}),
    (record(relevant={"type": "boolean"}, reason={**TEXT, "maxLength": 80}), {"relevant": True, "reason": "names it"}),
    (
        record(entities=many(record(text=TEXT, label={"enum": ["PER", "ORG", "LOC"]}, start={**INT, "minimum": 0}))),
        {"entities": [{"text": "Ada", "label": "PER", "start": 0}]},
    ),
    (
        {
            "title": "User",
            "type": "object",
            "properties": {
                "id": {"title": "Id", "type": "integer"},
                "email": {"title": "Email", "type": "string", "format": "email"},
                "nick": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Nick"},
            },
            "required": ["id", "email"],
        },
        {"id": 1, "email": "a@b.co", "nick": None},
    ),
    (
        {
            "$defs": {"Address": record(street=TEXT, zip={"type": "string", "pattern": "^[0-9]{5}$"})},
            **record(home={"$ref": "#/$defs/Address"}, work={"anyOf": [{"$ref": "#/$defs/Address"}, {"type": "null"}]}),
        },
        {"home": {"street": "Elm", "zip": "12345"}, "work": None},
    ),
    (
        {"$defs": {"Color": {"enum": ["red", "green"], "type": "string"}}, **record(color={"$ref": "#/$defs/Color"})},
        {"color": "red"},
    ),
    (
        record(sql=TEXT, parameters={"type": "object", "additionalProperties": {"type": ["string", "number", "null"]}}),
        {"sql": "select ?", "parameters": {"a": 1}},
    ),
    (
        record(query=TEXT, top_k={**INT, "minimum": 1, "maximum": 20}, filters={"type": "object"}),
        {"query": "q", "top_k": 3, "filters": {"lang": ["de", 1.5, {"x": None}]}},
    ),
    (
        record(action={"anyOf": [record(kind={"const": "search"}, query=TEXT), record(kind={"const": "stop"})]}),
        {"action": {"kind": "stop"}},
    ),
    (
        record(thought=TEXT, tool={"enum": ["none", "search", "calculator"]}, input=TEXT),
        {"thought": "…", "tool": "none", "input": ""},
    ),
    (
        record(
            invoice=record(
                number={"type": "string", "pattern": "^INV-[0-9]{4}$"},
                total={"type": "number"},
                lines=many(record(sku=TEXT, quantity={**INT, "exclusiveMinimum": 0}), minItems=1),
            )
        ),
        {"invoice": {"number": "INV-0042", "total": 12.5, "lines": [{"sku": "A", "quantity": 2}]}},
    ),
    (
        record(uuid={"type": "string", "format": "uuid"}, at={"type": "string", "format": "date-time"}),
        {"uuid": "123e4567-e89b-12d3-a456-426614174000", "at": "2024-01-02T03:04:05Z"},
    ),
    (
        record(question=TEXT, options={**many(TEXT), "minItems": 4, "maxItems": 4}, answer={"enum": [0, 1, 2, 3]}),
        {"question": "?", "options": ["a", "b", "c", "d"], "answer": 2},
    ),
    (record(score={**INT, "minimum": 1, "maximum": 10}), {"score": 10}),
    (record(summary={**TEXT, "minLength": 10, "maxLength": 60}), {"summary": "Ten or more characters."}),
    (many(record(head=TEXT, relation=TEXT, tail=TEXT)), [{"head": "a", "relation": "is", "tail": "b"}]),
    (
        record(
            point={
                "type": "array",
                "prefixItems": [{"type": "number"}, {"type": "number"}],
                "items": False,
                "minItems": 2,
            }
        ),
        {"point": [1.5, -2]},
    ),
    (record("title", title=TEXT, subtitle=TEXT, year=INT), {"title": "t", "year": 1999}),
    (
        {
            "type": "object",
            "properties": {"type": {"const": "object"}, "format": TEXT, "$ref": TEXT},
            "required": ["type"],
        },
        {"type": "object", "format": "x", "$ref": "y"},
    ),
    ({"type": "object", "additionalProperties": {"type": "array", "items": {"type": "number"}}}, {"a": [1], "b": []}),
    ({"type": "object", "patternProperties": {"^x_": TEXT}, "additionalProperties": False}, {"x_a": "1"}),
    (
        {
            "allOf": [
                {"type": "object", "properties": {"a": TEXT}, "required": ["a"]},
                {"type": "object", "properties": {"b": INT}, "required": ["b"]},
            ]
        },
        {"a": "", "b": 0},
    ),
    (
        {"oneOf": [record(ok={"const": True}, value=INT), record(ok={"const": False}, error=TEXT)]},
        {"ok": False, "error": "no"},
    ),
    (
        record(
            duration={"type": "string", "format": "duration"},
            host={"type": "string", "format": "hostname"},
            ip={"type": "string", "format": "ipv4"},
            link={"type": "string", "format": "uri"},
        ),
        {"duration": "P1D", "host": "example.org", "ip": "10.0.0.1", "link": "https://example.org/a"},
    ),
    (record(language={"enum": ["日本語", "Türkçe", "emoji 🙂", 'quote "', "back\\slash"]}), {"language": 'quote "'}),
    (
        record(**{f"field_{n}": {"type": ["string", "null"]} for n in range(40)}),
        {f"field_{n}": None for n in range(40)},
    ),
]
"""As applications and their libraries write them."""

KINDS: dict[str, Any] = {
    "null": None,
    "boolean": True,
    "integer": -3,
    "number": 2.5e-3,
    "string": 'a "b" \\ \n é 🙂',
    "array": [1, "a", None],
    "object": {"a": {"b": []}},
}
CONSTANTS: list[Any] = [None, False, 0, -1.5, "", "a\nb", [], [1, [2]], {}, {"a": {"b": [None]}}]
SHAPES: list[Case] = [
    *(({"type": kind}, value) for kind, value in KINDS.items()),
    ({"type": ["integer", "string"]}, "x"),
    ({"type": ["array", "object", "null"]}, {}),
    *(({"const": value}, value) for value in CONSTANTS),
    *(
        ({"enum": [*values]}, values[-1])
        for values in (
            [1],
            ["a", "ab", "abc"],
            [None, True, 0, "0"],
            [[1], {"a": 1}],
            ["\u2028", "\x7f", "/", "\\u0041"],
        )
    ),
    *(
        (INT | bounds, value)
        for bounds, value in (
            ({"minimum": 3}, 3),
            ({"maximum": -3}, -10),
            ({"minimum": -5, "maximum": 17}, 0),
            ({"exclusiveMinimum": 9, "exclusiveMaximum": 11}, 10),
            ({"minimum": 0, "maximum": 0}, 0),
            ({"multipleOf": 7}, 21),
            ({"minimum": 999, "maximum": 100000}, 54321),
        )
    ),
    *(
        ({"type": "number"} | bounds, value)
        for bounds, value in (
            ({"minimum": 0.5}, 0.5),
            ({"maximum": -0.25}, -1),
            ({"exclusiveMinimum": 0, "exclusiveMaximum": 1}, 0.001),
            ({"minimum": -1.5, "maximum": 1.5}, 1.25),
        )
    ),
    *(
        (TEXT | limits, value)
        for limits, value in (
            ({"minLength": 3}, "abc"),
            ({"maxLength": 2}, "🙂é"),
            ({"maxLength": 0}, ""),
            ({"minLength": 2, "maxLength": 2}, "ab"),
            ({"pattern": "^a+$"}, "aaa"),
            ({"pattern": "b"}, "abc"),
            ({"pattern": "^[A-Z]{2}-\\d{3}$"}, "AB-123"),
            ({"pattern": "^(foo|bar)?$"}, "bar"),
            ({"pattern": "^\\w+@\\w+$"}, "a@b"),
            ({"pattern": '^[^"\\\\]*$'}, "plain"),
            ({"pattern": "^\\S+ \\S+$"}, "a b"),
            ({"pattern": "^[^-a\\s]+$"}, "2B"),
            ({"pattern": "^.{2,4}$"}, "日本語"),
            ({"pattern": "^a$|^b$"}, "b"),
        )
    ),
    *(
        (TEXT | {"format": name}, value)
        for name, value in {
            "date": "2024-12-31",
            "time": "23:59:59Z",
            "date-time": "2024-12-31T23:59:59+02:00",
            "duration": "PT1H",
            "email": "ann@example.org",
            "hostname": "a.example",
            "ipv4": "255.0.0.1",
            "ipv6": "::1",
            "uuid": "00000000-0000-4000-8000-000000000000",
            "uri": "urn:a:b",
        }.items()
    ),
    *(
        (many(INT, **limits), value)
        for limits, value in (
            ({"minItems": 2}, [1, 2]),
            ({"maxItems": 0}, []),
            ({"maxItems": 2}, [5]),
            ({"minItems": 3, "maxItems": 3}, [1, 2, 3]),
        )
    ),
    ({"type": "array", "items": False}, []),
    ({"type": "array", "items": True}, [None]),
    ({"type": "array", "prefixItems": [TEXT, INT]}, ["a", 1, None]),
    ({"type": "array", "prefixItems": [TEXT, INT], "items": {"type": "boolean"}, "maxItems": 4}, ["a", 1, True]),
    ({"type": "object", "additionalProperties": False}, {}),
    ({"type": "object", "additionalProperties": INT}, {"a": 1}),
    ({"type": "object", "properties": {"a": INT}, "additionalProperties": TEXT}, {"a": 1, "b": "x"}),
    ({"type": "object", "required": ["a", "b"]}, {"a": 1, "b": None}),
    ({"type": "object", "properties": {"a": False, "b": True}}, {"b": 1}),
    (
        {"type": "object", "properties": {"a": INT}, "required": ["a", "z"], "additionalProperties": TEXT},
        {"a": 1, "z": ""},
    ),
    ({"type": "object", "maxProperties": 1}, {"a": 1}),
    ({"type": "object", "minProperties": 1}, {"a": 1}),
    ({"type": "object", "maxProperties": 0}, {}),
    ({"type": "object", "patternProperties": {"^a": INT, "^b": TEXT}}, {"a1": 1, "b1": ""}),
    (
        {"type": "object", "patternProperties": {"\\d$": {"type": "null"}}, "additionalProperties": INT},
        {"x1": None, "y": 1},
    ),
    ({"anyOf": [INT, {"type": "string", "maxLength": 3}]}, "abc"),
    ({"anyOf": [TEXT, {"maxItems": 1}]}, [1]),
    ({"anyOf": [record(a=INT), record(a=TEXT)]}, {"a": "x"}),
    ({"anyOf": [{"minimum": 2}, {"maximum": 1}]}, 3),
    ({"oneOf": [INT, TEXT]}, 5),
    ({"allOf": [{"minimum": 3, "type": "integer"}, {"maximum": 5}]}, 4),
    ({"allOf": [{}, INT]}, 1),
    ({"allOf": [True]}, 1),
    ({"allOf": [{"maxLength": 5}, {"minLength": 3}], "type": "string"}, "abcd"),
    ({"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]}, 3),
    ({"definitions": {"a": INT}, "$ref": "#/definitions/a"}, 1),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": TEXT}, "type": "array", "items": {"$ref": "#/$defs/a"}}, ["x"]),
    (
        {
            "$defs": {"a/b": INT, "c~d": TEXT, "e%f": INT},
            "type": "array",
            "prefixItems": [{"$ref": "#/$defs/a~1b"}, {"$ref": "#/$defs/c~0d"}, {"$ref": "#/$defs/e%25f"}],
            "minItems": 3,
            "items": False,
        },
        [1, "x", 2],
    ),
    (
        {
            "$defs": {"地址": INT, "List<string>": TEXT, "a [b]": INT},
            "type": "array",
            "prefixItems": [{"$ref": "#/$defs/地址"}, {"$ref": "#/$defs/List<string>"}, {"$ref": "#/$defs/a [b]"}],
            "minItems": 3,
            "items": False,
        },
        [1, "x", 2],
    ),
    ({"properties": {"a": INT, "b": {"$ref": "#/properties/a"}}, "type": "object"}, {"a": 1, "b": 2}),
    (
        {
            "$defs": {"s": {"minLength": 2}},
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/s", "type": "string"}},
            "required": ["a"],
        },
        {"a": "ab"},
    ),
    ({"$id": "https://example.org/tree", "type": "object", "properties": {"left": {"$ref": "#"}}}, {"left": {}}),
    (
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "$comment": "c",
            "title": "t",
            "description": "d",
            "default": 1,
            "examples": [2],
            "deprecated": False,
            "readOnly": False,
            "writeOnly": False,
            "type": "integer",
        },
        1,
    ),
    ({}, {"anything": [1]}),
]
"""The shapes that the test suite of JSON Schema is made of."""


def invented(random: Random, depth: int = 3) -> Case:
    """A schema out of nested shapes, with an instance. The same for the same seed."""
    kind = random.choice(["leaf"] * 2 + ["object"] * 3 + ["array", "choice", "reference"] if depth else ["leaf"])
    match kind:
        case "object":
            return invented_object(random, depth)
        case "array":
            schema, value = invented(random, depth - 1)
            least = random.randint(0, 2)
            most = least + random.randint(0, 2)
            limits = {"minItems": least} | ({"maxItems": most} if random.random() < 0.5 else {})
            return {"type": "array", "items": schema, **limits}, [value] * random.randint(least, most)
        case "choice":
            (first, value), (second, _) = invented(random, depth - 1), invented(random, depth - 1)
            return {"anyOf": random.sample([first, second], 2)}, value
        case "reference":
            schema, value = invented(random, depth - 1)
            name = f"d{random.randrange(10**9)}"
            inner = {"$ref": f"#/$defs/{name}"}
            return {"$defs": {name: schema, **schema.pop("$defs", {})}, **record(it=inner)}, {"it": value}
        case _:
            schema, value = random.choice(SHAPES[:60])
            return dict(schema), value


def invented_object(random: Random, depth: int) -> Case:
    names = random.sample(["id", "name", "größe", "a b", "x-y", "$id", "items", "type", "n" * 30], random.randint(1, 4))
    fields = {name: invented(random, depth - 1) for name in names}
    required = [name for name in names if random.random() < 0.7]
    schema: Schema = {"type": "object", "properties": {name: schema for name, (schema, _) in fields.items()}}
    if random.random() < 0.8:
        schema["required"] = required
    if random.random() < 0.7:
        schema["additionalProperties"] = random.choice([False, False, INT])
    shown = [name for name in names if name in required or random.random() < 0.5]
    return schema, {name: fields[name][1] for name in shown}


def lifted(case: Case) -> Case:
    """The case with every definition moved to the top, where references look for it."""
    found: Schema = {}

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(item) for item in node]
        if not isinstance(node, dict):
            return node
        rest = {key: walk(value) for key, value in node.items() if key != "$defs" or not isinstance(value, dict)}
        if isinstance(node.get("$defs"), dict):
            found.update({key: walk(value) for key, value in node["$defs"].items()})
        return rest

    schema = walk(case[0])
    return ({"$defs": found, **schema} if found else schema), case[1]


INVENTED = [lifted(invented(Random(seed))) for seed in range(300)]

WRITTEN = [*APPLICATIONS, *SHAPES]
CORPUS = [*WRITTEN, *INVENTED]

DEMO = pytest.param("demo", marks=pytest.mark.model)
GIVEN = pytest.param("given", marks=pytest.mark.skipif(TEST_TOKENIZER is None, reason="no tokenizer is named"))


@pytest.fixture(params=[DEMO, GIVEN])
def kit(request: pytest.FixtureRequest) -> Kit:
    return kit_of(request.param)


@pytest.fixture
def corpus(kit: Kit) -> list[Case]:
    """All that people wrote, with each tokenizer; what is invented, with one or the other."""
    first = 1 if TEST_TOKENIZER and kit is kit_of("demo") else 0
    return [*WRITTEN, *INVENTED[first :: 2 if TEST_TOKENIZER else 1]]


@pytest.fixture
def demo() -> Kit:
    return kit_of("demo")


@pytest.fixture(autouse=True)
def quick_numbers() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_corpus_is_sound() -> None:
    assert len(CORPUS) > 400
    for schema, value in CORPUS:
        Draft202012Validator.check_schema(schema)
        assert valid(schema, value), (schema, value)


@pytest.mark.parametrize("part", range(8))
def test_what_is_drawn_under_the_mask_always_validates(kit: Kit, corpus: list[Case], part: int) -> None:
    random = Random(part)
    for schema, _ in corpus[part::8]:
        text = kit.walk(kit.schema(schema), random, random.choice([0, 5, 30]))
        assert valid(schema, json.loads(text)), (schema, text)


@pytest.mark.parametrize("part", range(8))
def test_instances_in_the_order_of_their_schema_are_accepted(kit: Kit, corpus: list[Case], part: int) -> None:
    for schema, value in corpus[part::8]:
        grammar = kit.schema(schema)
        for separators in ((", ", ": "), (",", ":")):
            text = json.dumps(value, ensure_ascii=False, separators=separators)
            assert kit.accepts(grammar, text), (schema, text)


@pytest.mark.model
@pytest.mark.parametrize("part", range(4))
def test_what_does_not_validate_is_not_accepted(demo: Kit, part: int) -> None:
    values = {json.dumps(value, ensure_ascii=False): value for _, value in SHAPES}
    for schema, _ in SHAPES[part::4]:
        grammar = demo.schema(schema)
        for text, value in values.items():
            if not valid(schema, value):
                assert not demo.accepts(grammar, text), (schema, value)


@pytest.mark.model
def test_a_class_that_excludes_quotes_excludes_escaped_ones(demo: Kit) -> None:
    excluded = {r'^[^"]*$': 'x"', r"^[^\\]*$": "x\\", r'^[^"\\]*$': 'x"', '^[^]"]*$': 'x"', r'^[^\]"]*$': 'x"'}
    for pattern, value in excluded.items():
        keys = {"type": "object", "patternProperties": {pattern: INT}, "additionalProperties": False}
        for schema, text, plain in ((TEXT | {"pattern": pattern}, value, "x\n"), (keys, {value: 1}, {"x\n": 1})):
            grammar = demo.schema(schema)
            assert demo.accepts(grammar, json.dumps(plain))
            assert not demo.accepts(grammar, json.dumps(text))
    data = {"pattern": "[^a]", "patternProperties": {"[^a]": ["[^a]"]}}
    assert demo.accepts(demo.schema({"const": data}), json.dumps(data))
    assert demo.accepts(demo.schema({"enum": [data]}), json.dumps(data))


def test_a_json_object_is_an_object_without_idle_white_space(kit: Kit) -> None:
    grammar = run(kit.grammars.of(ANY_OBJECT))
    for text in ("{}", '{"a": [1, {"b": null}], "c":"x"}'):
        assert kit.accepts(grammar, text)
    for text in ("[]", "1", '"a"', " {}", "{ }", '{"a":  1}', '{\n"a":1}', "{} ", '{"a": 1'):
        assert not kit.accepts(grammar, text)
    for seed in range(20):
        assert isinstance(json.loads(kit.walk(grammar, Random(seed), seed)), dict)


def test_a_schema_that_is_not_strict_leaves_to_the_model_what_cannot_be_enforced(kit: Kit) -> None:
    schema = many(TEXT | {"format": "color"}, minItems=1) | {"uniqueItems": True, "x-guidance": {"lenient": False}}
    assert kit.accepts(kit.schema(schema, strict=False), '["a","a"]')
    assert not kit.accepts(kit.schema(schema, strict=False), "[1]")
    assert "uniqueItems" in refusal(kit.grammars.of(strict(schema))).message


def test_a_client_cannot_set_the_options_of_the_compiler(kit: Kit) -> None:
    lenient = {"uniqueItems": True, "x-guidance": {"lenient": True, "whitespace_flexible": True}}
    assert "uniqueItems" in refusal(kit.grammars.of(strict(lenient))).message


TOOLS: list[tuple[str, Schema | None]] = [
    ("get", {"type": "object"}),
    ("get_weather", record("city", city=TEXT, unit={"enum": ["c", "f"]})),
    ("now", None),
    ("find", {"$defs": {"n": INT}, "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}),
    ("odd", {"type": "object", "properties": {"x": many(TEXT) | {"uniqueItems": True}}}),
]
CALL = re.compile(r'<tool_call>\n({"name": ".*?", "arguments": .*})\n</tool_call>')


def calls(text: str) -> list[tuple[str, Any]]:
    found = [json.loads(call) for call in CALL.findall(text)]
    assert "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in CALL.findall(text)) == text
    return [(call["name"], call["arguments"]) for call in found]


@pytest.mark.parametrize("tools", [TOOLS, *([tool] for tool in TOOLS[:3])], ids=["all", "get", "get_weather", "now"])
@pytest.mark.parametrize("parallel", [True, False])
def test_an_answer_of_tool_calls_is_nothing_else(
    kit: Kit, tools: list[tuple[str, Schema | None]], parallel: bool
) -> None:
    grammar = run(kit.grammars.tool_calls(tools, QWEN, parallel=parallel))
    schemas = dict(tools)
    for seed in range(10):
        found = calls(kit.walk(grammar, Random(seed), seed * 10))
        assert len(found) >= 1 if parallel else len(found) == 1
        for name, arguments in found:
            assert isinstance(arguments, dict)
            assert valid(schemas[name] or {"maxProperties": 0}, arguments) or name == "odd"


def test_calls_as_models_write_them_are_accepted(kit: Kit) -> None:
    grammar = run(kit.grammars.tool_calls(TOOLS, QWEN))
    one = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern", "unit": "c"}}\n</tool_call>'
    two = one + '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert kit.accepts(grammar, one)
    assert kit.accepts(grammar, two)
    more, other = one.replace("Bern", 'Bern", "x": "'), one.replace("weather", "x")
    for text in ("", "I cannot", one[:-1], one + "\n", more, other):
        assert not kit.accepts(grammar, text)


def test_calls_as_llama_writes_them_are_accepted(kit: Kit) -> None:
    grammar = run(kit.grammars.tool_calls(TOOLS, LlamaFormat()))
    one = '{"name": "get_weather", "parameters": {"city": "Bern", "unit": "c"}}'
    now = '{"name": "now", "parameters": {}}'
    for text in (one, now, f"{one}; {now}; {one}"):
        assert kit.accepts(grammar, text)
    for text in ("", "I cannot", one[:-1], f"{one};", f"{one}\n{now}", one.replace("weather", "x")):
        assert not kit.accepts(grammar, text)


@pytest.mark.parametrize("parallel", [True, False])
def test_what_a_grammar_allows_is_what_its_format_reads(kit: Kit, parallel: bool) -> None:
    for known in FORMATS:
        grammar = run(kit.grammars.tool_calls(TOOLS, known, parallel=parallel))
        for seed in range(5):
            reader = known.parser()
            found = [*reader.push(kit.walk(grammar, Random(seed), seed * 10)), *reader.flush()]
            assert not any(isinstance(event, Content) for event in found)
            names = [event.name for event in found if isinstance(event, CallStarted)]
            assert set(names) <= {name for name, _ in TOOLS}
            assert len(names) == sum(isinstance(event, CallEnded) for event in found)
            assert len(names) == 1 or (parallel and names)


THOUGHT = '\nhm {"\n</think>\n\n'


@pytest.mark.parametrize(
    ("state", "before"),
    [
        (ThoughtState.UNKNOWN, [""]),
        (ThoughtState.CLOSED, [""]),
        (ThoughtState.OPENED, [THOUGHT, "</think>\n\n"]),
        (ThoughtState.FREE, ["", f"<think>{THOUGHT}", "<think></think>\n\n"]),
    ],
)
def test_an_answer_begins_with_a_thought_where_the_prompt_says_that_it_does(
    kit: Kit, state: ThoughtState, before: list[str]
) -> None:
    call = "{}".join(QWEN.around("智能体.0 😀"))
    calls = kit.grammars.tool_calls([("智能体.0 😀", None)], QWEN, thought=state)
    asked = [(run(kit.grammars.of(ANY_OBJECT, thought=state)), '{"a": 1}'), (run(calls), call)]
    thoughts = ["", THOUGHT, "</think>\n\n", f"<think>{THOUGHT}", "<think></think>\n\n", "<think>"]
    for grammar, answer in asked:
        for thought in thoughts[: 3 if state is ThoughtState.OPENED else None]:  # which may repeat the tag or not
            assert kit.accepts(grammar, thought + answer) is (thought in before), thought
            assert not kit.accepts(grammar, thought + "Yes")


@pytest.mark.parametrize("kit", [GIVEN], indirect=True)  # without a token for the tag, no thought is cut
def test_a_thought_that_is_cut_within_a_character_is_followed_by_the_answer(kit: Kit) -> None:
    begun, rest = kit.encode("𓀀"), kit.encode("\n</think>\n\n{}")
    assert len(begun) > 1
    for length in range(1, len(begun) + 1):
        matcher = kit.schema({"type": "object"}, thought=ThoughtState.OPENED).matcher()
        for token in [*begun[:length], *rest]:
            matcher.advance(token)
        assert kit.next(matcher)[1]


def test_a_batch_of_grammars_through_the_sampler(kit: Kit) -> None:
    schemas = [schema for schema, _ in APPLICATIONS[:4]]
    grammars = [None, *(kit.schema(schema) for schema in schemas)]
    stop = kit.tokenizer.eos_token_id
    rows = [
        replace(request(temperature=1.0, seed=seed, stop_token_ids=frozenset({stop})), grammar=grammar)
        for seed, grammar in enumerate(grammars)
    ]
    sampler = Sampler(rows, kit.width, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    boost = torch.zeros(kit.width)
    boost[[*kit.closers, stop]] = 12.0
    drawn = torch.stack([sampler(torch.randn(5, kit.width, generator=generator) + boost) for _ in range(150)], dim=1)
    finished = 0
    for schema, tokens in zip(schemas, drawn[1:].tolist(), strict=True):
        if stop in tokens:
            assert valid(schema, json.loads(kit.decode(tokens[: tokens.index(stop)])))
            finished += 1
    assert finished >= 3


def test_a_model_narrower_than_its_tokenizer_is_never_offered_what_it_lacks(kit: Kit) -> None:
    allowed: TokenBitmask = np.zeros(20, np.int32)
    assert kit.schema({"enum": ["a", "b"]}).matcher().fill(allowed) is False
    ids = np.flatnonzero(np.unpackbits(allowed.view(np.uint8), bitorder="little")).tolist()
    bits, _ = kit.next(kit.schema({"enum": ["a", "b"]}).matcher())
    assert ids == np.flatnonzero(bits[:640]).tolist()


def test_a_token_that_may_not_come_is_an_error_of_that_row_alone(kit: Kit) -> None:
    grammar = kit.schema(INT)
    for token in (kit.encode("x")[0], len(kit.tokenizer), 2**31 - 1):
        matcher = grammar.matcher()
        with pytest.raises(ValueError, match="not allowed here"):
            matcher.advance(token)
    assert kit.accepts(grammar, "12")


# What a client may send to do harm


def nested(depth: int) -> Schema:
    schema = INT
    for _ in range(depth):
        schema = record(a=schema)
    return schema


def chain(length: int) -> Schema:
    """References, each to the next."""
    names = [f"d{n}" for n in range(length)]
    links: Schema = {name: {"anyOf": [{"anyOf": [{"$ref": f"#/$defs/{after}"}]}]} for name, after in pairwise(names)}
    return {"$defs": {**links, names[-1]: INT}, "$ref": "#/$defs/d0"}


HOSTILE: dict[str, tuple[Schema, str]] = {
    "deep": (nested(64), "nested too deeply"),
    "a thousand deep": (nested(1000), "nested too deeply"),
    "a megabyte": ({"enum": ["x" * 2**20]}, "too large"),
    "wide": ({"properties": {f"p{n}": True for n in range(1001)}}, "more members"),
    "many": ({"enum": [[0] * 201] * 100}, "more members"),
    "itself": ({"$ref": "#"}, "endlessly"),
    "itself in a circle": (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        "endlessly",
    ),
    "itself required": (record(a={"$ref": "#"}), "endlessly"),
    "itself in an array": (many({"$ref": "#"}, minItems=1), "endlessly"),
    "itself in all": ({"anyOf": [record(a={"$ref": "#"}), {"allOf": [{"$ref": "#"}]}]}, "endlessly"),
    "repetition": (TEXT | {"pattern": "^(((a{100}){100}){100}){100}$"}, "repeats too much"),
    "repetition without end": (TEXT | {"pattern": "^(a{9999999999999})+$"}, "repeats too much"),
    "multiple": (INT | {"multipleOf": 999_983}, "multipleOf"),
    "multiples": ({"allOf": [INT | {"multipleOf": 9973}, {"multipleOf": 0.9967}]}, "multipleOf"),
    "product": (
        {
            "allOf": [
                {"anyOf": [record(**{f"k{i}_{j}": INT}) | {"additionalProperties": True} for j in range(10)]}
                for i in range(20)
            ]
        },
        "too complex",
    ),
    "intersection": ({"allOf": [TEXT | {"pattern": f".*{c}.*{c}.*{c}"} for c in "abcdefghijkl"]}, "too complex"),
    "keyword": ({"not": {}}, "cannot be enforced: not."),
    "keywords": ({"if": INT, "then": {}}, "cannot be enforced: if, then."),
    "format": (TEXT | {"format": "color"}, "the format color"),
    "unprintable format": (TEXT | {"format": "\x1b[31m"}, "a format that"),
    "look-ahead": (TEXT | {"pattern": "(?=a)b"}, "look-around"),
    "no pattern": (TEXT | {"pattern": "("}, "not a regular expression"),
    "elsewhere": ({"$ref": "https://example.org/x"}, "points nowhere"),
    "nowhere": ({"$ref": "#/$defs/x"}, "points nowhere"),
    "overlap": ({"oneOf": [{"type": "number"}, INT]}, "use anyOf"),
    "names counted": ({"type": "object", "minProperties": 2}, "minProperties"),
    "nothing": ({"enum": []}, "No value"),
    "no number": (INT | {"minimum": 5, "maximum": 3}, "No value"),
    "unknown type": ({"type": "text"}, "not a valid JSON Schema"),
    "wrong type": ({"properties": 5}, "not a valid JSON Schema"),
    "not a number": ({"minimum": float("nan")}, "not valid JSON"),
    "half a character": ({"const": "\ud800"}, "not a valid JSON Schema"),
    "huge number": (INT | {"minimum": 2**200}, "not a valid JSON Schema"),
}


@pytest.mark.model
@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_compiled_is_refused_in_a_sentence(demo: Kit, name: str) -> None:
    schema, words = HOSTILE[name]
    error = refusal(demo.grammars.of(Part(schema, True, "some.field")))
    assert words in error.message
    assert (error.param, error.code) == ("some.field", "unsupported_schema")


@pytest.mark.model
def test_what_looks_hostile_but_is_not_compiles(demo: Kit) -> None:
    for schema in (
        chain(900),
        nested(28),
        record(**{f"p{n}": TEXT for n in range(1000)}),
        {"enum": [f"value {n}" for n in range(5000)]},
        TEXT | {"pattern": "^(a|b)*a(a|b){18}$"},
        TEXT | {"maxLength": 10**9},
        many(INT, maxItems=10**9),
        TREE,
        LINKED,
    ):
        grammar = demo.schema(schema)
        matcher = grammar.matcher()
        for _ in range(10):
            bits, _ = demo.next(matcher)
            if bits.any():
                matcher.advance(int(bits.argmax()))


def test_repetitions_are_counted_with_what_they_repeat() -> None:
    expected = {
        "": 0,
        "abc": 3,
        "[a-z]{3}": 3,
        "(ab){2,5}": 10,
        "((a{3}){4}){5}": 60,
        r"\({3}": 3,
        "a{2,}": 2,
        "[{}()]{4}": 4,
        "(a": 1,
        "a)": 2,
        "{3}": 0,
        "\\": 1,
        "x{99999999999999}": 10**8,
    }
    for pattern, least in expected.items():
        assert written_out(pattern) >= least, pattern
    assert written_out(r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$") < 50


def test_references_with_an_end_are_told_from_those_without() -> None:
    for schema, _ in CORPUS:
        assert terminates(schema, set(re.findall(r'"\$ref": "([^"]*)"', json.dumps(schema, ensure_ascii=False))))
    backwards = {f"d{n}": {"$ref": f"#/$defs/d{n - 1}"} for n in range(1, 40)}
    assert terminates({"$defs": {**backwards, "d0": INT}}, {f"#/$defs/d{n}" for n in range(40)})
    for reference in ("#", "#/", "#/x/y", "#/allOf/0", "#/allOf/x", "#a", "other", "", "#/allOf/99999999999"):
        assert isinstance(terminates({"allOf": [{"$ref": reference}]}, {reference}), bool)


@pytest.mark.model
def test_order_of_properties_is_that_of_the_answer(demo: Kit) -> None:
    for names in (("a", "b"), ("b", "a")):
        grammar = demo.schema(record(**dict.fromkeys(names, INT)))
        assert demo.accepts(grammar, json.dumps(dict.fromkeys(names, 1)))
        assert not demo.accepts(grammar, json.dumps(dict.fromkeys(reversed(names), 1)))


def test_a_vocabulary_with_sentencepieces_decoder_can_be_constrained(tmp_path: Path) -> None:
    pieces = [
        ("</s>", 0.0),
        *((character, -9.0) for character in "\u2581" + string.printable.strip()),
        ("\u2581the", -1.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, 0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path)
    kit = Kit(str(tmp_path))
    found = json.loads(kit.walk(kit.schema(record(city=TEXT, count=INT)), Random(0), patience=20))
    assert list(found) == ["city", "count"]


def test_a_tokenizer_that_grammars_cannot_read_is_told_in_one_line() -> None:
    tokenizer = Tokenizer(models.WordPiece({"</s>": 0, "a": 1}, unk_token="</s>"))
    tokenizer.decoder = decoders.WordPiece()
    text = Text(PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="{{ messages }}", eos_token="</s>"))
    with pytest.raises(
        ModelError, match="this tokenizer cannot be used for structured output: can't determine decoder"
    ):
        text.grammars()
