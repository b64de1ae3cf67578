import gc
import mmap
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from transformers import OPTConfig, Qwen3Config, Qwen3ForCausalLM

from batching import memory
from batching.memory import cache_bytes_per_token, free_bytes, peak_bytes, total_bytes, used_bytes

CPU = torch.device("cpu")
MIB = 2**20
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_clear_refs = pytest.mark.skipif(not memory._reset_peak(), reason="needs Linux's /proc/self/clear_refs")


def map_pages(mebibytes: int) -> mmap.mmap:
    """Memory straight from the system: what an allocator hands out may have been resident before."""
    pages = mmap.mmap(-1, mebibytes * MIB)
    for _ in range(mebibytes):
        pages.write(b"x" * MIB)
    return pages


def hold(mebibytes: int) -> None:
    map_pages(mebibytes).close()


def hold_on_gpu(mebibytes: int, device: torch.device) -> None:
    torch.ones(mebibytes * MIB, dtype=torch.uint8, device=device)


def fail() -> None:
    raise ValueError("from run")


def test_free_and_used_bytes_of_the_cpu_are_within_the_machine() -> None:
    total = psutil.virtual_memory().total
    assert 0 < free_bytes(CPU) < total
    assert 0 < used_bytes(CPU) < total


def control_group(folder: Path, limit: str, used: int, inactive: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\nactive_file 7\n")


@pytest.mark.parametrize(
    ("own", "groups", "total", "free"),
    [
        ("0::/\n", {"": ("8388608", 3 * MIB, MIB)}, 8 * MIB, 6 * MIB),
        ("1:name=systemd:/x\n0::/a/b\n", {"a/b": ("max", 0, 0), "a": ("9437184", MIB, 0)}, 9 * MIB, 8 * MIB),
        ("0::/a/b\n", {"a/b": ("4194304", MIB, 0), "a": ("9437184", 8 * MIB, 0)}, 4 * MIB, MIB),
        ("0::/a\n", {"a": ("4194304", 5 * MIB, 0)}, 4 * MIB, 0),
    ],
)
def test_a_control_group_s_limit_is_a_limit(
    own: str,
    groups: dict[str, tuple[str, int, int]],
    total: int,
    free: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "own").write_text(own)
    for name, numbers in groups.items():
        control_group(tmp_path / "groups" / name, *numbers)
    monkeypatch.setattr(memory, "_OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "groups")
    assert (total_bytes(CPU), free_bytes(CPU)) == (total, free)


def test_without_control_groups_the_machine_is_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_OWN_CGROUP", tmp_path / "none")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "none")
    assert total_bytes(CPU) == psutil.virtual_memory().total
    assert free_bytes(CPU) > 0


def test_used_bytes_counts_what_is_held() -> None:
    gc.collect()
    before = used_bytes(CPU)
    with map_pages(64):
        assert used_bytes(CPU) - before >= 60 * MIB


@needs_clear_refs
def test_a_peak_is_seen_after_it_is_over() -> None:
    hold(256)
    assert 120 * MIB <= peak_bytes(CPU, lambda: hold(128)) <= 192 * MIB


@needs_clear_refs
def test_work_without_memory_has_no_peak() -> None:
    assert peak_bytes(CPU, lambda: None) < 16 * MIB


@needs_cuda
def test_a_cuda_peak_is_what_torch_allocated() -> None:
    device = torch.device("cuda", 0)
    hold_on_gpu(256, device)
    assert peak_bytes(device, lambda: hold_on_gpu(128, device)) == 128 * MIB
    assert used_bytes(device) + 128 * MIB < free_bytes(device)


class Meter:
    """Stands in for `used_bytes`; `high` is set once a sample has seen a level above the first one."""

    def __init__(self) -> None:
        self.level = 100
        self.high = threading.Event()

    def __call__(self, device: torch.device) -> int:
        if self.level > 100:
            self.high.set()
        return self.level

    def work(self) -> None:
        self.level = 700
        assert self.high.wait(timeout=60)
        self.level = 150


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    meter = Meter()
    monkeypatch.setattr(memory, "used_bytes", meter)
    monkeypatch.setattr(memory, "_reset_peak", lambda: False)
    return meter


def test_without_a_counter_the_peak_is_sampled(meter: Meter) -> None:
    assert peak_bytes(CPU, meter.work) == 600


@pytest.mark.usefixtures("meter")
def test_the_sampler_ends_with_its_work_even_if_that_fails() -> None:
    with pytest.raises(ValueError, match="from run"):
        peak_bytes(CPU, fail)
    assert "memory-sampler" not in [thread.name for thread in threading.enumerate()]


def test_what_run_raises_passes_through() -> None:
    with pytest.raises(ValueError, match="from run"):
        peak_bytes(CPU, fail)


def test_cache_bytes_are_those_of_the_published_example() -> None:
    opt_13b = OPTConfig(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40)
    assert cache_bytes_per_token(opt_13b, torch.float16) == 800 * 1024


def test_cache_bytes_are_those_of_the_cache_the_model_builds() -> None:
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
    )
    with torch.inference_mode():
        cache = Qwen3ForCausalLM(config)(torch.zeros(1, 5, dtype=torch.long)).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes_per_token(config, torch.float32) * 5 == held


def test_a_device_has_more_than_is_held_or_free() -> None:
    cpu = torch.device("cpu")
    assert 0 < used_bytes(cpu) < total_bytes(cpu)
    assert 0 < free_bytes(cpu) < total_bytes(cpu)


def test_mps_figures_come_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"recommended_max_memory": 100, "driver_allocated_memory": 30, "current_allocated_memory": 20}
    fake = SimpleNamespace(**{name: lambda value=value: value for name, value in figures.items()})
    monkeypatch.setattr(torch, "mps", fake)
    assert free_bytes(torch.device("mps")) == 70
    assert used_bytes(torch.device("mps")) == 20
    assert total_bytes(torch.device("mps")) == 100
