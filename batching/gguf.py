"""Converts GGUF files, each once, into safetensors folders in a cache that several processes may share.

A cache folder is named after its file's content. It is moved into place atomically with a list of its files' sizes, so
that a folder that was damaged later is detected and rebuilt.
"""

import hashlib
import importlib.util
import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout
from packaging.version import Version

from batching.errors import ModelError, explained

logger = logging.getLogger(__name__)

READS_GGUF = "5.18"
"""The first transformers that reads GGUF tokenizers correctly: the one before gave SmolLM2 a wrong end-of-sequence
token, and tokens that are not bytes."""

REVISION = 2
"""Raised when the same file is to be converted into something else than before."""

ENDS = ("eos", "eot", "eom")
"""A GGUF file's names for what ends a text, a turn and a message. transformers reads only the first, which in Gemma's
files is not the one that its answers end with."""

SIZES = "sizes.txt"
SCRATCH = ".converting-"


def converted(file: Path, cache: Path) -> Path:
    """The folder of `cache` with the model of a GGUF file, converted if it is missing or incomplete.

    Weights are in float32, so that they are exactly the file's dequantised values, at 4 bytes a parameter on disk and,
    meanwhile, in memory. A process waits while another one converts.

    Raises ModelError if the file cannot be converted, or if the cache is needed but not writable.
    """
    folder = cache / _key(file)
    if _is_whole(folder):
        return folder
    _check_tools(file)
    with _alone_in(cache):
        if not _is_whole(folder):  # another process may have completed it meanwhile
            _clear(cache, folder)
            _convert(file, folder)
    return folder


def _key(file: Path) -> str:
    # The library's version is part of the key, because it changes how a GGUF file is read.
    with explained(f"{file} cannot be read"), file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return f"{file.stem}-{digest[:16]}-{REVISION}-transformers-{version('transformers')}"


def _is_whole(folder: Path) -> bool:
    try:
        return (folder / SIZES).read_text() == _sizes(folder)
    except (OSError, UnicodeDecodeError):
        return False


def _sizes(folder: Path) -> str:
    return "".join(f"{file.stat().st_size} {file.name}\n" for file in sorted(folder.iterdir()) if file.name != SIZES)


def _check_tools(file: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading {file.name} needs the package gguf: pip install gguf")
    if Version(version("transformers")) < Version(READS_GGUF):
        raise ModelError(f"reading {file.name} needs transformers {READS_GGUF} or newer: pip install -U transformers")


@contextmanager
def _alone_in(cache: Path) -> Iterator[None]:
    """Inside the context no other process converts into the cache. The lock is released if the process dies."""
    lock = FileLock(cache / ".lock")
    with _writable(cache):
        cache.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _announce(f"waiting for another process to convert a model into {cache}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writable(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"{cache} is not writable ({error.strerror}): set another with --cache-dir") from error


def _clear(cache: Path, folder: Path) -> None:
    """Remove damaged folders, and the leftovers of killed conversions."""
    if folder.exists():
        _announce(f"{folder} is damaged; converting again")
    with _writable(cache):
        for left in [*cache.glob(f"{SCRATCH}*"), *([folder] if folder.exists() else [])]:
            shutil.rmtree(left)


def _announce(message: str) -> None:
    if sys.stderr.isatty():
        print(message, file=sys.stderr)
    else:
        logger.info(message)


def _convert(file: Path, folder: Path) -> None:
    _announce(f"converting {file.name} to safetensors, once, into {folder}")
    with (
        explained(f"{file} cannot be converted to safetensors"),
        TemporaryDirectory(prefix=SCRATCH, dir=folder.parent) as scratch,
    ):
        fresh = Path(scratch) / folder.name
        with _read_once():
            _save(file, fresh)
        (fresh / SIZES).write_text(_sizes(fresh))
        fresh.rename(folder)


@contextmanager
def _read_once() -> Iterator[None]:
    """Inside the context a GGUF file is read once: the library reads all of its tokens anew for the configuration, the
    tokenizer and the weights, and names tensors anew for each layer's part, which takes most of a small model's
    conversion."""
    import gguf

    reads = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, read in reads.items():
        setattr(gguf, name, lru_cache(read))
    try:
        yield
    finally:
        for name, read in reads.items():
            setattr(gguf, name, read)


def _save(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with explained(f"{file} is damaged or incomplete"):  # a download may have been interrupted
        named = _ends(file)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    auto: Any = AutoModelForCausalLM  # its types leave out that there may be a report
    # Without `dequantize` the model counts as quantised, and the library refuses to save it.
    model, report = auto.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    check_complete(sorted(report["missing_keys"]), f"{file.name}, which may be one of several parts,")
    known = model.generation_config.eos_token_id
    ends = named.union([known] if isinstance(known, int) else known or ())
    model.generation_config.eos_token_id = sorted(ends) or None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _ends(file: Path) -> set[int]:
    """The tokens that end an answer, as the file names them."""
    from gguf import GGUFReader

    reader = GGUFReader(str(file))  # as the library calls it
    fields = [reader.get_field(f"tokenizer.ggml.{name}_token_id") for name in ENDS]
    return {int(field.contents()) for field in fields if field is not None}


def check_complete(missing: list[str], source: str = "the checkpoint") -> None:
    """Raises ModelError for weights that the library missed: it only warns, and uses random ones instead."""
    if missing:
        raise ModelError(f"{source} lacks {len(missing)} of the model's weights, such as {missing[0]}")
