"""Prompts of the user's own: a file with a JSON object a line, or ShareGPT's array of conversations."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import orjson

from benchmarks.workloads import Job, Law, Message

BYTES_PER_TOKEN = 4
"""A rule of thumb for English (four letters) and Chinese (a character and a third) with today's vocabularies."""

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation and its maximum answer length, None if the file gives none."""

    messages: tuple[Message, ...]
    max_tokens: int | None

    @property
    def tokens(self) -> int:
        """About how many tokens the prompt has."""
        return sum(tokens(message["content"]) for message in self.messages)


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A `Source` of the file's prompts in their order, from the start again when all were sent."""

    prompts: tuple[Prompt, ...]
    output_tokens: Law
    concurrency: tuple[int, ...] = (1, 8, 32)

    def draw(self, count: int, *, seed: int, first: int = 0) -> list[Job]:
        """Every serial has a prompt of its own until the file is at its end. Lengths that the file does not say are
        drawn from the law.
        """
        random = Random(seed)
        outputs = [self.output_tokens(random) for _ in range(count)]
        return [self._job(serial, output) for serial, output in enumerate(outputs, start=first)]

    def _job(self, serial: int, output: int) -> Job:
        prompt = self.prompts[serial % len(self.prompts)]
        return Job(serial, prompt.messages, prompt.tokens, prompt.max_tokens or output)


def read(path: Path, output_tokens: Law, *, keep_lengths: bool) -> PromptFile:
    """The file's prompts. With `keep_lengths`, answers are as long as it says; a law is for those it does not say.

    Raises ValueError, with the place, for what is neither format, and OSError.
    """
    data = path.read_bytes()
    found = list(_share_gpt(data, path) if data.lstrip().startswith(b"[") else _json_lines(data, path))
    if not found:
        raise ValueError(f"{path} has no prompts")
    if not keep_lengths:
        found = [replace(prompt, max_tokens=None) for prompt in found]
    return PromptFile(tuple(found), output_tokens)


def tokens(text: str) -> int:
    """About how many tokens the text has, at least 1."""
    return max(1, round(len(text.encode()) / BYTES_PER_TOKEN))


def _json_lines(data: bytes, path: Path) -> Iterator[Prompt]:
    """Objects with `messages` or `prompt`, and maybe `max_tokens`."""
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            try:
                yield _prompt(orjson.loads(line))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: not an object with messages or prompt: {error}") from error


def _prompt(told: dict[str, Any]) -> Prompt:
    messages = told["messages"] if "messages" in told else [{"role": "user", "content": told["prompt"]}]
    checked = tuple({"role": _text(message["role"]), "content": _text(message["content"])} for message in messages)
    limit = told.get("max_tokens")
    if not checked or not (limit is None or (type(limit) is int and limit > 0)):
        raise ValueError("no message, or max_tokens that is no positive number")
    return Prompt(checked, limit)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _share_gpt(data: bytes, path: Path) -> Iterator[Prompt]:
    """The first answer of each conversation that has one, with all that was said before it as the prompt."""
    try:
        for conversation in orjson.loads(data):
            turns = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in conversation["conversations"]]
            roles = [turn["role"] for turn in turns]
            if "user" in roles and "assistant" in roles[roles.index("user") :]:
                answered = roles.index("assistant", roles.index("user"))
                yield Prompt(tuple(turns[:answered]), tokens(turns[answered]["content"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an array of conversations in ShareGPT's form: {error!r}") from error
