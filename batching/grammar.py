"""Guided decoding: before each token is sampled, tokens that the row's grammar does not allow are masked out.

Matching runs on a helper thread, from the moment the tokens are known until the next logits are ready, so that it
overlaps the model's forward pass. `GuidedDecoding` does it for logits on the device; the packed engine's kernels read
`Bitmask` itself.

A row never fails because of its grammar, and never affects its neighbours. A matcher that raises, allows nothing where
the text may not end, or takes too long is dropped and logged; its row continues without a grammar but can no longer
stop, so that its answer is cut by length.
"""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from batching.errors import UNWINDING
from batching.logits_processors import ForcedRow
from batching.types import Grammar, Matcher, Request, TokenBitmask

logger = logging.getLogger(__name__)

SLOW_START, SLOW_STEP = 0.5, 0.005
"""CPU seconds that a matcher may take: at the start, and in addition per step. Usual is 0.0001 per step."""

LOWEST = torch.finfo(torch.float32).min


class GuidedRow:
    """A row whose next token depends, on the host, on the previous one: it has a grammar or forced tokens.

    Where the text may end, its stop tokens are allowed too, and only they once the grammar is complete. A row without
    stop tokens (clients can ignore them) only ends by length and is unrestricted once its grammar is complete. A row
    that sampled a stop token has finished and is unrestricted as well, whatever tokens it still gets.

    `begin` and `accept_token` write the tokens allowed next to `allowed` [vocabulary / 32], and do not raise.
    """

    def __init__(self, request: Request, vocab_size: int, *, takes_forced: bool = True) -> None:
        self._id = request.id
        self._stop_ids = request.sampling.stop_token_ids
        self._stops = _bitmask_of(self._stop_ids, vocab_size)
        self._new_grammar: Grammar | None = request.grammar
        self._matcher: Matcher | None = None
        self._was_dropped = False
        self._time_left = SLOW_START
        forced = request.sampling.forced if takes_forced else None
        self._forced = ForcedRow(forced) if forced else None

    @staticmethod
    def is_needed(request: Request) -> bool:
        """Whether a request needs a guided row."""
        return request.grammar is not None or request.sampling.forced is not None

    @property
    def is_restricted(self) -> bool:
        """Whether some tokens are not allowed; False once its grammar is complete, and for ever then."""
        return self._new_grammar is not None or self._matcher is not None or self._was_dropped

    def begin(self, allowed: TokenBitmask) -> None:
        """Before the first token. Once more, if `allowed` is another place than before: the same."""
        self._match(None, allowed)

    def accept_token(self, token: int, allowed: TokenBitmask) -> None:
        """Take the row's newest token."""
        if self._matcher is not None and token in self._stop_ids:
            self._matcher = None
        if self._forced is not None:
            self._forced.accept_token(token)
        self._match(token, allowed)

    def _match(self, token: int | None, allowed: TokenBitmask) -> None:
        self._try_to_match(token, allowed)
        if self._matcher is None:
            allowed[:] = ~self._stops if self._was_dropped else -1
        forced = self._forced.next_token if self._forced is not None else None
        if forced is not None:
            allowed[:] = 0
            allowed.view(np.uint32)[forced // 32] = np.uint32(1) << np.uint32(forced % 32)

    def _try_to_match(self, token: int | None, allowed: TokenBitmask) -> None:
        started = time.thread_time()
        try:
            if self._new_grammar is not None:
                self._matcher, self._new_grammar = self._new_grammar.matcher(), None
            elif self._matcher is not None and token is not None:
                self._matcher.advance(token)
            if self._matcher is not None:
                self._fill(self._matcher, allowed)
            self._time_left += SLOW_STEP - (time.thread_time() - started)
            if self._time_left < 0:
                raise TimeoutError("the grammar took too long")
        except UNWINDING:
            raise
        except BaseException:
            logger.warning("request %s continues without its grammar", self._id, exc_info=True)
            self._matcher = self._new_grammar = None
            self._was_dropped = True

    def _fill(self, matcher: Matcher, allowed: TokenBitmask) -> None:
        allowed[:] = 0
        may_end = matcher.fill(allowed)
        if may_end:
            allowed |= self._stops
        if not allowed.any():
            if not may_end:
                raise ValueError("the grammar allows no token here")
            self._matcher = None


class Bitmask:
    """The tokens allowed next in some rows, [rows, vocabulary / 32, int32], written by a thread of its own.

    The thread ends when this is collected.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        """In memory from which copies to `device` need no wait."""
        shape = rows, -(-vocab_size // 32)
        self._tensor = torch.full(shape, -1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._rows: TokenBitmask = self._tensor.numpy()
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._written: Future[None] | None = None

    def begin(self, guided: GuidedRow, row: int) -> None:
        """Let a guided row have this one."""
        self._written = self._helper.submit(guided.begin, self._rows[row])

    def accept_tokens(self, guided: Sequence[GuidedRow], tokens: Sequence[int], rows: Sequence[int]) -> None:
        """The newest token of each, in order."""
        self._written = self._helper.submit(self._accept, guided, tokens, rows)

    def wait(self) -> Tensor:
        """All rows. They are as returned until the next call of another method."""
        if self._written is not None:
            self._written.result()
        return self._tensor

    def _accept(self, guided: Sequence[GuidedRow], tokens: Sequence[int], rows: Sequence[int]) -> None:
        for one, token, row in zip(guided, tokens, rows, strict=True):
            one.accept_token(token, self._rows[row])


class GuidedDecoding:
    """`LogitsProcessor` of the rows of a batch that have a grammar."""

    def __init__(self, rows: Sequence[int], requests: Sequence[Request], vocab_size: int, device: torch.device) -> None:
        self._rows = torch.tensor(rows, device=device)
        self._all_rows = len(rows) == len(requests)
        self._vocab_size = vocab_size
        # The upper bounds of a byte's eight tokens, for each byte value. A lookup and a minimum, because unpacking bits
        # and masked filling are five times slower in torch on the CPU.
        octets = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        self._ceilings = torch.tensor(np.where(octets, np.inf, -np.inf), dtype=torch.float32, device=device)
        self._bitmask = Bitmask(len(rows), vocab_size, device)
        # Forced tokens are a processor of their own.
        self._guided = [GuidedRow(requests[row], vocab_size, takes_forced=False) for row in rows]
        for place, guided in enumerate(self._guided):
            self._bitmask.begin(guided, place)

    @classmethod
    def of(cls, requests: Sequence[Request], vocab_size: int, device: torch.device) -> "GuidedDecoding | None":
        """The grammars of a batch, or None if no row has one."""
        rows = [row for row, request in enumerate(requests) if request.grammar is not None]
        return cls(rows, requests, vocab_size, device) if rows else None

    def apply(self, logits: Tensor) -> None:
        """Set the logits [all rows, vocabulary, float32] of tokens that are not allowed to -inf, in place.

        At least one logit of each row is finite afterwards, even if every token its grammar allows was masked before.
        """
        bitmask = self._bitmask.wait()
        if not self._is_restricted():
            return
        # Little-endian, like all supported platforms.
        octets = bitmask.to(logits.device, non_blocking=True).view(torch.uint8)
        ceilings = embedding(octets.int(), self._ceilings).flatten(1)[:, : self._vocab_size]
        chosen = logits if self._all_rows else logits[self._rows]
        torch.minimum(chosen.clamp_(min=LOWEST), ceilings, out=chosen)
        if not self._all_rows:
            logits[self._rows] = chosen

    def accept_tokens(self, tokens: Tensor) -> None:
        """Take the sampled tokens [all rows]. Waits for the device, then returns at once."""
        if self._is_restricted():
            mine = (tokens if self._all_rows else tokens[self._rows]).tolist()
            self._bitmask.accept_tokens(self._guided, mine, range(len(mine)))

    def _is_restricted(self) -> bool:
        return any(guided.is_restricted for guided in self._guided)


def _bitmask_of(tokens: frozenset[int], vocab_size: int) -> TokenBitmask:
    """A set of tokens as a bitmask; tokens beyond the vocabulary are left out."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[[token for token in tokens if 0 <= token < vocab_size]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
