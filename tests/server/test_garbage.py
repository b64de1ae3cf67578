"""The law of the garbage collector's settings: what is loaded is spared, what comes later is not."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from server.garbage import YOUNG, search_seldom, spare_imports, spare_what_is_loaded


class Cycle:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


def test_what_is_loaded_is_spared_and_later_cycles_are_found() -> None:
    spare_what_is_loaded()
    assert gc.get_freeze_count() > 1000
    gone = weakref.ref(Cycle())
    gc.collect()
    assert gone() is None


def test_imports_are_spared_and_what_loading_leaves_is_found() -> None:
    search_seldom()
    assert gc.get_threshold()[0] == YOUNG
    spare_imports()
    assert gc.get_freeze_count() > 1000
    gone = weakref.ref(Cycle())
    spare_what_is_loaded()
    assert gone() is None
