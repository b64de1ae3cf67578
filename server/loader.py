"""Loads the model that the settings name. torch and transformers are imported here and below, when it is needed."""

import logging
import os
import sys
from functools import cached_property

from batching.engine import Engine
from server.settings import Settings
from server.text import Text

logger = logging.getLogger(__name__)


LIBRARY_SETTINGS = {
    # The cache of a padded batch grows at every step, and the holes it leaves add up to an out-of-memory error.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # On a CPU, threads that wait for each other by spinning starve the event loop, and one that is descheduled stops
    # all: with one other busy process on two cores a step took ten times as long.
    "GOMP_SPINCOUNT": "10000",
    # The tokenizer is used from several threads of this process, which forks nothing.
    "TOKENIZERS_PARALLELISM": "false",
}
"""What the libraries below read from the environment when they are first imported; one set by hand wins."""


class ModelLoader:
    """`Loader` for a model's folder, GGUF file or hub id. All its methods may raise `ModelError`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        for name, value in LIBRARY_SETTINGS.items():
            os.environ.setdefault(name, value)

    @cached_property
    def _checkpoint(self) -> str:
        from batching.checkpoint import locate

        settings = self._settings
        return locate(settings.model, settings.load_format, settings.cache_dir)

    def text(self) -> Text:
        _show_progress(sys.stderr.isatty())
        return Text.load(self._checkpoint, trust_remote_code=self._settings.trust_remote_code)

    def engine(self) -> Engine:
        from batching.generate import GenerateEngine
        from batching.model import load

        settings = self._settings
        model = load(
            self._checkpoint,
            device=settings.device,
            dtype=settings.dtype,
            load_format=settings.load_format,
            trust_remote_code=settings.trust_remote_code,
        )
        return GenerateEngine(model, context_window=settings.context_window, token_budget=settings.token_budget)


def _show_progress(shown: bool) -> None:
    """transformers' own bars, on a terminal only."""
    from transformers.utils import logging as transformers_logging

    if not shown:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
