"""Spreads work over iterations of the event loop, so that many clients cannot block one. Event loop only."""

import asyncio
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
