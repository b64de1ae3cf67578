"""OpenAI's own client for Python: chat completions and responses, with every way to put an answer into a history."""

import json
import sys

import openai
from pydantic import BaseModel

URL, ASKED = sys.argv[1], json.loads(sys.argv[2])
HELLO, BYE, THINK, ROME, TYPED = (
    {"role": "user", "content": ASKED[name]} for name in ("hello", "bye", "think", "rome", "typed")
)
FUNCTION = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
DUMPS = {
    "nulls": lambda answer: answer.model_dump(),
    "without nulls": lambda answer: answer.model_dump(exclude_none=True),
    "as it came": lambda answer: answer.to_dict(),
    "itself": lambda answer: answer,
}


class Weather(BaseModel):
    city: str
    degrees: int


class Chats:
    def __init__(self, client):
        self._client = client.chat.completions
        self._tools = {"tools": [{"type": "function", "function": FUNCTION}]}

    def ask(self, messages, **fields):
        return self._client.create(model="scripted", messages=messages, **fields).choices[0].message

    def stream(self, messages, **fields):
        with self._client.stream(model="scripted", messages=messages, **fields) as stream:
            return stream.get_final_completion().choices[0].message

    def run(self, found):
        found["plain"] = self.ask([HELLO]).content
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = self._client.create(model="scripted", messages=[HELLO], **options)
        found["streamed"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        parsed = self._client.parse(model="scripted", messages=[TYPED], response_format=Weather)
        found["typed"] = parsed.choices[0].message.parsed.model_dump()
        for way, ask in {"plain": self.ask, "streamed": self.stream}.items():
            for name, dump in DUMPS.items():
                self.history(found, ask, dump, f"{way}, {name}")

    def history(self, found, ask, dump, name):
        found[f"next: {name}"] = self.ask([HELLO, dump(ask([HELLO])), BYE]).content
        thought = ask([THINK])
        found[f"thought: {name}"] = thought.reasoning_content
        found[f"next: {name}, after a thought"] = self.ask([THINK, dump(thought), BYE]).content
        called = ask([ROME], **self._tools)
        [call] = called.tool_calls
        found[f"called: {name}"] = json.loads(call.function.arguments)
        result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
        found[f"told: {name}"] = self.ask([ROME, dump(called), result], **self._tools).content


class Responses:
    def __init__(self, client):
        self._client = client.responses
        self._tools = {"tools": [{"type": "function"} | FUNCTION]}

    def ask(self, items, **fields):
        return self._client.create(model="scripted", input=items, **fields)

    def stream(self, items, **fields):
        with self._client.stream(model="scripted", input=items, **fields) as stream:
            return stream.get_final_response()

    def run(self, found):
        found["plain: responses"] = self.ask(ASKED["hello"]).output_text
        found["streamed: responses"] = self.stream([HELLO]).output_text
        found["typed: responses"] = self._client.parse(
            model="scripted", input=[TYPED], text_format=Weather
        ).output_parsed.model_dump()
        for way, ask in {"plain": self.ask, "streamed": self.stream}.items():
            for name, dump in DUMPS.items():
                self.history(found, ask, dump, f"responses, {way}, {name}")

    def history(self, found, ask, dump, name):
        found[f"next: {name}"] = self.ask([HELLO, *map(dump, ask([HELLO]).output), BYE]).output_text
        options = {"include": ["reasoning.encrypted_content"], "store": False}
        thought = ask([THINK], **options)
        found[f"thought: {name}"] = thought.output[0].content[0].text
        found[f"next: {name}, after a thought"] = self.ask(
            [THINK, *map(dump, thought.output), BYE], **options
        ).output_text
        called = ask([ROME], **self._tools)
        [call] = called.output
        found[f"called: {name}"] = json.loads(call.arguments)
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
        found[f"told: {name}"] = self.ask([ROME, *map(dump, called.output), result], **self._tools).output_text


client = openai.OpenAI(base_url=f"{URL}/v1", api_key="any", max_retries=0)
found = {}
Chats(client).run(found)
Responses(client).run(found)
print(json.dumps(found))
