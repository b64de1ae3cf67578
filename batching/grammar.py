"""Guided decoding: before each token is sampled, tokens that the row's grammar does not allow are masked out.

The worker thread calls `apply` and `accept_tokens` once a step. Matching itself runs on a helper thread, from the
moment the tokens are known until the next logits are ready, so that it overlaps the model's forward pass.

A row never fails because of its grammar, and never affects its neighbours. A matcher that raises, allows nothing where
the text may not end, or takes too long is dropped and logged; its row continues without a grammar but can no longer
stop, so that its answer is cut by length.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from batching.errors import UNWINDING
from batching.logits_processors import ForcedTokens
from batching.types import Grammar, Matcher, Request, TokenBitmask

logger = logging.getLogger(__name__)

SLOW_START, SLOW_STEP = 0.5, 0.005
"""CPU seconds that a matcher may take: at the start, and in addition per step. Usual is 0.0001 per step."""

LOWEST = torch.finfo(torch.float32).min


class GuidedDecoding:
    """`LogitsProcessor` of the rows of a batch that have a grammar.

    Where a row's text may end, its stop tokens are allowed too, and only they once its grammar is complete. A row
    without stop tokens (clients can ignore them) only ends by length and is unrestricted once its grammar is complete.
    A row that sampled a stop token has finished and is unrestricted as well, whatever tokens it still gets.
    """

    def __init__(
        self,
        grammars: dict[int, Grammar],
        requests: Sequence[Request],
        vocab_size: int,
        device: torch.device,
        helper: ThreadPoolExecutor | None = None,
    ) -> None:
        rows = list(grammars)
        self._ids = [requests[row].id for row in rows]
        self._rows = torch.tensor(rows, device=device)
        self._all_rows = len(rows) == len(requests)
        self._vocab_size = vocab_size
        # The upper bounds of a byte's eight tokens, for each byte value. A lookup and a minimum, because unpacking bits
        # and masked filling are five times slower in torch on the CPU.
        octets = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        self._ceilings = torch.tensor(np.where(octets, np.inf, -np.inf), dtype=torch.float32, device=device)
        shape = len(rows), -(-vocab_size // 32)
        self._pinned = torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._allowed: TokenBitmask = self._pinned.numpy()
        self._stop_ids = [requests[row].sampling.stop_token_ids for row in rows]
        self._stops: TokenBitmask = np.stack([_bitmask_of(ids, vocab_size) for ids in self._stop_ids])
        self._matchers: list[Matcher | None] = [None] * len(rows)
        self._time_left = [SLOW_START] * len(rows)
        self._num_unrestricted = 0
        # A thread of its own ends with the batch, when its executor is collected.
        self._helper = helper or ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._filled: Future[None] = self._helper.submit(self._begin, list(grammars.values()))

    @classmethod
    def of(
        cls,
        requests: Sequence[Request],
        vocab_size: int,
        device: torch.device,
        helper: ThreadPoolExecutor | None = None,
    ) -> "GuidedDecoding | None":
        """The grammars of a batch, or None if no row has one. `helper` is the thread to match them on."""
        grammars = {row: request.grammar for row, request in enumerate(requests) if request.grammar is not None}
        return cls(grammars, requests, vocab_size, device, helper) if grammars else None

    def bitmask(self) -> TokenBitmask:
        """The allowed next tokens, [rows with a grammar, vocabulary / 32]. Valid until `accept_tokens`."""
        self._filled.result()
        return self._allowed

    def apply(self, logits: Tensor) -> None:
        """Set the logits [all rows, vocabulary, float32] of tokens that are not allowed to -inf, in place.

        At least one logit of each row is finite afterwards, even if every token its grammar allows was masked before.
        """
        self.bitmask()
        if self._num_unrestricted == len(self._matchers):
            return
        octets = self._pinned.to(logits.device, non_blocking=True).view(
            torch.uint8
        )  # little-endian, like all supported platforms
        ceilings = embedding(octets.int(), self._ceilings).flatten(1)[:, : self._vocab_size]
        chosen = logits if self._all_rows else logits[self._rows]
        torch.minimum(chosen.clamp_(min=LOWEST), ceilings, out=chosen)
        if not self._all_rows:
            logits[self._rows] = chosen

    def accept_tokens(self, tokens: Tensor) -> None:
        """Take the sampled tokens [all rows]. Waits for the device, then returns at once."""
        if self._num_unrestricted < len(self._matchers):
            mine = (tokens if self._all_rows else tokens[self._rows]).tolist()
            self._filled = self._helper.submit(self._step, mine)

    # On the helper thread, while the worker does not look at the result

    def _begin(self, grammars: Sequence[Grammar]) -> None:
        for place, grammar in enumerate(grammars):
            self._attempt(place, partial(self._enter, place, grammar))

    def _step(self, tokens: Sequence[int]) -> None:
        for place, (matcher, token) in enumerate(zip(self._matchers, tokens, strict=True)):
            if matcher is not None and token in self._stop_ids[place]:
                self._release(place)
            elif matcher is not None:
                self._attempt(place, partial(self._move, place, matcher, token))

    def _attempt(self, place: int, action: Callable[[], None]) -> None:
        started = time.thread_time()
        try:
            action()
            self._time_left[place] += SLOW_STEP - (time.thread_time() - started)
            if self._time_left[place] < 0:
                raise TimeoutError("the grammar took too long")
        except UNWINDING:
            raise
        except BaseException:
            logger.warning("request %s continues without its grammar", self._ids[place], exc_info=True)
            self._matchers[place] = None
            self._allowed[place] = ~self._stops[place]

    def _enter(self, place: int, grammar: Grammar) -> None:
        self._matchers[place] = matcher = grammar.matcher()
        self._fill(place, matcher)

    def _move(self, place: int, matcher: Matcher, token: int) -> None:
        matcher.advance(token)
        self._fill(place, matcher)

    def _fill(self, place: int, matcher: Matcher) -> None:
        allowed = self._allowed[place]
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
        self._num_unrestricted += 1


class GuidedRow:
    """A row whose next token depends, on the host, on the previous one: it has a grammar or forced tokens.

    Worker thread only. Grammars are matched on the `helper` thread while the model runs.
    """

    def __init__(self, request: Request, vocab_size: int, helper: ThreadPoolExecutor) -> None:
        host = torch.device("cpu")
        self._guided = GuidedDecoding.of([request], vocab_size, host, helper)
        self._forced = ForcedTokens.of([request], vocab_size, host)
        self._bitmask_width = -(-vocab_size // 32)

    @staticmethod
    def is_needed(request: Request) -> bool:
        """Whether a request needs a guided row."""
        return request.grammar is not None or request.sampling.forced is not None

    def accept_token(self, token: int) -> None:
        """Take the row's newest sampled token."""
        newest = torch.tensor([token])
        if self._guided:
            self._guided.accept_tokens(newest)
        if self._forced:
            self._forced.accept_tokens(newest)

    def bitmask(self) -> TokenBitmask:
        """The allowed next tokens [vocabulary / 32]. Waits for the grammar."""
        forced = self._forced.next_token(0) if self._forced else None
        if forced is not None:
            bitmask = np.zeros(self._bitmask_width, dtype=np.int32)
            bitmask.view(np.uint32)[forced // 32] = np.uint32(1) << np.uint32(forced % 32)
            return bitmask
        if self._guided:
            mine: TokenBitmask = self._guided.bitmask()[0]
            return mine
        return np.full(self._bitmask_width, -1, dtype=np.int32)


def _bitmask_of(tokens: frozenset[int], vocab_size: int) -> TokenBitmask:
    """A set of tokens as a bitmask; tokens beyond the vocabulary are left out."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[[token for token in tokens if 0 <= token < vocab_size]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
