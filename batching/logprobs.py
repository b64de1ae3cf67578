"""Log probabilities of the tokens a batch chooses, and of the likeliest others, for the rows that ask for them.

They are the model's own: of its logits before penalties, bias, temperature or any cut. Worker thread only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from batching.types import Request, TokenLogprob


class Logprobs:
    """Of one batch: `read` a step's logits before they are changed, `note` the tokens that came of them."""

    def __init__(self, rows: list[int], requests: Sequence[Request], device: torch.device) -> None:
        self._places = rows
        self._rows = torch.tensor(rows, device=device)
        self._wanted = [requests[row].sampling.top_logprobs or 0 for row in rows]
        self.noted: dict[int, TokenLogprob] = {}

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> "Logprobs | None":
        """Those of a batch, or None if no row asks."""
        rows = [row for row, request in enumerate(requests) if request.sampling.top_logprobs is not None]
        return cls(rows, requests, device) if rows else None

    def read(self, logits: Tensor) -> None:
        """Logits [all rows, vocabulary], not kept."""
        self._all = logits[self._rows].log_softmax(-1)

    def note(self, tokens: Tensor) -> None:
        """Tokens [all rows] -> `noted`, by row."""
        chosen = tokens[self._rows]
        own = self._all.gather(-1, chosen[:, None]).squeeze(-1).tolist()
        values, ids = (found.tolist() for found in self._all.topk(max(self._wanted)))
        self.noted = {
            row: TokenLogprob(token, own[at], tuple(zip(ids[at][:wanted], values[at][:wanted], strict=True)))
            for at, (row, token, wanted) in enumerate(zip(self._places, chosen.tolist(), self._wanted, strict=True))
        }
