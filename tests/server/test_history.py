"""The law of histories: any answer of ours, sent back as its client keeps it, is answered, and means the same."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from typing import Any

import httpx2
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion

import batching.stream
from batching.types import Request
from server.model.text import Text
from server.openai.chat import encode
from server.openai.requests import ChatRequest
from server.output.hermes import QwenParser
from server.output.message import MessageReader, fold
from server.output.reasoning import ReasoningSplitter
from tests.live import BYTES, QUESTION, byte_tokenizer, frames, live, says, scripted
from tests.llama import llama_tokenizer
from tests.server.test_calls import KNOWING
from tests.server.test_message import THOUGHTS
from tests.server.test_tools import CALLS, TEXTS, one

Json = dict[str, Any]

CHAT = "chat/completions"
TOOLS = [{"type": "function", "function": {"name": "f"}}]
LEGACY = {"functions": [TOOLS[0]["function"]]}
LLAMA_CALL = '{"name": "f", "parameters": {"a": "中"}}'
WHOLE = st.sampled_from(
    [
        *("Hello!", "", "I can't help with that.", "<think>\nhm\n</think>\n\nYes.", "a\x00\u2028<|end|>😀"),
        *(one('{"a": "中"}'), one("{}") + one("[1"), one("null", "智能体_0"), one('{"a": 1e999}', "search.docs_0")),
        *(one('{"a": "\\ud800"}'), one("{}", "x" * 128), "Look.\n" + one("{}") * 150),
        *(LLAMA_CALL, f"{LLAMA_CALL}; {LLAMA_CALL}", LLAMA_CALL * 150, LLAMA_CALL[:-3], '{"name": "f"}'),
    ]
)
ANSWERS = st.tuples(THOUGHTS, TEXTS | CALLS).map("".join) | WHOLE


class Speaker:
    """A server that says what it was told to, and keeps the prompts it was asked with."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.say("")

    def say(self, text: str) -> None:
        self._script = says(text)

    def script(self, request: Request, position: int) -> int:
        if not position:
            self.prompts.append(str(BYTES.decode(list(request.prompt))))
        return self._script(request, position)


Ask = Callable[..., httpx2.Response]


