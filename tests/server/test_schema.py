"""Laws of what a client may send: bytes in, a `ChatRequest` or one sentence out."""

import contextlib
import re
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import fields as request_fields
from server.fields import MAX_BARE_BYTES, MAX_ITEMS, MAX_PARTS, parse, structure
from server.http.errors import RETRIED, ApiError
from server.openai.requests import MAX_STOP_LENGTH, MAX_STOPS, ChatRequest
from server.output.tool_calls import Turn

HI = [{"role": "user", "content": "Hi"}]
HUGE = 10**6


def accepted(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, orjson.dumps({"messages": HI} | fields))[0]


def refused(body: bytes) -> dict[str, Any]:
    """The error object that a body gets, which must be a 400 that no client takes for a passing trouble."""
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, body)
    assert caught.value.status == 400
    text = caught.value.body().decode()
    assert not RETRIED.search(text), text
    error: dict[str, Any] = orjson.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"].endswith(".")
    return error


def refused_field(name: str, json: str) -> dict[str, Any]:
    """What a request with a field of this JSON is told. Spelled out, because no Python value is `1e999`."""
    return refused(f'{{"messages": [{{"role": "user", "content": "Hi"}}], "{name}": {json}}}'.encode())


def for_template(*messages: object) -> list[Turn]:
    return [message.for_template(str) for message in accepted(messages=messages).messages]


REFUSED = {
    "max_tokens": ["0", "-1", "true", '"12"', "1.5", "[]", "9" * 6000],
    "max_completion_tokens": ["0", "-1", "true", '"12"'],
    "temperature": ["-1", "-1e-40", "NaN", "Infinity", "1e999", "-1e999", "2.1", "true", '"1"', "[0]"],
    "top_p": ["2", "-0.1", "NaN", "1e999", "true"],
    "top_k": ["-2", "2147483648", "1.5", "true", '"1"'],
    "min_p": ["-0.1", "1.1", "NaN"],
    "presence_penalty": ["2.1", "-2.1", "NaN", "1e999"],
    "frequency_penalty": ["2.1", "-2.1", "NaN", "1e999"],
    "repetition_penalty": ["0", "-1", "10.1", "NaN", "1e999"],
    "seed": [str(2**63), str(-(2**63) - 1), str(2**200), "1e999", "true", '"7"'],
    "stop": ['""', '[""]', '["a", ""]', "[1]", "[null]", "{}", "7", f'"{"x" * (MAX_STOP_LENGTH + 1)}"'],
    "stream": ["1", '"true"', "0"],
    "n": ["0", "17", str(HUGE), str(2**64), "true", "1.5", '"1"'],
    "logprobs": ['"yes"', "1"],
    "top_logprobs": ["21", "-1", "true", str(HUGE)],
    "logit_bias": ['{"-1": 5}', '{"x": 5}', '{"1": 101}', '{"1": 1e300}', '{"1": NaN}', '{"1": true}', "[]"],
    "messages": ["[]", "null", '"Hi"', "{}", "[null]", "[[]]", "[{}]", '[{"content": "Hi"}]', "7"],
    "model": ["7", "[]", "true"],
    "tools": ['[{"type": "function"}]', '"none"'],
    "tool_choice": ['"required"', '{"type": "function"}'],
    "do_sample": ["1", '"yes"'],
    "ignore_eos": ["1"],
    "enable_thinking": ["1", '"yes"'],
    "thinking": ["true", '{"type": "maybe"}', "{}", '{"type": "enabled", "budget_tokens": 0}'],
    "modalities": ['["audio"]', '["text", "audio"]', "[" + "1," * (MAX_ITEMS // 2) + "1]"],
    "audio": ['{"voice": "alloy", "format": "wav"}'],
    "web_search_options": ['{"search_context_size": "low"}'],
    "continue_final_message": ["1", '"yes"'],
    "add_generation_prompt": ["0"],
    "echo": ["1", "true"],
    "skip_special_tokens": ["false"],
    "guided_json": ["7", "[]", '"{"'],
    "chat_template_kwargs": ['{"chat_template": "{{ 1 }}"}', '{"tokenize": true}', '{"enable_thinking": 1}', "7"],
    "chat_template": ['"{{ 1 }}"'],
    "stop_token_ids": ["[9223372036854775808]"],
    "response_format": ['{"type": "json_schema"}'],
}


@pytest.mark.parametrize(("field", "json"), [(field, json) for field, values in REFUSED.items() for json in values])
def test_a_bad_value_is_refused_and_its_field_is_named(field: str, json: str) -> None:
    error = refused_field(field, json)
    assert error["code"] == "invalid_json" or field in error["message"]


ACCEPTED: dict[str, list[Any]] = {
    "max_tokens": [1, 2**31, None],
    "max_completion_tokens": [1, 10**9, None],
    "temperature": [0, 1e-40, 1, 2, 0.1, None],
    "top_p": [0, 0.3, 1, None],
    "top_k": [-1, 0, 50, 2**31 - 1, None],
    "min_p": [0, 0.5, 1, None],
    "presence_penalty": [-2, 0.4, 2, None],
    "frequency_penalty": [-2, 0.7, 2, None],
    "repetition_penalty": [0.1, 1, 10, None],
    "seed": [0, -(2**63), 2**63 - 1, None],
    "stop": ["x", [], ["x"] * MAX_STOPS, "x" * MAX_STOP_LENGTH, "\n", None],
    "stream": [True, False, None],
    "n": [1, None],
    "logprobs": [False, None],
    "model": ["any", "", None],
    "tools": [[], None],
    "tool_choice": ["auto", "none", None],
    "do_sample": [True, False, None],
    "ignore_eos": [True, None],
    "user": ["someone", 7, None],
    "modalities": [["text"], None],
    "skip_special_tokens": [True, None],
    "add_generation_prompt": [True, False, None],
    "continue_final_message": [True, False, None],
    "echo": [False, None],
    "verbosity": ["low", None],
    "prompt_cache_retention": ["24h", None],
    "include_reasoning": [True, False, None],
    "extra_body": [{}, None],
    "drop_params": [True, None],
    "top_logprobs": [0, None],
    "service_tier": ["scale", None],
    "metadata": [{"a": 1}, None],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in ACCEPTED.items() for value in values])
def test_a_good_value_is_accepted(field: str, value: object) -> None:
    kept = [value] if field == "stop" and isinstance(value, str) else value
    assert getattr(accepted(**{field: value}), field) == kept


def test_a_length_beyond_every_number_type_is_kept_to_be_cut_later() -> None:
    request, _ = parse(
        ChatRequest, b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 18446744073709551616}'
    )
    assert request.wanted_tokens == 2**64


