"""Clients of every kind, good and bad, for a soak: each does one thing and says what came of it.

A good client's word is "good" if it got the answer that the same request always gets, "refused" if the service said
that it is full or that the engine failed, which the soak provokes, and "WRONG ..." otherwise.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import SplitResult

import orjson

from benchmarks.connection import exchange, post, request

CHAT = "/v1/chat/completions"
TOPICS = ("the sea", "a lamp", "the keeper", "a storm", "the tower", "a ship", "the night", "a bell")
FORM = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "look", "parameters": FORM}}
PROVOKED = (429, 500, 503)
Client = Callable[["Crowd"], Awaitable[str]]


class Crowd:
    """What clients share: the service's address, dice, and the first answer to each request that has but one."""

    def __init__(self, url: SplitResult, seed: int) -> None:
        self.url = url
        self.dice = random.Random(seed)
        self._known: dict[bytes, Any] = {}

    def chat(self, **fields: Any) -> dict[str, Any]:
        words = f"Tell me of {self.dice.choice(TOPICS)}. " * self.dice.choice((1, 1, 1, 12))
        messages = [{"role": "user", "content": words}]
        return {"messages": messages, "temperature": 0, "max_tokens": 16, "ignore_eos": True} | fields

    def bytes_of(self, fields: dict[str, Any]) -> bytes:
        """A chat's request, to be sent in part or never to be read."""
        return request(self.url, "POST", CHAT, orjson.dumps(fields))

    async def ask(self, path: str, fields: dict[str, Any], read: Callable[[bytes], Any]) -> str:
        """Send a request that always has the same answer, and compare."""
        reply = await post(self.url, path, fields)
        if reply.status in PROVOKED or (reply.status == 200 and b'"error"' in reply.body):
            return "refused"
        if reply.status != 200:
            return f"WRONG status {reply.status}"
        key = orjson.dumps([path, fields])
        found = read(reply.body)
        return "good" if self._known.setdefault(key, found) == found else "WRONG answer"

    async def told_off(self, body: bytes, status: int, *headers: str) -> str:
        """Send what must be refused with this status."""
        reply = await exchange(self.url, request(self.url, "POST", CHAT, body, *headers))
        return f"{status}" if reply.status == status else f"WRONG status {reply.status} instead of {status}"


def choices(body: bytes) -> Any:
    return [{key: value for key, value in one.items() if key != "id"} for one in orjson.loads(body)["choices"]]


def calls(body: bytes) -> Any:
    return [call["function"] for call in orjson.loads(body)["choices"][0]["message"]["tool_calls"]]


def streamed(body: bytes) -> Any:
    """The text of a streamed answer, which must come to its end."""
    *events, done, rest = body.split(b"\n\n")
    chunks = [orjson.loads(event.removeprefix(b"data: ")) for event in events]
    text = "".join(one["delta"].get("content", "") for chunk in chunks for one in chunk["choices"])
    return text, done == b"data: [DONE]", rest


async def plain(crowd: Crowd) -> str:
    return await crowd.ask(CHAT, crowd.chat(), choices)


async def stream(crowd: Crowd) -> str:
    return await crowd.ask(CHAT, crowd.chat(stream=True), streamed)


async def sampled(crowd: Crowd) -> str:
    fields = {"temperature": 0.9, "top_p": 0.8, "seed": crowd.dice.randrange(4), "n": 2, "presence_penalty": 0.5}
    return await crowd.ask(CHAT, crowd.chat(**fields), choices)


async def stopped(crowd: Crowd) -> str:
    return await crowd.ask(CHAT, crowd.chat(stop=["a", "e"]), choices)


async def formed(crowd: Crowd) -> str:
    form = {"type": "json_schema", "json_schema": {"name": "form", "schema": FORM, "strict": True}}
    return await crowd.ask(CHAT, crowd.chat(response_format=form, ignore_eos=False, max_tokens=64), choices)


async def called(crowd: Crowd) -> str:
    fields = {"tools": [TOOL], "tool_choice": "required", "ignore_eos": False, "max_tokens": 96}
    return await crowd.ask(CHAT, crowd.chat(parallel_tool_calls=False, **fields), calls)


async def completed(crowd: Crowd) -> str:
    fields = {"prompt": [crowd.dice.choice(TOPICS), "Once"], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return await crowd.ask("/v1/completions", fields, choices)


async def tokenized(crowd: Crowd) -> str:
    return await crowd.ask("/v1/tokenize", {"prompt": crowd.dice.choice(TOPICS)}, orjson.loads)


async def leave(url: SplitResult, sent: bytes, after: float, *, read: int = 0) -> None:
    """Send a request or a part of one, read `read` bytes of an answer if any come, and leave after `after` seconds.

    Over a bare socket, because the benchmarks' client reads whatever comes.
    """
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        writer.write(sent)
        async with asyncio.timeout(after):
            while read > 0 and (found := await reader.read(read)):
                read -= len(found)
            await asyncio.sleep(after)
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.transport.abort()


async def leaves(crowd: Crowd) -> str:
    asked = crowd.bytes_of(crowd.chat(stream=crowd.dice.random() < 0.5, max_tokens=200))
    await leave(crowd.url, asked, crowd.dice.random(), read=crowd.dice.choice((0, 1, 1000)))
    return "left"


async def hesitates(crowd: Crowd) -> str:
    asked = crowd.bytes_of(crowd.chat())
    await leave(crowd.url, asked[: crowd.dice.randrange(len(asked))], crowd.dice.choice((0.0, 2.0)))
    return "half a request"


async def does_not_read(crowd: Crowd) -> str:
    await leave(crowd.url, crowd.bytes_of(crowd.chat(stream=True, max_tokens=512)), 8.0)
    return "did not read"


async def talks_nonsense(crowd: Crowd) -> str:
    body = crowd.dice.choice((b"{", b"[" * 5000, b'{"messages": []}', orjson.dumps(crowd.chat(n=10**6))))
    return await crowd.told_off(body, 400)


async def shouts(crowd: Crowd) -> str:
    if crowd.dice.random() < 0.5:
        return await crowd.told_off(b"x" * 5_000_000, 413)
    return await crowd.told_off(b"{}", 431, "X-Padding: " + "x" * 100_000)


async def floods(crowd: Crowd) -> str:
    found = await asyncio.gather(*(plain(crowd) for _ in range(60)))
    return next((word for word in found if word.startswith("WRONG")), "flood")


CLIENTS: dict[Client, int] = {
    plain: 20,
    stream: 20,
    sampled: 10,
    stopped: 10,
    formed: 5,
    called: 5,
    completed: 5,
    tokenized: 5,
    leaves: 10,
    hesitates: 5,
    does_not_read: 2,
    talks_nonsense: 5,
    shouts: 2,
    floods: 1,
}
"""Who comes, and how often."""


async def act(crowd: Crowd) -> str:
    """One client, drawn by weight, and its word. One that gets no answer in a minute says so."""
    client: Client = crowd.dice.choices(list(CLIENTS), list(CLIENTS.values()))[0]
    try:
        async with asyncio.timeout(60):
            word = await client(crowd)
    except TimeoutError:
        word = "WRONG silence"
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        word = f"WRONG {type(error).__name__}: {error}"
    return f"{word} ({getattr(client, '__name__', '')})" if word.startswith("WRONG") else word
