"""The decode loop of packed rows: who is processed next, who joins, who leaves. Worker thread only.

A round has three parts: a piece of the waiting prompts, a step of all running rows, and the news of the round before.
Reading one round behind, the device always has its next orders when it has carried out the last. A row that turns out
to be over has then got one token more, which is dropped.
"""

import logging
from collections import deque
from collections.abc import Mapping, Sequence

from batching.engine import Steps
from batching.packed.attention import Piece
from batching.packed.kv_cache import Pool
from batching.packed.runner import Choice, Runner, Seat
from batching.stream import Row
from batching.types import TokenLogprob

logger = logging.getLogger(__name__)


class DecodeLoop:
    """One batch, from its first rows to the end of the last one that joined.

    A round processes at most `piece` prompt tokens, which is how long running rows are held up; but `burst` while more
    rows wait for their prompts than run, for many are served sooner then and few are held up longer. With
    `one_prompt_a_pass` no prompt shares a pass with another: what is computed for it does not depend on who waits.
    """

    def __init__(
        self, runner: Runner, pool: Pool, steps: Steps, *, piece: int, burst: int, one_prompt_a_pass: bool = False
    ) -> None:
        self._runner = runner
        self._pool = pool
        self._steps = steps
        self._piece = piece
        self._burst = burst
        self._one_prompt_a_pass = one_prompt_a_pass
        self._free = list(range(runner.lanes))
        self._waiting: deque[Row] = deque()
        self._reading: list[Seat] = []  # their prompts are not processed yet, first come first
        self._running: list[Seat] = []
        self._unread: deque[Choice] = deque()

    def run(self, rows: Sequence[Row]) -> None:
        """Blocks until every row is over, those that join meanwhile included."""
        self._waiting.extend(rows)
        try:
            while self._waiting or self._reading or self._running or self._unread:
                self._round()
                self._waiting.extend(self._steps.admit())
        finally:
            for seat in self._reading + self._running:  # none, unless it failed
                self._runner.leave(seat)

    def _round(self) -> None:
        self._seat_rows()
        before = len(self._unread)
        self._process_prompts()
        self._step()
        # All but the news of this round, if it has any: the device is busy with those.
        self._deliver(before if len(self._unread) > before else len(self._unread))

    def _seat_rows(self) -> None:
        """Give lanes and extents to waiting rows in their order, until one finds no room."""
        while self._waiting:
            row = self._waiting[0]
            if row.cancelled:
                row.over = True
            elif (seat := self._seat(row)) is not None:
                self._reading.append(seat)
            else:
                return
            self._waiting.popleft()

    def _seat(self, row: Row) -> Seat | None:
        if not self._free:
            return None
        extent = self._pool.reserve(row.request.total_tokens, row.request.salt)
        if extent is None:
            return None
        seat = Seat(row, self._free.pop(), extent)
        self._runner.enter(seat)
        return seat

    def _process_prompts(self) -> None:
        held_up = sum(seat.wants_step for seat in self._running)
        work = self._next_pieces(self._burst if len(self._reading) > held_up else self._piece)
        if not work:
            return
        self._runner.prompts(work)
        ended = [seat for seat, piece in work if seat.left == piece.count]
        for seat, piece in work:
            seat.done += piece.count
        for seat in ended:
            self._reading.remove(seat)
            self._pool.share(seat.extent, seat.row.request.prompt)
        self._choose(ended)
        self._running += ended

    def _next_pieces(self, most: int) -> list[tuple[Seat, Piece]]:
        work = list[tuple[Seat, Piece]]()
        for seat in list(self._reading):
            if seat.row.cancelled:
                seat.row.over = True
                self._reading.remove(seat)
                self._leave(seat, seat.row.request.prompt[: seat.done])
            elif most:
                if not seat.done:
                    self._take_over_beginning(seat)
                work.append((seat, seat.piece(most)))
                most = 0 if self._one_prompt_a_pass else most - work[-1][1].count
        return work

    def _take_over_beginning(self, seat: Seat) -> None:
        found = self._pool.beginning(seat.row.request.salt, seat.row.request.prompt)
        if found is not None:
            extent, seat.done = found
            self._runner.copy(extent.start, seat.extent.start, seat.done)
            seat.row.reused = seat.done

    def _step(self) -> None:
        seats = [seat for seat in self._running if seat.wants_step]
        if seats:
            self._runner.steps(seats)
            self._choose(seats)

    def _choose(self, seats: Sequence[Seat]) -> None:
        if not seats:
            return
        if self._runner.waits(seats):
            self._deliver(len(self._unread))
        self._unread.append(self._runner.choose(seats))
        for seat in seats:
            seat.begun += 1

    def _deliver(self, choices: int) -> None:
        """Tell what was chosen, in one report, and let go of the rows that are over with it."""
        seats: list[Seat] = []
        tokens: list[int] = []
        logprobs: dict[int, TokenLogprob] = {}
        for _ in range(choices):
            choice = self._unread.popleft()
            chosen, noted = choice.read()
            logprobs |= shifted(noted, len(seats))
            seats += choice.seats
            tokens += chosen
        if not seats:
            return
        over = self._steps.emit([seat.row for seat in seats], tokens, logprobs)
        gone = set[Seat]()
        for seat, token, is_over in zip(seats, tokens, over, strict=True):
            if is_over:
                gone.add(seat)
            else:
                seat.tokens.append(token)
                self._runner.told(seat, token)
        if gone:
            for seat in gone.intersection(self._running):
                self._leave(seat, seat.tokens)
            self._running = [seat for seat in self._running if seat not in gone]

    def _leave(self, seat: Seat, tokens: Sequence[int]) -> None:
        self._pool.release(seat.extent, tokens)
        self._runner.leave(seat)
        self._free.append(seat.lane)


def shifted(noted: Mapping[int, TokenLogprob], by: int) -> dict[int, TokenLogprob]:
    """The same with each place moved on."""
    return {place + by: logprob for place, logprob in noted.items()}
