"""The model that servers are started on: flags that name it, and its folder, converted or written first if need be."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE = Path.home() / ".cache" / "microbatch"
MODULE = (sys.executable, "-m")
LOCATE = """
import pathlib, sys
from batching.checkpoint import locate
print(locate(sys.argv[1] or None, "auto", pathlib.Path(sys.argv[2])))
"""


class ModelError(Exception):
    """There is no such model, or it cannot be prepared."""


@dataclass(frozen=True, slots=True)
class Model:
    """A folder, what clients call it, where and how it runs, and more flags of this service."""

    folder: str
    name: str
    device: str = "auto"
    dtype: str = "auto"
    server_flags: tuple[str, ...] = ()


def add_model(parser: argparse.ArgumentParser) -> None:
    """Flags that `take_model` takes."""
    add = parser.add_argument_group("model").add_argument
    add("--model", help="folder, or GGUF file; the demo model if not given")
    add("--name", help="what clients call it (the folder's name)")
    add("--load-format", choices=["auto", "dummy"], default="auto", help="dummy: random weights, written once")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto", help="of the weights (auto)")
    add("--server-args", type=shlex.split, default=[], help="more flags of this service, as one text")
    add("--cache-dir", type=Path, default=CACHE, help="where converted and random models are kept")


def take_model(options: dict[str, Any]) -> Model:
    """The model of the flags, which are removed from `options`. Raises ModelError."""
    model: str | None = options.pop("model")
    load_format, dtype, device = options.pop("load_format"), options.pop("dtype"), options.pop("device")
    folder = folder_of(model, load_format, dtype, options.pop("cache_dir"))
    name = options.pop("name") or (Path(model).resolve().name if model else "smollm2-135m-instruct")
    return Model(folder, name, device, dtype, tuple(options.pop("server_args")))


def folder_of(model: str | None, load_format: str, dtype: str, cache: Path) -> str:
    """A folder with weights. Loading is left to processes of their own, so that this one holds neither device nor
    memory. Raises ModelError."""
    if load_format == "auto":
        return said((sys.executable, "-c", LOCATE, model or "", str(cache)))
    if model is None:
        raise ModelError("load-format dummy needs a model folder with a config.json")
    kind = "bfloat16" if dtype == "auto" else dtype
    out = cache / f"random-{Path(model).resolve().name}-{kind}"
    said((*MODULE, "benchmarks.random_weights", model, str(out), "--dtype", kind))
    return str(out)


def said(command: Sequence[str]) -> str:
    """The last line of the command's output. Raises ModelError with the last line of its complaint if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2] or "no reason given"
        raise ModelError(f"the model cannot be prepared: {reason}")
    return done.stdout.strip().rpartition("\n")[2]
