"""When Python looks for unreachable cycles. A full search stops the event loop and the worker at once."""

import gc

YOUNG = 10_000
"""New objects between garbage collections. A step of many rows creates thousands of short-lived ones: with CPython's
700, collections took a quarter of the time with 2,000 streams, and an eighth of the startup time."""


def search_seldom() -> None:
    """Raise the threshold for good, before the model is loaded: imports create many objects but hardly any garbage."""
    gc.set_threshold(YOUNG)


def spare_imports() -> None:
    """Exclude the imported modules from the full collections during model loading."""
    gc.freeze()


def spare_what_is_loaded() -> None:
    """Exclude everything that exists by now from collections: modules, the model, the tokenizer."""
    gc.collect()
    gc.freeze()
