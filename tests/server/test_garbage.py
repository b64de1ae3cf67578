"""The law of the garbage collector's settings: what is loaded is spared, what comes later is not."""

import gc
import weakref

from server.garbage import YOUNG, spare_what_is_loaded


class Cycle:
    def __init__(self) -> None:
        self.me = self


def test_what_is_loaded_is_spared_and_later_cycles_are_found() -> None:
    before = gc.get_threshold()
    try:
        spare_what_is_loaded()
        assert gc.get_freeze_count() > 1000
        assert gc.get_threshold()[0] == YOUNG
        gone = weakref.ref(Cycle())
        gc.collect()
        assert gone() is None
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
