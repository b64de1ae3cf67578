"""Strangers who want everybody else to wait: each attack acts until it is cancelled, and counts its answers."""

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

import orjson

from benchmarks.connection import exchange, post, request
from benchmarks.mischief import CHAT, Crowd, act

MIB = 2**20
LARGE = 4 * MIB - 1024
PATIENCE = 0.05
"""Seconds that an attacker rests after it was turned away, so that it measures the server and not its own speed."""

Said = Counter[str]
Attack = Callable[[SplitResult, Said], Awaitable[None]]

QUESTION = [{"role": "user", "content": "Tell me of the lamp."}]
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
LIVE = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"


HERE = urlsplit("http://localhost")


# What they send


def wire(path: str, body: bytes, *headers: str) -> bytes:
    """A request with a body."""
    return request(HERE, "POST", path, body, *headers)


def body(**fields: Any) -> bytes:
    """The body of a chat."""
    return orjson.dumps({"messages": QUESTION} | fields)


def with_field(name: str, value: str) -> bytes:
    """The body of a chat with one more field, of any JSON."""
    return body()[:-1] + f', "{name}": {value}}}'.encode()


def many(item: str) -> str:
    """4 MiB of items."""
    return "[" + ",".join([item] * (LARGE // (len(item) + 1))) + "]"


def keys(value: str, size: int = LARGE) -> str:
    """Members, of most of this many bytes."""
    return "{" + ",".join(f'"{n}":{value}' for n in range(size // 13)) + "}"


def of_schema(schema: Any, *, strict: bool = True) -> bytes:
    """The body of a chat whose answer is to be of a schema."""
    return body(response_format={"type": "json_schema", "json_schema": {"schema": schema, "strict": strict}})


def chat(**fields: Any) -> bytes:
    return wire(CHAT, body(**fields))


def endless_schemas() -> Iterable[bytes]:
    """Each another one, so that none is remembered, and none of which is ever compiled."""
    for number in itertools.count():
        patterns = [{"type": "string", "pattern": f"^.*x{number}y{n}.*$"} for n in range(39)]
        yield wire(CHAT, of_schema({"allOf": patterns}))


# How they send it


def repeated(requests: Iterable[bytes], clients: int) -> Attack:
    """Clients in a closed loop: each sends its next request as soon as the previous one is answered."""

    async def attack(url: SplitResult, said: Said) -> None:
        turns = itertools.cycle(requests) if isinstance(requests, Sequence) else iter(requests)

        async def client() -> None:
            while True:
                try:
                    said[str((await exchange(url, next(turns))).status)] += 1
                except OSError:
                    said["closed"] += 1

        await asyncio.gather(*(client() for _ in range(clients)))

    return attack


def endless(first: bytes, more: bytes, *, reads: bool = True) -> Attack:
    """A connection on which `more` follows without end. It is opened again whenever it is closed."""

    async def attack(url: SplitResult, said: Said) -> None:
        while True:
            reader, writer = await asyncio.open_connection(url.hostname, url.port)
            reading = asyncio.create_task(_swallow(reader)) if reads else None
            try:
                writer.write(first)
                while True:
                    writer.write(more)
                    await writer.drain()
            except ConnectionError:
                said["closed"] += 1
                await asyncio.sleep(PATIENCE)
            finally:
                if reading:
                    reading.cancel()
                writer.transport.abort()

    return attack


async def _swallow(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(2**16):
            pass


def held(sent: bytes, count: int, *, reads: bool = True) -> Attack:
    """So many connections at once, each of which sends that much and nothing more. One that is answered is replaced, if
    it reads at all."""

    async def attack(url: SplitResult, said: Said) -> None:
        async def client() -> None:
            while True:
                said[await _hold(url, sent, reads)] += 1
                await asyncio.sleep(PATIENCE)

        await asyncio.gather(*(client() for _ in range(count)))

    return attack


async def _hold(url: SplitResult, sent: bytes, reads: bool) -> str:
    """What came back: a status, or that the connection was closed."""
    try:
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
    except OSError:
        return "closed"
    try:
        writer.write(sent)
        if not reads:
            await asyncio.Event().wait()
        return (await reader.read(12))[9:].decode() or "closed"
    except ConnectionError:
        return "closed"
    finally:
        writer.transport.abort()


async def crowd(url: SplitResult, said: Said) -> None:
    """The clients of the soak, good and bad, eight at a time."""
    shared = Crowd(url, seed=0)

    async def client() -> None:
        while True:
            said[await act(shared)] += 1

    await asyncio.gather(*(client() for _ in range(8)))


async def half_a_character(url: SplitResult) -> int:
    """A token that is the beginning of a character."""
    for token in range(2**16):
        told = orjson.loads((await post(url, "/v1/detokenize", {"tokens": [token]})).body)
        if told["prompt"] == "\ufffd":
            return token
    raise LookupError("every token of this model is whole characters")


def halves(token: int, **fields: Any) -> bytes:
    """16 answers of nothing but beginnings of characters."""
    return chat(n=16, max_tokens=960, ignore_eos=True, logit_bias={str(token): 100}, temperature=0, **fields)


def attacks(half: int) -> dict[str, Attack]:
    """All of them, by what they are. `half` is the token of `half_a_character`."""
    long_chat = chat(messages=[{"role": "user", "content": "word " * (LARGE // 5 - 64)}])
    strings = orjson.dumps({"prompt": "a b " * (LARGE // 4 - 64), "return_token_strs": True})
    smuggled = wire(CHAT, LIVE, "Connection: Upgrade", "Upgrade: h2c", "Content-Type: application/json")
    form = wire(CHAT, body(), "Content-Type: text/plain", "Origin: http://evil.example")
    unfinished = HEAD + b"Content-Length: 4000000\r\n\r\n" + b" " * 3_900_000
    lists = [
        wire(CHAT, with_field("modalities", many("1"))),
        wire(CHAT, with_field("tools", many("{}"))),
        wire("/v1/completions", with_field("prompt", many("-1"))),
        wire(CHAT, with_field("logit_bias", keys("1"))),
        wire(CHAT, with_field("unknown", keys("1"))),
    ]
    return {
        "trailers without end": endless(CHUNKED + b"0\r\n", b"aN:bb\r\n" * 4096),
        "the smallest chunks without end": endless(CHUNKED, b"1\r\n \r\n" * 4096),
        "schemas that compile endlessly, 4 clients": repeated(endless_schemas(), 4),
        "a pattern of 32,000 brackets, and of a million": repeated(
            [wire(CHAT, of_schema({"type": "string", "pattern": "[^" + "[" * size})) for size in (32_000, MIB)], 2
        ),
        "a million of everything in 4 MiB, 2 clients": repeated(lists, 2),
        "16 answers of halves of characters": repeated([halves(half)], 2),
        "the same with log probabilities": repeated([halves(half, logprobs=True, top_logprobs=15)], 2),
        "the same streamed": repeated([halves(half, stream=True)], 2),
        "tokenize 4 MiB into strings": repeated([wire("/v1/tokenize", strings)], 2),
        "chats of 4 MiB that are refused, 4 clients": repeated([long_chat], 4),
        "40 clients of priority -8": repeated([chat(priority=-8, max_tokens=16, ignore_eos=True)], 40),
        "the queue filled, 400 clients": repeated([chat(max_tokens=16, ignore_eos=True)], 400),
        "300 bodies of 3.9 MiB, unfinished": held(unfinished, 300),
        "3,000 connections with half a head": held(LIVE[:40], 3000),
        "an upgrade with a request for a body": repeated([smuggled], 8),
        "a page of another origin": repeated([form], 8),
        "requests without end on one connection": endless(LIVE, LIVE * 1000),
        "the same, and no answer is read": endless(LIVE, LIVE * 1000, reads=False),
        "a path of 60,000 bytes": repeated([LIVE.replace(b"/health", b"/" + b"x" * 60_000)], 8),
        "clients of the soak, 8 at a time": crowd,
    }
