"""The bounded queue between the handlers and the worker, and the policy that picks a batch from it.

Lives on the event loop's thread. The policy:

1. The oldest row is always taken, so the head of the line is first come, first served.
2. The rest of the batch prefers the rows whose prompts are nearest in length to the head's, the ones that waste the
   least padding beside it.
3. A row may be passed over (a later row taken before it) `MAX_PASSED_OVER` times. After that nothing that came later
   is taken before it.
4. A batch holds at most `max_rows` rows and costs at most `token_budget` padded tokens, where the cost is
   rows x (longest prompt + longest allowed output): the memory that a padded batch can come to need.
"""

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from batching.row import Row

MAX_PASSED_OVER = 3


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one batch may hold: rows, and padded tokens (rows x (longest prompt + longest allowed output))."""

    max_rows: int
    token_budget: int


def padded_cost(rows: Iterable[Row]) -> int:
    """Padded tokens that a batch of these rows can come to: rows x (longest prompt + longest output)."""
    requests = [row.request for row in rows]
    longest_prompt = max(len(request.prompt) for request in requests)
    longest_output = max(request.sampling.max_tokens for request in requests)
    return len(requests) * (longest_prompt + longest_output)


class RowQueue:
    """Rows that wait for a batch, oldest first. `limit` bounds how many; the caller checks `room` before `push`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rows: dict[Row, None] = {}  # a dict for its order and its O(1) removal
        self._changed = asyncio.Event()
        self.prompt_tokens = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    @property
    def room(self) -> int:
        """How many more rows may wait."""
        return self._limit - len(self._rows)

    @property
    def oldest(self) -> Row:
        return next(iter(self._rows))

    def push(self, row: Row) -> None:
        self._rows[row] = None
        self.prompt_tokens += len(row.request.prompt)
        self._changed.set()

    def discard(self, row: Row) -> bool:
        """Forget a row that ended while it waited; False if it was not here."""
        if row not in self._rows:
            return False
        del self._rows[row]
        self.prompt_tokens -= len(row.request.prompt)
        self._changed.set()
        return True

    async def change(self) -> None:
        """Wait until a row came or went."""
        self._changed.clear()
        await self._changed.wait()

    def take(self, limits: BatchLimits) -> list[Row]:
        """Remove the next batch and return it, oldest row first. Empty if no row waits."""
        batch = select(list(self._rows), limits)
        for row in batch:
            self.discard(row)
        return batch


def select(waiting: list[Row], limits: BatchLimits) -> list[Row]:
    """The batch that the policy picks from `waiting` (oldest first); marks the rows it passes over."""
    if not waiting:
        return []
    batch = Batch(waiting[0], limits)
    rest = waiting[1:]
    for place, row in enumerate(rest):
        if row.passed_over >= MAX_PASSED_OVER and not batch.add(row):
            rest = rest[:place]
            break
    head = len(waiting[0].request.prompt)
    for row in sorted(rest, key=lambda row: abs(len(row.request.prompt) - head)):
        if row.passed_over < MAX_PASSED_OVER:
            batch.add(row)
    taken = [row for row in waiting if row in batch.rows]
    for row in waiting[: waiting.index(taken[-1])]:
        row.passed_over += row not in batch.rows
    return taken


class Batch:
    """A batch being filled: it knows its cost so that asking whether one more row fits is O(1)."""

    def __init__(self, head: Row, limits: BatchLimits) -> None:
        self._limits = limits
        self._longest_prompt = self._longest_output = 0
        self.rows: set[Row] = set()
        # The head is taken whatever it costs: `submit` refuses a row that does not fit a batch of its own.
        self._admit(head)

    def add(self, row: Row) -> bool:
        """Take the row if the batch still keeps its limits with it."""
        prompt, output = self._with(row)
        size = len(self.rows) + 1
        if size > self._limits.max_rows or size * (prompt + output) > self._limits.token_budget:
            return False
        self._admit(row)
        return True

    def _with(self, row: Row) -> tuple[int, int]:
        request = row.request
        return (
            max(self._longest_prompt, len(request.prompt)),
            max(self._longest_output, request.sampling.max_tokens),
        )

    def _admit(self, row: Row) -> None:
        self._longest_prompt, self._longest_output = self._with(row)
        self.rows.add(row)
