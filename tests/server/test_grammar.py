"""Structured output against real tokenizers: whatever is drawn under the mask parses, validates and comes to an end."""

from random import Random
from typing import Any

Schema = dict[str, Any]
Case = tuple[Schema, Any]
"""A schema, and an instance of it with its properties in the schema's order."""

TEXT = {"type": "string"}
INT = {"type": "integer"}


def record(*required: str, **properties: Schema) -> Schema:
    """An object of just these properties, all of them required unless some are named."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required or properties),
        "additionalProperties": False,
    }


def many(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


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

SHAPES: list[Case] = [
    *(
        ({"type": kind}, value)
        for kind, value in {
            "null": None,
            "boolean": True,
            "integer": -3,
            "number": 2.5e-3,
            "string": 'a "b" \\ \n é 🙂',
            "array": [1, "a", None],
            "object": {"a": {"b": []}},
        }.items()
    ),
    ({"type": ["integer", "string"]}, "x"),
    ({"type": ["array", "object", "null"]}, {}),
    *(
        ({"const": value}, value)
        for value in (None, False, 0, -1.5, "", "a\nb", [], [1, [2]], {}, {"a": {"b": [None]}})
    ),
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
            ({"pattern": "^.{2,4}$"}, "日本語"),
            ({"pattern": "^a$|^b$"}, "b"),
            ({"pattern": "^\\p{L}+$"}, "é"),
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
    ({"type": "object", "properties": {"k": TEXT}, "anyOf": [{"required": ["k"]}, {"maxProperties": 0}]}, {"k": ""}),
    ({"oneOf": [{"const": 1}, {"const": 2}]}, 2),
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