TOKENIZERS = {
    "told in words": BYTES,
    "its own template": byte_tokenizer(KNOWING + "{# <think> #}"),
    "Llama's template": llama_tokenizer(),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def speaking(request: pytest.FixtureRequest) -> Iterator[tuple[Ask, Speaker]]:
    """How to ask, by path and fields, and who answers."""
    tokenizer = TOKENIZERS[request.param]
    speaker = Speaker()
    engine = scripted(speaker.script, context_window=10**6)
    with (
        live(engine, tokenizer=tokenizer, default_max_tokens=9000, max_output_tokens=9000) as service,
        service.http() as client,
    ):

        def ask(path: str, **fields: Any) -> httpx2.Response:
            answer = client.post(f"/v1/{path}", content=orjson.dumps(fields))
            assert answer.status_code == 200, answer.text
            return answer

        yield ask, speaker


# As clients keep an answer


def as_it_came(answer: Json) -> Json:
    message: Json = answer["choices"][0]["message"]
    return message


def dumped(answer: Json, exclude_none: bool = False) -> Json:
    return ChatCompletion.model_validate(answer).choices[0].message.model_dump(mode="json", exclude_none=exclude_none)


def with_empty_lists(answer: Json) -> Json:
    return {"tool_calls": [], "annotations": [], "audio": None, "function_call": None} | as_it_came(answer)


def with_reasoning_renamed(answer: Json) -> Json:
    message = dict(as_it_came(answer))
    return message | {"reasoning": message.pop("reasoning_content", None)}


def with_parts(answer: Json) -> Json:
    message = as_it_came(answer)
    parts = [{"type": "text", "text": message["content"]}] if message["content"] else None
    return message | {"content": parts}


KEPT: list[Callable[[Json], Json]] = [
    as_it_came,
    dumped,
    partial(dumped, exclude_none=True),
    with_empty_lists,
    with_reasoning_renamed,
    with_parts,
]


def folded(chunks: list[Any]) -> Json:
    """A message as clients put it together from a stream."""
    message: Json = {}
    for delta in (choice["delta"] for chunk in chunks for choice in chunk["choices"]):
        for key in ("role", "content", "reasoning_content"):
            if key in delta:
                message[key] = message.get(key, "") + delta[key]
        if made := delta.get("function_call"):
            whole = message.setdefault("function_call", {"name": "", "arguments": ""})
            message["function_call"] = {key: whole[key] + made.get(key, "") for key in whole}
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in call:
                calls.append(call)
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return message


def results_of(message: Mapping[str, Any]) -> list[Json]:
    called = [{"role": "tool", "tool_call_id": call["id"], "content": "7"} for call in message.get("tool_calls") or ()]
    if message.get("function_call"):
        called.append({"role": "function", "name": message["function_call"]["name"], "content": "7"})
    return called


LIMITS = settings(max_examples=15, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("fields", [{"tools": TOOLS}, LEGACY, {}], ids=["tools", "functions", "neither"])
def test_any_answer_is_answered_when_it_comes_back(speaking: tuple[Ask, Speaker], fields: Json) -> None:
    ask, speaker = speaking

    @LIMITS
    @given(ANSWERS)
    def law(text: str) -> None:
        speaker.say(text)
        answer = ask(CHAT, messages=QUESTION, **fields).json()
        chunks = frames(ask(CHAT, messages=QUESTION, stream=True, **fields))[:-1]
        speaker.say("")
        speaker.prompts.clear()
        for message in [*(keep(answer) for keep in KEPT), folded(chunks)]:
            ask(CHAT, messages=[*QUESTION, message, *results_of(message), *QUESTION], **fields)
        assert len(set(speaker.prompts)) == 1

    law()


def test_any_response_is_answered_when_it_comes_back(speaking: tuple[Ask, Speaker]) -> None:
    ask, speaker = speaking
    tools = [{"type": "function", "name": "f"}]

    @LIMITS
    @given(ANSWERS)
    def law(text: str) -> None:
        speaker.say(text)
        answer = ask("responses", input="Hi", tools=tools).json()
        calls = [item["call_id"] for item in answer["output"] if item["type"] == "function_call"]
        results = [{"type": "function_call_output", "call_id": call, "output": "7"} for call in calls]
        question = {"role": "user", "content": "Hi"}
        speaker.say("")
        ask("responses", input=[question, *answer["output"], *results, question], tools=tools)

    law()


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_generated_after_an_answer_s_end_is_not_in_it(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is ahead of the reader, which takes a token at a time."""
    monkeypatch.setattr(batching.stream, "MOST_TOKENS", 1)
    call = one("{}")
    with live(scripted("So" + call * 20 + "END" * 20), default_max_tokens=2000) as service:
        for fields, calls in (({"parallel_tool_calls": False}, 1), ({"stop": ["ENDE"]}, 20)):
            reply = service.chat(stream=stream, tools=TOOLS, **fields)
            message = folded(frames(reply)[:-1]) if stream else as_it_came(reply.json())
            assert (message["content"], len(message["tool_calls"])) == ("So", calls)


@pytest.mark.parametrize(
    "refusal",
    [
        {"content": None, "refusal": "No."},
        {"content": "", "refusal": "No.", "tool_calls": None},
        {"content": [{"type": "refusal", "refusal": "No."}]},
        {"content": "No."},
    ],
)
def test_a_refusal_of_another_service_is_what_it_said(speaking: tuple[Ask, Speaker], refusal: Json) -> None:
    ask, speaker = speaking
    speaker.prompts.clear()
    ask(CHAT, messages=[*QUESTION, {"role": "assistant"} | refusal, *QUESTION])
    assert re.search(r"assistant>?\s*No\.(<|user)", speaker.prompts[0])


def test_a_call_of_another_service_s_free_text_tool_is_one_of_a_function(speaking: tuple[Ask, Speaker]) -> None:
    """As in /v1/responses."""
    ask, speaker = speaking
    speaker.prompts.clear()
    custom = {"type": "custom", "custom": {"name": "shell", "input": "ls"}}
    function = {"type": "function", "function": {"name": "shell", "arguments": '{"input": "ls"}'}}
    for call in (custom, function):
        turn = {"role": "assistant", "content": None, "tool_calls": [{"id": "c"} | call]}
        ask(CHAT, messages=[*QUESTION, turn, *results_of(turn), *QUESTION])
    assert speaker.prompts[0] == speaker.prompts[1]


def test_any_answer_can_be_shown_to_qwen3(thinking_tokenizer: str) -> None:
    model = Text.load(thinking_tokenizer)

    @LIMITS
    @given(ANSWERS, st.booleans())
    def law(text: str, thinks: bool) -> None:
        ids = count()
        reader = MessageReader(ReasoningSplitter(), QwenParser(lambda: f"call_{next(ids)}"))
        message = fold(reader.push(text) + reader.flush())
        body = {"messages": [*QUESTION, message, *results_of(message)], "tools": TOOLS}
        assert encode(model, ChatRequest.model_validate_json(orjson.dumps(body)), thinks).tokens

    law()
