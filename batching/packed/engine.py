"""The engine for GPUs and CPUs: rows packed without padding, which join and leave a batch inside one `generate` call.

Worker thread only. `generate` prepares the call and hands it to `decode_loop`, its own extension point. `unsupported`
says what this engine needs of a model; everything else runs on `PaddedEngine`.
"""

import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from batching.engine import Steps
from batching.errors import ModelError
from batching.memory import cache_bytes_per_token, free_bytes, is_shortage, out_of_memory, peak_bytes, used_bytes
from batching.model import describe, stop_token_ids, window_of
from batching.packed import attention, layer, reference
from batching.packed.cpu_runner import CPURunner
from batching.packed.gap_limit import GapLimit
from batching.packed.kv_cache import BLOCK_SIZE, BlockPool, blocks_for
from batching.packed.runner import Runner
from batching.packed.scheduler import Scheduler
from batching.packed.speculation import MAX_DRAFT_TOKENS
from batching.scoring import logits_bytes
from batching.stream import Row
from batching.types import DEFAULT_ROWS

if TYPE_CHECKING:
    from batching.packed.cuda_runner import CUDARunner


MAX_PREFILL_TOKENS = 8192
"""Tokens of a prompt that is alone in one forward pass on a GPU: as many as keep the matrix units busy."""

GPU_PREFILL_CHUNK = 1024
CPU_PREFILL_CHUNK = 128
"""A CPU computes more tokens at once no faster, and every decoding row waits for the pass."""

CPU_TOKENS = 65_536
"""Tokens of the KV cache on a CPU, if the window is not larger: it shares its memory with everything else."""

FEWEST_TOKENS = 256
"""Of the KV cache, unless the window or the budget has fewer: less memory than for these is too little to serve."""

GPU_ROWS = 256
"""Rows that run at a time on a GPU: what memory holds is the limit of longer ones."""

COMPILERS = (os.environ.get("CC", ""), "gcc", "clang", "cc")
"""The compilers that Triton can build its kernel launchers with."""

GRAPH_BYTES = 160 * 2**20
"""GPU memory for CUDA graphs and what torch loads for them, in addition to that of the rows and forward passes."""


