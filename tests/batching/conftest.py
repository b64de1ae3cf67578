"""What several tests here need: requests, rows, and a test loop that fails loudly rather than hang."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from batching.row import Row
from batching.stream import Stream
from batching.types import Request, Sampling

PATIENCE = 30.0
"""Seconds after which an event that should come at once is given up on."""


def sampling(**settings: Any) -> Sampling:
    """Greedy, eight tokens, unless told otherwise."""
    return Sampling(**{"max_tokens": 8, "seed": 0, "temperature": 0.0, **settings})


def request(
    prompt: tuple[int, ...] | int = (1, 2, 3), *, id: str = "r", time_limit: float = 600.0, **settings: Any
) -> Request:
    """A request for `prompt`, or for one of so many tokens."""
    ids = tuple(range(prompt)) if isinstance(prompt, int) else prompt
    return Request(id=id, prompt=ids, sampling=sampling(**settings), time_limit=time_limit)


def loose_row(request: Request) -> Row:
    """A row that has no stream, for parts that never look at it."""
    return Row(request, stream=None, arrived=0.0)  # type: ignore[arg-type]


async def drain_all(stream: Stream) -> list[int]:
    """Every token of a stream, whose row's error is raised after them."""
    async with stream:
        return [token async for delta in stream for token in delta.tokens]


Runner = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def run_async() -> Runner:
    """Runs a coroutine on a loop of its own; a task or callback that fails unheard fails the test."""

    def run(main: Coroutine[Any, Any, None]) -> None:
        unheard: list[dict[str, Any]] = []

        async def bounded() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: unheard.append(context))
            async with asyncio.timeout(PATIENCE):
                await main

        asyncio.run(bounded())
        assert not unheard

    return run
