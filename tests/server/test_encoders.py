"""Laws of the threads that read requests: short ones do not wait for long ones, nor one key for another's."""

import asyncio
import threading

from server.callers import Caller
from server.threads import LONG_BYTES, Encoders


def caller(name: str = "", request_id: str = "r") -> Caller:
    return Caller(request_id, name)


def test_short_requests_are_read_while_long_ones_are() -> None:
    gate = threading.Event()

    async def main() -> list[str]:
        encoders = Encoders()
        long = [
            asyncio.ensure_future(encoders.run(gate.wait, LONG_BYTES + 1, caller(request_id=str(n)))) for n in range(8)
        ]
        await asyncio.sleep(0)
        short = [await encoders.run(lambda: "read", 10, caller(request_id=f"s{n}")) for n in range(8)]
        assert not any(one.done() for one in long)
        gate.set()
        await asyncio.gather(*long)
        return short

    assert asyncio.run(main()) == ["read"] * 8


def test_keys_take_turns() -> None:
    gate = threading.Event()
    order: list[str] = []

    async def main() -> None:
        encoders = Encoders()

        async def ask(name: str) -> None:
            await encoders.run(gate.wait, LONG_BYTES + 1, caller(name))
            order.append(name)

        flood = [asyncio.ensure_future(ask("flood")) for _ in range(20)]
        await asyncio.sleep(0)
        other = asyncio.ensure_future(ask("other"))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*flood, other)

    asyncio.run(main())
    assert order.index("other") <= 2


def test_what_the_work_raises_is_raised_and_its_place_is_free_again() -> None:
    async def main() -> None:
        encoders = Encoders()
        for _ in range(10):
            try:
                await encoders.run(lambda: 1 // 0, 10, caller("a"))
            except ZeroDivisionError:
                continue
            raise AssertionError("nothing was raised")
        assert await encoders.run(lambda: 2, 10, caller("a")) == 2

    asyncio.run(main())
