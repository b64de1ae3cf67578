"""In which order waiting rows are served: clients share the device by weight, each by its own priorities.

Lives on the event loop's thread.
"""

from collections.abc import Iterator

from batching.stream import Row
from batching.types import Request


class Priorities:
    """One client's order, by self-clocked fair queueing (Golestani 1994) between its priorities.

    Each step of priority halves a request's cost, so that urgent ones go first and others still come up. Requests of
    the same priority are served in order of arrival.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._finish_times: dict[int, float] = {}

    def finish_time(self, request: Request) -> float:
        """When a request that arrives now would finish, on the client's own virtual clock."""
        end = self._finish_times.get(request.priority, 0.0)
        return max(self._now, end) + request.total_tokens * 2.0**request.priority

    def schedule(self, request: Request) -> float:
        """The same, and the next request of its priority comes after it."""
        finish = self._finish_times[request.priority] = self.finish_time(request)
        return finish

    def served(self, finish: float) -> None:
        self._now = max(self._now, finish)


class Client:
    """The rows of one client that wait. `start`: the virtual time up to which it has been served."""

    def __init__(self, start: float) -> None:
        self.start = start
        self.rows: list[Row] = []
        self.priorities = Priorities()

    def place_of(self, rank: float) -> int:
        """Where a row of this rank would stand. Most belong at the end, so it is looked for from there."""
        place = len(self.rows)
        while place and self.rows[place - 1].rank > rank:
            place -= 1
        return place

    def cost_until(self, place: int) -> int:
        """Tokens of the rows before a place."""
        return sum(row.request.total_tokens for row in self.rows[:place])


class FairOrder:
    """Waiting rows by virtual finish time: self-clocked fair queueing (Golestani 1994) between clients.

    A row takes its tokens / its client's weight, after the rows of its client before it. So waiting clients share the
    device by weight whatever their priorities are, and one that was away gets no credit for it.
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
        """All rows in order of service. Computed anew only after a change; not to be changed by the caller."""
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
        cost = client.cost_until(place) + request.total_tokens
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
        """Forget a row that was not served: those behind it move up."""
        name = row.request.client
        client = self._clients[name]
        client.rows.remove(row)
        if not client.rows:
            del self._clients[name]
            self._served_until[name] = client.start
        self._ordered = None

    def serve(self, batch: list[Row]) -> None:
        """Remove rows that are served now. The clock moves on to the finish time of the first of them."""
        self._now = max(self._now, batch[0].virtual_finish)
        for row in batch:
            client = self._clients[row.request.client]
            client.start += row.request.total_tokens / row.request.weight
            client.priorities.served(row.rank)
            self.remove(row)
        self._served_until = {name: end for name, end in self._served_until.items() if end > self._now}

    def _start_of(self, name: str) -> float:
        """Where a client that has no row waiting begins: a debt from before counts, a credit does not."""
        return max(self._now, self._served_until.get(name, 0.0))
