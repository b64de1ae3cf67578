import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.queue import MAX_PASSED_OVER, BatchLimits, QueueLimits, RowQueue, growing_cost, select
from batching.stream import Row
from tests.batching.conftest import Runner, loose_row, request


@dataclass(frozen=True)
class Shape:
    prompt: int
    output: int


SHAPES = st.builds(Shape, prompt=st.integers(1, 60), output=st.integers(1, 60))
LIMITS = st.builds(BatchLimits, max_rows=st.integers(1, 6), token_budget=st.integers(1, 400))
ROOMY = BatchLimits(max_rows=1000, token_budget=10**9)


def rows_of(shapes: Sequence[Shape]) -> list[Row]:
    return [
        loose_row(request(shape.prompt, id=str(place), max_tokens=shape.output)) for place, shape in enumerate(shapes)
    ]


def padded_cost(rows: Sequence[Row]) -> int:
    """Tokens of a padded batch: rows x (longest prompt + longest output)."""
    requests = [row.request for row in rows]
    longest_output = max(request.sampling.max_tokens for request in requests)
    return len(rows) * (max(len(request.prompt) for request in requests) + longest_output)


def prompts(*lengths: int) -> list[Row]:
    return rows_of([Shape(length, 1) for length in lengths])


def lengths(rows: Sequence[Row]) -> list[int]:
    return [len(row.request.prompt) for row in rows]


@given(st.lists(SHAPES, min_size=1, max_size=20), LIMITS)
def test_the_oldest_row_is_always_taken(shapes: list[Shape], limits: BatchLimits) -> None:
    rows = rows_of(shapes)
    assert select(rows, limits)[0] is rows[0]


@given(st.lists(SHAPES, min_size=1, max_size=20), LIMITS)
def test_a_batch_keeps_both_limits_unless_its_head_alone_breaks_them(shapes: list[Shape], limits: BatchLimits) -> None:
    taken = select(rows_of(shapes), limits)
    assert len(taken) <= limits.max_rows
    assert len(taken) == 1 or padded_cost(taken) <= limits.token_budget


@given(st.lists(SHAPES, min_size=1, max_size=20), st.integers(2, 120))
def test_a_padded_batch_is_no_longer_than_the_window(shapes: list[Shape], window: int) -> None:
    rows = [row for row in rows_of(shapes) if row.request.total_tokens <= window]
    taken = select(rows, replace(ROOMY, max_length=window))
    assert not taken or padded_cost(taken) <= len(taken) * window


@given(st.lists(SHAPES, min_size=1, max_size=20), LIMITS)
def test_a_batch_is_in_the_order_of_arrival(shapes: list[Shape], limits: BatchLimits) -> None:
    places = [int(row.request.id) for row in select(rows_of(shapes), limits)]
    assert places == sorted(set(places))


@given(st.lists(SHAPES, min_size=1, max_size=20), LIMITS)
def test_no_row_that_would_fit_is_left_behind(shapes: list[Shape], limits: BatchLimits) -> None:
    rows = rows_of(shapes)
    taken = select(rows, limits)
    if len(taken) < limits.max_rows:
        left = [row for row in rows if row not in taken]
        assert all(padded_cost([*taken, row]) > limits.token_budget for row in left)


@given(st.lists(SHAPES, min_size=1, max_size=20))
def test_all_are_taken_when_all_fit(shapes: list[Shape]) -> None:
    rows = rows_of(shapes)
    exact = BatchLimits(max_rows=len(rows), token_budget=padded_cost(rows))
    assert select(rows, exact) == rows


@given(SHAPES, st.integers(1, 9), LIMITS, st.booleans())
def test_as_many_are_thought_to_fit_as_are_taken_where_all_are_alike(
    shape: Shape, count: int, limits: BatchLimits, padded: bool
) -> None:
    rows, limits = rows_of([shape] * count), replace(limits, padded=padded)
    fitting = limits.hold([row.request for row in rows])
    taken = len(select(rows, limits))
    assert fitting == taken or (fitting, taken) == (0, 1)  # the head is taken though it alone breaks the limits


def test_none_is_thought_to_fit_where_nothing_is_left() -> None:
    assert BatchLimits(max_rows=4, token_budget=100).less(4, 150).hold([request()]) == 0
    assert BatchLimits(max_rows=4, token_budget=100).less(3, 150).hold([request()]) == 0


def test_nothing_is_taken_from_nothing() -> None:
    assert select([], ROOMY) == []
    assert RowQueue(QueueLimits(4)).take(ROOMY) == []


