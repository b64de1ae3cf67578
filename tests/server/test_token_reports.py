"""What evaluation and training ask for: token ids, why an answer ended, prompts cut to a length."""

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching.packed.engine import PackedEngine
from batching.types import Request
from server.model.served_model import fingerprint
from server.openai.completions import MAX_PROMPT_IDS
from tests.fakes import INFO
from tests.live import BYTES, END, QUESTION, frames, live, says, scripted, settings_of, tokens_of
from tests.server.test_app import error_of, remembering
from tests.server.test_choices import telling
from tests.server.test_completions import complete, echoing
from tests.tiny import tiny_model

PROMPT: list[int] = BYTES.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]  # type: ignore[assignment, index, call-overload]


def choices_of(chunks: list[Any], index: int) -> list[dict[str, Any]]:
    return [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]


def ids_of(choices: list[dict[str, Any]]) -> list[int]:
    return [token for choice in choices for token in choice.get("token_ids", [])]


# Ids


@pytest.mark.parametrize("logprobs", [None, True])
@pytest.mark.parametrize("said", ["Hello!", "é😀", "", "ab</s>c"])
def test_a_chat_s_ids_are_those_of_its_prompt_and_of_every_token(said: str, logprobs: bool | None) -> None:
    asked: dict[str, Any] = {"return_token_ids": True, "logprobs": logprobs, "n": 2, "stop": ["</s>"]}
    with live(telling(said)) as service:
        whole = service.chat(**asked).json()
        chunks = frames(service.chat(stream=True, **asked))[:-1]
    before, stop, _ = said.partition("</s>")
    wanted = tokens_of(before + stop) if stop else [*tokens_of(said), END]
    assert whole["prompt_token_ids"] == chunks[0]["prompt_token_ids"] == PROMPT
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    for index in range(2):
        assert whole["choices"][index]["token_ids"] == ids_of(choices_of(chunks, index)) == wanted


@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"echo": True, "logprobs": 1}, {"logprobs": 0}])
def test_a_completion_s_ids_stand_in_each_choice(fields: dict[str, Any]) -> None:
    prompts = ["é", tokens_of("ids")]
    with live(telling(echoing())) as service:
        whole = complete(service, prompts, return_token_ids=True, **fields).json()["choices"]
        chunks = frames(complete(service, prompts, return_token_ids=True, stream=True, **fields))[:-1]
    for index, prompt in enumerate([tokens_of("é"), tokens_of("ids")]):
        first, *others = choices_of(chunks, index)
        assert whole[index]["prompt_token_ids"] == first["prompt_token_ids"] == prompt
        assert not any("prompt_token_ids" in choice for choice in others)
        assert whole[index]["token_ids"] == ids_of([first, *others]) == [*tokens_of("re:"), *prompt, END]


