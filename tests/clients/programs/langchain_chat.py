"""LangChain's ChatOpenAI, over chat completions and over responses."""

import json
import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

URL, ASKED = sys.argv[1], json.loads(sys.argv[2])
HELLO, BYE, THINK, ROME, TYPED = (HumanMessage(ASKED[name]) for name in ("hello", "bye", "think", "rome", "typed"))


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    degrees: int


def weather(city: str) -> str:
    """Tells the weather."""
    return "Sunny."


def streamed(model, messages):
    chunks = list(model.stream(messages))
    folded = chunks[0]
    for chunk in chunks[1:]:
        folded += chunk
    return folded


def text(message):
    return message.text if isinstance(message.text, str) else message.text()


def talk(found, model, name):
    caller = model.bind_tools([weather])
    found[f"typed: {name}"] = model.with_structured_output(Weather).invoke([TYPED]).model_dump()
    for way, ask in {"plain": lambda model, messages: model.invoke(messages), "streamed": streamed}.items():
        answer = ask(model, [HELLO])
        found[f"{way}: {name}"] = text(answer)
        found[f"next: {name}, {way}"] = text(model.invoke([HELLO, answer, BYE]))
        thought = ask(model, [THINK])
        found[f"next: {name}, {way}, after a thought"] = text(model.invoke([THINK, thought, BYE]))
        called = ask(caller, [ROME])
        [call] = called.tool_calls
        found[f"called: {name}, {way}"] = call["args"]
        result = ToolMessage("Sunny.", tool_call_id=call["id"])
        found[f"told: {name}, {way}"] = text(caller.invoke([ROME, called, result]))


found = {}
settings = {"model": "scripted", "base_url": f"{URL}/v1", "api_key": "any", "max_retries": 0}
talk(found, ChatOpenAI(**settings), "chat")
talk(found, ChatOpenAI(**settings, use_responses_api=True), "responses")
print(json.dumps(found))
