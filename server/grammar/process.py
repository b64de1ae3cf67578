"""The process that tries grammars: `python -m server.grammar.process SOCKET EOS SIZE < tokenizer.json`.

It loads the tokenizer once. For each connection that arrives over the socket it forks, and the fork tries one grammar
under limits enforced by the kernel, because a compiler in native code cannot be interrupted any other way: the fork is
killed when it exceeds its CPU time, memory or wall time, or when nobody waits for its answer any more. Only the
compiler is loaded here, and the forking process has no other threads.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import selectors
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

from llguidance import LLTokenizer

from server.grammar.pattern import Pattern
from server.grammar.source import Part, PartError, Plan, write

CPU_SECONDS = 1.0  # usually 0.02
WALL_SECONDS = 20  # generous, for a machine busy with other work
USUAL_MEMORY = 8 * 2**20  # bytes that even the smallest grammar takes, mostly for the trial itself
KIB = 1 if sys.platform == "darwin" else 1024  # bytes per unit of `getrusage`
MEMORY = 512 * 2**20  # bytes of address space beyond the tokenizer's

STACK = 128 * 2**20
"""Stack bytes of a compiling thread; only used pages take memory. A chain of references recurses in native code: 2,000
of them overflow the usual 8 MiB, which would kill the process."""

BEGUN = b"+"
"""Sent by a fork before it starts, so that its death can be distinguished from that of the parent process."""


def main(control: socket.socket, tokens: LLTokenizer) -> None:
    """Fork for each connection until the service closes the other end of the socket.

    With a connection comes a pipe. The service closes its end once it has the answer or nobody waits for it any more;
    only then is the fork reaped, so that its number cannot be another process's when it is killed.
    """
    gc.freeze()  # so that collections in a fork do not copy shared pages
    forks: dict[int, int] = {}
    with selectors.PollSelector() as ready:
        ready.register(control, selectors.EVENT_READ)
        while True:
            for pipe in [key.fd for key, _ in ready.select()]:
                if pipe in forks:
                    ready.unregister(pipe)
                    _end(pipe, forks.pop(pipe))
                    continue
                message, descriptors, _, _ = socket.recv_fds(control, 1, 2)
                if not message:
                    return
                connection, pipe = descriptors
                if fork := _fork(connection, tokens):
                    forks[pipe] = fork
                    ready.register(pipe, selectors.EVENT_READ)
                else:
                    os.close(pipe)


def _fork(connection: int, tokens: LLTokenizer) -> int:
    """Its process number; 0 if there is not enough memory to fork. The connection is then closed without an answer."""
    try:
        if not (fork := os.fork()):
            _answer(connection, tokens)
    except OSError:
        fork = 0
    os.close(connection)
    return fork


def _end(pipe: int, fork: int) -> None:
    os.close(pipe)
    os.kill(fork, signal.SIGKILL)
    os.waitpid(fork, 0)


def _answer(connection: int, tokens: LLTokenizer) -> None:
    """Try the plan from the connection, send the result, and exit, whatever happens."""
    try:
        _be_limited()
        service = socket.socket(fileno=connection)
        service.sendall(BEGUN)
        with service.makefile("rb") as lines:
            plan = read_plan(lines.readline())
        threading.stack_size(STACK)
        thread = threading.Thread(target=lambda: service.sendall(json.dumps(tried(plan, tokens)).encode()))
        thread.start()
        thread.join()
    finally:
        os._exit(0)


def _be_limited() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # libraries' messages when out of memory
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.alarm(WALL_SECONDS)
    size = Path("/proc/self/statm")  # outside Linux this limit means something else
    if size.exists():
        used = int(size.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def write_plan(plan: Plan) -> bytes:
    """A plan as one line."""
    parts = [(type(part) is Pattern, vars(part)) for part in plan.parts]
    return json.dumps([plan.rules, parts]).encode() + b"\n"


def read_plan(line: bytes) -> Plan:
    rules, parts = json.loads(line)
    return Plan(tuple(rules), tuple((Pattern if is_pattern else Part)(**part) for is_pattern, part in parts))


def tried(plan: Plan, tokens: LLTokenizer) -> dict[str, object]:
    """The plan's `source` and its extra bytes of `memory`; or the sentence `refused` and the `param` at fault."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        source = write(plan, tokens)
    except PartError as error:
        return {"refused": str(error), "param": error.param}
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * KIB
    return {"source": source, "memory": max(0, grown - USUAL_MEMORY)}


if __name__ == "__main__":
    written = sys.stdin.buffer.read()
    if len(written) < int(sys.argv[3]):
        sys.exit()  # the service ended while it wrote
    loaded = LLTokenizer(written.decode(), eos_token=json.loads(sys.argv[2]))
    with suppress(OSError):
        os.nice(5)  # generation has priority over new grammars
    main(socket.socket(fileno=int(sys.argv[1])), loaded)