def test_the_newer_name_of_the_length_wins() -> None:
    assert accepted(max_tokens=5, max_completion_tokens=7).wanted_tokens == 7
    assert accepted(max_tokens=5).wanted_tokens == 5
    assert accepted().wanted_tokens is None


def test_as_many_stop_strings_as_a_body_holds_are_refused() -> None:
    assert refused_field("stop", "[" + ",".join(['"x"'] * (MAX_ITEMS // 2)) + "]")["param"] == "stop"


def test_one_stop_string_may_come_without_a_list() -> None:
    assert accepted(stop="END").stop == ["END"]


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({"enable_thinking": False}, False),
        ({"enable_thinking": True}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"chat_template_kwargs": {}}, None),
        ({"enable_thinking": None, "chat_template_kwargs": None, "thinking": None}, None),
        ({}, None),
    ],
)
def test_thinking_is_switched_in_any_of_three_spellings(fields: dict[str, Any], thinks: bool | None) -> None:
    assert accepted(**fields).thinks is thinks


def test_stream_options_mean_something_in_a_stream_alone() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    streamed, plain = (accepted(stream=stream, stream_options=options) for stream in (True, False))
    assert (streamed.include_usage, streamed.continuous_usage) == (True, True)
    assert (plain.include_usage, plain.continuous_usage) == (False, False)


def test_counts_in_every_event_come_only_with_a_count_at_the_end() -> None:
    assert not accepted(stream=True, stream_options={"continuous_usage_stats": True}).continuous_usage


