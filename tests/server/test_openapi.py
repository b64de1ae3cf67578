"""Laws of /openapi.json and /docs: the document says what is served and taken, neither more nor less."""

import os
import re
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema_rs
import orjson
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.app import OPEN_PATHS, routes
from server.fields import RequestBody, parse
from server.http.errors import ApiError
from server.openai.completions import CompletionRequest
from server.openai.requests import ChatRequest
from server.openai.responses_request import ResponseRequest
from server.web.openapi import OPERATIONS, Operation, document, schemas
from server.web.pages import ROUTES
from tests.live import QUESTION, Live, frames, live, scripted

DOCUMENT: Any = document("scripted", keyed=False)
REFUSED = {"/v1/responses/{name}/{rest}"}
"""Paths that are there only to say that there is nothing."""

EXAMPLES = [(each, name) for each in OPERATIONS for name in each.examples]


@cache
def validator(name: str) -> jsonschema_rs.Validator:
    """Of one of the document's types."""
    return jsonschema_rs.validator_for({"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]})


@cache
def exact_validator(kind: object) -> jsonschema_rs.Validator:
    """Of a type that an operation names, for objects without fields that the document does not list."""
    known: dict[str, Any] = DOCUMENT["components"]["schemas"]
    closed = {name: each | {"additionalProperties": False} for name, each in known.items() if "properties" in each}
    return jsonschema_rs.validator_for(schemas()[0][kind] | {"components": {"schemas": known | closed}})


def accepts(kind: type[RequestBody], fields: dict[str, Any]) -> bool:
    """Whether validation does. Rules between fields are not what a schema can say."""
    try:
        parse(kind, orjson.dumps(fields))
    except ApiError as error:
        return error.param is None and error.code is None
    return True


@pytest.fixture(scope="module")
def service() -> Iterator[Live]:
    with live(scripted("Hello!")) as found:
        yield found


# The document


def test_the_document_has_every_path_and_no_other() -> None:
    described = {route.path.replace(":path", "") for route in routes(page=False)} - {route.path for route in ROUTES}
    served = described - REFUSED
    aliases = {path for path in served if f"/v1{path}" in served | REFUSED}
    assert served - aliases == set(DOCUMENT["paths"])


def test_each_path_has_the_methods_it_is_served_with() -> None:
    served = {route.path.replace(":path", ""): set(route.methods or ()) for route in routes()}
    for path, methods in DOCUMENT["paths"].items():
        assert {method.upper() for method in methods} == served[path] - {"HEAD"}


def test_each_path_says_whether_it_needs_a_key() -> None:
    with live(api_keys=("secret",)) as locked:
        found = locked.get("/openapi.json").json()
        assert found["components"]["securitySchemes"] == {"apiKey": {"type": "http", "scheme": "bearer"}}
        for path, methods in found["paths"].items():
            for operation in methods.values():
                assert ("security" in operation) == ("401" in operation["responses"]) == (path not in OPEN_PATHS)
        answer = locked.get("/v1/models")
    assert answer.status_code == 401
    assert validator("Error").is_valid(answer.json())
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "securitySchemes" not in DOCUMENT["components"]


def test_the_document_needs_no_key_and_no_model() -> None:
    with live(ready=False, api_keys=("secret",)) as starting:
        assert starting.get("/openapi.json").json()["openapi"].startswith("3.1")
        assert [starting.get(route.path).status_code for route in ROUTES] == [200] * len(ROUTES)


def test_every_reference_leads_somewhere() -> None:
    for found in re.findall(rb'"\$ref":"#/([^"]+)"', orjson.dumps(DOCUMENT)):
        node = DOCUMENT
        for key in found.decode().split("/"):
            node = node[key]


@pytest.mark.parametrize("kind", [each.takes for each in OPERATIONS if each.takes])
def test_every_field_of_a_request_is_in_the_document(kind: type[RequestBody]) -> None:
    described = DOCUMENT["components"]["schemas"][kind.__name__]
    assert set(described["properties"]) == {info.alias or name for name, info in kind.model_fields.items()}
    assert described.get("additionalProperties", True) is True


def test_fields_without_effect_say_so() -> None:
    described = DOCUMENT["components"]["schemas"]["ChatRequest"]["properties"]
    for name in ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"):
        assert "without effect" in described[name]["description"]


@pytest.mark.parametrize(
    ("kind", "name"), [("ChatCompletion", "created"), ("TextChoice", "prompt_logprobs"), ("ChosenToken", "logprob")]
)
def test_a_field_that_a_type_inherits_is_described(kind: str, name: str) -> None:
    assert DOCUMENT["components"]["schemas"][kind]["properties"][name]["description"]


# The schemas against validation

CONTENTS: list[Any] = [
    *("a", "", None, [], ["a"], 1, {}, [1], [None]),
    [{"type": "text", "text": "a"}],
    [{"type": "text", "text": "a", "cache_control": {}}],
    [{"type": "text"}],
    [{"type": "image_url", "text": "a"}],
]
VALUES: dict[str, list[Any]] = {
    "stop": ["a", "", ["a", "b"], [""], [], None, 1, ["a"] * 17, "x" * 257],
    "logit_bias": [{"1": 1}, {"007": -100.0}, {"x": 1}, {"-1": 1}, {"1": 101}, {"1234567890": 1}, {}, None, [], "1"],
    "messages": [
        *([{"role": "user", "content": content}] for content in CONTENTS),
        [{"role": "user"}],
        [{"role": "nobody", "content": "a"}],
        [],
        None,
    ],
    "n": [1, 16, 17, 0, True, "1", 1.5, None],
    "temperature": [0, 2, 0.5, 2.1, -1, True, "1"],
    "tool_choice": ["none", "auto", "some", {"type": "function"}, None],
    "service_tier": ["auto", "best", None],
    "metadata": [{"a": "b"}, {"a": 1}, None],
    "modalities": [["text"], ["audio"], None],
    "seed": [-(2**63), 2**63 - 1, 2**63, True],
    "made_up": [None],
}
PROMPTS: list[Any] = [
    "a", "", ["a", "b"], [1, 2], [[1], [2, 3]], ["a", [1]], [], [[]], [True], [-1], [2**31], ["a", 1], [1, "a"], None,
    1, {}, ["a"] * 65, [1] * 65,
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, each in VALUES.items() for value in each])
def test_the_schema_of_chats_takes_what_validation_takes(name: str, value: Any) -> None:
    fields = {"messages": QUESTION, name: value}
    assert validator("ChatRequest").is_valid(fields) == accepts(ChatRequest, fields)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_schema_of_prompts_takes_what_validation_takes(prompt: Any) -> None:
    fields = {"prompt": prompt}
    assert validator("CompletionRequest").is_valid(fields) == accepts(CompletionRequest, fields)


@pytest.mark.parametrize("best_of", [1, None, 2, 0, True, 1.5, "1"])
def test_the_schema_of_best_of_takes_what_validation_takes(best_of: Any) -> None:
    fields = {"prompt": "a", "best_of": best_of}
    assert validator("CompletionRequest").is_valid(fields) == accepts(CompletionRequest, fields)


@pytest.mark.parametrize(("operation", "name"), EXAMPLES)
def test_the_examples_work_and_answers_have_the_described_shape(service: Live, operation: Operation, name: str) -> None:
    post = DOCUMENT["paths"][operation.path]["post"]
    body = post["requestBody"]["content"]["application/json"]["examples"][name]["value"]
    assert exact_validator(operation.takes).is_valid(body)
    answer = service.post(orjson.dumps(body), operation.path)
    assert answer.status_code == 200, answer.text
    if body.get("stream"):
        for event in events(answer.text):
            assert_described(operation.event, event)
    else:
        assert_described(operation.gives, answer.json())


def test_the_example_of_a_name_is_of_the_kind_that_the_path_takes(service: Live) -> None:
    def example(path: str, method: str) -> str:
        return str(DOCUMENT["paths"][path][method]["parameters"][0]["example"])

    def form(identifier: str) -> str:
        return re.sub("[0-9a-f]", "0", identifier)

    assert service.get(f"/v1/models/{example('/v1/models/{name}', 'get')}").status_code == 200
    response = service.post(orjson.dumps({"input": "Say hello."}), "/v1/responses").json()
    for method in ("get", "delete"):
        assert form(example("/v1/responses/{name}", method)) == form(response["id"])


def events(text: str) -> list[Any]:
    """The JSON of each event of a stream, whatever else its frames hold."""
    found = re.findall(r"^data: (.*)$", text, re.MULTILINE)
    return [orjson.loads(one) for one in found if one != "[DONE]"]


def assert_described(kind: object, answer: Any) -> None:
    """The answer is of this kind and has no field that the document does not know."""
    exact_validator(kind).validate(answer)


@pytest.mark.parametrize("fields", [{"logprobs": True, "top_logprobs": 2}, {"n": 2, "max_tokens": 2}])
def test_other_answers_have_the_described_shape(service: Live, fields: dict[str, Any]) -> None:
    by_path = {each.path: each for each in OPERATIONS}
    chat, models = by_path["/v1/chat/completions"], by_path["/v1/models"]
    assert_described(chat.gives, service.chat(**fields).json())
    for event in frames(service.chat(stream=True, **fields))[:-1]:
        assert_described(chat.event, event)
    assert_described(models.gives, service.get("/v1/models").json())
    assert validator("Health").is_valid(service.get("/health").json())


# The page


class Links(HTMLParser):
    """All that a page loads or leads to, and what of it would need a laxer policy."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inline: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given_ = dict(attrs)
        self.found += [value for name in ("src", "href") if (value := given_.get(name))]
        self.inline += [name for name in given_ if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in given_):
            self.inline.append(tag)


KINDS = {".css": "css", ".js": "javascript"}
PAGE = {route.path: KINDS.get(Path(route.path).suffix, "html") for route in ROUTES if route.path != "/openapi.json"}


def test_the_page_loads_nothing_from_elsewhere(service: Live) -> None:
    links = Links(service.get("/docs").text)
    assert {path.removeprefix("/") for path in PAGE} - {"docs"} < set(links.found)
    assert not links.inline
    for link in links.found:
        assert not re.match(r"[a-z]+:(?!,)|//", link), link
        if not link.startswith(("#", "data:,")):
            assert service.get(f"/{link}").status_code == 200
    for part in ("/docs.css", "/docs.js"):
        text = service.get(part).text
        assert not re.search(r"https?://|@import|\burl\(|\beval\b|innerHTML", text)
    assert not re.search(r"@import|\burl\((?!\"?data:)", service.get("/docs/swagger-ui.css").text)


@pytest.mark.parametrize(("path", "kind"), PAGE.items())
def test_the_page_may_do_only_what_it_needs(service: Live, path: str, kind: str) -> None:
    headers = service.get(path).headers
    assert headers["content-type"] == f"text/{kind}; charset=utf-8"
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


# The service against the document

EXAMPLES_EACH = int(os.environ.get("REQUESTS", "20"))
CHECKS: list[Any] = [
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]


ADEQUATE: dict[str, Any] = {"negative_data_rejection": {"expected-statuses": [400, 404, 413, 422]}}
CONFIG = schemathesis.Config.from_dict({"checks": ADEQUATE})
"""What breaks the document is refused; a body that is too large, too."""

MODES = [(each, mode) for each in OPERATIONS for mode in schemathesis.GenerationMode if each.takes or mode.is_positive]


@pytest.mark.parametrize(("operation", "mode"), MODES, ids=lambda each: getattr(each, "path", each))
def test_any_request_gets_an_answer_of_the_document(
    service: Live, operation: Operation, mode: schemathesis.GenerationMode
) -> None:
    found = schemathesis.openapi.from_dict(DOCUMENT, config=CONFIG)[operation.path][operation.method]

    @settings(max_examples=EXAMPLES_EACH, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def law(data: st.DataObject) -> None:
        case = data.draw(found.as_strategy(generation_mode=mode))
        case.call_and_validate(base_url=service.url, checks=CHECKS)

    law()


@pytest.mark.parametrize("operation", [each for each in OPERATIONS if each.takes], ids=lambda each: each.path)
def test_any_request_with_a_body_may_have_to_wait_for_others_of_its_key(operation: Operation) -> None:
    responses = DOCUMENT["paths"][operation.path][operation.method]["responses"]
    assert "Retry-After" in responses["429"]["headers"]


@pytest.mark.parametrize("item", [{"role": "user"}, {"role": "user", "type": "message"}, {"type": "web_search_call"}])
def test_an_item_that_is_taken_is_of_one_kind_in_the_document(item: dict[str, Any]) -> None:
    fields = {"input": [{"role": "user", "content": "Hi"}, item]}
    assert accepts(ResponseRequest, fields)
    assert validator("ResponseRequest").is_valid(fields)


ODD_ARGUMENTS = [f'{{"a": 1{"0" * 30}}}', '{"a": 1e400}', r'{"a": "\ud800"}', r'{"\udc00": 1}', "[" * 1000, "{"]


@pytest.mark.parametrize("arguments", ODD_ARGUMENTS, ids=lambda each: each[:12])
def test_no_arguments_of_an_earlier_call_fail_a_request(service: Live, arguments: str) -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": arguments}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "r"}]
    assert service.chat(messages=QUESTION + turns).status_code == 200


def test_a_tool_may_have_limits_of_any_size(service: Live) -> None:
    schema = b'{"type": "object", "properties": {"a": {"maximum": 1%s}}}' % (b"0" * 30)
    body = b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", "function": {"name": "f", '
    assert service.post(body + b'"parameters": ' + schema + b"}}]}").status_code == 200
