"""How far loading is, for whoever waits. Told on the thread that loads; a `Loading` may be read on any."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Loading:
    """A step in words and, where they can be counted, how many of its parts are done."""

    step: str
    done: int = 0
    total: int = 0


def follow_bars(tell: Callable[[Loading], None]) -> None:
    """Count along with transformers' progress bars, shown or not: the loading of weights is the longest."""
    from transformers.utils import logging as transformers_logging

    def made(bar: Callable[..., T], args: tuple[object, ...], options: dict[str, object]) -> T:
        if args and isinstance(args[0], Collection):
            total = len(args[0])
            args = (counted(args[0], tell, str(options.get("desc", "Loading")), total), *args[1:])
            options = {"total": total} | options
        return bar(*args, **options)

    transformers_logging.set_tqdm_hook(made)


def counted(items: Iterable[T], tell: Callable[[Loading], None], step: str, total: int) -> Iterator[T]:
    """The items; with each it is told how many were taken before."""
    for done, item in enumerate(items):
        tell(Loading(step, done, total))
        yield item
