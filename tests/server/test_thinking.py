"""Laws of thoughts over HTTP: whatever a request asked for, what its rendered prompt does decides.

A tiny model of random weights says what its grammar allows, and thinks until its budget is spent.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import orjson
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from batching.engine import Engine
from batching.packed.engine import PackedEngine
from batching.padded import PaddedEngine
from batching.types import Delta, Finish, Request
from server.model.text import Text
from server.openai.chat import EventReader, encode
from server.openai.messages import Message
from server.openai.requests import ChatRequest
from server.output.reasoning import ThoughtState
from tests.live import QUESTION, Live, byte_tokenizer, frames, live, scripted, tokens_of
from tests.server.test_app import error_of, remembering
from tests.tiny import tiny_model

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}{% if tools %}<tool_call>{% endif %}"
TEMPLATES = {
    "always opens": PLAIN + "<assistant><think>\n",
    "closes if told": PLAIN + "<assistant>{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
    "opens or closes": PLAIN + "<assistant>{% if enable_thinking %}<think>{% else %}</think>{% endif %}",
    "leaves it to the model": PLAIN + "<assistant>{# <think> #}",
    "knows none": PLAIN + "<assistant>",
}
OPENED, CLOSED, FREE, UNKNOWN = (
    ThoughtState.OPENED,
    ThoughtState.CLOSED,
    ThoughtState.FREE,
    ThoughtState.UNKNOWN,
)
STATES = {  # where thinking is off, and where it is on
    "always opens": (OPENED, OPENED),
    "closes if told": (CLOSED, FREE),
    "opens or closes": (CLOSED, OPENED),
    "leaves it to the model": (FREE, FREE),
    "knows none": (UNKNOWN, UNKNOWN),
}
BUDGET = 5
SCHEMA = {
    "type": "object",
    "properties": {"sure": {"enum": ["yes", "no"]}},
    "required": ["sure"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "智能体.0", "parameters": SCHEMA}}
ENGINES: dict[str, Callable[[], Engine]] = {
    "padded": lambda: PaddedEngine(tiny_model(), token_budget=8192),
    "packed": lambda: PackedEngine(tiny_model(), num_slots=4, token_budget=2048, prefill_chunk=64),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokenizer(template: str, tags: tuple[str, ...] = TAGS) -> PreTrainedTokenizerFast:
    return byte_tokenizer(TEMPLATES[template], tags)


def message_of(service: Live, stream: bool, **fields: Any) -> dict[str, Any]:
    """The message of an answer, put together from its chunks if it is streamed."""
    answer = service.chat(thinking_budget=BUDGET, max_tokens=200, seed=1, stream=stream, **fields)
    assert answer.status_code == 200, answer.text
    if not stream:
        choice = answer.json()["choices"][0]
        return {"finish": choice["finish_reason"], **choice["message"]}
    found: dict[str, Any] = {"content": "", "reasoning_content": ""}
    for chunk in frames(answer)[:-1]:
        for key, said in chunk["choices"][0]["delta"].items():
            found[key] = found.get(key, [] if key == "tool_calls" else "") + said
        found["finish"] = chunk["choices"][0]["finish_reason"]
    return found


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("thinks", [False, True])
def test_the_state_of_a_thought_is_that_of_the_rendered_prompt(template: str, thinks: bool) -> None:
    chat = ChatRequest.model_validate({"messages": [{"role": "user", "content": "<think>"}]})
    assert encode(Text(tokenizer(template)), chat, thinks).thought is STATES[template][thinks]


def test_qwen3_closes_a_thought_or_leaves_it_to_the_model(thinking_tokenizer: str) -> None:
    text = Text.load(thinking_tokenizer)
    chat = ChatRequest.model_validate({"messages": QUESTION, "tools": [TOOL]})
    assert encode(text, chat, thinking=False).thought is ThoughtState.CLOSED
    assert encode(text, chat, thinking=True).thought is ThoughtState.FREE


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_what_was_demanded_is_the_answer_and_the_thought_is_beside_it(template: str, engine: str) -> None:
    with live(ENGINES[engine](), tokenizer=tokenizer(template)) as service:
        for thinks in (False, True):
            state = STATES[template][thinks]
            for stream in (False, True):
                asked: dict[str, Any] = {"enable_thinking": thinks, "stream": stream}
                answer = message_of(service, response_format=FORMAT, **asked)
                assert orjson.loads(answer["content"])["sure"] in ("yes", "no")
                call = message_of(service, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, **asked)
                assert (call["finish"], call["content"] or "") == ("tool_calls", "")
                assert call["tool_calls"][0]["function"]["name"] == "智能体.0"
                thoughts = [found.get("reasoning_content", "") for found in (answer, call)]
                assert all(len(thought) <= BUDGET for thought in thoughts)
                assert state.to_come or not any(thoughts)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_thought_that_the_prompt_has_opened_ends_at_its_budget(engine: str) -> None:
    with live(ENGINES[engine](), tokenizer=tokenizer("always opens")) as service:
        answer = service.chat(thinking_budget=BUDGET, max_tokens=20, ignore_eos=True, logprobs=True, seed=1).json()
        tokens = [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert tokens[BUDGET : BUDGET + 4] == ["\n", "</think>", "\n", "\n"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_budget_that_ends_within_a_character_leaves_the_answer_what_was_demanded(engine: str) -> None:
    """The bytes of characters are tokens here, so that some of these thoughts are cut within one."""
    with live(ENGINES[engine](), tokenizer=tokenizer("always opens")) as service:
        for budget in range(1, 9):
            fields = {"thinking_budget": budget, "max_tokens": 100, "seed": 10, "temperature": 1}
            choice = service.chat(response_format=FORMAT, **fields).json()["choices"][0]
            assert choice["finish_reason"] == "stop"
            assert orjson.loads(choice["message"]["content"])["sure"] in ("yes", "no")


def first_of(state: ThoughtState) -> int | None:
    return tokenizer("always opens").convert_tokens_to_ids("<think>") if state is FREE else None  # type: ignore[return-value]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("thinks", [False, True])
def test_a_budget_is_for_a_thought_that_may_come(template: str, thinks: bool) -> None:
    seen: list[Request] = []
    state = STATES[template][thinks]
    with live(scripted(remembering(seen)), tokenizer=tokenizer(template)) as service:
        assert service.chat(enable_thinking=thinks, thinking_budget=BUDGET).status_code == 200
    forced = seen[0].sampling.forced
    assert (forced is not None) is state.to_come
    if forced:
        assert (forced.after, forced.first) == (BUDGET, first_of(state))


def test_a_budget_that_cannot_be_kept_is_refused_where_there_is_a_thought() -> None:
    with live(scripted(), tokenizer=tokenizer("always opens", ())) as service:
        assert error_of(service.chat(thinking_budget=BUDGET), 400, None)["param"] == "thinking_budget"
    with live(scripted(), tokenizer=tokenizer("leaves it to the model", ())) as service:
        error_of(service.chat(thinking_budget=BUDGET, enable_thinking=True), 400, None)
        for fields in ({}, {"enable_thinking": False}, {"thinking": {"type": "disabled"}}):
            assert service.chat(thinking_budget=BUDGET, **fields).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_to_a_prompt_that_has_opened_a_thought_begins_with_it(stream: bool) -> None:
    with live(scripted("hm\n</think>\n\nYes."), tokenizer=byte_tokenizer(TEMPLATES["always opens"])) as service:
        answer = service.chat(enable_thinking=False, stream=stream)
    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in frames(answer)[:-1]]
        said = {key: "".join(delta.get(key, "") for delta in deltas) for key in ("reasoning_content", "content")}
    else:
        said = answer.json()["choices"][0]["message"]
    assert (said["reasoning_content"], said["content"]) == ("hm", "Yes.")


@pytest.mark.parametrize("stream", [False, True])
def test_the_usage_says_how_many_tokens_are_thoughts(stream: bool) -> None:
    with live(scripted("hm\n</think>\n\nYes."), tokenizer=byte_tokenizer(TEMPLATES["always opens"])) as service:
        fields: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        answer = service.chat(n=2, **fields)
        counts = (frames(answer)[-2] if stream else answer.json())["usage"]
    assert counts["completion_tokens_details"] == {"reasoning_tokens": 2 * len(tokens_of("hm\n</think>"))}


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("pieces", [1, 50])
def test_the_tokens_of_a_long_thought_are_counted_whatever_comes_at_once(closed: bool, pieces: int) -> None:
    """A step that has to look at all of a thought for each of its tokens would take minutes."""
    text = Text(byte_tokenizer(TEMPLATES["always opens"]))
    chat = ChatRequest(messages=[Message(role="user", content="Hi")], enable_thinking=True)
    reader = EventReader(Mock(), text, encode(text, chat, thinking=True))
    thought = tokens_of("a" * 300_000 + "</think>" * closed)
    tokens = [*thought, *tokens_of("So." * closed)]
    size = len(tokens) // pieces
    for start in range(0, len(tokens), size):
        finish = Finish.LENGTH if start + size >= len(tokens) else None
        reader.push(Delta(tuple(tokens[start : start + size]), finish, ()))
    assert reader.thought_tokens == len(thought)


@pytest.mark.parametrize("stop", ["</think>\n\nNo", "k>\n\nYes, but", "> "])
@pytest.mark.parametrize("size", [1, 3, 50])
def test_a_stop_string_that_may_have_begun_in_the_tag_makes_no_thought_longer(stop: str, size: int) -> None:
    text = Text(byte_tokenizer(TEMPLATES["always opens"]))
    chat = ChatRequest(messages=[Message(role="user", content="Hi")], enable_thinking=True, stop=[stop])
    reader = EventReader(Mock(), text, encode(text, chat, thinking=True))
    thought = tokens_of("hm\n</think>")
    tokens = [*thought, *tokens_of("\n\nYes, it is.")]
    for start in range(0, len(tokens), size):
        reader.push(Delta(tuple(tokens[start : start + size]), Finish.LENGTH if start + size >= len(tokens) else None))
    assert reader.thought_tokens == len(thought)


THOUGHT, SAID = "First: STOP.\n\nThen go.", "Go. STOP\n\n<b>No.</b>"
ENDINGS = [("STOP", "Go. "), ("\n\n", "Go. STOP"), ("<", "Go. STOP\n\n"), ("k", SAID)]
"""Stop strings, and what is left of what was said."""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("template", ["always opens", "leaves it to the model"])
@pytest.mark.parametrize(("stop", "content"), ENDINGS)
def test_a_stop_string_ends_the_answer_and_not_the_thought(
    template: str, stop: str, content: str, stream: bool
) -> None:
    opening = "" if template == "always opens" else "<think>\n"
    script = f"{opening}{THOUGHT}\n</think>\n\n{SAID}"
    with live(scripted(script), tokenizer=byte_tokenizer(TEMPLATES[template])) as service:
        answer = service.chat(stop=stop, stream=stream)
    if stream:
        *choices, last = [chunk["choices"][0] for chunk in frames(answer)[:-1]]
        deltas = [choice["delta"] for choice in [*choices, last]]
        found = {key: "".join(delta.get(key, "") for delta in deltas) for key in ("reasoning_content", "content")}
    else:
        last = answer.json()["choices"][0]
        found = last["message"]
    assert (found["reasoning_content"], found["content"]) == (THOUGHT, content)
    assert last["stop_reason"] == (None if content == SAID else stop)


def test_a_stop_string_that_holds_the_closing_tag_ends_the_thought() -> None:
    with live(
        scripted(f"{THOUGHT}\n</think>\n\n{SAID}"), tokenizer=byte_tokenizer(TEMPLATES["always opens"])
    ) as service:
        choice = service.chat(stop="</think>").json()["choices"][0]
    assert choice["message"]["reasoning_content"].strip() == THOUGHT
    assert (choice["message"]["content"] or "", choice["stop_reason"]) == ("", "</think>")
