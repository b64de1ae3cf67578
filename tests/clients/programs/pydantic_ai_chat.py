"""Pydantic AI's agents, over chat completions and over responses."""

import asyncio
import json
import sys

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, ASKED = sys.argv[1], json.loads(sys.argv[2])


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    degrees: int


async def streamed(agent, question, **given):
    async with agent.run_stream(question, **given) as answer:
        return await answer.get_output(), answer


async def plain(agent, question, **given):
    answer = await agent.run(question, **given)
    return answer.output, answer


async def talk(found, model, name):
    cities = []
    agent = Agent(model, retries=0)
    native = Agent(model, output_type=NativeOutput(Weather), retries=0)
    found[f"typed: {name}"] = (await native.run(ASKED["typed"])).output.model_dump()
    caller = Agent(model, retries=0)

    @caller.tool_plain
    def weather(city: str) -> str:
        """Tells the weather."""
        cities.append(city)
        return "Sunny."

    for way, ask in {"plain": plain, "streamed": streamed}.items():
        found[f"{way}: {name}"], answer = await ask(agent, ASKED["hello"])
        said, _ = await ask(agent, ASKED["bye"], message_history=answer.all_messages())
        found[f"next: {name}, {way}"] = said
        _, thought = await ask(agent, ASKED["think"])
        said, _ = await ask(agent, ASKED["bye"], message_history=thought.all_messages())
        found[f"next: {name}, {way}, after a thought"] = said
        found[f"told: {name}, {way}"], answer = await ask(caller, ASKED["rome"])
        found[f"called: {name}, {way}"] = {"city": cities.pop()}
        found[f"next: {name}, {way}, after a call"], _ = await ask(
            caller, ASKED["bye"], message_history=answer.all_messages()
        )


async def main():
    provider = OpenAIProvider(base_url=f"{URL}/v1", api_key="any")
    found = {}
    await talk(found, OpenAIChatModel("scripted", provider=provider), "chat")
    await talk(found, OpenAIResponsesModel("scripted", provider=provider), "responses")
    print(json.dumps(found))


asyncio.run(main())
