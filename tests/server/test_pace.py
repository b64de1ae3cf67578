"""Laws of work that is spread over turns of the event loop and over time."""

import asyncio
from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from server.callers import Pace
from server.http.connection import Turns


@given(most=st.integers(1, 5), asked=st.lists(st.integers(0, 12), max_size=8))
def test_all_is_done_in_order_and_no_turn_has_more_than_its_share(most: int, asked: list[int]) -> None:
    """`asked`: how much is asked for in each turn."""
    done: list[int] = []
    shares: list[int] = []  # how much was done in each turn

    async def run() -> None:
        turns, number = Turns(most), 0
        for turn in range(len(asked) + sum(asked) + 1):
            before = len(done)
            for _ in range(asked[turn] if turn < len(asked) else 0):
                turns.call(asyncio.get_running_loop(), partial(done.append, number))
                number += 1
            await asyncio.sleep(0)
            shares.append(len(done) - before)

    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(run())
    assert done == list(range(sum(asked)))
    assert max(shares) <= 2 * most  # what is left of this turn's share, and the next one's


def test_what_a_turn_has_room_for_is_done_at_once() -> None:
    done: list[int] = []

    async def run() -> None:
        turns = Turns(2)
        for number in range(3):
            turns.call(asyncio.get_running_loop(), partial(done.append, number))
        assert done == [0, 1]
        await asyncio.sleep(0)
        assert done == [0, 1, 2]

    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(run())


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 0.5)), min_size=1, max_size=60),
    st.integers(1, 5),
    st.floats(1, 50),
    st.floats(0, 3),
)
def test_a_client_is_held_to_its_pace_and_no_other(
    calls: list[tuple[str, float]], burst: int, rate: float, longest: float
) -> None:
    """`calls`: of whom, and how long after the one before."""
    shared, alone = Pace(burst, rate, longest), {name: Pace(burst, rate, longest) for name in "ab"}
    now, let_through = 0.0, list[float]()
    for client, after in calls:
        now += after
        delay = shared.delay(client, now)
        assert delay == alone[client].delay(client, now)
        assert 0 <= delay <= longest + 1e-9
        if client == "a":
            earlier = len(let_through)
            let_through.append(now + delay)
            assert delay < 1e-9 or earlier >= burst, "the first are let through at once"
            since = [at for at in let_through if at > now + delay - 1]
            assert delay >= longest - 1e-9 or len(since) <= burst + rate + 1
