"""What a chat request demands of its answer's form, as a grammar."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.formats import find_format
from server.grammar_source import Part
from server.qwen import QwenFormat
from server.schema import ChatRequest, ResponseFormat
from server.service import Service
from server.tools import NamedChoice

if TYPE_CHECKING:
    from batching.types import Grammar


async def grammar_of(service: Service, chat: ChatRequest, *, thinking: bool, client: str = "") -> Grammar | None:
    """The grammar of the answer, after its thoughts if the model is `thinking`; None if it is free.

    A call that is demanded is what the answer is. Where calls are only offered, the answer is calls or of the format.
    Raises `ApiError`: 400 for a schema that cannot be held to, 503 if too many are being compiled.
    """
    form = None if chat.demanded else form_of(chat.response_format)
    if chat.demanded or (form and chat.offered):
        calls = find_format(service.text.template) or QwenFormat()
        named = chat.tool_choice.function.name if isinstance(chat.tool_choice, NamedChoice) else None
        return await service.grammars.tool_calls(
            [(tool.function.name, tool.function.parameters) for tool in chat.demanded or chat.offered],
            calls.around,
            named=named,
            parallel=chat.parallel_tool_calls is not False,
            otherwise=form,
            thinking=thinking,
            client=client,
        )
    return await service.grammars.json(form, thinking=thinking, client=client) if form else None


def form_of(wanted: ResponseFormat | None) -> Part | None:
    """The schema that a response format stands for; None for text."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is not None:
        return Part(wanted.json_schema.schema_, bool(wanted.json_schema.strict), "response_format")
    if wanted.schema_ is not None:
        return Part(wanted.schema_, strict=False, param="response_format")
    return ANY_OBJECT


ANY_OBJECT = Part({"type": "object"}, strict=True, param="response_format")
