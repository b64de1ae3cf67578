"""A device's free and used memory, and the peak of a call.

No state. `peak_bytes` resets the process's peak counter, so one caller at a time: the worker thread.
"""

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from transformers import PreTrainedConfig

from batching.errors import SHORTAGE, OutOfMemory

SAMPLE_SECONDS = 0.002

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: on CUDA the driver's free memory and torch's cache.

    On the CPU the smallest of what the machine and this process's control groups have left.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return max(0, min([int(psutil.virtual_memory().available), *(limit - used for limit, used in _cgroup_limits())]))


def used_bytes(device: torch.device) -> int:
    """Bytes held now: by torch's tensors on a GPU, by the whole process (resident set) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return int(psutil.Process().memory_info().rss)


def total_bytes(device: torch.device) -> int:
    """Total bytes of the device; on the CPU no more than its control groups allow."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _cgroup_limits())])


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """Call `run` and return how many bytes above the starting level it held at its peak.

    On the CPU the resident set is measured: memory that the allocator kept from earlier work does not count, and
    weights that are mapped from their file count when first touched, so do a small forward pass before. Whatever
    `run` raises passes through.
    """
    gc.collect()  # garbage freed during `run` would hide part of its peak
    if device.type == "cuda":
        return _cuda_peak(device, run)
    if device.type == "cpu" and _reset_peak():
        return _linux_peak(run)
    return _sampled_peak(device, run)


def cache_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one position in all layers: 2 x layers x KV heads x head size x itemsize.

    The formula is that of Kwon et al. 2023 (PagedAttention, section 3). It counts every layer as full
    attention: an upper bound for models whose layers look back over a limited window.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * head_size * dtype.itemsize)


def is_shortage(error: RuntimeError) -> bool:
    """Whether the error says that the device is out of memory. Only some allocators have an exception of their own."""
    return any(words in str(error) for words in SHORTAGE)


def out_of_memory(device: torch.device) -> OutOfMemory:
    """The error to raise once the tensors of the failed call are freed."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return OutOfMemory(f"{device} ran out of memory")


def _cgroup_limits() -> list[tuple[int, int]]:
    """The limit of each control group that this process is in, and how many bytes of it are used.

    A container, or a service with `MemoryMax`, is killed at its limit, whatever the machine has. Version 2 only; pages
    of files that were not read lately do not count as used, because the kernel drops those first.
    """
    lines = _OWN_CGROUP.read_text().splitlines() if _OWN_CGROUP.exists() else []
    own = _CGROUPS.joinpath(*(line.removeprefix("0::/") for line in lines if line.startswith("0::/")))
    groups = [group for group in (own, *own.parents) if group.is_relative_to(_CGROUPS)]
    return [found for group in groups if (found := _cgroup_limit(group)) is not None]


def _cgroup_limit(group: Path) -> tuple[int, int] | None:
    """None without one, as in the topmost group."""
    try:
        limit, used, stat = ((group / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
    except OSError:
        return None
    if limit.strip() == "max":
        return None
    counts = dict(line.split() for line in stat.splitlines())
    return int(limit), int(used) - int(counts.get("inactive_file", 0))


def _cuda_peak(device: torch.device, run: Callable[[], object]) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - start


def _reset_peak() -> bool:
    """Set VmHWM back to VmRSS (proc_pid_clear_refs(5), value 5); False where the kernel has no such file."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _linux_peak(run: Callable[[], object]) -> int:
    start = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - start)


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status, which is in KiB (proc_pid_status(5))."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _sampled_peak(device: torch.device, run: Callable[[], object]) -> int:
    """The highest of samples taken during `run`; may miss a peak shorter than the interval."""
    levels = [used_bytes(device)]
    over = threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_SECONDS):
            levels.append(used_bytes(device))

    thread = threading.Thread(target=sample, name="memory-sampler", daemon=True)
    thread.start()
    try:
        run()
    finally:
        over.set()
        thread.join()
    return max(*levels, used_bytes(device)) - levels[0]
