"""Log probabilities of a prompt's own tokens, as if the model had generated them.

Worker thread only. They are the model's own, before penalties, bias, temperature or any cut. Logits of a whole prompt
would take gigabytes, so both engines compute `PIECE` positions at a time; `logits_bytes` is what that costs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from batching.engine import Steps
from batching.stream import Row
from batching.types import PromptLogprob

PIECE = 256
"""Positions of a prompt whose logits are in memory at a time."""

WIDE = 32
"""How many of them in float32."""


def logits_bytes(model: PreTrainedModel) -> int:
    """Bytes of a piece's logits: in the model's dtype, and part of them twice in float32."""
    vocab_size = int(model.config.get_text_config().vocab_size)
    return vocab_size * (PIECE * model.dtype.itemsize + WIDE * (4 + 4 + 1))


def prompt_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[PromptLogprob]:
    """Logits [positions, vocabulary] and the tokens after these positions -> an entry for each token."""
    after = torch.tensor(tokens, device=logits.device)
    pairs = zip(torch.split(logits, WIDE), torch.split(after, WIDE), strict=True)
    columns = zip(*(_read(part, ids, min(top, logits.shape[-1])) for part, ids in pairs), strict=True)
    own, ranks, values, others = (torch.cat(column).tolist() for column in columns)
    return [
        PromptLogprob(token, own[at], tuple(zip(others[at], values[at], strict=True)), ranks[at])
        for at, token in enumerate(tokens)
    ]


def _read(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log probabilities [n] of the tokens [n], their ranks, and the likeliest tokens [n, top] with theirs."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(-1, tokens[:, None])
    best = logprobs.topk(top)
    return own[:, 0], (logprobs > own).sum(-1) + 1, best.values, best.indices


def score(model: PreTrainedModel, row: Row, steps: Steps) -> None:
    """Hand over the log probabilities of a row's prompt, computed alone in one forward pass without padding."""
    request = row.request
    if steps.emit_prompt(row, 0, [None]) or len(request.prompt) == 1:
        return
    head = Head(model, request.prompt[:-1])
    for start in range(0, len(request.prompt) - 1, PIECE):
        tokens = request.prompt[start + 1 : start + 1 + PIECE]
        found = prompt_logprobs(head.logits(start, len(tokens)), tokens, request.sampling.prompt_logprobs or 0)
        if steps.emit_prompt(row, start + 1, found):
            return


class Head:
    """The model's last step, from hidden states to logits, for any positions of one text."""

    def __init__(self, model: PreTrainedModel, tokens: Sequence[int]) -> None:
        self._model = model
        self._ids = torch.tensor([tokens], device=model.device)
        self._out: Any = model.base_model(self._ids, use_cache=False)

    def logits(self, start: int, count: int) -> Tensor:
        """[count, vocabulary] of the positions from `start` on."""
        here = slice(start, start + count)
        out = type(self._out)(last_hidden_state=self._out.last_hidden_state[:, here])
        # The model's own `forward`, because some models scale or cap the output of the last matrix product.
        with answering(self._model.base_model, out):
            logits: Tensor = self._model(self._ids[:, here], use_cache=False).logits
        return logits[0]


@contextmanager
def answering(module: nn.Module, output: object) -> Iterator[None]:
    """Inside the context, calling the module computes nothing and returns `output`."""
    own = vars(module).get("forward")  # the instance may have one that wraps the class's
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