class PackedEngine:
    """`Engine` whose rows may join a running batch. Takes the model over: its layers and its attention are replaced.

    `num_slots` is the most rows that run at a time (None: by the device), `gpu_memory_utilization` the share of a GPU's
    memory that may be used, model included, `prefill_chunk` the most tokens computed in one pass while rows decode
    (None: by the device), `max_gap` the seconds between two tokens of a row that prompts are to keep to instead (None:
    no limit; without effect if `batch_invariant`), `max_draft_tokens` the most that speculation guesses for a row in a
    step (None: `MAX_DRAFT_TOKENS`). Raises `ModelError` if there is no room for a KV cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_slots: int | None = None,
        context_window: int | None = None,
        token_budget: int | None = None,
        gpu_memory_utilization: float = 0.9,
        prefill_chunk: int | None = None,
        max_gap: float | None = None,
        prefix_caching: bool = True,
        batch_invariant: bool = False,
        max_draft_tokens: int | None = None,
    ) -> None:
        on_gpu = model.device.type == "cuda"
        num_slots = num_slots or (GPU_ROWS if on_gpu else DEFAULT_ROWS)
        self._model = model
        self._prefill_chunk = chunk = prefill_chunk or (GPU_PREFILL_CHUNK if on_gpu else CPU_PREFILL_CHUNK)
        self._max_prefill_tokens = chunk if batch_invariant or not on_gpu else max(chunk, MAX_PREFILL_TOKENS)
        self._gap_limit = GapLimit(max_gap) if max_gap and not batch_invariant else None
        # KV from another forward pass may differ in the last bit from what this one would compute.
        self._prefix_caching = prefix_caching and not batch_invariant
        self._batch_invariant = batch_invariant
        # A step with drafts has another shape, in which sums are rounded differently.
        wanted = MAX_DRAFT_TOKENS if max_draft_tokens is None else max_draft_tokens
        self._max_draft_tokens = 0 if batch_invariant else wanted
        stops = stop_token_ids(model)
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # type: ignore[no-untyped-call]
        model.set_attn_implementation(attention.NAME)
        layer.fuse(model, _ops(model.device))
        window = window_of(model, context_window)
        self._max_blocks = blocks_for(window)
        most = num_slots * self._max_blocks
        if token_budget is not None or not on_gpu:
            most = min(most, blocks_for(token_budget or max(window, CPU_TOKENS)))
        num_blocks = self._num_blocks(most, num_slots, gpu_memory_utilization)
        self.runner = self._make_runner(num_slots, num_blocks)
        self.pool = BlockPool(num_blocks, caching=self._prefix_caching)
        capacity = min(num_blocks * BLOCK_SIZE, token_budget or num_slots * window)
        self.info = replace(describe(model, window, capacity, stops, joins=True), max_rows=num_slots)

    def run(self, rows: Sequence[Row], steps: Steps) -> None:
        try:
            self._generate(rows, steps)
            return
        except BaseException as error:
            # The rows' part of the KV cache is given up with them, and no other row may find any of it.
            self.pool = BlockPool(self.pool.num_blocks, caching=self._prefix_caching)
            if not (isinstance(error, RuntimeError) and is_shortage(error)):
                raise
        # Only here, where the caught error is gone: its traceback kept the batch's tensors.
        raise out_of_memory(self._model.device)

    def memory(self) -> int:
        return used_bytes(self._model.device)

    @torch.inference_mode()
    def _generate(self, rows: Sequence[Row], steps: Steps) -> None:
        # The scheduler has the rows; `generate` sees a prompt of one token, and prepares next to nothing.
        first = torch.tensor([rows[0].request.prompt[:1]], device=self._model.device)
        scheduler = Scheduler(
            self.runner,
            self.pool,
            steps,
            prefill_chunk=self._prefill_chunk,
            max_prefill_tokens=self._max_prefill_tokens,
            gap_limit=self._gap_limit,
            one_prompt_a_pass=self._batch_invariant,
        )
        self._model.generate(  # type: ignore[operator]
            first,
            attention_mask=torch.ones_like(first),
            max_new_tokens=1,
            custom_generate=decode_loop,
            scheduler=scheduler,
            rows=rows,
        )

    def _num_blocks(self, most: int, num_slots: int, gpu_memory_utilization: float) -> int:
        """Blocks of the KV cache that fit into memory beside the model and its forward passes, at most `most`."""
        block = BLOCK_SIZE * cache_bytes_per_token(self._model.config, self._model.dtype)
        if self._model.device.type == "cuda":
            room = self._room_on_gpu(num_slots, gpu_memory_utilization) - logits_bytes(self._model)
        else:
            room = int(0.5 * free_bytes(self._model.device))
        num_blocks = min(most, room // block)
        if num_blocks < min(most, blocks_for(FEWEST_TOKENS)):
            left = f"only {room / 2**20:.0f} MiB are left for the KV cache beside the model"
            raise ModelError(f"{left}, too few for a batch")
        return int(num_blocks)

    def _room_on_gpu(self, num_slots: int, gpu_memory_utilization: float) -> int:
        passes = self._bytes_of_passes(num_slots)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._model.device)
        return int(gpu_memory_utilization * total) - (total - free) - passes - GRAPH_BYTES

    @torch.inference_mode()
    def _bytes_of_passes(self, num_slots: int) -> int:
        """What the rows' state and the largest pass take. Compiles the kernels first, all at once."""
        before = self.memory()
        runner = self._cuda_runner(num_slots, 1)
        state = self.memory() - before
        runner.compile_kernels(*self._graph_sizes(num_slots))
        runner.profile_run(64)  # first calls load kernels, which stay and must not count
        return state + peak_bytes(self._model.device, lambda: runner.profile_run(self._max_prefill_tokens))

    def _make_runner(self, num_slots: int, num_blocks: int) -> Runner:
        if self._model.device.type != "cuda":
            cache, drafts = self._kv_cache(num_blocks), self._max_draft_tokens
            return CPURunner(self._model, cache, num_slots, drafts, one_by_one=self._batch_invariant)
        runner = self._cuda_runner(num_slots, num_blocks)
        mixed, decodes = self._graph_sizes(num_slots)
        with torch.inference_mode():
            captured = runner.capture(mixed, decodes)
            shown = sys.stderr.isatty()
            total = len(mixed) + len(decodes) + runner.num_wide_graphs
            for _ in track(captured, "capturing", total, disable=not shown, transient=True):
                pass
            runner.measure_steps()
        return runner

    def _graph_sizes(self, num_slots: int) -> tuple[list[int], list[int]]:
        """The numbers of tokens of mixed passes and of sequences of decode steps that are captured."""
        from batching.packed.cuda_graphs import decode_sizes, mixed_sizes

        decodes = [num_slots] if self._batch_invariant else decode_sizes(num_slots)
        return mixed_sizes(self._prefill_chunk, self._max_prefill_tokens), decodes

    def _cuda_runner(self, num_slots: int, num_blocks: int) -> "CUDARunner":
        from batching.packed.cuda_runner import CUDARunner

        cache = self._kv_cache(num_blocks)
        return CUDARunner(self._model, cache, num_slots, self._max_blocks, self._max_draft_tokens)

    def _kv_cache(self, num_blocks: int) -> Tensor:
        """The tensor, with an extra block that belongs to no row. Zeros, because its content may be multiplied by 0."""
        config = self._model.config.get_text_config()
        heads = config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = config.num_hidden_layers, 2, heads, (num_blocks + 1) * BLOCK_SIZE, size
        if self._model.device.type == "cpu":  # the system's zeros: memory is only taken where something is written
            empty = np.zeros(math.prod(shape) * self._model.dtype.itemsize, np.uint8)
            return torch.from_numpy(empty).view(self._model.dtype).view(shape)
        return torch.zeros(shape, dtype=self._model.dtype, device=self._model.device)


def decode_loop(
    model: PreTrainedModel, input_ids: Tensor, *, scheduler: Scheduler, rows: Sequence[Row], **prepared: Any
) -> Tensor:
    """Called by `generate` in place of its own loop. The result is unused, because the rows have their tokens."""
    scheduler.run(rows)
    return input_ids


def _ops(device: torch.device) -> ModuleType:
    if device.type != "cuda":
        return reference
    from batching.packed import triton_layer

    return triton_layer


def unsupported(model: PreTrainedModel) -> str | None:
    """Why the packed engine cannot run this model, or None if it can."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    if model.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if model.device.type == "cuda" and not any(map(shutil.which, COMPILERS)):
        return "triton finds no C compiler (install gcc, or name one in CC)"
    if model.device.type not in ("cuda", "cpu"):
        return f"it does not run on {model.device.type}"
    if not getattr(model, "_supports_attention_backend", False):
        return "the model does not take an attention function"
    if any(kind != "full_attention" for kind in kinds) or (not kinds and getattr(config, "sliding_window", None)):
        return "not every layer attends to everything"
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") in ("dynamic", "longrope"):
        return "its position embedding depends on how long the text is"
    return None