@pytest.mark.parametrize("inclusive", [False, True])
def test_tokens_after_a_stop_string_are_no_part_of_the_answer_however_many_arrive_with_it(inclusive: bool) -> None:
    asked: dict[str, Any] = {"stop": ["</s>"], "include_stop_str_in_output": inclusive, "logprobs": 0}
    usage: dict[str, Any] = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    with live(telling("ab</s>cd")) as service:
        text = complete(service, **asked).json()
        chat = service.chat(**asked | {"logprobs": True}).json()
        *chunks, _ = frames(complete(service, stream=True, **asked, **usage))
        response = service.post(
            orjson.dumps({"input": "Hi", "stop": "</s>", "include": ["message.output_text.logprobs"]}), "/v1/responses"
        ).json()
        message = service.post(
            orjson.dumps({"messages": QUESTION, "stop_sequences": ["</s>"], "max_tokens": 50}), "/v1/messages"
        ).json()
    assert "".join(text["choices"][0]["logprobs"]["tokens"]) == "ab</s>"
    assert "".join(entry["token"] for entry in chat["choices"][0]["logprobs"]["content"]) == "ab</s>"
    streamed = [choice["logprobs"]["tokens"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert "".join(token for tokens in streamed for token in tokens) == "ab</s>"
    assert all(chunk["usage"]["completion_tokens"] <= len("ab</s>") for chunk in chunks)
    counts = [reply["usage"]["completion_tokens"] for reply in (text, chat, chunks[-1])]
    counts += [reply["usage"]["output_tokens"] for reply in (response, message)]
    assert counts == [len("ab</s>")] * 5


def test_without_the_field_no_reply_has_ids() -> None:
    with live(telling("x")) as service:
        for response in (service.chat(), service.chat(stream=True), complete(service), complete(service, stream=True)):
            assert b"token_ids" not in response.content


def test_no_answer_has_more_ids_of_prompts_than_allowed() -> None:
    prompt = [1] * (MAX_PROMPT_IDS // 16)
    with live(scripted("", context_window=2**20, token_budget=2**24), queue_size=64) as service:
        assert complete(service, [prompt], n=16, return_token_ids=True).status_code == 200
        answer = complete(service, [[*prompt, 1]], n=16, return_token_ids=True)
    assert error_of(answer, 400, "too_large")["param"] == "return_token_ids"


def test_tokens_are_named_by_their_ids_if_asked_for() -> None:
    asked: dict[str, Any] = {"return_tokens_as_token_ids": True}
    names = [f"token_id:{token}" for token in [*tokens_of("é"), END]]
    with live(telling("é")) as service:
        [chat] = service.chat(logprobs=True, top_logprobs=2, **asked).json()["choices"]
        [text] = complete(service, "a", logprobs=2, echo=True, **asked).json()["choices"]
        [plain] = service.chat(logprobs=True, top_logprobs=2).json()["choices"]
    assert [entry["token"] for entry in chat["logprobs"]["content"]] == names
    assert [entry["bytes"] for entry in chat["logprobs"]["content"]][:2] == [[0xC3], [0xA9]]
    assert text["logprobs"]["tokens"] == [f"token_id:{tokens_of('a')[0]}", *names]
    likeliest = [other["token"] for entry in chat["logprobs"]["content"] for other in entry["top_logprobs"]]
    assert all(name.startswith("token_id:") for name in [*likeliest, *text["logprobs"]["top_logprobs"][1]])
    assert not any("token_id" in entry["token"] for entry in plain["logprobs"]["content"])


def test_tokens_named_by_id_have_their_log_probabilities() -> None:
    engine = PackedEngine(tiny_model(vocab_size=len(BYTES)), num_slots=2)
    asked: dict[str, Any] = {"logprob_token_ids": [5, 7, 5], "max_tokens": 3, "return_tokens_as_token_ids": True}
    with live(engine, guarded=False) as service:
        [chat] = service.chat(logprobs=True, top_logprobs=2, ignore_eos=True, **asked).json()["choices"]
        [text] = complete(service, "a", logprobs=0, ignore_eos=True, **asked).json()["choices"]
    for entry in chat["logprobs"]["content"]:
        names = [other["token"] for other in entry["top_logprobs"]]
        assert set(names) >= {"token_id:5", "token_id:7"}
        assert names[2:] == [name for name in ("token_id:5", "token_id:7") if name not in names[:2]]
    own = text["logprobs"]["tokens"]
    named = [list(dict.fromkeys(["token_id:5", "token_id:7", token])) for token in own]
    assert [list(others) for others in text["logprobs"]["top_logprobs"]] == named


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({}, None, "logprob_token_ids may only be set when logprobs is set"),
        ({"logprobs": True}, "logprob_token_ids", "beyond the model's vocabulary"),
    ],
)
def test_tokens_that_cannot_be_named_are_refused(fields: dict[str, Any], param: str | None, said: str) -> None:
    with live() as service:
        error = service.chat(logprob_token_ids=[10**7], **fields).json()["error"]
    assert said in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


# Endings

B = tokens_of("b")[0]
ENDINGS: list[tuple[dict[str, Any], str, str | int | None]] = [
    ({}, "stop", None),
    ({"stop": ["c", "bc"]}, "stop", "bc"),
    ({"stop": ["bc", "b"]}, "stop", "b"),
    ({"stop": ["z"]}, "stop", None),
    ({"stop_token_ids": [B]}, "stop", B),
    ({"stop_token_ids": [B, END], "stop": "z"}, "stop", B),
    ({"stop_token_ids": [END]}, "stop", None),
    ({"stop_token_ids": [END], "ignore_eos": True}, "stop", END),
    ({"max_tokens": 2}, "length", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "finish", "reason"), ENDINGS)
def test_an_ending_has_its_reason(fields: dict[str, Any], finish: str, reason: str | int | None, stream: bool) -> None:
    with live(scripted("abcd")) as service:
        for answer in (service.chat(stream=stream, **fields), complete(service, stream=stream, **fields)):
            chunks = frames(answer)[:-1] if stream else [answer.json()]
            *before, last = choices_of(chunks, 0)
            assert (last["finish_reason"], last["stop_reason"]) == (finish, reason)
            assert not any("stop_reason" in choice for choice in before)


# Prompts that are cut


def test_the_end_of_a_prompt_is_kept() -> None:
    text = "a text of some length"
    with live(scripted(echoing())) as service:

        @settings(max_examples=30)
        @given(st.integers(1, 60))
        def law(most: int) -> None:
            found = complete(service, text, truncate_prompt_tokens=most, echo=True, max_tokens=1).json()
            assert found["choices"][0]["text"] == text[-most:] + "r"
            assert found["usage"]["prompt_tokens"] == min(most, len(text))
            chat = service.chat(truncate_prompt_tokens=most, return_token_ids=True, max_tokens=1).json()
            assert chat["prompt_token_ids"] == PROMPT[-most:]

        law()


@pytest.mark.parametrize(("fields", "kept"), [({"max_tokens": 30}, 70), ({}, 50), ({"max_tokens": 10**6}, 50)])
def test_a_prompt_of_any_length_can_leave_room_for_its_answer(fields: dict[str, Any], kept: int) -> None:
    seen: list[Request] = []
    limits: dict[str, Any] = {"default_max_tokens": 50, "max_output_tokens": 50}
    with live(scripted(remembering(seen, "x"), context_window=100), **limits) as service:
        assert complete(service, "x" * 200, truncate_prompt_tokens=-1, **fields).status_code == 200
        assert service.chat(truncate_prompt_tokens=-1, **fields).status_code == 200
        error_of(complete(service, "x" * 200, **fields), 400, "context_length_exceeded")
        response = {"input": "x" * 200, "truncate_prompt_tokens": -1}
        assert service.post(orjson.dumps(response), "/v1/responses").status_code == 200
    assert len(seen[0].prompt) == kept
    assert list(seen[1].prompt) == PROMPT[-kept:]


@pytest.mark.parametrize("most", [0, -2, 1.5, "7", True])
def test_a_length_that_is_none_is_refused(most: Any) -> None:
    with live() as service:
        for answer in (service.chat(truncate_prompt_tokens=most), complete(service, truncate_prompt_tokens=most)):
            assert error_of(answer, 400, None)["param"] == "truncate_prompt_tokens"


# Fingerprints


def test_every_reply_made_of_choices_has_the_fingerprint() -> None:
    with live(scripted(says("Hi"))) as service, service.openai() as client:
        found = service.model.fingerprint
        chat: Any = {"model": "scripted", "messages": QUESTION}
        assert client.chat.completions.create(**chat).system_fingerprint == found
        assert {chunk.system_fingerprint for chunk in client.chat.completions.create(stream=True, **chat)} == {found}
        assert client.completions.create(model="scripted", prompt="x").system_fingerprint == found


def test_a_fingerprint_is_of_what_answers_depend_on() -> None:
    assert fingerprint(settings_of(), INFO) == fingerprint(settings_of(queue_size=7, port=0), INFO)
    assert fingerprint(settings_of(), INFO) != fingerprint(settings_of(model="/models/other"), INFO)


def test_what_a_response_cannot_return_is_refused() -> None:
    with live() as service:
        for field in ("return_token_ids", "return_tokens_as_token_ids", "logprob_token_ids"):
            answer = service.post(orjson.dumps({"input": "x", field: True}), "/v1/responses")
            assert error_of(answer, 400, "unsupported_field")["param"] == field
