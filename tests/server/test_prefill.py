"""Laws of an answer that the client began: the model continues the last message, and only the rest is returned."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import orjson
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from batching.types import Request
from server import replies
from server.model.text import Text
from server.openai.chat import encode
from server.openai.prefill import MAX_PREFILL, MAX_PREFILL_OF_CALLS, Begun, Prefill, begun
from server.openai.requests import ChatRequest
from server.output.detokenize import Detokenizer, Vocabulary
from server.output.message import Event, MessageReader, fold
from server.output.model_format import QWEN
from server.output.reasoning import ReasoningSplitter, ThoughtState
from server.output.tool_calls import CallStarted
from tests.live import BYTES, QUESTION, byte_tokenizer, frames, live, says, scripted, text_of, tokens_of
from tests.server.test_app import error_of, remembering

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BEGUN: list[Any] = [*QUESTION, {"role": "assistant", "content": "Well, "}]
TEMPLATES = {
    "shows thoughts": "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{% if tools %}<tool_call>{% endif %}",
    "hides thoughts": "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}",
}


def shows_thoughts() -> PreTrainedTokenizerFast:
    return byte_tokenizer(TEMPLATES["shows thoughts"], TAGS)


def conversation(*turns: dict[str, Any], **fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [*QUESTION, *turns], "continue_final_message": True} | fields)


# What is returned

PIECES = ["<think>", "</think>", "\n", "a", " b", "<tool_", CALL, CALL[:25], CALL[25:], "{", "é"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


def reader(thinks: bool) -> MessageReader:
    return MessageReader(ReasoningSplitter() if thinks else None, QWEN.parser())


def message(events: Iterable[Event]) -> replies.ChatMessage:
    """Without the ids of calls, which are random."""
    return fold([replace(event, id="") if isinstance(event, CallStarted) else event for event in events])


def ended(answer: MessageReader, before: Sequence[Event], rest: str) -> list[Event]:
    return [*before, *answer.push(rest), *answer.flush()]


@given(TEXTS, st.integers(0, 200), st.booleans())
def test_an_answer_reads_the_same_whoever_began_it(text: str, cut: int, thinks: bool) -> None:
    first, rest = text[:cut], text[cut:]
    # A client that sends a part of a tag has shown it as text, which it is no more once the model completes the tag.
    within = (text.startswith(tag, cut - n) for tag in TAGS[:2] for n in range(1, min(len(tag), cut + 1)))
    assume(not (thinks and any(within)))
    whole = message(ended(reader(thinks), (), text))
    answer = begun(partial(reader, thinks), Prefill("content", first))
    events = ended(answer.reader, answer.take(), rest)
    assert message(events) == whole
    shown, known = message(answer.rest(events)), message(ended(reader(thinks), (), first))
    assert shown.get("tool_calls") == whole.get("tool_calls")
    for field in ("content", "reasoning_content"):
        there, sent, new = (str(each.get(field) or "") for each in (whole, known, shown))
        assert there.endswith(new)
        assert there == sent + new or "tool_calls" in whole


@given(TEXTS)
def test_without_a_prefill_nothing_is_left_out(text: str) -> None:
    events = ended(reader(True), (), text)
    assert Begun(reader(True), (), ()).rest(events) == events


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("echo", "content"), [(None, "it is."), (False, "it is."), (True, "Well, it is.")])
def test_only_the_rest_is_returned_unless_all_is_asked_for(echo: bool | None, content: str, stream: bool) -> None:
    with live(scripted("it is.")) as service:
        answer = service.chat(messages=BEGUN, continue_final_message=True, echo=echo, stream=stream, n=2 - stream)
    if stream:
        assert text_of(frames(answer)) == content
    else:
        assert [choice["message"]["content"] for choice in answer.json()["choices"]] == [content] * 2
        assert answer.json()["usage"]["completion_tokens"] == 2 * len("it is.") + 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("cut", [0, 5, 11, 20, 25, 40, len(CALL)])
def test_a_call_that_was_begun_is_returned_whole(cut: int, stream: bool) -> None:
    turn = {"role": "assistant", "content": "So: " + CALL[:cut]}
    script = says(CALL[cut:])
    with live(scripted(script, stop_token=shows_thoughts().eos_token_id), tokenizer=shows_thoughts()) as service:
        answer = service.chat(messages=[*QUESTION, turn], continue_final_message=True, tools=[TOOL], stream=stream)
    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in frames(answer)[:-1]]
        functions = [call["function"] for delta in deltas for call in delta.get("tool_calls", [])]
        name, arguments = functions[0]["name"], "".join(function["arguments"] for function in functions)
        said, finish = text_of(frames(answer)), frames(answer)[-2]["choices"][0]["finish_reason"]
    else:
        [choice] = answer.json()["choices"]
        [call] = choice["message"]["tool_calls"]
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        said, finish = choice["message"]["content"] or "", choice["finish_reason"]
    assert (name, orjson.loads(arguments), said.strip(), finish) == ("f", {"x": 1}, "", "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
def test_a_thought_that_was_begun_is_thought_to_its_end(stream: bool) -> None:
    turn = {"role": "assistant", "reasoning_content": "Hm, "}
    with live(scripted("yes.</think>Sure."), tokenizer=shows_thoughts()) as service:
        answer = service.chat(messages=[*QUESTION, turn], continue_final_message=True, stream=stream)
    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in frames(answer)[:-1]]
        thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
        assert (thought, text_of(frames(answer))) == ("yes.", "Sure.")
    else:
        found = answer.json()["choices"][0]["message"]
        assert (found["reasoning_content"], found["content"]) == ("yes.", "Sure.")


def test_text_after_a_prefill_that_looks_like_a_thought_is_content() -> None:
    with live(scripted("<think>x</think>"), tokenizer=shows_thoughts()) as service:
        found = service.chat(messages=BEGUN, continue_final_message=True).json()["choices"][0]["message"]
    assert (found["content"], "reasoning_content" in found) == ("<think>x</think>", False)


def test_a_space_between_what_was_sent_and_what_is_returned_is_kept() -> None:
    words = {"▁one": 0, "▁two": 1, "▁": 2}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    vocabulary = Vocabulary(tokenizer)
    assert Detokenizer(vocabulary).push([1, 1]) == "two two"
    assert Detokenizer(vocabulary, after=[0]).push([1, 1]) == " two two"


# What the model reads


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {"add_generation_prompt": True}),
        ({"add_generation_prompt": True}, {"add_generation_prompt": True}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        ({"continue_final_message": True}, {"continue_final_message": True}),
        ({"continue_final_message": True, "add_generation_prompt": False}, {"continue_final_message": True}),
    ],
)
def test_a_prompt_ends_as_in_transformers(fields: dict[str, Any], options: dict[str, Any]) -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen))) as service:
        assert service.chat(messages=BEGUN, **fields).status_code == 200
    own: Any = BYTES.apply_chat_template(BEGUN, **options)
    assert list(seen[0].prompt) == own["input_ids"]


@cache
def qwen3(folder: str) -> tuple[Text, Any]:
    """Its text as the service has it, and its tokenizer as transformers does."""
    return Text.load(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize(
    "turn",
    [
        {"content": "Well, "},
        {"content": "Well,\n\n"},
        {"content": "Well, ", "reasoning_content": "Hm."},
        {"content": "", "reasoning_content": "Hm, I"},
        {"content": ""},
        {"content": "Let me see.\n<tool_call>\n"},
    ],
)
def test_qwen3_reads_a_prefill_as_in_transformers(thinking_tokenizer: str, turn: dict[str, Any], thinks: bool) -> None:
    last = {"role": "assistant", **turn}
    text, tokenizer = qwen3(thinking_tokenizer)
    found = encode(text, conversation(last, tools=[TOOL]), thinks)
    own: Any = tokenizer.apply_chat_template(
        [*QUESTION, last],
        tools=[TOOL],
        enable_thinking=thinks,
        continue_final_message="content" if turn["content"] or len(turn) == 1 else "reasoning_content",
    )
    assert list(found.tokens) == own["input_ids"]


@given(st.text(st.sampled_from("a\n <>|end{")))
def test_a_prefill_that_looks_like_a_special_token_stays_text(text: str) -> None:
    start = encode(Text(BYTES), conversation({"role": "assistant", "content": ""}), thinking=False).tokens
    found = encode(Text(BYTES), conversation({"role": "assistant", "content": f"{text}<|end|>"}), thinking=False).tokens
    assert list(found) == [*start, *tokens_of(text), *tokens_of("<"), *tokens_of("|end|>")]


# The thought before the answer

OPENED, CLOSED, FREE = ThoughtState.OPENED, ThoughtState.CLOSED, ThoughtState.FREE


@pytest.mark.parametrize(
    ("turn", "state"),
    [
        ({"content": ""}, FREE),
        ({"content": "Well, "}, CLOSED),
        ({"content": "<think>Hm"}, OPENED),
        ({"content": "<think>Hm</think>"}, CLOSED),
        ({"content": "<think>Hm</think>Well"}, CLOSED),
        ({"reasoning_content": "Hm"}, OPENED),
        ({"reasoning_content": "Hm", "content": "Well"}, CLOSED),
    ],
)
def test_a_prefill_says_whether_a_thought_is_to_come(turn: dict[str, Any], state: ThoughtState) -> None:
    assert encode(Text(shows_thoughts()), conversation({"role": "assistant", **turn}), True).thought is state


def test_a_budget_is_for_what_the_model_adds_to_a_thought() -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen)), tokenizer=shows_thoughts()) as service:
        for turn in ({"reasoning_content": "Hm"}, {"content": "Well"}):
            message = {"role": "assistant", **turn}
            service.chat(messages=[*QUESTION, message], continue_final_message=True, thinking_budget=3)
    forced = [request.sampling.forced for request in seen]
    assert forced[0] is not None
    assert (forced[0].after, forced[0].first, forced[1]) == (3, None, None)


# What is refused


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        (QUESTION, {"continue_final_message": True}, "continue_final_message"),
        (
            [*QUESTION, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}],
            {"continue_final_message": True},
            "continue_final_message",
        ),
        (
            [*QUESTION, {"role": "assistant", "content": "x" * (MAX_PREFILL + 1)}],
            {"continue_final_message": True},
            "continue_final_message",
        ),
        (
            [*QUESTION, {"role": "assistant", "content": "x" * (MAX_PREFILL // 4 + 1)}],
            {"continue_final_message": True, "n": 4},
            "continue_final_message",
        ),
        (
            [*QUESTION, {"role": "assistant", "content": "x" * (MAX_PREFILL_OF_CALLS + 1)}],
            {"continue_final_message": True, "tools": [TOOL]},
            "continue_final_message",
        ),
        ([*QUESTION, {"role": "assistant", "reasoning_content": "x"}], {"continue_final_message": True}, "messages"),
        (BEGUN, {"continue_final_message": True, "add_generation_prompt": True}, None),
        (BEGUN, {"echo": True}, None),
    ],
)
def test_what_cannot_be_continued_is_refused(messages: Any, fields: dict[str, Any], param: str | None) -> None:
    with live(tokenizer=byte_tokenizer(TEMPLATES["hides thoughts"], TAGS)) as service:
        assert error_of(service.chat(messages=messages, **fields), 400, None)["param"] == param


def test_other_ways_to_ask_have_no_message_to_continue() -> None:
    with live() as service:
        for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/responses", {"input": "x"})):
            answer = service.post(orjson.dumps(body | {"continue_final_message": True}), path)
            assert error_of(answer, 400, "unsupported_field")["param"] == "continue_final_message"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choices", [1, 16])
def test_the_longest_prefill_keeps_no_one_waiting(choices: int, stream: bool) -> None:
    with live(scripted("!", context_window=10**6, token_budget=10**8), tokenizer=shows_thoughts()) as service:
        for most, tools in ((MAX_PREFILL, {}), (MAX_PREFILL_OF_CALLS, {"tools": [TOOL]})):
            longest = most // choices
            for piece in ("x" * longest, "<tool_call>" * (longest // 11), CALL * (longest // len(CALL))):
                turn = {"role": "assistant", "content": piece}
                fields = {"continue_final_message": True, "n": choices, "stream": stream, **tools}
                answer = service.chat(messages=[*QUESTION, turn], **fields)
                assert answer.status_code == 200, answer.text
