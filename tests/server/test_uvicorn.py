"""What of uvicorn is used beside its public settings. A version that changes it fails here first, and says where."""

import asyncio
import contextlib
import inspect
import signal
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import version
from types import FrameType
from typing import Any

import pytest
import uvicorn
from packaging.requirements import Requirement
from starlette.responses import PlainTextResponse
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from server.http.connection import Connection, Connections, listener
from tests.live import ROOT, settings_of


def test_the_installed_version_is_one_whose_use_was_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [needed] = [one for one in map(Requirement, project["dependencies"]) if one.name == "uvicorn"]
    assert needed.specifier.contains(version("uvicorn"))
    assert not needed.specifier.contains("0.999")  # the next one has to be looked at


def test_connections_are_made_as_uvicorn_makes_its_own() -> None:
    own = list(inspect.signature(H11Protocol).parameters)
    assert list(inspect.signature(Connections(settings_of())).parameters) == own


def test_a_server_s_state_has_what_connections_keep_there() -> None:
    state = ServerState()
    assert state.connections == set()
    assert state.tasks == set()
    assert state.default_headers == []


Reading = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def serving(server: uvicorn.Server) -> AsyncIterator[Callable[[], Awaitable[Reading]]]:
    """What opens connections to a server, which the end waits for. Its starter stops it."""
    async with contextlib.AsyncExitStack() as opened:
        bound = opened.enter_context(contextlib.closing(listener("127.0.0.1", 0)))
        task = asyncio.create_task(server.serve([bound]))

        async def connect() -> Reading:
            reader, writer = await asyncio.open_connection(*bound.getsockname())
            opened.push_async_callback(writer.wait_closed)
            opened.callback(writer.close)
            return reader, writer

        yield connect
        await task


def config_of(app: Any, **settings: Any) -> uvicorn.Config:
    http: Any = Connections(settings_of())
    return uvicorn.Config(app, http=http, ws="none", lifespan="off", log_config=None, server_header=False, **settings)


class Slow:
    """An application that answers once it is let."""

    def __init__(self) -> None:
        self.asked, self.go = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.set()
        await self.go.wait()
        await PlainTextResponse("done")(scope, receive, send)


QUESTION = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def test_a_server_that_stops_closes_what_is_idle_and_waits_for_what_is_not() -> None:
    async def main() -> None:
        app = Slow()
        server = uvicorn.Server(config_of(app))
        async with serving(server) as connect:
            idle, _ = await connect()
            busy, writer = await connect()
            writer.write(QUESTION)
            await app.asked.wait()
            assert all(isinstance(one, Connection) for one in server.server_state.connections)
            assert len(server.server_state.tasks) == 1
            server.should_exit = True
            assert await idle.read() == b""
            app.go.set()
            answer = await busy.read()
            assert b"connection: close" in answer.lower()
            assert b"\r\ndate: " in answer.lower()  # uvicorn's one default header here, which it renews
            assert b"\r\nserver: " not in answer.lower()
            assert answer.endswith(b"done")

    asyncio.run(main())


def test_a_server_that_has_waited_long_enough_cancels_what_is_not_answered() -> None:
    async def main() -> None:
        app = Slow()
        server = uvicorn.Server(config_of(app, timeout_graceful_shutdown=0))
        async with serving(server) as connect:
            busy, writer = await connect()
            writer.write(QUESTION)
            await app.asked.wait()
            server.should_exit = True
            assert (await busy.read()).startswith(b"HTTP/1.1 500 ")

    asyncio.run(main())


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_comes_to_the_server_s_own_handler_and_does_nothing_else(sig: signal.Signals) -> None:
    before = signal.getsignal(sig)
    heard: list[int] = []

    class Deaf(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            heard.append(sig)

    async def main() -> None:
        app = Slow()
        server = Deaf(config_of(app))
        async with serving(server) as connect:
            reader, writer = await connect()
            writer.write(QUESTION)
            await app.asked.wait()
            signal.raise_signal(sig)
            app.go.set()
            assert b"connection: close" not in (await reader.readuntil(b"done")).lower()
            server.should_exit = True

    asyncio.run(main())
    assert heard == [sig]
    assert signal.getsignal(sig) is before
