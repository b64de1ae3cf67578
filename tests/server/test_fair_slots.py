"""Places that clients share: one each, none empty while somebody waits, and turns that come round."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.threads import FairSlots, Full

CLIENTS = "abcd"
SLOTS = 2
MOST = 3


class World:
    """Requests of several clients that ask for places, hold them, and leave when told to."""

    def __init__(self) -> None:
        self.slots = FairSlots(SLOTS, MOST)
        self.waiting: list[tuple[str, asyncio.Task[None]]] = []
        self.working: list[tuple[str, asyncio.Task[None]]] = []
        self.passed: dict[str, Counter[str]] = {}
        """For each client that waits, how often each other one was served meanwhile."""

    async def ask(self, client: str) -> None:
        before = sum(name == client for name, _ in self.waiting)
        task = asyncio.create_task(self._work(client))
        self.waiting.append((client, task))
        await self.settle()
        if task.done():
            self.waiting.remove((client, task))
            assert before >= MOST
            assert isinstance(task.exception(), Full)

    async def _work(self, client: str) -> None:
        async with self.slots.of(client):
            place = next(place for place in self.waiting if place[1] is asyncio.current_task())
            self.waiting.remove(place)
            self.working.append(place)
            self.served(client)
            try:
                await asyncio.Event().wait()
            finally:
                self.working.remove(place)

    def served(self, client: str) -> None:
        self.passed.pop(client, None)
        for name in {name for name, _ in self.waiting} - {name for name, _ in self.working}:
            self.passed.setdefault(name, Counter())[client] += 1

    async def leave(self, which: int) -> None:
        places = [*self.working, *self.waiting]
        if places:
            place = places[which % len(places)]
            place[1].cancel()
            await asyncio.gather(place[1], return_exceptions=True)
            if place in self.waiting:
                self.waiting.remove(place)
            if all(name != place[0] for name, _ in self.waiting):
                self.passed.pop(place[0], None)
            await self.settle()

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)
        self.check()

    def check(self) -> None:
        busy = [name for name, _ in self.working]
        assert len(busy) <= SLOTS
        assert len(set(busy)) == len(busy), "one client holds two places"
        idle = {name for name, _ in self.waiting} - set(busy)
        assert len(busy) == SLOTS or not idle, "a place is empty while a client waits"
        for name in idle:
            assert max(self.passed.get(name, Counter()).values(), default=0) <= 1, "a client was passed twice"


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 11)), max_size=60))
def test_places_are_shared_in_turn_whoever_asks_and_leaves(steps: list[tuple[bool, int]]) -> None:
    async def main() -> None:
        world = World()
        for asks, number in steps:
            await (world.ask(CLIENTS[number % len(CLIENTS)]) if asks else world.leave(number))
        while world.working or world.waiting:
            await world.leave(0)
        for client in CLIENTS:
            await world.ask(client)
        assert len(world.working) == SLOTS, "places were lost"
        for _, task in [*world.working, *world.waiting]:
            task.cancel()

    asyncio.run(main())


def test_a_place_given_while_its_taker_is_cancelled_is_not_lost() -> None:
    async def main() -> None:
        slots = FairSlots(1, MOST)
        holding, leaving = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with slots.of("a"):
                holding.set()
                await leaving.wait()
            waiter.cancel()  # which was given the place in this very step

        holder = asyncio.create_task(hold())
        await holding.wait()
        waiter = asyncio.create_task(slots.of("b").__aenter__())
        await asyncio.sleep(0)
        leaving.set()
        await holder
        with pytest.raises(asyncio.CancelledError):
            await waiter
        async with asyncio.timeout(10), slots.of("c"):
            pass

    asyncio.run(main())
