"""Tools for models whose chat template knows none: told in words, in the form that `server/qwen.py` reads.

The conversation is rewritten so that only system, user and assistant turns with text are left.
"""

import json
from collections.abc import Sequence

from server.qwen import CLOSE, OPEN
from server.tool_format import ShownArguments, ShownTool, Turn

HOW = f"""You can call functions. These are the functions, one JSON object a line:
{{tools}}
To call one, answer with nothing but a JSON object between tags, and wait for its result:
{OPEN}
{{{{"name": "the function's name", "arguments": {{{{"the parameter's name": "its value"}}}}}}}}
{CLOSE}"""


def without_tools(messages: Sequence[Turn], tools: Sequence[ShownTool]) -> list[Turn]:
    """The conversation with tools, calls and results in words. The tools are added to the system message."""
    turns = [_in_words(message) for message in messages]
    if not tools:
        return turns
    how = HOW.format(tools="\n".join(_json(tool["function"]) for tool in tools))
    if turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{how}"}, *turns[1:]]
    return [{"role": "system", "content": how}, *turns]


def _in_words(message: Turn) -> Turn:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    plain = message.copy()
    calls = [f"{OPEN}\n{_call(call['function'])}\n{CLOSE}" for call in plain.pop("tool_calls", [])]
    plain["content"] = "\n".join(filter(None, [message["content"], *calls]))
    return plain


def _call(function: ShownArguments) -> str:
    return _json({"name": function["name"], "arguments": function["arguments"]})


def _json(value: object) -> str:
    """Unlike orjson this has a form for integers of any size, which clients may send."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
