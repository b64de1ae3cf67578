"""Responses that clients may refer to: in memory, each for its API key alone, bounded in bytes and in age.

Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

OVERHEAD = 1024
"""Bytes that a stored response takes besides its texts."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and the items of its conversation up to its own, both as JSON. Its own begin at `begin`."""

    response: bytes
    items: bytes
    begin: int = 0

    @property
    def output(self) -> bytes:
        """Its own items, as JSON."""
        return b"[" + self.items[self.begin :]

    @property
    def size(self) -> int:
        return len(self.response) + len(self.items) + OVERHEAD


class ResponseStore:
    """Keeps up to `most` bytes of responses for `seconds` each. If there are too many, whoever has the most loses the
    oldest, so that no key can drive out the others'."""

    def __init__(self, most: int, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self._seconds = seconds
        self._now = now
        self._kept: dict[str, OrderedDict[str, tuple[float, StoredResponse]]] = {}
        self._sizes: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(self._sizes.values())

    def add(self, client: str, name: str, stored: StoredResponse) -> None:
        """Keep a response, unless it is larger than all that may be kept."""
        self._expire()
        if stored.size > self.most:
            return
        self.delete(client, name)
        self._kept.setdefault(client, OrderedDict())[name] = self._now() + self._seconds, stored
        self._sizes[client] = self._sizes.get(client, 0) + stored.size
        while self.size > self.most:
            self._remove(*self._oldest_of_most(client, name))
        self._watch()

    def _oldest_of_most(self, *newest: str) -> tuple[str, str]:
        """The client with the most and its oldest response, or the next client's if that is the newest of all."""
        clients = sorted(self._sizes, key=self._sizes.__getitem__, reverse=True)
        oldest = ((client, next(iter(self._kept[client]))) for client in clients)
        return next(each for each in oldest if each != newest)

    def get(self, client: str, name: str) -> StoredResponse | None:
        """The client's response of this name; None if it has none."""
        self._expire()
        kept = self._kept.get(client)
        return kept[name][1] if kept and name in kept else None

    def delete(self, client: str, name: str) -> bool:
        """Whether there was one."""
        self._expire()
        found = name in self._kept.get(client, ())
        if found:
            self._remove(client, name)
        return found

    def _remove(self, client: str, name: str) -> None:
        _, stored = self._kept[client].pop(name)
        self._sizes[client] -= stored.size
        if not self._kept[client]:
            del self._kept[client], self._sizes[client]

    def _expire(self) -> None:
        """Remove what has become too old; each client's are in the order of their age."""
        now = self._now()
        for client, kept in list(self._kept.items()):
            while kept and kept[name := next(iter(kept))][0] <= now:
                self._remove(client, name)

    def _watch(self) -> None:
        """Have the oldest removed when its time comes, whether or not anyone asks by then."""
        if self._timer is None and self._kept:
            oldest = min(next(iter(kept.values()))[0] for kept in self._kept.values())
            delay = max(0.0, oldest - self._now())
            self._timer = asyncio.get_running_loop().call_later(delay, self._time_is_up)

    def _time_is_up(self) -> None:
        self._timer = None
        self._expire()
        self._watch()
