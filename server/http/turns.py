"""Spreads work over turns of the event loop and over time, so that many clients cannot block it. Event loop only."""

import asyncio
import time
from collections import deque
from collections.abc import Callable


class Turns:
    """Calls at most `most` functions per iteration of the loop, in order of arrival."""

    def __init__(self, most: int) -> None:
        self._most = self._left = most
        self._later: deque[Callable[[], None]] = deque()
        self._begun = False

    def call(self, loop: asyncio.AbstractEventLoop, work: Callable[[], None]) -> None:
        """Call it now if this iteration has room, else in a later one. It must not raise."""
        self._later.append(work)
        self._work(loop)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._later and self._left:
            self._left -= 1
            self._later.popleft()()
        if not self._begun:
            self._begun = True
            loop.call_soon(self._next, loop)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        self._begun, self._left = False, self._most
        if self._later:
            self._work(loop)


class Pace:
    """Lets `burst` calls of a client through at once, and `rate` a second after that (a leaky bucket). A call waits for
    `longest` seconds at most."""

    def __init__(self, burst: int, rate: float, longest: float) -> None:
        self._interval = 1 / rate
        self._ahead = burst / rate
        self._longest = longest
        self._empty: dict[str, float] = {}  # when each client's bucket will be

    async def wait(self, client: str) -> None:
        await asyncio.sleep(self.delay(client, time.monotonic()))

    def delay(self, client: str, now: float) -> float:
        """Seconds that a call at this time waits."""
        empty = max(now, self._empty.get(client, now)) + self._interval
        self._empty[client] = min(empty, now + self._ahead + self._longest)
        return max(0.0, self._empty[client] - now - self._ahead)
