"""A model's conversation format, detected once when it is loaded. No other module inspects its chat template.

Most of it follows from the template: the thinking tags, how tool calls are written, whether it renders tools itself,
and which tokens delimit turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tokenizers import AddedToken

from batching.types import Forced
from server.output.hermes import CLOSE, OPEN, QwenFormat
from server.output.llama import LlamaFormat
from server.output.reasoning import THINK, ReasoningSplitter, ThinkTags, ThoughtState
from server.output.tool_calls import ShownArguments, ShownTool, ToolFormat, Turn

QWEN = QwenFormat()
FORMATS: tuple[ToolFormat, ...] = (QWEN, LlamaFormat())
PART_TAGS = frozenset(THINK).union(*(known.tags for known in FORMATS))
"""Tags around parts of a turn, which models have as tokens whether or not their template uses them."""

Encode = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True)
class Thinking:
    """A model's thinking tags and their tokens.

    `opening` and `closing` are None if the tag is not a single token; `end` is the text that ends a thought which is
    cut off.
    """

    tags: ThinkTags
    opening: int | None
    closing: int | None
    end: tuple[int, ...]

    @classmethod
    def of(cls, tags: ThinkTags, encode: Encode) -> Thinking:
        opening, closing = map(encode, tags)
        return cls(tags, _only(opening), _only(closing), encode(f"\n{tags.close}\n\n"))


@dataclass(frozen=True)
class ModelFormat:
    """`thinking` is None if the template has no thinking. `tools` is how calls are written: natively if the template
    `renders_tools`, otherwise as described in the prompt, in a system message if the template `renders_system`.
    `turn_tokens` are the added tokens that delimit turns.
    """

    tools: ToolFormat
    renders_tools: bool
    renders_system: bool
    thinking: Thinking | None
    turn_tokens: frozenset[str]

    def conversation(self, turns: Sequence[Turn], tools: Sequence[ShownTool]) -> tuple[list[Turn], dict[str, Any]]:
        """The template's turns and variables for a conversation with tools."""
        if not self.renders_tools:
            return without_tools(turns, tools, in_system=self.renders_system), {}
        return self.tools.turns(turns), {"tools": tools} if tools else {}

    def thought_after(self, prompt: str) -> ThoughtState:
        """The state at the end of a rendered prompt: templates may open a thought, or close it, too."""
        if self.thinking is None:
            return ThoughtState.UNKNOWN
        tags, end = self.thinking.tags, prompt.rstrip()
        if end.endswith(tags.open):
            return ThoughtState.OPENED
        return ThoughtState.CLOSED if end.endswith(tags.close) else ThoughtState.FREE

    def splitter(self, thought: ThoughtState) -> ReasoningSplitter | None:
        """A splitter for one answer's thought and content; None if the model has no thinking."""
        if self.thinking is None:
            return None
        return ReasoningSplitter(*self.thinking.tags, started=thought is ThoughtState.OPENED)

    def forced_end(self, thought: ThoughtState, after: int) -> Forced | None:
        """How to cut a thought off after this many tokens.

        None if no thought can come, or if a thinking tag that this needs is not a single token.
        """
        if not thought.to_come or self.thinking is None or self.thinking.closing is None:
            return None
        first = self.thinking.opening if thought is ThoughtState.FREE else None
        if first is None and thought is ThoughtState.FREE:
            return None
        return Forced(after=after, unless=self.thinking.closing, tokens=self.thinking.end, first=first)


def format_of(
    template: str, added: Collection[AddedToken], encode: Encode, *, renders_system: bool = True
) -> ModelFormat:
    """The format of a model, from its chat template, its tokenizer's added tokens, and its encode function."""
    own = next((known for known in FORMATS if known.fits(template)), None)
    return ModelFormat(
        tools=own or QWEN,
        renders_tools=own is not None,
        renders_system=renders_system,
        thinking=Thinking.of(THINK, encode) if THINK.open in template else None,
        turn_tokens=tokens_of_turns(added, template),
    )


def tokens_of_turns(added: Collection[AddedToken], template: str) -> frozenset[str]:
    """The special tokens and those written by the template, without the tags of parts of a turn.

    Some tokenizers do not flag their turn tokens as special, hence the template. Others have plain words and white
    space as added tokens, which a template's source contains by chance.
    """
    turns = {
        token.content for token in added if token.special or (token.content in template and _is_tag(token.content))
    }
    return frozenset(turns) - PART_TAGS


def _is_tag(text: str) -> bool:
    """Whether it has a letter between punctuation."""
    return any(map(str.isalpha, text)) and not text[0].isalnum() and not text[0].isspace()


def _only(tokens: tuple[int, ...]) -> int | None:
    return tokens[0] if len(tokens) == 1 else None


HOW = f"""You can call functions. These are the functions, one JSON object a line:
{{tools}}
To call one, answer with nothing but a JSON object between tags, and wait for its result:
{OPEN}
{{{{"name": "the function's name", "arguments": {{{{"the parameter's name": "its value"}}}}}}}}
{CLOSE}"""


def without_tools(messages: Sequence[Turn], tools: Sequence[ShownTool], *, in_system: bool = True) -> list[Turn]:
    """The conversation with tools, calls and results as plain text. The tools are added to the system message, or if
    they must not be `in_system`, to the first message of the user."""
    turns = list(_in_words(messages))
    if not tools:
        return turns
    how = HOW.format(tools="\n".join(_json(tool["function"]) for tool in tools))
    first = turns[0]
    if first["role"] == "system":
        return [{**first, "content": f"{first['content']}\n\n{how}"}, *turns[1:]]
    if first["role"] == "user" and not in_system:
        return [{**first, "content": f"{how}\n\n{first['content']}"}, *turns[1:]]
    return [{"role": "system", "content": how}, *turns]


def _in_words(messages: Sequence[Turn]) -> Iterator[Turn]:
    """Results that follow each other are one turn, because some templates want the roles to alternate."""
    for are_results, group in groupby(messages, lambda message: message["role"] == "tool"):
        if are_results:
            results = [f"<tool_response>\n{message['content']}\n</tool_response>" for message in group]
            yield {"role": "user", "content": "\n".join(results)}
        else:
            yield from map(_with_calls, group)


def _with_calls(message: Turn) -> Turn:
    plain = message.copy()
    calls = [f"{OPEN}\n{_call(call['function'])}\n{CLOSE}" for call in plain.pop("tool_calls", [])]
    plain["content"] = "\n".join(filter(None, [message["content"], *calls]))
    return plain


def _call(function: ShownArguments) -> str:
    return _json({"name": function["name"], "arguments": function["arguments"]})


def _json(value: object) -> str:
    """Unlike orjson, this can write the integers of any size that clients may send."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
