"""Laws of what Claude Code's search for tools returns: the model reads which tools it found."""

import orjson
import pytest

from server.http.errors import ApiError
from server.openai.anthropic_request import MessageRequest, as_chat
from server.openai.parsing import parse


def told(*parts: dict[str, str]) -> str:
    """What the model reads as the result of a tool."""
    result = {"type": "tool_result", "tool_use_id": "a", "content": parts}
    body = {"max_tokens": 1, "messages": [{"role": "user", "content": [result]}]}
    return as_chat(parse(MessageRequest, orjson.dumps(body))).messages[-1].content


def test_a_reference_to_a_tool_is_read_by_its_name_beside_text() -> None:
    text, reference = {"type": "text", "text": "Found:"}, {"type": "tool_reference", "tool_name": "WebFetch"}
    assert told(text, reference) == "Found:\nThe tool WebFetch can be called."


@pytest.mark.parametrize("part", [{"type": "tool_reference"}, {"type": "image"}])
def test_a_result_that_cannot_be_read_is_refused_by_its_place(part: dict[str, str]) -> None:
    with pytest.raises(ApiError) as refused:
        told(part)
    assert refused.value.status == 400
    assert refused.value.message.startswith("messages.0.content.0.tool_result.content.0")
