"""What `--help` prints: a line for each setting, in groups."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

GROUPS = {
    "model": "Model",
    "host": "Address and access",
    "max_batch_size": "Batching",
    "unknown_fields": "Requests and answers",
    "request_timeout_s": "Limits",
    "log_format": "Logs and traces",
}
"""Titles, each before the setting that it is named with here."""

METAVARS = {
    "model": "MODEL",
    "name": "NAME,...",
    "device": "DEVICE",
    "cache_dir": "FOLDER",
    "host": "ADDRESS",
    "allowed_hosts": "HOST,...",
    "api_keys": "KEY,...",
    "api_keys_file": "FILE",
    "admin_keys": "NAME,...",
    "cors_origins": "ORIGIN,...",
    "gpu_memory_utilization": "SHARE",
    "otlp_endpoint": "URL",
}
"""For settings whose values neither their type nor their name tells."""

UNITS = {"s": "SECONDS", "ms": "MS", "mib": "MIB"}

EPILOGUE = """\
Each flag is an environment variable, too: MICROBATCH_PORT for --port. A flag wins. No .env file is read.
server/README.md describes every setting in full."""

COLUMN = 36
"""Where descriptions begin, unless the flag itself is longer."""


def help_text(usage: str, purpose: str, settings: Mapping[str, FieldInfo]) -> str:
    """Usage, purpose, then groups of settings, each with the first part of its description and its default."""
    lines = [
        f"usage: {usage}",
        "",
        purpose,
        "",
        _line("-h, --help", "print this"),
        _line("--version", "print the version"),
    ]
    for name, setting in settings.items():
        if name in GROUPS:
            lines += ["", GROUPS[name]]
        summary = (setting.description or "").partition(";")[0]
        lines.append(_line(_flag(name, setting.annotation), summary + _default(setting.default)))
    return "\n".join([*lines, "", EPILOGUE, ""])


def _line(flag: str, text: str) -> str:
    return f"  {flag:{COLUMN - 4}}  {text}"


def _flag(name: str, kind: object) -> str:
    flag = name.replace("_", "-")
    return f"--[no-]{flag}" if kind is bool else f"--{flag} {METAVARS.get(name) or _metavar(name, kind)}"


def _metavar(name: str, kind: object) -> str:
    return UNITS.get(name.rpartition("_")[2]) or "|".join(_values(kind))


def _values(kind: object) -> Iterator[str]:
    """The words of a Literal, and N for a number, alone or in a union."""
    if get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    elif kind in (int, float):
        yield "N"
    else:
        for part in get_args(kind):
            yield from _values(part)


def _default(value: object) -> str:
    match value:
        case None | () | False:
            return ""
        case True:
            return " (on)"
        case float():
            return f" ({value:g})"
        case str() | int() | Path():
            return f" ({value})"
        case _:
            raise TypeError(f"{value!r} has no words for a default")
