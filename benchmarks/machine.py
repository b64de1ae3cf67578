"""Facts about the machine and the software that a measurement was taken with, on the client's side."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("microbatch", "httptools", "orjson", "uvloop")


def machine() -> dict[str, str | int]:
    """Operating system, processor, number of processors and memory in bytes (0 where unknown)."""
    return {
        "system": platform.platform(),
        "processor": processor(),
        "processors": os.cpu_count() or 0,
        "memory": memory(),
    }


def processor() -> str:
    """The processor's name; Linux keeps it in a file, elsewhere Python knows."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def memory() -> int:
    """Bytes of main memory."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the client's speed depends on, where installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
