"""What a chat request demands of its answer's form, as a grammar."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.formats import find_format
from server.qwen import QwenFormat
from server.schema import ChatRequest
from server.service import Service
from server.tools import NamedChoice

if TYPE_CHECKING:
    from batching.types import Grammar


async def grammar_of(service: Service, chat: ChatRequest, *, thinking: bool) -> Grammar | None:
    """The grammar of the answer, after its thoughts if the model is `thinking`; None if it is free.

    Raises `ApiError`: 400 for a schema that cannot be held to, 503 if too many are being compiled.
    """
    if chat.demanded:
        form = find_format(service.text.template) or QwenFormat()
        named = chat.tool_choice.function.name if isinstance(chat.tool_choice, NamedChoice) else None
        tools = [(tool.function.name, tool.function.parameters) for tool in chat.demanded]
        parallel = chat.parallel_tool_calls is not False
        return await service.grammars.tool_calls(tools, form.around, named=named, parallel=parallel, thinking=thinking)
    wanted = chat.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return await service.grammars.json_object(thinking=thinking)
    strict = bool(wanted.json_schema.strict)
    return await service.grammars.json_schema(wanted.json_schema.schema_, strict=strict, thinking=thinking)
