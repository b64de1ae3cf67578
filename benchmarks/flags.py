"""What the commands' flags may be: each function takes a flag's text, and raises ValueError for what makes no sense."""

from typing import Any

import orjson

from benchmarks.connection import server_url


def url(text: str) -> str:
    """The text itself, if it is a server's URL."""
    server_url(text)
    return text


def natural(text: str) -> int:
    """A whole number from 0 on."""
    if (number := int(text)) < 0:
        raise ValueError(text)
    return number


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def more_than_zero(text: str) -> float:
    """A finite number above 0."""
    if not 0 < (number := float(text)) < float("inf"):
        raise ValueError(text)
    return number


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    if (number := more_than_zero(text)) > 1:
        raise ValueError(text)
    return number


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= (number := float(text)) <= 1:
        raise ValueError(text)
    return number


def milliseconds(text: str) -> float:
    """ "250" as 0.25 seconds."""
    return more_than_zero(text) / 1000


def counts(text: str) -> tuple[int, ...]:
    """ "1,8,32" as whole numbers from 1 on."""
    return tuple(positive(part) for part in text.split(","))


def named_counts(text: str) -> tuple[str, tuple[int, ...]]:
    """ "serial=1,8" as a name and whole numbers from 1 on."""
    name, _, numbers = text.partition("=")
    return name, counts(numbers)


def rates(text: str) -> tuple[float, ...]:
    """ "0.5,2" as numbers above 0."""
    return tuple(more_than_zero(part) for part in text.split(","))


def token_range(text: str) -> tuple[int, int]:
    """ "32:64" as its two ends."""
    low, high = map(positive, text.split(":"))
    if low > high:
        raise ValueError(text)
    return low, high


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(found := orjson.loads(text), dict):
        raise ValueError(text)
    return found
