"""The bounded queue between the handlers and the worker, and the policy that picks a batch from it.

Lives on the event loop's thread. The policy:

1. Rows are ordered by virtual finish time (`FairOrder`): clients share by weight, and one client's rows stay in order
   of arrival, or of priority. The head of the queue is always taken if there is room for it.
2. For padded batches, the rest of the batch prefers rows whose prompts are closest in length to the head's, which waste
   the least padding. Otherwise rows are taken in order.
3. A row may be passed over (a row behind it taken before it) `MAX_PASSED_OVER` times. After that nothing behind it is
   taken before it.
4. A batch holds at most `max_rows` rows and costs at most `token_budget` tokens. Padded: rows x (longest prompt +
   longest allowed output), the most memory that the batch can need; and that length is at most the context window,
   because rows that are finished stay in the batch, and some models have nothing for positions beyond it. Otherwise:
   the sum of the rows' current tokens, because memory is allocated as rows grow.
5. Where clients share and rows can join, one client may hold at most `CLIENT_SHARE` times as many running rows, and as
   much of the token budget, as it leaves free, so that the next client finds room at once.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from batching.stream import Row
from batching.types import Request


class Priorities:
    """One client's order, by self-clocked fair queueing (Golestani 1994) between its priorities.

    Each step of priority halves a request's cost, so that urgent requests go first without starving the others.
    Requests of the same priority are served in order of arrival.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._finish_times: dict[int, float] = {}

    def cost(self, request: Request) -> float:
        """What a request takes of the client's own clock."""
        return request.total_tokens * 2.0**request.priority

    def finish_time(self, request: Request) -> float:
        """The virtual finish time, on the client's own clock, of a request that arrives now."""
        end = self._finish_times.get(request.priority, 0.0)
        return max(self._now, end) + self.cost(request)

    def schedule(self, request: Request) -> float:
        """The same, and the next request of its priority is placed after it."""
        finish = self._finish_times[request.priority] = self.finish_time(request)
        return finish

    def unschedule(self, request: Request) -> None:
        """Take back what was scheduled for a request that was not served."""
        self._finish_times[request.priority] -= self.cost(request)

    def served(self, finish: float) -> None:
        self._now = max(self._now, finish)


class Client:
    """One client's waiting rows. `start`: the virtual time up to which it has been served."""

    def __init__(self, start: float) -> None:
        self.start = start
        self.rows: list[Row] = []
        self.priorities = Priorities()

    def place_of(self, rank: float) -> int:
        """The place for a row of this rank. Searched from the end, where most belong."""
        place = len(self.rows)
        while place and self.rows[place - 1].rank > rank:
            place -= 1
        return place

    def move_up(self, left: Row) -> None:
        """Let the rows of its priority behind one that leaves, not served, take its place."""
        request, cost = left.request, self.priorities.cost(left.request)
        for row in self.rows[self.rows.index(left) + 1 :]:
            if row.request.priority == request.priority:
                row.rank -= cost
        self.priorities.unschedule(request)
        self.rows.sort(key=lambda row: row.rank)


