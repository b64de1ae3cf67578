"""Holding a row to a grammar: before each token is chosen, the tokens that may not come next are ruled out.

The worker thread calls `apply` and `advance` once a step. Matching itself runs on a helper thread of the batch's own,
from the moment the tokens are known until the next logits are there, so that it overlaps the model's forward pass.

A row never fails because of its grammar, and never harms its neighbours. A matcher that raises, or that allows nothing
where the text may not end, is dropped and logged; its row goes on without one but may no longer stop, so that its
answer is one cut by length.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batching.types import Request

logger = logging.getLogger(__name__)

Words = NDArray[np.int32]
"""A set of tokens: token t is bit t % 32 of word t // 32."""

LOWEST = torch.finfo(torch.float32).min


class Matcher(Protocol):
    """One row's place in its grammar. Only ever called by one thread at a time. Both methods may raise anything."""

    def fill(self, allowed: Words) -> bool:
        """Add the tokens that may come next to `allowed`, which comes empty; True if the text may end here.

        Nothing to add and True: the grammar is complete.
        """
        ...

    def advance(self, token: int) -> None:
        """Take a token. Raises ValueError if it may not come next."""
        ...


class Grammar(Protocol):
    """A compiled grammar, immutable and shared by any number of rows."""

    def matcher(self) -> Matcher:
        """A new row's place: the grammar's beginning. Any thread."""
        ...


class Constraints:
    """The grammars of the rows of one batch that have one.

    Where a row's text may end its stop tokens are allowed too, and they alone where its grammar is complete. A row
    without stop tokens (a client may ask to ignore them) has no other way to end than its length: it is free once its
    grammar is complete. A row that drew a stop token is over and free as well, whatever it goes on to receive.
    """

    def __init__(self, rows: list[int], requests: Sequence[Request], vocab_size: int, device: torch.device) -> None:
        self._ids = [requests[row].id for row in rows]
        self._rows = torch.tensor(rows, device=device)
        self._everyone = len(rows) == len(requests)
        self._vocab_size = vocab_size
        self._bits = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)
        shape = len(rows), -(-vocab_size // 32)
        self._packed = torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._allowed: Words = self._packed.numpy()
        self._stop_ids = [requests[row].sampling.stop_token_ids for row in rows]
        self._stops: Words = np.stack([_packed(ids, vocab_size) for ids in self._stop_ids])
        self._matchers: list[Matcher | None] = [None] * len(rows)
        self._free = 0
        # It ends with the batch: an executor that nobody holds any more lets its thread go.
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._filled: Future[None] = self._helper.submit(self._begin, [requests[row].grammar for row in rows])

    @classmethod
    def of(cls, requests: Sequence[Request], vocab_size: int, device: torch.device) -> "Constraints | None":
        """The constraints of a batch, or None if no row has a grammar."""
        rows = [row for row, request in enumerate(requests) if request.grammar is not None]
        return cls(rows, requests, vocab_size, device) if rows else None

    def apply(self, logits: Tensor) -> None:
        """Set the logits [all rows, vocabulary, float32] of what may not come next to -inf, in place.

        At least one logit of each row is finite afterwards, even if all that its grammar allows was ruled out before.
        """
        self._filled.result()
        if self._free == len(self._matchers):
            return
        octets = self._packed.to(logits.device, non_blocking=True).view(
            torch.uint8
        )  # little-endian, as all targets are
        barred = ((octets[:, :, None] & self._bits) == 0).flatten(1)[:, : self._vocab_size]
        chosen = logits if self._everyone else logits[self._rows]
        chosen.clamp_(min=LOWEST).masked_fill_(barred, float("-inf"))
        if not self._everyone:
            logits[self._rows] = chosen

    def advance(self, tokens: Tensor) -> None:
        """Take the tokens [all rows] that were chosen. Waits for the device, then returns at once."""
        if self._free < len(self._matchers):
            mine = (tokens if self._everyone else tokens[self._rows]).tolist()
            self._filled = self._helper.submit(self._step, mine)

    # On the helper thread, while the worker does not look

    def _begin(self, grammars: Sequence[Grammar | None]) -> None:
        for place, grammar in enumerate(grammars):
            try:
                assert grammar is not None
                self._matchers[place] = grammar.matcher()
                self._fill(place)
            except Exception:
                self._fail(place)

    def _step(self, tokens: Sequence[int]) -> None:
        for place, token in enumerate(tokens):
            matcher = self._matchers[place]
            if matcher is None:
                continue
            if token in self._stop_ids[place]:
                self._release(place)
                continue
            try:
                matcher.advance(token)
                self._fill(place)
            except Exception:
                self._fail(place)

    def _fill(self, place: int) -> None:
        matcher, allowed = self._matchers[place], self._allowed[place]
        assert matcher is not None
        allowed[:] = 0
        may_end = matcher.fill(allowed)
        if may_end:
            allowed |= self._stops[place]
        if not allowed.any():
            if not may_end:
                raise ValueError("the grammar allows no token here")
            self._release(place)

    def _release(self, place: int) -> None:
        self._matchers[place] = None
        self._allowed[place] = -1
        self._free += 1

    def _fail(self, place: int) -> None:
        logger.warning("request %s goes on without its grammar", self._ids[place], exc_info=True)
        self._matchers[place] = None
        self._allowed[place] = ~self._stops[place]


def _packed(tokens: frozenset[int], vocab_size: int) -> Words:
    """A set of tokens as words; those beyond the vocabulary are left out."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[[token for token in tokens if 0 <= token < vocab_size]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
