"""Servers to compare: how each is started on a model's folder, when it is ready, and what must be asked differently."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import orjson

from benchmarks.connection import get, server_url
from benchmarks.models import MODULE, Model
from server.model.loader import LIBRARY_SETTINGS

PATIENCE = 900.0
"""Seconds that a server may take to load its model and compile."""
STOP_SECONDS = 60
IGNORE_EOS = {"ignore_eos": True}
GENERATION_CONFIG_WITHOUT_END = {"generation_config": '{"eos_token_id": null}'}
"""Requests answers of full length from `transformers serve`, which refuses the field `ignore_eos`."""


class ContenderError(Exception):
    """A contender cannot be started, or is not what it should be."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A server. `command` is for a port on 127.0.0.1, put in for PORT; empty for one that runs already at `url`.

    `fields` ask for answers of full length, in this server's own way.
    """

    name: str
    model: str
    command: tuple[str, ...] = ()
    url: str = ""
    ready_path: str = "/health/ready"
    fields: dict[str, Any] = field(default_factory=lambda: IGNORE_EOS)


def microbatch(name: str, model: Model, *flags: str) -> Contender:
    """This service. Thinking is as the model's template has it, as with the other servers: so prompts are the same."""
    place = ("--device", model.device, "--dtype", model.dtype, "--thinking")
    served = ("--model", model.folder, "--name", model.name, "--port", "PORT")
    return Contender(name, model.name, (*MODULE, "server", *served, *place, *flags, *model.server_flags))


def serial(model: Model) -> Contender:
    """One request at a time."""
    place = ("--device", model.device, "--dtype", model.dtype)
    served = ("--model", model.folder, "--name", model.name, "--port", "PORT")
    return Contender("serial", model.name, (*MODULE, "benchmarks.serial_server", *served, *place))


def transformers(name: str, model: Model, *flags: str) -> Contender:
    """`transformers serve` on one model, which it knows by its folder."""
    command = (*MODULE, "transformers.cli.transformers", "serve", model.folder, "--host", "127.0.0.1", "--port", "PORT")
    place = ("--device", model.device, "--dtype", model.dtype)
    fields = GENERATION_CONFIG_WITHOUT_END
    return Contender(name, model.folder, (*command, *place, *flags), ready_path="/health", fields=fields)


def external(name: str, url: str, model: Model) -> Contender:
    """A server that someone else started."""
    return Contender(name, model.name, url=url, ready_path="/v1/models")


def known(model: Model, engines: Sequence[str]) -> dict[str, Contender]:
    """All that can be started here, by name."""
    found = [
        microbatch("microbatch", model),
        *(microbatch(f"microbatch-{engine}", model, "--engine", engine) for engine in engines),
        serial(model),
        transformers("transformers", model),
        transformers("transformers-cb", model, "--continuous-batching"),
    ]
    return {contender.name: contender for contender in found}


def engines() -> list[str]:
    """The engines that this service lets one choose between; none where it has no such setting."""
    shown = subprocess.run((*MODULE, "server", "--help"), capture_output=True, text=True, check=True).stdout
    return engines_in(shown)


def engines_in(shown: str) -> list[str]:
    """The engines that the text of `python -m server --help` names, but for the automatic choice."""
    found = re.search(r"--engine (\S+)", shown)
    return [name for name in found[1].split("|") if name != "auto"] if found else []


@asynccontextmanager
async def serving(contender: Contender, log: Path) -> AsyncIterator[str]:
    """The contender's URL while it runs; it is ended after. Its output goes to the file `log`.

    Raises ContenderError if it is not ready within `PATIENCE` seconds.
    """
    if contender.url:
        yield contender.url
        return
    port = free_port()
    command = [str(port) if part == "PORT" else part for part in contender.command]
    with log.open("w") as out, ended_by_sigterm():
        process = start(contender, command, out)
        try:
            url = f"http://127.0.0.1:{port}"
            await wait_ready(contender, url, process, log)
            yield url
        finally:
            stop(process)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the task, and so the server that it started, instead of this process alone."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None  # there always is one where this is called from a coroutine
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def start(contender: Contender, command: list[str], out: TextIO) -> "subprocess.Popen[bytes]":
    """The process, in a group of its own, with what this service sets for its libraries set for all."""
    environment = LIBRARY_SETTINGS | os.environ
    try:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    except OSError as error:
        raise ContenderError(f"{contender.name} cannot be started: {error}") from error


async def wait_ready(contender: Contender, url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Ask twice a second. Raises ContenderError as `serving`."""
    end = time.monotonic() + PATIENCE
    while await status(url, contender.ready_path) != 200:
        if process.poll() is not None:
            raise ContenderError(f"{contender.name} ended with {process.returncode} before it was ready; see {log}")
        if time.monotonic() > end:
            raise ContenderError(f"{contender.name} was not ready within {PATIENCE:g} s; see {log}")
        await asyncio.sleep(0.5)


async def status(url: str, path: str) -> int:
    """The path's status, or 0 without an answer."""
    try:
        async with asyncio.timeout(5):
            return (await get(server_url(url), path)).status
    except OSError:
        return 0


async def check_model(contender: Contender) -> None:
    """Raises ContenderError unless the server that runs at the contender's URL lists its model."""
    try:
        async with asyncio.timeout(5):
            reply = await get(server_url(contender.url), "/v1/models")
        served = [card["id"] for card in orjson.loads(reply.body)["data"]] if reply.status == 200 else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ContenderError(f"{contender.name} lists no models at {contender.url}: {error!r}") from error
    if contender.model not in served:
        raise ContenderError(
            f"{contender.name} serves {', '.join(served) or 'nothing'}, not {contender.model}: "
            "different models are not compared"
        )


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End the group, by force if asking does not do."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """A free port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port
