"""LiteLLM, under two of its names for such a service, and its bridges between chat completions and responses."""

import gc
import json
import sys

import litellm

URL, ASKED = sys.argv[1], json.loads(sys.argv[2])
HELLO, BYE, THINK, ROME = ({"role": "user", "content": ASKED[name]} for name in ("hello", "bye", "think", "rome"))
FUNCTION = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS = {"tools": [{"type": "function", "function": FUNCTION}]}
DUMPS = {
    "nulls": lambda message: message.model_dump(),
    "without nulls": lambda message: message.model_dump(exclude_none=True),
    "json": lambda message: message.json(),
    "itself": lambda message: message,
}
litellm.suppress_debug_info = True
# LiteLLM leaves streams of responses behind unread to their end, and httpx waits for ever where one is collected while
# the next request holds the lock of the connections.
gc.disable()
SETTINGS = {"api_base": f"{URL}/v1", "api_key": "any", "num_retries": 0}


def talk(found, model, dumps, ways=("plain", "streamed")):
    def ask(messages, **fields):
        return litellm.completion(model=model, messages=messages, **SETTINGS, **fields).choices[0].message

    def stream(messages, **fields):
        chunks = list(litellm.completion(model=model, messages=messages, stream=True, **SETTINGS, **fields))
        return litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message

    for way in ways:
        put = {"plain": ask, "streamed": stream}[way]
        found[f"{way}: {model}"] = put([HELLO]).content
        for dump in dumps:
            name = f"{model}, {way}, {dump}"
            back = DUMPS[dump]
            found[f"next: {name}"] = ask([HELLO, back(put([HELLO])), BYE]).content
            found[f"next: {name}, after a thought"] = ask([THINK, back(put([THINK])), BYE]).content
            called = put([ROME], **TOOLS)
            [call] = called.tool_calls
            found[f"called: {name}"] = json.loads(call.function.arguments)
            result = {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "Sunny."}
            found[f"told: {name}"] = ask([ROME, back(called), result], **TOOLS).content


def text(answer):
    return "".join(part.text for item in answer.output if item.type == "message" for part in item.content)


def bridged(found):
    """Responses that LiteLLM asks for as chat completions."""

    def ask(items, **fields):
        return litellm.responses(model="hosted_vllm/scripted", input=items, **SETTINGS, **fields)

    found["plain: bridge"] = text(ask(ASKED["hello"]))
    for name in ("nulls", "without nulls"):
        back = DUMPS[name]
        thought = ask([THINK])
        found[f"next: bridge, {name}"] = text(ask([THINK, *map(back, thought.output), BYE]))
        tools = {"tools": [{"type": "function"} | FUNCTION]}
        called = ask([ROME], **tools)
        [call] = [item for item in called.output if item.type == "function_call"]
        found[f"called: bridge, {name}"] = json.loads(call.arguments)
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
        found[f"told: bridge, {name}"] = text(ask([ROME, *map(back, called.output), result], **tools))


found = {}
talk(found, "openai/scripted", DUMPS)
talk(found, "hosted_vllm/scripted", ["nulls"])
# LiteLLM makes up the stream of a model that it does not know, and then tells a call's arguments twice.
talk(found, "openai/responses/scripted", ["nulls"], ways=["plain"])
bridged(found)
print(json.dumps(found))
