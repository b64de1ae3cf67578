"""Laws of what Claude Code's tools return beside text: which tools a search found, and images that nobody here sees."""

import orjson
import pytest

from server.fields import parse
from server.http.errors import ApiError
from server.openai.anthropic_request import MessageRequest, as_chat


def told(*parts: dict[str, str]) -> str:
    """What the model reads as the result of a tool."""
    result = {"type": "tool_result", "tool_use_id": "a", "content": parts}
    body = {"max_tokens": 1, "messages": [{"role": "user", "content": [result]}]}
    return as_chat(parse(MessageRequest, orjson.dumps(body))[0]).messages[-1].content


def test_a_reference_to_a_tool_is_read_by_its_name_beside_text() -> None:
    text, reference = {"type": "text", "text": "Found:"}, {"type": "tool_reference", "tool_name": "WebFetch"}
    assert told(text, reference) == "Found:\nThe tool WebFetch can be called."


def test_an_image_that_a_tool_returned_is_told_of_and_named_and_ends_no_session() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [image, {"type": "document"}, image]}
    body = orjson.dumps({"max_tokens": 1, "messages": [{"role": "user", "content": [result]}]})
    request, ignored = parse(MessageRequest, body)
    lines = as_chat(request).messages[-1].content.split("\n")
    assert [word in line for line, word in zip(lines, ("an image", "a document", "an image"), strict=True)] == [
        True
    ] * 3
    assert "iVBOR" not in "".join(lines)
    assert ignored == ("tool_result.image", "tool_result.document")
    with pytest.raises(ApiError, match=r"tool_result\.image"):
        parse(MessageRequest, body, refuse_unknown=True)


@pytest.mark.parametrize("part", [{"type": "tool_reference"}, {"type": "search_result"}])
def test_a_result_that_cannot_be_read_is_refused_by_its_place(part: dict[str, str]) -> None:
    with pytest.raises(ApiError) as refused:
        told(part)
    assert refused.value.status == 400
    assert refused.value.message.startswith("messages.0.content.0.tool_result.content.0")
