"""Answers held to a schema, a regular expression, choices or a grammar: under every name the same, and as it says."""

import re
from collections.abc import Iterator
from random import Random
from typing import Any

import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batching.packed.engine import PackedEngine
from server.fields import parse
from server.grammar.pattern import LITERAL, Kind, Pattern, written
from server.grammar.source import Part
from server.http.errors import ApiError
from server.openai.completions import CompletionRequest
from server.openai.constraints import MAX_OFFERED, MAX_TEXT
from server.openai.requests import ChatRequest
from server.openai.responses_request import ResponseRequest, as_chat
from tests.grammars import INT, Kit, kit_of, record, refusal, run
from tests.live import QUESTION, Live, byte_tokenizer, live
from tests.server.test_app import error_of
from tests.server.test_thinking import TAGS, TEMPLATES
from tests.tiny import tiny_model

SCHEMA = record(a=INT)
GBNF = 'root ::= "yes" | "no"'
AS_TEXT = orjson.dumps(SCHEMA).decode()
NAMES: dict[Kind | str, list[dict[str, Any]]] = {
    "schema": [
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": AS_TEXT, "regex": None, "disable_any_whitespace": True}},
        {"guided_json": SCHEMA},
        {"guided_json": AS_TEXT, "guided_decoding_backend": "outlines"},
        {"json_schema": SCHEMA},
        {"json_schema": AS_TEXT},
        {"response_format": {"type": "json", "value": SCHEMA}},
        {"response_format": {"type": "json_object", "value": SCHEMA}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"response_format": {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    ],
    "object": [
        {"structured_outputs": {"json_object": True}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json"}},
    ],
    "regex": [
        {"structured_outputs": {"regex": "a+", "json_object": False}},
        {"guided_regex": "a+"},
        {"regex": "a+"},
        {"response_format": {"type": "regex", "regex": "a+"}},
        {"response_format": {"type": "regex", "pattern": "a+"}},
        {"response_format": {"type": "regex", "regex": "a+", "pattern": None}},
        {"response_format": {"type": "regex", "value": "a+"}},
    ],
    "choice": [{"structured_outputs": {"choice": ["yes", "no"]}}, {"guided_choice": ["yes", "no"]}],
    "grammar": [
        {"structured_outputs": {"grammar": GBNF}},
        {"guided_grammar": GBNF},
        {"ebnf": GBNF},
        {"grammar": GBNF},
        {"response_format": {"type": "grammar", "grammar": GBNF}},
        {"response_format": {"type": "grammar", "value": GBNF}},
    ],
    "nothing": [
        {},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False, "choice": None}},
        {"guided_json": None},
        {"response_format": {"type": "text"}},
    ],
}
SPELLED = [
    (request_type, kind, fields)
    for request_type in (ChatRequest, CompletionRequest, ResponseRequest)
    for kind, spellings in NAMES.items()
    for fields in spellings
    if request_type is not ResponseRequest or "response_format" not in fields
]


ASKED: dict[Any, dict[str, Any]] = {
    ChatRequest: {"messages": QUESTION},
    CompletionRequest: {"prompt": "x"},
    ResponseRequest: {"input": "x"},
}


def chat_of(kind: Any, fields: dict[str, Any]) -> Any:
    """The request as its endpoint sees it; of a response, the chat that it becomes."""
    request, _ = parse(kind, orjson.dumps(ASKED[kind] | fields))
    return as_chat(request) if isinstance(request, ResponseRequest) else request


@pytest.mark.parametrize(("request_type", "kind", "fields"), SPELLED)
def test_a_constraint_is_the_same_under_every_name(request_type: Any, kind: str, fields: dict[str, Any]) -> None:
    found = chat_of(request_type, fields).constraint
    match found:
        case Part():
            assert (found.schema, kind) in ((SCHEMA, "schema"), ({"type": "object"}, "object"))
        case Pattern():
            texts = {"regex": ("a+",), "choice": ("yes", "no"), "grammar": (GBNF,)}[kind]
            assert (found.kind, found.texts) == (kind, texts)
        case _:
            assert kind == "nothing"
    if found:
        assert found.param.split(".")[0] in fields
    assert chat_of(request_type, fields).useless_if_cut or kind == "nothing"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"guided_regex": "a", "regex": "a"}, "guided_regex and regex"),
        ({"guided_choice": ["a"], "response_format": {"type": "json_object"}}, "response_format and guided_choice"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.json and structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["a"]}, "grammar": GBNF}, "structured_outputs.choice and grammar"),
    ],
)
def test_of_two_constraints_none_is_dropped(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat_of(ChatRequest, fields)
    assert caught.value.status == 400
    assert named in caught.value.message


def test_a_response_names_its_own_fields() -> None:
    with live() as service:
        asked = {"input": "x", "text": {"format": {"type": "json_object"}}, "regex": "a"}
        error = error_of(service.post(orjson.dumps(asked), "/v1/responses"), 400, None)
    assert "text.format and regex" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs"),
        ({"structured_outputs": {"disable_additional_properties": True}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": 7}}, "structured_outputs.regex"),
        ({"structured_outputs": "a"}, "structured_outputs"),
        ({"structural_tag": "{}"}, "structural_tag"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_json": "nothing"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": "yes"}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice.0"),
        ({"guided_choice": ["x"] * (MAX_OFFERED + 1)}, "guided_choice"),
        ({"guided_choice": ["x" * MAX_TEXT, "y"]}, "guided_choice"),
        ({"regex": ""}, "regex"),
        ({"regex": "x" * (MAX_TEXT + 1)}, "regex"),
        ({"grammar": {"type": "json"}}, "grammar"),
        ({"response_format": {"type": "regex"}}, "response_format"),
        ({"response_format": {"type": "grammar", "regex": "a"}}, "response_format"),
        ({"response_format": {"type": "text", "regex": "a"}}, "response_format"),
        ({"response_format": {"type": "text", "value": "a"}}, "response_format"),
        ({"response_format": {"type": [], "value": "a"}}, "response_format"),
        ({"response_format": {"type": "regex", "value": 7}}, "response_format.regex"),
        ({"response_format": {"type": "json", "value": {}, "schema": {}}}, "response_format"),
    ],
)
def test_what_constrains_nothing_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat_of(ChatRequest, fields)
    assert (caught.value.status, caught.value.param) == (400, param)


# What answers are held to


@pytest.fixture(scope="module")
def demo() -> Kit:
    return kit_of("demo")


REGEXES = [
    r"[0-9]{3}-[a-z]{1,8}",
    r"(yes|no|maybe)( indeed)?",
    r"/home/[a-z]+\/[^/]+",
    "one\nline or\\ntwo",
    "\n\nfirst\n\nand \\\nlast\n",
    "(?x)\n yes # or\n | n / o # not \\/\n",
    r"^\d{4}$",
    r"[^\W_]{1,5}@[\d.]{1,5}",
    r'"[^"\\]{0,9}"',
    "(?i)ÄÖ?ß",
    r"a\\/b?",
]


def pattern(kind: Kind, *texts: str) -> Pattern:
    return Pattern(kind, texts, kind)


@pytest.mark.model
@pytest.mark.parametrize("regex", REGEXES)
def test_an_answer_matches_the_regular_expression_as_a_whole(demo: Kit, regex: str) -> None:
    grammar = run(demo.grammars.of(pattern("regex", regex)))
    for seed in range(10):
        assert re.fullmatch(regex, demo.walk(grammar, Random(seed), patience=5))


CHOICES = ("yes", "yes, but", "no", 'quote "', "back\\slash", "日本", "two\nlines", "{}", "<|im_end|>", " ")


@pytest.mark.model
def test_an_answer_is_one_of_the_choices(demo: Kit) -> None:
    grammar = run(demo.grammars.of(pattern("choice", *CHOICES)))
    assert {demo.walk(grammar, Random(seed), patience=1) for seed in range(60)} <= {*CHOICES}
    assert all(demo.accepts(grammar, text) for text in CHOICES if text != "<|im_end|>")
    assert not any(demo.accepts(grammar, text) for text in ("", "ye", "yes, ", "noo", "yes\n"))


GRAMMARS = {
    "choices": ('root ::= "yes" | "no"', ["yes", "no"], ["", "y", "yesno"]),
    "comments and lines": (
        '# llama.cpp\r\nroot ::= item-1+ # all\n\nitem-1 ::=\n  "a" |\n  "b"\n',
        ["a", "ab", "bbb"],
        ["", "c"],
    ),
    "classes": (r'root ::= [a-c]+ [^a-c\]] "/"?', ["abz", "cab/", "a[/"], ["abc", "a]", ""]),
    "ends in what repeats": ('root ::= [a-z]+ "b"', ["ab", "abb"], ["b", "a"]),
    "escapes": (r'root ::= "\"" "\u00e9" "\u0041" [\U0001F600-\U0001F64F] "\x42" "\\u0041"', ['"éA😀B\\u0041'], ["é"]),
    "counts": ('root ::= ("x" "y"){2,3} "z"{0,1} "w"{2}', ["xyxyww", "xyxyxyzww"], ["xyww", "xyxyw"]),
    "recursion": ('root ::= "(" root? ")"', ["()", "((()))"], ["(", "(()"]),
    "arithmetic": (
        'root ::= expr\nexpr ::= term ([-+*/] term)*\nterm ::= num | "(" expr ")"\nnum ::= [0-9]+',
        ["1+(2*33)-4", "7"],
        ["1+", "()"],
    ),
    "lark": ('start: greeting NAME\ngreeting: "Hi "\nNAME: /[A-Z][a-z]+/\n', ["Hi Ann"], ["Hi ", "Hi ann"]),
    "lark with modifiers": ('\n  ?start: query\n\n  ?query: "SELECT " /[a-z]+/\n', ["SELECT a"], ["SELECT "]),
    "lark that keeps its tokens": ('!start: "yes" | "no"', ["yes", "no"], ["maybe"]),
    "lark with attributes": ("start[max_tokens=9]: /[ab]+/", ["ab"], ["c"]),
}


@pytest.mark.model
@pytest.mark.parametrize("name", GRAMMARS)
def test_an_answer_is_a_text_of_the_grammar(demo: Kit, name: str) -> None:
    source, good, bad = GRAMMARS[name]
    grammar = run(demo.grammars.of(pattern("grammar", source)))
    assert [text for text in good if not demo.accepts(grammar, text)] == []
    assert [text for text in bad if demo.accepts(grammar, text)] == []


UNREADABLE: dict[str, tuple[Kind, str, str]] = {
    "no regular expression": ("regex", "a(", "is malformed"),
    "a slash at its end": ("regex", "a\\", "is malformed"),
    "look-around": ("regex", "a(?!b)", "look-around"),
    "a word's border": ("regex", r"\ba", "look-around"),
    "nothing matches": ("regex", r"[^\s\S]", "No text could match"),
    "too much": ("regex", ".*a.{500}b.*", "too complex|too much time"),
    "too long": ("regex", "x" * 2001, "too long"),
    "a long choice": ("choice", "ü" * 1001, "at most 2,000 bytes"),
    "a long string": ("grammar", 'root ::= "' + "x" * 2001 + '"', "at most 2,000 bytes"),
    "no rules": ("grammar", "yes or no", "in line 1"),
    "an error below": ("grammar", 'root ::= a\na ::= ("b"\n', "in line"),
    "no root": ("grammar", 'a ::= "b"', "named root"),
    "an unknown rule": ("grammar", "root ::= secret", "does not define"),
    "names too alike": ("grammar", 'root ::= a-b a_b\na-b ::= root "x"\na_b ::= root "y"', "differ only"),
    "a rule named start": ("grammar", 'root ::= "<" start\nstart ::= "a"', "beside root is named start"),
    "too deep": ("grammar", "root ::= " + "(" * 3000 + '"a"' + ")" * 3000, "too complex"),
    "no end and no beginning": ("grammar", "root ::= root", "No text could match"),
    "a quadratic number of rules": (
        "grammar",
        "root ::= r0\n" + "".join(f"r{n} ::= r{n + 1}\n" for n in range(5000)),
        ".",
    ),
    "unknown in lark": ("grammar", "start: secret", "does not define"),
    "malformed lark": ("grammar", 'start: "a', "is malformed"),
    "lark that leaves its block": ("grammar", 'start: "a" }\nstart: "b" {', "malformed"),
}


@pytest.mark.model
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_compiled_is_refused_in_a_sentence(demo: Kit, name: str) -> None:
    kind, text, words = UNREADABLE[name]
    error = refusal(demo.grammars.of(pattern(kind, text)))
    assert re.search(words, error.message), error.message
    assert (error.param, error.code) == (kind, "unsupported_schema")
    assert "secret" not in error.message


@given(st.text('"\\a'))
def test_the_search_for_strings_in_a_grammar_reads_each_quote_once(grammar: str) -> None:
    assert '"' not in LITERAL.sub("", grammar), "a quote that is left would begin another search to the grammar's end"


def test_a_regular_expression_is_escaped_where_it_is_not_yet() -> None:
    assert written(pattern("regex", r"a/b\/c\\/d")) == r"/a\/b\/c\\\/d/"
    assert written(pattern("regex", "a\nb\\\nc")) == "/a\nb\\nc/"


# With a model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def service() -> Iterator[Live]:
    engine = PackedEngine(tiny_model(), num_slots=4, token_budget=2048, prefill_chunk=64)
    with live(engine, tokenizer=byte_tokenizer(TEMPLATES["closes if told"], TAGS)) as found:
        yield found


WANTED: list[dict[str, Any]] = [
    {"structured_outputs": {"regex": "(yes|no){3}"}},
    {"guided_choice": ["yesyesyes", "nonono"]},
    {"ebnf": 'root ::= yn yn yn\nyn ::= "yes" | "no"'},
]


@pytest.mark.parametrize("wanted", WANTED)
def test_every_endpoint_holds_its_answers_to_it(service: Live, wanted: dict[str, Any]) -> None:
    with service.openai() as client:
        common: dict[str, Any] = {"model": "scripted", "temperature": 1.0, "extra_body": wanted | {"seed": 5}}
        chats = client.chat.completions.create(messages=QUESTION, n=3, max_tokens=100, **common).choices
        texts = client.completions.create(prompt=["one", "two"], max_tokens=100, **common).choices
        response = client.responses.create(input="Hi", max_output_tokens=100, **common)
    answers = [
        *(str(choice.message.content) for choice in chats),
        *(choice.text for choice in texts),
        response.output_text,
    ]
    assert all(re.fullmatch("(yes|no){3}", answer) for answer in answers), answers
    assert {choice.finish_reason for choice in [*chats, *texts]} == {"stop"}


def test_a_thought_comes_before_what_is_held_to_a_pattern(service: Live) -> None:
    asked: dict[str, Any] = {"enable_thinking": True, "thinking_budget": 3, "max_tokens": 100, "seed": 1}
    [choice] = service.chat(regex="(yes|no){2}", **asked).json()["choices"]
    assert re.fullmatch("(yes|no){2}", choice["message"]["content"])


def test_an_answer_with_tools_is_a_call_or_matches(service: Live) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": record(a={"enum": [1, 2]})}}
    for seed in range(4):
        [choice] = service.chat(tools=[tool], regex="(yes|no){2}", seed=seed, max_tokens=200).json()["choices"]
        content = choice["message"]["content"]
        assert "tool_calls" in choice["message"] or re.fullmatch("(yes|no){2}", content)
