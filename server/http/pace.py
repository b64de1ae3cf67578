"""How often a client may call. Event loop only."""

import asyncio
import time


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
