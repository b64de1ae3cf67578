"""What of uvicorn is used beside its public settings. A version that changes it fails here first, and says where."""

import asyncio
import contextlib
import inspect
import tomllib
from importlib.metadata import version
from typing import Any

import uvicorn
from packaging.requirements import Requirement
from starlette.responses import PlainTextResponse
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from server.connection import Connection, Connections, listener
from tests.live import ROOT, settings_of


def test_the_installed_version_is_one_whose_use_was_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [needed] = [one for one in map(Requirement, project["dependencies"]) if one.name == "uvicorn"]
    assert needed.specifier.contains(version("uvicorn"))
    assert not needed.specifier.contains("1.0")


def test_connections_are_made_as_uvicorn_makes_its_own() -> None:
    own = list(inspect.signature(H11Protocol).parameters)
    assert list(inspect.signature(Connections(settings_of())).parameters) == own


def test_a_server_s_state_has_what_connections_keep_there() -> None:
    state = ServerState()
    assert state.connections == set()
    assert state.tasks == set()
    assert state.default_headers == []


def test_a_server_that_stops_closes_what_is_idle_and_waits_for_what_is_not() -> None:
    asked, go = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.set()
        await go.wait()
        await PlainTextResponse("done")(scope, receive, send)

    async def main() -> None:
        http: Any = Connections(settings_of())
        config = uvicorn.Config(app, http=http, ws="none", lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        with contextlib.closing(listener("127.0.0.1", 0)) as bound:
            serving = asyncio.create_task(server.serve([bound]))
            idle, idler = await asyncio.open_connection(*bound.getsockname())
            busy, writer = await asyncio.open_connection(*bound.getsockname())
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await asked.wait()
            assert all(isinstance(one, Connection) for one in server.server_state.connections)
            assert len(server.server_state.tasks) == 1
            server.should_exit = True
            assert await idle.read() == b""
            go.set()
            answer = await busy.read()
            assert b"connection: close" in answer.lower()
            assert answer.endswith(b"done")
            await serving
            for one in (idler, writer):
                one.close()
                await one.wait_closed()

    asyncio.run(main())
