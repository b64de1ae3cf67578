"""Loads the model that the settings name. torch and transformers are imported here and below, when it is needed."""

import logging
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from batching.checkpoint import find, prepare, readable
from batching.engine import Engine
from batching.errors import UNWINDING, ModelError, explained
from batching.progress import Progress
from server.model.defaults import Defaults, recommended
from server.model.text import Text
from server.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


logger = logging.getLogger(__name__)

LIBRARY_SETTINGS = {
    # The cache of a padded batch grows at every step, and the holes it leaves add up to an out-of-memory error.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # On a CPU, threads that wait for each other by spinning starve the event loop, and one that is descheduled stops
    # all: with one other busy process on two cores a step took ten times as long.
    "GOMP_SPINCOUNT": "10000",
    # The tokenizer is used from several threads of this process, which forks nothing.
    "TOKENIZERS_PARALLELISM": "false",
    # A product and the sum it goes into are one operation on a GPU, rounded once. Triton 3.9 warns that it will not be
    # the default for ever.
    "TRITON_DEFAULT_FP_FUSION": "1",
}
"""What the libraries below read from the environment when they are first imported; one set by hand wins."""

UNUSED = ("deepspeed", "librosa", "scipy", "sklearn", "soundfile", "soxr", "torchaudio", "torchvision")
"""Packages that transformers imports, if they are installed, for what this service never does: losses of training,
assisted generation, sounds and images. They take a tenth of the start."""


class ModelLoader:
    """`Loader` for a model's folder, GGUF file or hub id. All its methods may raise `ModelError`.

    `when_imported` is called one time, after the libraries are imported and before anything is loaded with them.
    """

    def __init__(
        self, settings: Settings, progress: Progress, when_imported: Callable[[], None] = lambda: None
    ) -> None:
        self._settings = settings
        self._locating = threading.Lock()
        self.loading = Loading("Reading the model's files")
        self._progress = progress
        self._when_imported = when_imported
        self._imported = False
        for name, value in LIBRARY_SETTINGS.items():
            os.environ.setdefault(name, value)
        if not settings.trust_remote_code:  # a model's own code may want any package
            hide(UNUSED)

    def _import(self) -> None:
        """What both threads use is imported by one: two that import transformers at once may find half of it.

        The model's files are looked at first, because the imports take seconds.
        """
        with self._locating:
            if self._imported:
                return
            self._found = find(self._settings.model, self._settings.load_format)
            with explained("the libraries that run the model cannot be imported"):
                import batching.model  # noqa: F401, I001  # torch comes first, whose reason transformers would keep to itself
                from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

            _show_progress(sys.stderr.isatty())
            self._when_imported()
            self._imported = True

    @property
    def _checkpoint(self) -> str:
        self._import()
        with self._locating:  # a GGUF file is converted once, and two threads ask
            self._found = prepare(self._found, self._settings.cache_dir)
            return self._found

    def defaults(self) -> Defaults:
        if self._settings.generation_config == "openai":
            return Defaults()
        self._import()
        with readable():
            return recommended(self._settings.model)

    def text(self) -> Text:
        return Text.load(self._checkpoint, trust_remote_code=self._settings.trust_remote_code)

    def engine(self) -> Engine:
        self._import()
        from batching.rehearsal import disagreement, own_answers

        follow_bars(self._tell)
        model = self._load()
        if self._packs(model):
            engine, reason = self._rehearsed(model)
            if engine is not None:
                self._progress.follow(model)
                return engine
            self._refuse_packed(reason)
            del model  # it was taken apart, and there may be no room for two
            model = self._load()
        own = own_answers(model)
        padded = self._padded(model)
        if difference := disagreement(padded, model, own):
            raise ModelError(f"this model cannot be served: in a padded batch {difference}")
        self._progress.follow(model)
        return padded

    def _load(self) -> "PreTrainedModel":
        from batching.model import load

        settings, checkpoint = self._settings, self._checkpoint
        self.loading = Loading("Loading the model")
        model = load(
            checkpoint,
            device=settings.device,
            dtype=settings.dtype,
            load_format=settings.load_format,
            trust_remote_code=settings.trust_remote_code,
        )
        self.loading = Loading("Preparing the engine")
        return model

    def _rehearsed(self, model: "PreTrainedModel") -> tuple[Engine | None, str]:
        """The packed engine if it gives the model's own answers, or else why not. Raises `ModelError`."""
        from batching.rehearsal import disagreement, own_answers

        own = own_answers(model)
        try:
            engine = self._packed(model)
            reason = disagreement(engine, model, own)
        except (ModelError, *UNWINDING):
            raise
        except BaseException as error:
            logger.debug("the packed engine failed", exc_info=True)
            return None, f"it fails with {type(error).__name__}"
        return (None, reason) if reason else (engine, "")

    def _refuse_packed(self, reason: str) -> None:
        """Raises `ModelError` if the packed engine was asked for."""
        if self._settings.engine == "packed":
            raise ModelError(f"the packed engine cannot run this model: {reason}; use --engine generate")
        logger.info("padded batches of stock generate, because for the packed engine %s", reason)

    def _packs(self, model: "PreTrainedModel") -> bool:
        """Whether the packed engine is to be tried. Raises `ModelError` if it was asked for and cannot."""
        from batching.packed.engine import unsupported

        wanted = self._settings.engine
        if wanted == "generate" or (wanted == "auto" and model.device.type != "cuda"):
            return False
        reason = unsupported(model)
        if reason is not None:
            self._refuse_packed(reason)
        return reason is None

    def _packed(self, model: "PreTrainedModel") -> Engine:
        from batching.packed.engine import PackedEngine

        settings = self._settings
        return PackedEngine(
            model,
            num_slots=settings.max_batch_size,
            context_window=settings.context_window,
            token_budget=settings.token_budget,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            prefill_chunk=settings.prefill_chunk,
            prefix_caching=settings.prefix_sharing != "off",
            batch_invariant=settings.batch_invariant,
        )

    def _padded(self, model: "PreTrainedModel") -> Engine:
        from batching.padded import PaddedEngine

        settings = self._settings
        return PaddedEngine(model, context_window=settings.context_window, token_budget=settings.token_budget)

    def _tell(self, loading: Loading) -> None:
        self.loading = loading


def hide(packages: Iterable[str]) -> None:
    """Have the import system answer that these are not installed, but for those imported already.

    A name that stands for None in `sys.modules` cannot be imported or found (Python's reference, 5.3.1).
    """
    for name in packages:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def _show_progress(shown: bool) -> None:
    """transformers' own bars, on a terminal only."""
    from transformers.utils import logging as transformers_logging

    if not shown:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
