"""The engine for GPUs: rows packed without padding, joining and leaving a running batch, inside one `generate` call.

Worker thread only. `generate` prepares the call and hands it to `decode_loop`, its own extension point. What the loop
needs of a model, `unsupported` tells; all else runs on `GenerateEngine`.
"""

import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from batching.engine import Steps
from batching.errors import ModelError
from batching.memory import cache_bytes_per_token, free_bytes, is_shortage, out_of_memory, peak_bytes, used_bytes
from batching.model import describe, stop_token_ids, window_of
from batching.packed import attention, layer, reference
from batching.packed.cpu_runner import HostRunner
from batching.packed.kv_cache import Pool
from batching.packed.runner import Runner
from batching.packed.scheduler import DecodeLoop
from batching.stream import Row

if TYPE_CHECKING:
    from batching.packed.cuda_runner import DeviceRunner

logger = logging.getLogger(__name__)

BURST = 8192
"""Prompt tokens in one pass while no row is running: as many as keep the matrix units busy."""

COMPILERS = (os.environ.get("CC", ""), "gcc", "clang", "cc")
"""What Triton may build its kernels' launchers with."""

CAPTURE_BYTES = 768 * 2**20
"""What captured steps and what torch loads for them take on a GPU, beside the passes' own memory."""


class PackedEngine:
    """`Engine` whose rows may join a running batch. Takes the model over: its layers and its attention are replaced.

    `lanes` is the most rows at a time, `share` the part of a GPU's memory that may be used, model included, `piece` the
    most prompt tokens between two steps of running rows. Raises `ModelError` if there is no room for a pool.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        lanes: int,
        context_window: int | None = None,
        token_budget: int | None = None,
        share: float = 0.9,
        piece: int = 2048,
        sharing: bool = True,
        batch_invariant: bool = False,
    ) -> None:
        self._model = model
        self._piece = piece
        self._burst = piece if batch_invariant else max(piece, BURST)
        # What was computed in another pass may differ in the last bit from what would be computed in this one.
        self._sharing = sharing and not batch_invariant
        self._invariant = batch_invariant
        stops = stop_token_ids(model)
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # type: ignore[no-untyped-call]
        model.set_attn_implementation(attention.NAME)
        layer.fuse(model, _ops(model.device))
        window = window_of(model, context_window)
        most = lanes * window if token_budget is None else min(token_budget, lanes * window)
        capacity = self._capacity(most, share)
        self.runner = self._make_runner(lanes, capacity)
        self._pool = Pool(capacity, sharing=self._sharing)
        self.info = describe(model, window, capacity, stops, joins=True)

    def run(self, rows: Sequence[Row], steps: Steps) -> None:
        """See `Engine`."""
        try:
            self._generate(rows, steps)
            return
        except BaseException as error:
            # Whatever the rows had is given up with them, and nothing of it may be found by others.
            self._pool = Pool(self._pool.capacity, sharing=self._sharing)
            if not (isinstance(error, RuntimeError) and is_shortage(error)):
                raise
        # Only here, where the caught error is gone: its traceback kept the batch's tensors.
        raise out_of_memory(self._model.device)

    def memory(self) -> int:
        """See `Engine`."""
        return used_bytes(self._model.device)

    @torch.inference_mode()
    def _generate(self, rows: Sequence[Row], steps: Steps) -> None:
        # The loop has the rows from `batch`; `generate` sees a prompt of one token, and prepares next to nothing.
        first = torch.tensor([rows[0].request.prompt[:1]], device=self._model.device)
        batch = DecodeLoop(
            self.runner, self._pool, steps, piece=self._piece, burst=self._burst, one_prompt_a_pass=self._invariant
        )
        self._model.generate(  # type: ignore[operator]
            first,
            attention_mask=torch.ones_like(first),
            max_new_tokens=1,
            custom_generate=decode_loop,
            batch=batch,
            rows=rows,
        )

    def _capacity(self, most: int, share: float) -> int:
        """Slots of the pool: what fits into the share of memory beside the model and its passes, at most `most`."""
        per_slot = cache_bytes_per_token(self._model.config, self._model.dtype)
        if self._model.device.type == "cuda":
            room = self._room_on_gpu(share)
        else:
            room = int(0.5 * free_bytes(self._model.device))
        capacity = min(most, room // per_slot)
        if capacity < 256:
            raise ModelError(f"only {room / 2**20:.0f} MiB are left for the pool beside the model, too few for a batch")
        return int(capacity)

    def _room_on_gpu(self, share: float) -> int:
        device = self._model.device
        rehearsal = self._device_runner(1, 1)
        with torch.inference_mode():
            rehearsal.rehearse(64)  # first calls load kernels, which stay and must not count
            passes = peak_bytes(device, lambda: rehearsal.rehearse(self._burst))
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return int(share * total) - (total - free) - passes - CAPTURE_BYTES

    def _make_runner(self, lanes: int, capacity: int) -> Runner:
        if self._model.device.type != "cuda":
            return HostRunner(self._model, self._memory(capacity), lanes)
        from batching.packed.cuda_graphs import prompt_sizes, step_sizes

        runner = self._device_runner(lanes, capacity)
        prompts, steps = prompt_sizes(self._piece, self._burst), [lanes] if self._invariant else step_sizes(lanes)
        with torch.inference_mode():
            captured = runner.capture(prompts, steps)
            shown = sys.stderr.isatty()
            for _ in track(captured, "capturing", len(prompts) + len(steps), disable=not shown, transient=True):
                pass
        return runner

    def _device_runner(self, lanes: int, capacity: int) -> "DeviceRunner":
        from batching.packed.cuda_runner import DeviceRunner

        return DeviceRunner(self._model, self._memory(capacity), lanes)

    def _memory(self, capacity: int) -> Tensor:
        """The pool's tensor, and a slot more that belongs to no row. Zeros: what is there may be multiplied by 0."""
        config = self._model.config.get_text_config()
        heads = config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = config.num_hidden_layers, 2, heads, capacity + 1, size
        return torch.zeros(shape, dtype=self._model.dtype, device=self._model.device)


def decode_loop(
    model: PreTrainedModel, input_ids: Tensor, *, batch: DecodeLoop, rows: Sequence[Row], **prepared: Any
) -> Tensor:
    """What `generate` calls in place of its own loop; its answer is of no interest, the rows have had theirs."""
    batch.run(rows)
    return input_ids


def _ops(device: torch.device) -> ModuleType:
    if device.type != "cuda":
        return reference
    from batching.packed import triton_layer

    return triton_layer


def unsupported(model: PreTrainedModel) -> str | None:
    """Why the loop cannot run this model, or None if it can."""
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