@pytest.mark.parametrize("field", ["max_tokens", "n", "seed", "top_k", "min_tokens", "priority"])
def test_a_whole_number_may_be_written_with_a_point(field: str) -> None:
    found = getattr(accepted(**{field: 2.0}), field)
    assert (found, type(found)) == (2, int)


def test_content_may_be_a_string_null_absent_or_text_parts() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two", "cache_control": {}}, " three"]
    assert for_template(
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant"},
        {"role": "user", "content": parts},
        {"role": "user", "content": []},
    ) == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "one two three"},
        {"role": "user", "content": ""},
    ]


def test_turns_of_any_order_pass_and_a_developer_speaks_as_the_system() -> None:
    roles = ["user", "user", "assistant", "assistant", "developer"]
    found = for_template(*({"role": role, "content": "x", "name": "n"} for role in roles))
    assert [message["role"] for message in found] == ["user", "user", "assistant", "assistant", "system"]
    assert all(message["name"] == "n" for message in found)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file"])
def test_a_part_that_is_not_text_is_refused_by_its_type(kind: str) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": kind, kind: {"url": "http://192.0.2.1/x.png"}}]}]}
    error = refused(orjson.dumps(body))
    assert kind in error["message"]
    assert "192.0.2.1" not in error["message"]


@pytest.mark.parametrize(
    "content",
    [
        7,
        True,
        {"text": "x"},
        [7],
        [None],
        [[]],
        [{}],
        [{"type": "text"}],
        [{"type": "text", "text": 7}],
        [{"type": []}],
    ],
)
def test_content_of_any_other_kind_is_refused(content: object) -> None:
    assert refused(orjson.dumps({"messages": [{"role": "user", "content": content}]}))["param"] == "messages.0.content"


@pytest.mark.parametrize("field", [{"tool_calls": [{}]}, {"function_call": {}}, {"role": None}])
def test_a_message_that_cannot_be_served_is_refused(field: dict[str, Any]) -> None:
    assert refused(orjson.dumps({"messages": [{"role": "user", "content": "x"} | field]}))["param"].startswith(
        "messages.0"
    )


STORED = {"id": "a1", "files": [], "conversationId": "c1", "created_at": 1.5, "doc_ids": []}
"""What RAGFlow's chats keep beside a message."""

ANSWERED = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None}
"""What openai-python's `model_dump` adds to one."""


@pytest.mark.parametrize(
    "beside",
    [STORED, ANSWERED, {"provider_specific_fields": {"x": 1}}, {"reasoning_details": [{"text": "hm"}]}, {"": 1}],
)
def test_what_a_client_keeps_beside_a_message_changes_nothing(beside: dict[str, Any]) -> None:
    for turn in ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}):
        assert for_template(turn | beside) == for_template(turn)


@pytest.mark.parametrize(
    ("turn", "field", "shown"),
    [
        ({"reasoning": "hm"}, "reasoning_content", "hm"),
        ({"reasoning": {"effort": "low"}, "content": "x"}, "content", "x"),
        ({"content": None, "refusal": "No."}, "content", "No."),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "content", "No."),
        ({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "x"}]}, "content", "x"),
        ({"content": [{"type": "thinking", "thinking": "hm"}]}, "reasoning_content", "hm"),
        ({"content": [{"type": "output_text", "text": "x", "annotations": []}]}, "content", "x"),
    ],
)
def test_an_assistant_is_understood_in_every_spelling(turn: dict[str, Any], field: str, shown: str) -> None:
    assert for_template({"role": "assistant"} | turn)[0].get(field) == shown


def test_older_and_newer_forms_of_a_call_and_its_result_are_the_same_turns() -> None:
    call = {"name": "add", "arguments": '{"a": 1}'}
    old = [
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "add", "content": "1"},
    ]
    new: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "", "type": "function", "function": call}]},
        {"role": "tool", "name": "add", "content": [{"type": "text", "text": "1"}]},
    ]
    as_object = [{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}, new[1]]
    assert for_template(*old) == for_template(*new) == for_template(*as_object)