def test_rows_of_near_lengths_are_preferred_when_not_all_fit() -> None:
    rows = prompts(10, 50, 11, 1, 9, 30)
    assert lengths(select(rows, BatchLimits(max_rows=3, token_budget=10**6))) == [10, 11, 9]


def test_a_long_row_does_not_keep_short_ones_out_of_the_budget() -> None:
    rows = prompts(10, 100, 10, 10)
    assert lengths(select(rows, BatchLimits(max_rows=4, token_budget=40 + 4))) == [10, 10, 10]


def test_equally_near_rows_are_taken_first_come_first_served() -> None:
    rows = prompts(10, 10, 10, 10)
    assert select(rows, BatchLimits(max_rows=2, token_budget=10**6)) == rows[:2]


def test_only_rows_before_a_taken_one_are_passed_over() -> None:
    rows = prompts(10, 50, 10, 60)
    select(rows, BatchLimits(max_rows=2, token_budget=10**6))
    assert [row.passed_over for row in rows] == [0, 1, 0, 0]


def test_a_row_passed_over_often_enough_is_taken_before_nearer_ones() -> None:
    rows = prompts(10, 50, 10)
    rows[1].passed_over = MAX_PASSED_OVER
    assert lengths(select(rows, BatchLimits(max_rows=2, token_budget=10**6))) == [10, 50]


def test_nothing_later_is_taken_before_an_aged_row_that_does_not_fit() -> None:
    rows = prompts(10, 11, 100, 10, 10)
    rows[2].passed_over = MAX_PASSED_OVER
    assert lengths(select(rows, BatchLimits(max_rows=4, token_budget=60))) == [10, 11]


@given(st.lists(st.one_of(SHAPES, st.just("take")), max_size=60), LIMITS)
def test_every_row_is_taken_once_and_passed_over_only_so_often(plan: list[Shape | str], limits: BatchLimits) -> None:
    queue = RowQueue(QueueLimits(100))
    waiting: list[Row] = []
    passes: dict[Row, int] = {}

    def take() -> None:
        batch = queue.take(limits)
        assert all(waiting.count(row) == 1 for row in batch), "taken twice, or never pushed"
        last = max((waiting.index(row) for row in batch), default=0)
        for row in waiting[:last]:
            passes[row] += row not in batch
        waiting[:] = [row for row in waiting if row not in batch]

    for step in plan:
        if isinstance(step, Shape):
            (row,) = rows_of([step])
            queue.push(row)
            waiting.append(row)
            passes[row] = 0
        else:
            take()
        assert list(queue) == waiting
        assert len(queue) == len(waiting)
        assert queue.prompt_tokens == sum(lengths(waiting))
    for _ in range(len(waiting)):  # each take removes at least the head, so as many as rows are enough
        take()
    assert waiting == list(queue) == []
    assert queue.prompt_tokens == 0
    assert max(passes.values(), default=0) <= MAX_PASSED_OVER


@given(st.lists(SHAPES, min_size=1, max_size=12), st.data())
def test_a_discarded_row_is_forgotten_and_the_others_keep_their_order(shapes: list[Shape], data: st.DataObject) -> None:
    queue = RowQueue(QueueLimits(100))
    rows = rows_of(shapes)
    for row in rows:
        queue.push(row)
    gone = data.draw(st.sampled_from(rows))
    assert queue.discard(gone)
    assert not queue.discard(gone)
    rows.remove(gone)
    assert list(queue) == rows
    assert queue.prompt_tokens == sum(lengths(rows))
    assert queue.take(ROOMY) == rows


def test_a_queue_is_full_at_its_limit_and_not_before() -> None:
    queue = RowQueue(QueueLimits(2))
    first, second = prompts(1, 1)
    queue.push(first)
    one_more = [request(1)]
    assert queue.has_room(one_more)
    assert not queue.has_room(one_more * 2)
    queue.push(second)
    assert not queue.has_room(one_more)
    queue.discard(first)
    assert queue.has_room(one_more)
    assert not queue.has_room(one_more * 2)
    assert list(queue) == [second]


def test_a_client_has_limits_of_its_own() -> None:
    queue = RowQueue(QueueLimits(100, client_rows=2, client_tokens=50))
    ours = request(10, max_tokens=10, client="us")  # 20 tokens
    theirs = request(10, max_tokens=10, client="them")
    queue.push(loose_row(ours))
    assert queue.has_room([ours])
    assert not queue.has_room([ours, ours])  # three rows
    assert not queue.has_room([request(31, max_tokens=1, client="us")])  # 52 tokens
    assert queue.has_room([theirs, theirs])


