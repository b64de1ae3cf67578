"""API keys: their names and shares of the device, and how often each may call. Only digests are kept."""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Caller:
    """`name` is the API key's, or empty without authentication; `share` is the key's weight in the queue.

    `trace` has the W3C headers `traceparent` and `tracestate`, as far as they were sent.
    """

    request_id: str
    name: str = ""
    share: float = 1.0
    trace: tuple[tuple[str, str], ...] = ()


class KeyFileError(ValueError):
    """The key file cannot be read. The message is one sentence and contains no key."""


@dataclass(frozen=True, slots=True)
class Key:
    """`share` is the key's weight in the queue, relative to other keys."""

    name: str
    digest: bytes
    share: float = 1.0


def load_keys(secrets: Iterable[str], file: Path | None) -> tuple[Key, ...]:
    """All keys, none for no authentication: those of the settings, named key-1, key-2, ..., and of a file with lines
    `name key [share]` (# for comments).

    Raises `KeyFileError`, also for a file without keys, because the service would then be open to everyone.
    """
    listed = [Key(f"key-{n}", sha256(secret.encode()).digest()) for n, secret in enumerate(secrets, 1)]
    return *listed, *(_from_file(file) if file else [])


def _from_file(file: Path) -> list[Key]:
    try:
        lines = file.read_text("utf-8-sig").splitlines()  # Windows may begin a file with a byte order mark
    except (OSError, UnicodeDecodeError):
        raise KeyFileError(f"cannot read the API key file {file}") from None
    numbered = [(number, line.split()) for number, line in enumerate(lines, 1)]
    keys = [_from_line(words, file, number) for number, words in numbered if words and not words[0].startswith("#")]
    if not keys:
        raise KeyFileError(f"the API key file {file} has no keys")
    return keys


def _from_line(words: list[str], file: Path, number: int) -> Key:
    try:
        name, secret, share = [*words, "1"][:3]
        if len(words) > 3 or not 0 < float(share) <= 1000:
            raise ValueError
    except ValueError:
        raise KeyFileError(
            f"line {number} of {file} is not a name, a key and optionally a share between 0 and 1000"
        ) from None
    return Key(name, sha256(secret.encode()).digest(), float(share))


class Pace:
    """Lets `burst` calls of a client through at once, and `rate` a second after that (a leaky bucket). A call waits for
    `longest` seconds at most. Event loop only."""

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