def nulled(value: Any) -> Any:
    """The same value with a null of an odd name, and one of a known name, in every object."""
    if isinstance(value, list):
        return [nulled(item) for item in value]
    if isinstance(value, dict):
        return {"nothing": None, "description": None} | {key: nulled(item) for key, item in value.items()}
    return value


def test_null_is_as_good_as_absent_everywhere() -> None:
    body: dict[str, Any] = {
        "messages": [*HI, {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "response_format": {"type": "text"},
        "chat_template_kwargs": {"enable_thinking": True},
        "thinking": {"type": "enabled"},
    }
    every = dict.fromkeys(ChatRequest.model_fields)
    assert parse(ChatRequest, orjson.dumps(every | nulled(body))) == parse(ChatRequest, orjson.dumps(body))


def test_an_unknown_field_is_ignored_and_named() -> None:
    asked, ignored = parse(ChatRequest, orjson.dumps({"messages": HI, "foo": 1, "bar": {"x": []}, "baz": None}))
    assert asked == accepted()
    assert ignored == ("foo", "bar")


def strictly(body: dict[str, Any]) -> dict[str, Any]:
    """The error object of a request with unknown fields where those are refused."""
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, orjson.dumps(body), refuse_unknown=True)
    text = caught.value.body().decode()
    assert not RETRIED.search(text), text
    error: dict[str, Any] = orjson.loads(text)["error"]
    assert error["code"] == "unsupported_field"
    return error


def test_an_unknown_field_can_be_refused_by_name() -> None:
    assert "best_of" in strictly({"messages": HI, "best_of": 1})["message"]
    parse(ChatRequest, orjson.dumps({"messages": [HI[0] | {"weight": 1}], "foo": None}), refuse_unknown=True)


@pytest.mark.parametrize("name", ["", "é", "a b", "x" * 100, "\x1b[31m", "<script>", 'a"b', "\x00"])
def test_a_field_whose_name_is_not_fit_to_be_repeated_is_refused_without_it(name: str) -> None:
    error = strictly({"messages": HI, name: 1})
    assert error["param"] is None
    assert not name or name not in error["message"]


WORDS = ["429", "500", "502", "503", "504", "rate_limit", "rate.limit", "server", "SERVER", "timeout", "time_out"]
NUMBERS = ["42", "9", "50", "3", "4", "rate", "limit", "ser", "ver", "_", "."]


@given(st.lists(st.sampled_from(WORDS + NUMBERS), min_size=1, max_size=6).map("".join))
def test_no_name_of_a_field_makes_a_refusal_look_like_a_passing_trouble(name: str) -> None:
    strictly({"messages": HI, name: 1})


@given(st.integers(429, 504) | st.sampled_from([5000, 42900, 450_000]))
def test_no_count_makes_a_refusal_look_like_a_passing_trouble(count: int) -> None:
    refused(orjson.dumps({"messages": HI, "stop": ["x"] * count}))


BAD_BYTES = {
    "nothing": b"",
    "no object": b"[]",
    "null": b"null",
    "cut off": b'{"messages": [',
    "two values": b"{} {}",
    "trailing comma": b'{"messages": [],}',
    "invalid UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "byte order mark": b'\xef\xbb\xbf{"messages": [{"role": "user", "content": "Hi"}]}',
    "UTF-16": '{"messages": [{"role": "user", "content": "Hi"}]}'.encode("utf-16"),
    "escaped surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "encoded surrogate": b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
    "surrogate in a name": b'{"\\udfff": 1}',
    "raw NUL": b'{"messages": [{"role": "user", "content": "\x00"}]}',
    "deep lists": b"[" * 1000 + b"]" * 1000,
    "deep objects": b'{"messages": ' * 1000 + b"1" + b"}" * 1000,
    "depth in a field that is unknown": b'{"x": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    "depth without an end": b"[" * 100_000,
}


@pytest.mark.parametrize("what", BAD_BYTES)
def test_bytes_that_are_no_request_are_refused(what: str) -> None:
    refused(BAD_BYTES[what])


def test_an_escaped_nul_and_astral_characters_are_text() -> None:
    request, _ = parse(ChatRequest, b'{"messages": [{"role": "user", "content": "a\\u0000b\\ud83d\\ude00"}]}')
    assert request.messages[0].content == "a\x00b😀"


def test_no_value_that_was_sent_is_repeated() -> None:
    secret = "do not tell"
    for fields in (
        {"temperature": secret},
        {"messages": secret},
        {"stop": [secret, {secret: 1}]},
        {"thinking": secret},
    ):
        assert secret not in str(refused(orjson.dumps({"messages": HI} | fields)))


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(sorted(ChatRequest.model_fields))
MESSAGE = st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls", "x"]), JSON | st.just("user"))
NEAR_MISSES = st.builds(
    lambda fields, messages: {"messages": messages} | fields,
    st.dictionaries(FIELDS | st.text(), JSON, max_size=3),
    st.lists(MESSAGE | st.just(HI[0]), max_size=3) | JSON,
)


@given(st.binary() | (JSON | NEAR_MISSES).map(orjson.dumps))
def test_any_body_is_a_request_or_a_400(body: bytes) -> None:
    with contextlib.suppress(ApiError):
        assert isinstance(parse(ChatRequest, body)[0], ChatRequest)
        return
    refused(body)


@given(JSON, st.integers(1, 40), st.sampled_from([None, orjson.OPT_INDENT_2]))
def test_what_strings_hold_is_no_part_of_a_body(value: Any, piece: int, option: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request_fields, "PIECE_BYTES", piece)
        found = b"".join(structure(orjson.dumps(value, option=option)))
    assert not re.search(rb'[\s"]', found)
    assert (found.count(b"[") + found.count(b"{"), found.count(b":"), found.count(b",")) == parts(value)


def parts(value: Any) -> tuple[int, int, int]:
    """How many lists and objects, members of objects, and commas between items its JSON has."""
    if not isinstance(value, list | dict):
        return 0, 0, 0
    inside = [parts(item) for item in (value.values() if isinstance(value, dict) else value)]
    lists, members, commas = map(sum, zip(*inside, strict=True)) if inside else (0, 0, 0)
    return lists + 1, members + len(value) * isinstance(value, dict), commas + max(0, len(value) - 1)


@pytest.mark.parametrize("part", ["{}", "[]", '{"":0}', '[""]', '["[:{\\""]'])
def test_a_body_of_too_many_parts_is_refused_before_it_is_parsed(part: str) -> None:
    for count, code in ((MAX_PARTS // 4, None), (MAX_PARTS + 1, "too_large")):
        assert refused_field("modalities", "[" + ",".join([part] * count) + "]")["code"] == code
    assert refused_field("modalities", "[" + '"",' * MAX_ITEMS + '""]')["code"] == "too_large"
    for size, code in ((MAX_BARE_BYTES // 5000, None), (MAX_BARE_BYTES // 4000 + 1, "too_large")):
        assert refused_field("modalities", "[" + ",".join(["9" * 4000] * size) + "]")["code"] == code


TEXTS = {
    "a table": "id,name,a:b,[x],{y}\n" * 190_000,
    "code": 'if (a["b"][0] == "\\"") { f({1: [2, 3]}); }\n' * 80_000,
    "json": '{"a": [1, {"b": "c\\\\"}], "d": ""}\n' * 84_000,
    "quotes and backslashes": '"\\' * 950_000,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_may_have_as_many_brackets_colons_and_commas_as_it_likes(text: str) -> None:
    body = orjson.dumps({"messages": [{"role": "user", "content": text}]})
    assert 3.6 * 2**20 < len(body) < 4 * 2**20
    assert parse(ChatRequest, body)[0].messages[0].content == text


@given(st.text(), st.sampled_from([400, 401, 404, 405, 413]))
def test_no_4xx_body_has_a_word_that_clients_retry_on(text: str, status: int) -> None:
    shown = f"{text} server 429 Rate-Limit time out {text}".encode(errors="replace").decode()
    body = ApiError(status, shown, param=shown).body().decode()
    assert not RETRIED.search(body)
    assert not re.search("429|500|502|503|504|rate.?limit|server|timeout", body, re.IGNORECASE)