COSTS = st.lists(st.integers(1, 40), min_size=30, max_size=30)


@given(costs=st.tuples(COSTS, COSTS, COSTS), weights=st.tuples(*[st.sampled_from([0.5, 1.0, 2.0, 4.0])] * 3))
def test_clients_that_wait_share_by_weight(costs: tuple[list[int], ...], weights: tuple[float, ...]) -> None:
    """The bound of self-clocked fair queueing, while all are waiting: work / weight differs by the largest request."""
    queue = RowQueue(QueueLimits(1000))
    for client, (own, weight) in enumerate(zip(costs, weights, strict=True)):
        for cost in own:
            queue.push(loose_row(request(cost, max_tokens=1, client=str(client), weight=weight)))
    work = [0.0, 0.0, 0.0]
    waiting = [len(own) for own in costs]
    while min(waiting) > 0:
        (row,) = queue.take(BatchLimits(max_rows=1, token_budget=10**6))
        client = int(row.request.client)
        waiting[client] -= 1
        work[client] += row.request.total_tokens / row.request.weight
        largest = [(max(own) + 1) / weight for own, weight in zip(costs, weights, strict=True)]
        for a in range(3):
            for b in range(a):
                assert abs(work[a] - work[b]) <= largest[a] + largest[b] + 1e-9


def test_a_client_that_was_away_gets_no_credit_for_it() -> None:
    queue = RowQueue(QueueLimits(1000))
    alone = BatchLimits(max_rows=1, token_budget=10**6)
    for _ in range(20):
        queue.push(loose_row(request(9, max_tokens=1, client="busy")))
    for _ in range(10):
        queue.take(alone)
    for _ in range(10):
        queue.push(loose_row(request(9, max_tokens=1, client="back")))
    served = [queue.take(alone)[0].request.client for _ in range(10)]
    assert 4 <= served.count("back") <= 6


@given(priorities=st.lists(st.integers(-8, 8), min_size=20, max_size=20))
def test_a_client_s_priorities_take_nothing_from_another(priorities: list[int]) -> None:
    """Whatever one client says of its own requests, the other gets its half."""
    queue = RowQueue(QueueLimits(1000))
    for priority in priorities:
        queue.push(loose_row(request(9, max_tokens=1, client="pushy", priority=priority)))
        queue.push(loose_row(request(9, max_tokens=1, client="plain")))
    served = [queue.take(BatchLimits(max_rows=1, token_budget=10**6))[0].request.client for _ in range(20)]
    for n in range(2, 21, 2):
        assert served[:n].count("plain") == n // 2


def test_an_urgent_request_goes_before_its_client_s_others_and_does_not_starve_them() -> None:
    queue = RowQueue(QueueLimits(1000))
    calm = [loose_row(request(9, max_tokens=1)) for _ in range(4)]
    for row in calm:
        queue.push(row)
    urgent = [loose_row(request(9, max_tokens=1, priority=-1)) for _ in range(8)]
    for row in urgent:
        queue.push(row)
    order = list(queue)
    assert order[0] is urgent[0]
    assert [row for row in order if row in calm] == calm
    assert order.index(calm[1]) < order.index(urgent[-1])


REQUESTS = st.lists(st.tuples(st.integers(1, 50), st.integers(-2, 2), st.booleans()), max_size=12)


@given(REQUESTS, REQUESTS)
def test_rows_that_left_hold_back_none_of_the_client_s_other_ones(
    first: list[tuple[int, int, bool]], later: list[tuple[int, int, bool]]
) -> None:
    queue, other = RowQueue(QueueLimits(rows=1000)), RowQueue(QueueLimits(rows=1000))
    pairs: list[tuple[Row, Row]] = []
    for plan in (first, later):
        gone = []
        for length, priority, leaves in plan:
            row, same = (loose_row(request(length, max_tokens=1, priority=priority)) for _ in range(2))
            queue.push(row)
            if leaves:
                gone.append(row)
            else:
                other.push(same)
                pairs.append((row, same))
        assert all(map(queue.discard, gone))
    assert [row.rank for row, _ in pairs] == [same.rank for _, same in pairs]
    assert [row.rank for row in queue] == sorted(same.rank for _, same in pairs)


