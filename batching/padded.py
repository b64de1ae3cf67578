"""The engine that runs everywhere: pads the rows, calls `model.generate`, and is called back at every step.

Worker thread only. A logits processor samples each row's token by its own settings, so `generate` runs with
`do_sample=False` and takes the argmax of what the processor leaves; a stopping criterion sees every step's tokens,
reports them, and says which rows are over. `generate` returns when all are. Rows whose positions are embedded in
different ways are batches of their own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedConfig, PreTrainedModel, StoppingCriteria

from batching.engine import Steps
from batching.errors import ModelError
from batching.memory import cache_bytes_per_token, free_bytes, is_shortage, out_of_memory, peak_bytes, used_bytes
from batching.model import describe, stop_token_ids, window_of
from batching.sampling import Sampler
from batching.scoring import logits_bytes, score
from batching.stream import Row
from batching.types import Request, Sampling

MEMORY_UTILIZATION = 0.9
"""Fraction of the free memory that a batch may use; the rest is for fragmentation and other processes."""

WARM_UP_TOKENS = {"cuda": 8192}
"""Prompt length of the warm-up batch: long where that is fast, because the attention mask and the scores grow with its
square; short elsewhere."""


class PaddedEngine:
    """`Engine` over stock `generate`. Both limits are in tokens; None derives them from the model and the free memory.

    Raises `ModelError` if the device has no room for even a short batch beside the model.
    """

    def __init__(
        self, model: PreTrainedModel, *, context_window: int | None = None, token_budget: int | None = None
    ) -> None:
        self._model = model
        self._vocab_size = model.config.get_text_config().vocab_size
        self._short_rope = short_rope(model.config.get_text_config())
        stops = stop_token_ids(model)
        # `generate` takes unset options from here, and a model's own file may set penalties or top_k.
        model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, use_cache=True, pad_token_id=0
        )
        window = window_of(model, context_window)
        budget = token_budget or self._measure_budget(window)
        self.info = describe(model, window, budget, stops)

    def run(self, rows: Sequence[Row], steps: Steps) -> None:
        try:
            self._score(rows, steps)
            for batch in alike([row for row in rows if not row.over], self._short_rope):
                self._generate([row.request for row in batch], batch, steps)
            return
        except RuntimeError as error:
            if not is_shortage(error):
                raise
        # Raised here, after the caught error is gone, because its traceback holds the batch's tensors.
        raise out_of_memory(self._model.device)

    def memory(self) -> int:
        return used_bytes(self._model.device)

    @torch.inference_mode()
    def _score(self, rows: Sequence[Row], steps: Steps) -> None:
        for row in rows:
            if row.wants_prompt_logprobs:
                score(self._model, row, steps)

    @torch.inference_mode()
    def _generate(self, requests: Sequence[Request], rows: Sequence[Row] = (), steps: Steps | None = None) -> None:
        device = self._model.device
        sampler = Sampler(requests, self._vocab_size, device)
        ids, mask = pad([request.prompt for request in requests], device)
        self._model.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            max_new_tokens=max(request.sampling.max_tokens for request in requests),
            logits_processor=[SampledTokens(sampler)],
            stopping_criteria=[StepReporter(rows, sampler, steps)] if steps else None,
        )

    def _measure_budget(self, window: int) -> int:
        """Padded tokens that fit in memory: the free fraction divided by a token's peak memory in a warm-up batch.

        The batch has two rows of different lengths, because only a padded batch needs an attention mask.
        """
        device = self._model.device
        length = min(window, WARM_UP_TOKENS.get(device.type, 64)) - 2
        sampling = Sampling(max_tokens=2, seed=0)
        requests = [Request("warm-up", (0,) * n, sampling, time_limit=0.0) for n in (length, length // 2)]
        self._generate(requests[1:])  # the first call loads kernels, which stay and must not count
        peak = peak_bytes(device, lambda: self._generate(requests))
        free = max(0, free_bytes(device) - logits_bytes(self._model))
        # A short batch may fit in memory that the process already held, so the KV cache's need is a lower bound.
        per_token = max(peak / (2 * (length + 2)), cache_bytes_per_token(self._model.config, self._model.dtype))
        budget = int(MEMORY_UTILIZATION * free / per_token)
        if budget < 256:
            raise ModelError(f"only {free / 2**20:.0f} MiB are free besides the model, too little for a batch")
        return budget


class SampledTokens(LogitsProcessor):
    """Gives each row's sampled token the largest score, so that `generate` picks it by argmax."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._sampler.is_plain_argmax:
            return scores
        return scores.scatter_(1, self._sampler(scores)[:, None], float("inf"))


class StepReporter(StoppingCriteria):
    """Reports the newest token of every row, and returns which rows are over."""

    def __init__(self, rows: Sequence[Row], sampler: Sampler, steps: Steps) -> None:
        self._rows = rows
        self._sampler = sampler
        self._steps = steps

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        over = self._steps.emit(self._rows, input_ids[:, -1].tolist(), self._sampler.logprobs)
        return torch.tensor(over, device=input_ids.device)


def short_rope(config: PreTrainedConfig) -> int | None:
    """With LongRoPE (Ding et al. 2024), which has two position embeddings, the most tokens of a text that has the short
    one. A batch has the one that its longest text needs."""
    rope = getattr(config, "rope_parameters", None) or {}
    return int(rope["original_max_position_embeddings"]) if rope.get("rope_type") == "longrope" else None


def alike(rows: Sequence[Row], short_rope: int | None) -> list[Sequence[Row]]:
    """The rows in batches in which each has the position embedding that it has alone, at every step."""
    if not rows:
        return []
    prompts = [len(row.request.prompt) for row in rows]
    most = max(prompts) + max(row.request.sampling.max_tokens for row in rows)
    if short_rope is None or len(rows) == 1 or most <= short_rope or min(prompts) > short_rope:
        return [rows]
    by_length = sorted(rows, key=lambda row: len(row.request.prompt))
    half = len(rows) // 2
    return [*alike(by_length[:half], short_rope), *alike(by_length[half:], short_rope)]


def pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask, both [rows, longest] in int64, built on the CPU and copied once."""
    longest = max(map(len, prompts))
    ids = torch.zeros(2, len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[0, row, longest - len(prompt) :] = torch.tensor(prompt)
        ids[1, row, longest - len(prompt) :] = 1
    ids, mask = ids.to(device)
    return ids, mask
