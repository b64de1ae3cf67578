"""Requests as real clients sent them, kept as JSON without what is another each time.

    python -m tests.clients.recording codex langchain

runs these clients, or all, against the scripted model and writes what they send to `recorded/`.
"""

import contextlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from starlette.requests import Request

from server.http.request import read_body
from server.openai import endpoint
from tests.clients.client import CLIENTS
from tests.clients.model import scripted_model
from tests.live import live

FOLDER = Path(__file__).parent / "recorded"
LONGEST = 80  # characters of a text that is kept
MADE = re.compile(r"\b(call|chatcmpl|fc|fco|msg|resp|rs|run|toolu|functions)([_-]+)[\w-]{8,}\b")
UUID = re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")


@dataclass(frozen=True)
class Sent:
    path: str
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recording:
    """`source`: "recorded" from the client itself, or where else it is known from."""

    client: str
    version: str
    source: str
    requests: list[Sent]

    @classmethod
    def read(cls, file: Path) -> "Recording":
        fields = json.loads(file.read_text())
        return cls(**fields | {"requests": [Sent(**one) for one in fields["requests"]]})

    def write(self) -> None:
        file = FOLDER / f"{self.client}.json"
        told = asdict(self, dict_factory=lambda pairs: {name: value for name, value in pairs if value != {}})
        file.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def recording() -> Iterator[list[Sent]]:
    """What the servers of this process are sent meanwhile."""
    sent: list[Sent] = []

    async def read(http: Request, *limits: Any) -> bytes:
        body = await read_body(http, *limits)
        sent.append(Sent(http.url.path, json.loads(body)))
        return body

    with mock.patch.object(endpoint, "read_body", read):
        yield sent


def bare(value: Any, key: str = "") -> Any:
    """A body without long texts and without names that are made up anew each time."""
    match value:
        case dict():
            return {name: bare(item, name) for name, item in value.items()}
        case list():
            return [bare(item, key) for item in value]
        case str() if key == "description":
            return "What it is for."
        case str() if len(value) > LONGEST:
            return "A long text."
        case str():
            return UUID.sub("00000000-0000-4000-8000-000000000000", MADE.sub(r"\1\g<2>1", value))
    return value


def shape(value: Any, at: str = "") -> Iterator[str]:
    """Where which kinds of values are: the same for two bodies that differ in texts and numbers alone."""
    match value:
        case dict():
            for name, item in value.items():
                yield from shape(item, f"{at}.{name}")
        case list():
            for item in value:
                yield from shape(item, f"{at}[]")
        case str() if at.endswith((".role", ".type")):
            yield f"{at}={value}"
        case _:
            yield f"{at}:{type(value).__name__}"


def different(sent: Iterable[Sent]) -> list[Sent]:
    """The first of each shape."""
    found: dict[Any, Sent] = {}
    for one in sent:
        found.setdefault((one.path, frozenset(shape(one.body))), Sent(one.path, bare(one.body)))
    return list(found.values())


def record(name: str) -> None:
    client = CLIENTS[name]
    with live(scripted_model(), default_max_tokens=1024) as service, recording() as sent:
        client.run(service.url)
    Recording(name, client.needed(), "recorded", different(sent)).write()


if __name__ == "__main__":
    for name in sys.argv[1:] or CLIENTS:
        record(name)
