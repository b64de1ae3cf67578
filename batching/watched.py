"""Rows whose next token depends, on the host, on the one before: held to a grammar, or told what to say.

Worker thread only. Grammars are matched on a helper thread while the model runs.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from batching.adjustments import Forcing
from batching.constraint import Constraints, Words
from batching.types import Request


class Watched:
    """One row's rules. `told` each of its tokens, it answers with the tokens that may come next."""

    def __init__(self, request: Request, vocab_size: int, helper: ThreadPoolExecutor) -> None:
        host = torch.device("cpu")
        self._constraints = Constraints.of([request], vocab_size, host, helper)
        self._forcing = Forcing.of([request], vocab_size, host)
        self._words = -(-vocab_size // 32)

    @staticmethod
    def wants(request: Request) -> bool:
        """Whether a row is one."""
        return request.grammar is not None or request.sampling.forced is not None

    def told(self, token: int) -> None:
        """The row's newest token."""
        newest = torch.tensor([token])
        if self._constraints:
            self._constraints.advance(newest)
        if self._forcing:
            self._forcing.advance(newest)

    def allowed(self) -> Words:
        """The tokens that may come next, one bit each. Waits for the grammar."""
        forced = self._forcing.next_of(0) if self._forcing else None
        if forced is not None:
            words = np.zeros(self._words, dtype=np.int32)
            words.view(np.uint32)[forced // 32] = np.uint32(1) << np.uint32(forced % 32)
            return words
        if self._constraints:
            mine: Words = self._constraints.words()[0]
            return mine
        return np.full(self._words, -1, dtype=np.int32)
