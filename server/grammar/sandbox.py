"""Tries grammars in another process before this one compiles them: the service's side of `server.grammar.process`."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import orjson

from server.grammar.pattern import NAMES, Pattern
from server.grammar.process import BEGUN, WALL_SECONDS, write_plan
from server.grammar.source import PartError, Plan

ROOT = Path(__file__).parents[2]

ANSWER_SECONDS = 2.0 * WALL_SECONDS
"""A trial takes half of that at most; the rest is for the process to load and to fork."""


class Unavailable(Exception):
    """The process could not try a grammar, which says nothing about the grammar."""


@dataclass(frozen=True)
class Written:
    """A grammar that compiled and stepped within the limits, and the bytes of memory it took."""

    source: str
    memory: int


class Sandbox:
    """The process, started when first needed and restarted if it has ended. It ends when this object is collected or
    the service ends."""

    def __init__(self, tokenizer: str, eos: int | None) -> None:
        """`tokenizer`: the text of tokenizer.json."""
        self._tokenizer = tokenizer
        self._eos = eos
        self._starting = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] | None = None

    def start(self) -> socket.socket:
        """The socket of the running process. Blocks for tens of milliseconds if it must be started. Thread-safe."""
        with self._starting:
            if (control := self._running()) is not None:
                return control
            if self._end is not None:
                self._end()
            # The socket first: beside the process that has ended, it does not pass for that of a running one.
            self._control, self._process = control, process = _spawned(self._tokenizer, self._eos)
            self._end = weakref.finalize(self, _end, control, process)
            return control

    def _running(self) -> socket.socket | None:
        return self._control if self._process is not None and self._process.poll() is None else None

    async def write(self, plan: Plan) -> Written:
        """The plan's grammar. Raises `PartError`, also if a limit was exceeded, and `Unavailable`."""
        try:
            reply = await self._ask(write_plan(plan))
        except OSError as error:
            raise Unavailable(str(error)) from error
        if not reply.startswith(BEGUN):
            raise Unavailable("the process that tries grammars has ended")
        try:
            answer = orjson.loads(reply.removeprefix(BEGUN))
        except orjson.JSONDecodeError:  # it was stopped before it had answered
            part = plan.parts[-1]
            what = NAMES[part.kind] if isinstance(part, Pattern) else "schema"
            too_much = f"The {what} takes too much time or memory to compile; make it simpler."
            raise PartError(too_much, part.param) from None
        if "refused" in answer:
            raise PartError(answer["refused"], answer["param"])
        return Written(answer["source"], answer["memory"])

    async def _ask(self, line: bytes) -> bytes:
        control = self._running()
        if control is None:
            control = await asyncio.to_thread(self.start)
        process = self._process
        with ExitStack() as held:
            ours = _sent(control, held)
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    return await _answer_to(line, ours)
            except TimeoutError:
                if process is not None:
                    process.kill()  # it hangs: the next trial starts another
                raise


async def _answer_to(line: bytes, ours: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    reply = bytearray()
    with suppress(ConnectionError):  # a closed connection just yields less
        await loop.sock_sendall(ours, line)
        while piece := await loop.sock_recv(ours, 2**16):
            reply += piece
    return bytes(reply)


def _sent(control: socket.socket, held: ExitStack) -> socket.socket:
    """A connection to a new trial, which lasts as long as what is `held`. Raises OSError."""
    with ExitStack() as sent:
        ours, theirs = socket.socketpair()
        held.enter_context(ours).setblocking(False)
        sent.enter_context(theirs)
        end, pipe = os.pipe()
        held.callback(os.close, pipe)
        sent.callback(os.close, end)
        socket.send_fds(control, [b"+"], [theirs.fileno(), end])
    return ours


def _spawned(tokenizer: str, eos: int | None) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Raises OSError if no process can be started."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    text = tokenizer.encode()
    with ExitStack() as undone:
        ours, theirs = map(undone.enter_context, socket.socketpair())
        arguments = str(theirs.fileno()), json.dumps(eos), str(len(text))
        process = subprocess.Popen(
            # -P: the working folder may have a package of the same name.
            [sys.executable, "-P", "-m", "server.grammar.process", *arguments],
            stdin=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": paths},
            start_new_session=True,  # so that Ctrl-C in a terminal only reaches the service
        )
        undone.pop_all()
    theirs.close()
    ours.setblocking(False)  # what a process that hangs does not take must not hold up the event loop
    if process.stdin is not None:
        with suppress(BrokenPipeError), process.stdin as pipe:  # if it has already ended, the first request finds out
            pipe.write(text)
    return ours, process


def _end(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    control.close()
    process.kill()
    process.wait()
