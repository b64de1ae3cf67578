"""Laws of work that is spread over turns of the event loop."""

import asyncio
from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from server.http.turns import Turns


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
