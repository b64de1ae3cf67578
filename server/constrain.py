"""What a chat request demands of its answer's form, as a grammar."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.formats import format_of
from server.reasoning import ThoughtState
from server.schema import ChatRequest
from server.service import Service
from server.tool_names import ToolNames

if TYPE_CHECKING:
    from batching.types import Grammar


async def grammar_of(service: Service, chat: ChatRequest, names: ToolNames, thought: ThoughtState) -> Grammar | None:
    """The grammar of the answer, thought included; None if it is free.

    Raises `ApiError`: 400 for a schema that cannot be held to, 503 if too many are being compiled.
    """
    if chat.demanded:
        return await service.grammars.tool_calls(
            [(names.shown(tool.function.name), tool.function.parameters) for tool in chat.demanded],
            format_of(service.text.template).around,
            named=names.shown(chat.named) if chat.named else None,
            parallel=not chat.one_call,
            thought=thought,
        )
    wanted = chat.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return await service.grammars.json_object(thought=thought)
    strict = bool(wanted.json_schema.strict)
    return await service.grammars.json_schema(wanted.json_schema.schema_, strict=strict, thought=thought)