@given(
    plan=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 30), st.integers(-2, 2)), max_size=30),
    late=st.tuples(st.sampled_from("abcd"), st.integers(1, 30), st.integers(-2, 2)),
    taken=st.integers(0, 10),
)
def test_how_many_are_ahead_is_told_before_a_request_is_queued(
    plan: list[tuple[str, int, int]], late: tuple[str, int, int], taken: int
) -> None:
    queue = RowQueue(QueueLimits(1000))
    for client, length, priority in plan:
        queue.push(loose_row(request(length, max_tokens=1, client=client, priority=priority)))
    for _ in range(taken):
        queue.take(BatchLimits(max_rows=1, token_budget=10**6))
    row = loose_row(request(late[1], max_tokens=1, client=late[0], priority=late[2]))
    told = queue.ahead_of(row.request)
    queue.push(row)
    ties = sum(other.virtual_finish == row.virtual_finish for other in queue) - 1
    assert abs(list(queue).index(row) - told) <= ties


def test_greedy_clients_of_a_shared_queue_leave_places_for_the_next() -> None:
    queue = RowQueue(QueueLimits(256, shared=True))
    counts = []
    for name in "abcde":
        mine = request(1, client=name)
        counts.append(0)
        while queue.has_room([mine]):
            queue.push(loose_row(mine))
            counts[-1] += 1
    assert counts[0] == 192  # three quarters
    assert min(counts) >= 1
    assert sum(counts) == 256


@given(size=st.integers(1, 64), others=st.integers(0, 63))
def test_a_client_without_a_waiting_row_is_refused_only_by_a_full_queue(size: int, others: int) -> None:
    queue = RowQueue(QueueLimits(size, shared=True))
    for _ in range(min(others, size)):
        queue.push(loose_row(request(1, client="other")))
    assert queue.has_room([request(1, client="new")]) == (others < size)


JOINING = BatchLimits(max_rows=16, token_budget=10**9, padded=False)
SHARED = QueueLimits(1000, shared=True)


@given(st.lists(SHAPES, min_size=1, max_size=80), st.integers(2, 40), st.integers(1000, 4000))
def test_a_newcomer_finds_room_at_once_whatever_one_client_has_running(
    shapes: list[Shape], places: int, budget: int
) -> None:
    limits = BatchLimits(places, budget, padded=False)
    queue, running = RowQueue(SHARED), list[Row]()
    for shape in shapes:
        queue.push(loose_row(request(shape.prompt, client="greedy", max_tokens=shape.output)))
        running += queue.take(beside(running, limits), running)
        newcomer = RowQueue(SHARED)
        newcomer.push(loose_row(request(60, client="new", max_tokens=60)))
        assert running
        assert newcomer.take(beside(running, limits), running)


def beside(running: Sequence[Row], limits: BatchLimits) -> BatchLimits:
    return limits.less(len(running), sum(map(growing_cost, running)))


def test_one_client_alone_has_three_quarters_of_the_rows_where_clients_share() -> None:
    for shared, most in ((True, 12), (False, 16)):
        queue = RowQueue(QueueLimits(1000, shared=shared))
        for _ in range(20):
            queue.push(loose_row(request(3)))
        assert len(queue.take(JOINING)) == most


def test_a_client_at_its_share_does_not_hold_up_those_behind_it() -> None:
    queue, running = RowQueue(SHARED), [loose_row(request(3, client="greedy")) for _ in range(12)]
    for _ in range(5):
        queue.push(loose_row(request(3, client="greedy")))
        queue.push(loose_row(request(3, client="modest")))
    taken = queue.take(beside(running, JOINING), running)
    assert {row.request.client for row in taken} == {"modest"}
    assert len(queue) == 10 - len(taken)


def test_a_row_that_needs_most_of_the_memory_runs_if_its_client_has_no_other() -> None:
    queue = RowQueue(SHARED)
    queue.push(loose_row(request(90, max_tokens=5)))
    assert queue.take(BatchLimits(16, 100, padded=False))


def test_one_client_is_served_in_order_whatever_it_asks_for() -> None:
    queue = RowQueue(QueueLimits(1000))
    rows = [loose_row(request(length, max_tokens=1)) for length in (30, 1, 17, 2, 40)]
    for row in rows:
        queue.push(row)
    assert list(queue) == rows


@pytest.mark.parametrize("what", ["push", "discard"])
def test_a_change_wakes_the_one_who_waits(what: str, run_async: Runner) -> None:
    async def main() -> None:
        queue = RowQueue(QueueLimits(2))
        first, second = prompts(1, 1)
        queue.push(first)
        waiting = asyncio.create_task(queue.change())
        await asyncio.sleep(0)
        assert not waiting.done(), "a change from before the wait must not count"
        if what == "push":
            queue.push(second)
        else:
            queue.discard(first)
        await waiting

    run_async(main)
