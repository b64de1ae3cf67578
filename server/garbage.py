"""When Python looks for unreachable cycles. A full search stops the event loop and the worker at once."""

import gc

YOUNG = 10_000
"""New objects until the next search among them. A step of many rows makes thousands at once, which soon go again:
with CPython's 700 the searches took a quarter of the time that 2,000 streams need, and an eighth of the start's."""


def search_seldom() -> None:
    """For good, from before the model is loaded: what makes most objects then, imports, leaves next to no garbage."""
    gc.set_threshold(YOUNG)


def spare_imports() -> None:
    """Leave the modules out of the full searches that loading the model goes on to make."""
    gc.freeze()


def spare_what_is_loaded() -> None:
    """Nothing that exists by now is looked at again: modules, the model, the tokenizer."""
    gc.collect()
    gc.freeze()