class FairOrder:
    """Waiting rows by virtual finish time: self-clocked fair queueing (Golestani 1994) between clients.

    A row takes its tokens / its client's weight, after its client's earlier rows. So waiting clients share the device
    by weight whatever their priorities, and an idle client earns no credit.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._clients: dict[str, Client] = {}
        self._served_until: dict[str, float] = {}
        self._ordered: list[Row] | None = []

    def __len__(self) -> int:
        return sum(len(client.rows) for client in self._clients.values())

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows())

    def __contains__(self, row: Row) -> bool:
        client = self._clients.get(row.request.client)
        return client is not None and row in client.rows

    def of_client(self, name: str) -> list[Row]:
        """The rows of one client, in its own order."""
        client = self._clients.get(name)
        return client.rows if client else []

    def rows(self) -> list[Row]:
        """All rows in order of service. Recomputed only after a change; callers must not modify it."""
        if self._ordered is None:
            for client in self._clients.values():
                finish = client.start
                for row in client.rows:
                    finish += row.request.total_tokens / row.request.weight
                    row.virtual_finish = finish
            waiting = [row for client in self._clients.values() for row in client.rows]
            self._ordered = sorted(waiting, key=lambda row: row.virtual_finish)
        return self._ordered

    def ahead_of(self, request: Request) -> int:
        """How many rows would be served before this request."""
        client = self._clients.get(request.client) or Client(self._start_of(request.client))
        place = client.place_of(client.priorities.finish_time(request))
        cost = sum(row.request.total_tokens for row in client.rows[:place]) + request.total_tokens
        finish = client.start + cost / request.weight
        others = (row for row in self.rows() if row.request.client != request.client)
        return place + sum(row.virtual_finish <= finish for row in others)

    def add(self, row: Row) -> None:
        name = row.request.client
        client = self._clients.setdefault(name, Client(self._start_of(name)))
        row.rank = client.priorities.schedule(row.request)
        client.rows.insert(client.place_of(row.rank), row)
        self._ordered = None

    def remove(self, row: Row) -> None:
        """Remove a row that was not served; those behind it move up."""
        self._clients[row.request.client].move_up(row)
        self._drop(row)

    def _drop(self, row: Row) -> None:
        name = row.request.client
        client = self._clients[name]
        client.rows.remove(row)
        if not client.rows:
            del self._clients[name]
            self._served_until[name] = client.start
        self._ordered = None

    def serve(self, batch: list[Row]) -> None:
        """Remove rows that are served now. The clock advances to the finish time of the first of them."""
        self._now = max(self._now, batch[0].virtual_finish)
        for row in batch:
            client = self._clients[row.request.client]
            client.start += row.request.total_tokens / row.request.weight
            client.priorities.served(row.rank)
            self._drop(row)
        self._served_until = {name: end for name, end in self._served_until.items() if end > self._now}

    def _start_of(self, name: str) -> float:
        """The start of a client without waiting rows: an earlier debt counts, a credit does not."""
        return max(self._now, self._served_until.get(name, 0.0))


MAX_PASSED_OVER = 3
CLIENT_SHARE = 3
"""A client may hold this many times what it leaves free: three quarters of everything if it is alone (dynamic
thresholds, Choudhury and Hahne 1998)."""

FIRST_OUTPUT = 64
"""Minimum number of output tokens that a row is counted with: a block of the KV cache."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Limits of a batch: rows, and tokens with or without padding; with it, also the length (None: no limit)."""

    max_rows: int
    token_budget: int
    padded: bool = True
    max_length: int | None = None

    def less(self, rows: int, tokens: int) -> "BatchLimits":
        """The limits less this many rows and tokens."""
        return replace(self, max_rows=self.max_rows - rows, token_budget=self.token_budget - tokens)

    def hold(self, requests: Sequence[Request]) -> int:
        """How many of these, at least one, might be served together if all were as long as the longest."""
        cost = max(request.total_tokens if self.padded else first_cost(request) for request in requests)
        return max(0, min(len(requests), self.max_rows, self.token_budget // cost))


def first_cost(request: Request) -> int:
    """Tokens of memory that a request needs without padding to be let into a batch: its prompt and `FIRST_OUTPUT`."""
    return len(request.prompt) + min(FIRST_OUTPUT, request.sampling.max_tokens)


def growing_cost(row: Row) -> int:
    """Tokens of memory that a row holds without padding: its prompt, less what it shares with other rows, and its
    output, which counts as at least `FIRST_OUTPUT`."""
    request = row.request
    output = max(row.num_output_tokens, min(FIRST_OUTPUT, request.sampling.max_tokens))
    return len(request.prompt) - row.num_shared_tokens + output


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Queue limits: rows in total, and rows and tokens (prompts and allowed outputs) per client; None: no limit.

    `shared`: clients leave room for each other. Each may have at most `CLIENT_SHARE` times as many waiting rows as
    there are free places (dynamic thresholds, Choudhury and Hahne 1998): three quarters of the queue if it is alone,
    less beside others, so that newcomers find places.
    """

    rows: int
    client_rows: int | None = None
    client_tokens: int | None = None
    shared: bool = False

    def allow(self, requests: Sequence[Request]) -> bool:
        """Whether all of these, which are one client's, fit in an empty queue."""
        too_many = len(requests) > min(self.rows, self.client_rows or self.rows)
        too_long = self.client_tokens is not None and sum(r.total_tokens for r in requests) > self.client_tokens
        return not (too_many or too_long) and self.leaves_room(len(requests), len(requests), self.rows)

    def leaves_room(self, new: int, own: int, free: int) -> bool:
        """Whether a client may take `new` of `free` places, which makes `own` waiting rows."""
        return new <= free and (not self.shared or own <= CLIENT_SHARE * (free - new + 1))


class RowQueue:
    """Rows that wait for a batch, in order of service. The caller checks `has_room` before it pushes."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._rows = FairOrder()
        self._changed = asyncio.Event()
        self.prompt_tokens = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def has_room(self, requests: Sequence[Request]) -> bool:
        """Whether all of these, which are one client's, fit in the queue now."""
        own = [row.request for row in self._rows.of_client(requests[0].client)]
        free = self._limits.rows - len(self)
        roomy = self._limits.leaves_room(len(requests), len(own) + len(requests), free)
        return roomy and self._limits.allow([*requests, *own])

    def is_full_for(self, client: str) -> bool:
        """Whether not even one more row of this client fits in the queue now."""
        limits, own = self._limits, len(self._rows.of_client(client)) + 1
        too_many = limits.client_rows is not None and own > limits.client_rows
        return too_many or not limits.leaves_room(1, own, limits.rows - len(self))

    def ahead_of(self, request: Request) -> int:
        """How many rows would be served before this request."""
        return self._rows.ahead_of(request)

    @property
    def first_arrival(self) -> float:
        """When the longest waiting row arrived, in monotonic seconds."""
        return min(row.arrived for row in self._rows)

    def push(self, row: Row) -> None:
        self._rows.add(row)
        self.prompt_tokens += len(row.request.prompt)
        self._changed.set()

    def discard(self, row: Row) -> bool:
        """Remove a row that ended while it waited; False if it was not in the queue."""
        if row not in self._rows:
            return False
        self._rows.remove(row)
        self.prompt_tokens -= len(row.request.prompt)
        self._changed.set()
        return True

    def wake(self) -> None:
        """End a wait in `change` without a change."""
        self._changed.set()

    async def change(self) -> None:
        """Wait until a row is added or removed."""
        self._changed.clear()
        await self._changed.wait()

    def take(self, limits: BatchLimits, running: Iterable[Row] = ()) -> list[Row]:
        """Remove and return the next batch, in order of service. Empty if no row waits or none may run now.

        `limits` are what the `running` rows leave of the limits.
        """
        waiting = self._rows.rows()
        shared = self._limits.shared and not limits.padded
        batch = select(within_shares(waiting, limits, running) if shared else waiting, limits)
        if batch:
            self._rows.serve(batch)
            self.prompt_tokens -= sum(len(row.request.prompt) for row in batch)
            self._changed.set()
        return batch


def within_shares(waiting: Iterable[Row], limits: BatchLimits, running: Iterable[Row]) -> list[Row]:
    """The rows that can be taken, in order, with each client leaving room for others (`CLIENT_SHARE`).

    A client's first row needs no share, because the others leave room for it.
    """
    rows, tokens = Counter[str](), Counter[str]()
    for row in running:
        rows[row.request.client] += 1
        tokens[row.request.client] += growing_cost(row)
    left, free = limits.max_rows, limits.token_budget
    found = []
    for row in waiting:
        client, cost = row.request.client, growing_cost(row)
        fits = rows[client] < CLIENT_SHARE * (left - 1) and tokens[client] + cost <= CLIENT_SHARE * (free - cost)
        if fits or not rows[client]:
            found.append(row)
            rows[client] += 1
            tokens[client] += cost
            left, free = left - 1, free - cost
    return found


def select(waiting: list[Row], limits: BatchLimits) -> list[Row]:
    """The batch that the policy picks from `waiting` (in order); marks the rows it passes over."""
    if not waiting:
        return []
    batch = Batch(limits)
    rest = waiting
    for place, row in enumerate(waiting):
        due = row.passed_over >= MAX_PASSED_OVER
        if (due or place == 0) and not batch.add(row) and due:
            rest = waiting[:place]
            break
    if limits.padded:
        rest = sorted(rest, key=lambda row: abs(len(row.request.prompt) - len(waiting[0].request.prompt)))
    for row in rest:
        if row.passed_over < MAX_PASSED_OVER and row not in batch.rows:
            batch.add(row)
    taken = [row for row in waiting if row in batch.rows]
    if not taken:
        return []
    for row in waiting[: waiting.index(taken[-1])]:
        row.passed_over += row not in batch.rows
    return taken


class Batch:
    """A batch being filled: it keeps its cost, so that checking whether one more row fits is O(1)."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._longest_prompt = self._longest_output = self._tokens = 0
        self.rows: set[Row] = set()

    def add(self, row: Row) -> bool:
        """Take the row if the batch stays within its limits with it."""
        request = row.request
        prompt = max(self._longest_prompt, len(request.prompt))
        output = max(self._longest_output, request.sampling.max_tokens)
        tokens = self._tokens + growing_cost(row)
        size = len(self.rows) + 1
        cost = size * (prompt + output) if self._limits.padded else tokens
        # A padded batch takes its head whatever it costs: a row that does not fit alone is refused before the queue.
        head = self._limits.padded and size == 1
        if not head and not self._within_limits(size, cost, prompt + output):
            return False
        self._longest_prompt, self._longest_output, self._tokens = prompt, output, tokens
        self.rows.add(row)
        return True

    def _within_limits(self, size: int, cost: int, length: int) -> bool:
        limits = self._limits
        too_long = limits.padded and limits.max_length is not None and length > limits.max_length
        return size <= limits.max_rows and cost <= limits.token_budget and not too_long
