"""Facts about the machine and the software that a measurement was taken with, on the client's side."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("microbatch", "httptools", "orjson", "uvloop", "torch", "transformers")


def machine() -> dict[str, str | int]:
    """Operating system, processor, number of processors, memory in bytes (0 where unknown), and NVIDIA's GPUs."""
    return {
        "system": platform.platform(),
        "processor": processor(),
        "processors": os.cpu_count() or 0,
        "memory": memory(),
        "gpu": gpu(),
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


def gpu() -> str:
    """Names of NVIDIA's GPUs, as their driver's tool says; nothing where there is no such tool."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return ""
    asked = [tool, "--query-gpu=name", "--format=csv,noheader"]
    told = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    return ", ".join(told.stdout.splitlines()) if told.returncode == 0 else ""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect the speed of the client or a local server."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
