"""LlamaIndex's OpenAILike."""

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

URL, ASKED = sys.argv[1], json.loads(sys.argv[2])
HELLO, BYE, THINK, ROME = (ChatMessage(role="user", content=ASKED[name]) for name in ("hello", "bye", "think", "rome"))


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    degrees: int


def weather(city: str) -> str:
    """Tells the weather."""
    return "Sunny."


def last(stream):
    *_, whole = stream
    return whole


model = OpenAILike(
    model="scripted",
    api_base=f"{URL}/v1",
    api_key="any",
    is_chat_model=True,
    is_function_calling_model=True,
    context_window=4096,
    max_retries=0,
)
tool = FunctionTool.from_defaults(weather)
found = {}
chats = {"plain": model.chat, "streamed": lambda messages: last(model.stream_chat(messages))}
calls = {
    "plain": model.chat_with_tools,
    "streamed": lambda *given, **named: last(model.stream_chat_with_tools(*given, **named)),
}
for way, ask in chats.items():
    answer = ask([HELLO])
    found[way] = answer.message.content
    found[f"next: {way}"] = model.chat([HELLO, answer.message, BYE]).message.content
    thought = ask([THINK]).message
    found[f"next: {way}, after a thought"] = model.chat([THINK, thought, BYE]).message.content
    called = calls[way]([tool], chat_history=[ROME])
    [call] = model.get_tool_calls_from_response(called)
    found[f"called: {way}"] = call.tool_kwargs
    result = ChatMessage(role="tool", content="Sunny.", additional_kwargs={"tool_call_id": call.tool_id})
    found[f"told: {way}"] = model.chat_with_tools([tool], chat_history=[ROME, called.message, result]).message.content
typed = model.as_structured_llm(Weather)
found["typed"] = typed.chat([ChatMessage(role="user", content=ASKED["typed call"])]).raw.model_dump()
found["plain: completions"] = model.complete(ASKED["hello"]).text
print(json.dumps(found))
