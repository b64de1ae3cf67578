"""Loads the configured model. torch and transformers are imported only when they are needed."""

import gc
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

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Loading:
    """A step of loading and, where it can be counted, its progress."""

    step: str
    done: int = 0
    total: int = 0


def follow_bars(tell: Callable[[Loading], None]) -> None:
    """Report the progress of transformers' progress bars, shown or not; loading the weights takes longest."""
    from transformers.utils import logging as transformers_logging

    def made(bar: Callable[..., T], args: tuple[object, ...], options: dict[str, object]) -> T:
        if args and isinstance(args[0], Collection):
            total = len(args[0])
            args = (counted(args[0], tell, str(options.get("desc", "Loading")), total), *args[1:])
            options = {"total": total} | options
        return bar(*args, **options)

    transformers_logging.set_tqdm_hook(made)


def counted(items: Iterable[T], tell: Callable[[Loading], None], step: str, total: int) -> Iterator[T]:
    """Yield the items, reporting before each one how many came before it."""
    for done, item in enumerate(items):
        tell(Loading(step, done, total))
        yield item


LIBRARY_SETTINGS = {
    # The cache of a padded batch grows at every step, and the fragmentation would add up to an out-of-memory error.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # On a CPU, threads that spin while they wait starve the event loop, and a descheduled thread stalls all others:
    # with one other busy process on two cores a step took ten times as long.
    "GOMP_SPINCOUNT": "10000",
    # A long text is tokenized by several threads. This process never forks, and the one that compiles grammars, which
    # does, tokenizes nothing.
    "TOKENIZERS_PARALLELISM": "true",
    # Fused multiply-add: a product and a sum are one operation on a GPU, rounded once. Triton 3.9 warns that the
    # default will change.
    "TRITON_DEFAULT_FP_FUSION": "1",
}
"""Environment variables that the libraries read on import; values that are already set take precedence."""

UNUSED = ("deepspeed", "librosa", "scipy", "sklearn", "soundfile", "soxr", "torchaudio", "torchvision")
"""Packages that transformers imports, if installed, for features this service never uses: training losses, assisted
generation, audio and images. They take a tenth of the startup time."""


class ModelLoader:
    """`Loader` for a model's folder, GGUF file or hub id. All its methods may raise `ModelError`.

    `when_imported` is called once, after the libraries are imported and before anything is loaded with them.
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
        self._refused: ModelError | None = None
        for name, value in LIBRARY_SETTINGS.items():
            os.environ.setdefault(name, value)
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # the bar of a GGUF file, which transformers' switch leaves on
        if not settings.trust_remote_code:  # a model's own code may need any package
            hide(UNUSED)

    def _import(self) -> None:
        """Import the libraries on one thread: two threads that import transformers at once may see it half imported.

        The model's files are checked first, because the imports take seconds.
        """
        with self._locating:
            if self._imported:
                return
            self._found = find(self._settings.model, self._settings.load_format)
            with explained("the libraries that run the model cannot be imported"):
                import batching.model  # noqa: F401, I001  # torch first, because transformers hides why it failed
                from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

            _log_as_we_do()
            _show_progress(sys.stderr.isatty())
            self._when_imported()
            self._imported = True

    @property
    def _checkpoint(self) -> str:
        self._import()
        from batching.model import usable_device

        usable_device(self._settings.device, self._settings.quantization)  # else told after minutes of conversion
        with self._locating:  # two threads call this, but a GGUF file is converted, or refused, only once
            if self._refused is not None:
                raise ModelError(*self._refused.args)
            try:
                self._found = prepare(self._found, self._settings.cache_dir)
            except ModelError as error:
                self._refused = error
                raise
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
        follow_bars(self._tell)
        model = self._load()
        packs = self._packs(model)
        engine = self._try_packed(model) if packs else None
        if packs and engine is None:
            del model  # the packed engine took it apart
            gc.collect()  # there may be no room for two
            model = self._load()
        engine = engine or self._try_padded(model)
        self._progress.follow(model)
        return engine

    def _load(self) -> "PreTrainedModel":
        from batching.model import load

        settings, checkpoint = self._settings, self._checkpoint
        self.loading = Loading("Loading the model")
        model = load(
            checkpoint,
            device=settings.device,
            dtype=settings.dtype,
            load_format=settings.load_format,
            quantization=settings.quantization,
            trust_remote_code=settings.trust_remote_code,
        )
        self.loading = Loading("Preparing the engine")
        return model

    def _try_packed(self, model: "PreTrainedModel") -> Engine | None:
        """The packed engine if it gives the model's own answers. Raises `ModelError` if it is required but does not."""
        from batching.rehearsal import disagreement, own_answers

        own = own_answers(model)
        try:
            engine = self._packed(model)
            reason = disagreement(engine, model, own)
        except (ModelError, *UNWINDING):
            raise
        except BaseException as error:
            logger.debug("the packed engine failed", exc_info=True)
            reason = f"it fails with {type(error).__name__}"
        if reason is None:
            return engine
        self._refuse_packed(reason)
        return None

    def _try_padded(self, model: "PreTrainedModel") -> Engine:
        """Raises `ModelError` unless padding leaves the model's answers as they are."""
        from batching.rehearsal import disagreement, own_answers

        own = own_answers(model)
        engine = self._padded(model)
        if reason := disagreement(engine, model, own):
            raise ModelError(f"this model cannot be served: in a padded batch {reason}")
        return engine

    def _refuse_packed(self, reason: str) -> None:
        """Raises `ModelError` if the packed engine was asked for, or what only it gives."""
        if self._settings.engine == "packed":
            raise ModelError(f"the packed engine cannot run this model: {reason}; use --engine generate")
        if self._settings.batch_invariant:
            raise ModelError(f"--batch-invariant needs the packed engine, which cannot run this model: {reason}")
        logger.info("using padded batches of stock generate: for the packed engine %s", reason)

    def _packs(self, model: "PreTrainedModel") -> bool:
        """Whether the packed engine is to be tried. Raises `ModelError` if it was asked for and cannot."""
        from batching.packed.engine import unsupported

        if self._settings.engine == "generate":
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
            max_gap=settings.max_gap_ms and settings.max_gap_ms / 1000,
            prefix_caching=settings.prefix_sharing != "off",
            batch_invariant=settings.batch_invariant,
            max_draft_tokens=settings.max_draft_tokens,
        )

    def _padded(self, model: "PreTrainedModel") -> Engine:
        from batching.padded import PaddedEngine

        settings = self._settings
        return PaddedEngine(model, context_window=settings.context_window, token_budget=settings.token_budget)

    def _tell(self, loading: Loading) -> None:
        self.loading = loading


def hide(packages: Iterable[str]) -> None:
    """Make the import system report these packages as not installed, except those already imported.

    A name that is None in `sys.modules` cannot be imported or found (Python's reference, 5.3.1).
    """
    for name in packages:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def _log_as_we_do() -> None:
    """Leave the libraries' log lines to the root logger: their own handlers would write them to stderr as they are,
    beside or in place of a line in the chosen format."""
    for library in ("transformers", "huggingface_hub"):
        logger = logging.getLogger(library)
        logger.handlers.clear()
        logger.propagate = True


def _show_progress(shown: bool) -> None:
    """Show transformers' progress bars only on a terminal."""
    from transformers.utils import logging as transformers_logging

    if not shown:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
