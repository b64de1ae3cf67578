"""What a chat request demands of its answer's form, as a grammar."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.grammar_source import Part
from server.reasoning import ThoughtState
from server.schema import ChatRequest, ResponseFormat
from server.served_model import ServedModel
from server.tool_names import ToolNames

if TYPE_CHECKING:
    from batching.types import Grammar


async def grammar_of(
    model: ServedModel, chat: ChatRequest, names: ToolNames, thought: ThoughtState, client: str
) -> Grammar | None:
    """The grammar of the answer, thought included; None if it is free. `client`: whose turn it takes to compile it.

    A call that is demanded is what the answer is. Where calls are only offered, the answer is calls or of the format.
    Raises `ApiError`: 400 for a schema that cannot be held to, 503 if too many are being compiled.
    """
    form = None if chat.demanded else form_of(chat.response_format)
    if chat.demanded or (form and chat.offered):
        return await model.grammars.tool_calls(
            [(names.shown(tool.function.name), tool.function.parameters) for tool in chat.demanded or chat.offered],
            model.text.format.tools,
            named=names.shown(chat.named) if chat.named else None,
            parallel=not chat.one_call,
            otherwise=form,
            thought=thought,
            client=client,
        )
    return await model.grammars.json(form, thought=thought, client=client) if form else None


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
