"""What several tests here need: requests, rows, and a test loop that fails loudly rather than hang."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import torch

from batching.stream import Row, Stream
from batching.types import Request, Sampling

PATIENCE = 60.0
"""Seconds after which an event that should come at once is given up on."""


def sampling(**settings: Any) -> Sampling:
    """Greedy, eight tokens, unless told otherwise."""
    return Sampling(**{"max_tokens": 8, "seed": 0, "temperature": 0.0, **settings})


def request(
    prompt: tuple[int, ...] | int = (1, 2, 3),
    *,
    id: str = "r",
    time_limit: float = 600.0,
    client: str = "",
    weight: float = 1.0,
    priority: int = 0,
    **settings: Any,
) -> Request:
    """A request for `prompt`, or for one of so many tokens."""
    ids = tuple(range(prompt)) if isinstance(prompt, int) else prompt
    return Request(
        id=id,
        prompt=ids,
        sampling=sampling(**settings),
        time_limit=time_limit,
        client=client,
        weight=weight,
        priority=priority,
    )


def loose_row(request: Request) -> Row:
    """A row that has no stream, for parts that never look at it."""
    return Row(request, stream=None, arrived=0.0)  # type: ignore[arg-type]


async def all_tokens(stream: Stream) -> list[int]:
    """Every token of a stream; raises its error, if it ends with one."""
    async with stream:
        return [token async for delta in stream for token in delta.tokens]


class SkippingLoop(asyncio.SelectorEventLoop):
    """A loop whose clock can be moved on, so that a time limit passes exactly when a test wants it to."""

    skipped = 0.0

    def time(self) -> float:
        return super().time() + self.skipped


def skip(seconds: float) -> None:
    """Move the running loop's clock on. Less than `PATIENCE` in one test."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SkippingLoop)
    loop.skipped += seconds


Runner = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


@pytest.fixture
def run_async() -> Runner:
    """Runs a coroutine function on a loop of its own; a task or callback that fails unheard fails the test."""

    def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        unheard: list[dict[str, Any]] = []

        async def bounded() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda loop, context: unheard.append(context))
            async with asyncio.timeout(PATIENCE):
                await main()

        with asyncio.Runner(loop_factory=SkippingLoop) as runner:
            runner.run(bounded())
        assert not unheard

    return run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads, on a busy machine a hundred times longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
