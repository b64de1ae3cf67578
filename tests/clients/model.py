"""A scripted model that answers as the question itself says, so that what a client should get is certain.

`[[one || two]]` in a turn of the user is the script of what follows it: "one" is answered first, "two" once something
came back for that, which in the template of `tests.live` is the user's turn, too. `call NAME ARGUMENTS` is a call of a
tool, `*` being the first tool there is, and `{result}` is what the last tool told.
"""

import re
from collections.abc import Callable
from typing import Any

from batching.types import Request
from tests.fakes import ScriptedEngine
from tests.live import BYTES, END, scripted, tokens_of

QUESTIONS = {
    "hello": "Greet me. [[Hello!]]",
    "bye": "I must go. [[Goodbye!]]",
    "think": "Think first. [[<think>Hm.</think>Well!]]",
    "rome": 'Rome? [[call weather {"city": "Rome"} || It said: {result}]]',
    "shell": 'Look out. [[call exec_command {"cmd": "echo Sunny."} || It said: {result}]]',
    "bash": 'Look out. [[call Bash {"command": "echo Sunny.", "description": "Look."} || It said: {result}]]',
    "typed": 'Rome, typed? [[{"city": "Rome", "degrees": 21}]]',
    "typed call": 'Rome, as a call? [[call * {"city": "Rome", "degrees": 21}]]',
    "wrong typed": 'Rome, typed? [[{"city": "Rome", "degrees": "?"} || {"city": "Rome", "degrees": 21}]]',
    "wrong typed call": ('Rome? [[call * {"city": "Rome", "degrees": "?"} || call * {"city": "Rome", "degrees": 21}]]'),
}
"""What every client asks."""

ANSWERS: dict[str, Any] = {
    "plain": "Hello!",
    "streamed": "Hello!",
    "next": "Goodbye!",
    "thought": "Hm.",
    "called": {"city": "Rome"},
    "told": "It said: Sunny.",
    "typed": {"city": "Rome", "degrees": 21},
}
"""What every client must find: in a first answer, in the one to a history with it, in a call and after its result."""

SCRIPT = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
CALL = re.compile(r"call (\S+) (.*)", re.DOTALL)
OFFERED = re.compile(r'^\{"name":"(\w+)"', re.MULTILINE)
RESULT = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)


def answer_to(prompt: str) -> str:
    """The answer to a conversation."""
    *_, last = SCRIPT.finditer(prompt)
    steps = last[1].split("||")
    since = prompt[last.end() :]
    step = steps[min(since.count("<user>"), len(steps) - 1)].strip()
    results: list[str] = RESULT.findall(since)
    if called := CALL.fullmatch(step):
        name = OFFERED.findall(prompt)[0] if called[1] == "*" else called[1]
        return f'<tool_call>\n{{"name": "{name}", "arguments": {called[2]}}}\n</tool_call>'
    return step.replace("{result}", results[-1] if results else "")


def scripted_model(
    seen: list[str] | None = None, before_step: Callable[[int], None] = lambda step: None
) -> ScriptedEngine:
    """An engine that answers so. The prompts go to `seen`."""
    answers: dict[str, list[int]] = {}

    def script(request: Request, position: int) -> int:
        if not position:
            prompt = str(BYTES.decode(list(request.prompt)))
            answers[request.id] = [*tokens_of(answer_to(prompt)), END]
            if seen is not None:
                seen.append(prompt)
        return answers[request.id][position]

    return scripted(script, context_window=2**17, before_step=before_step)
