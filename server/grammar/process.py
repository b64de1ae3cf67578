"""A process of its own in which grammars are tried: `python -m server.grammar.process SOCKET EOS < tokenizer.json`.

It loads the tokenizer once. For each connection that comes over the socket it forks, and the fork tries one grammar
under limits that the kernel enforces, because a compiler in native code cannot be interrupted otherwise: it is killed
when it has taken its processor time, its memory, or too long. Nothing but the compiler is loaded here, and no thread
runs where it forks.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

from llguidance import LLTokenizer

from server.grammar.source import Part, PartError, Plan, write

CPU_SECONDS = 1.0  # 0.02 are usual
WALL_SECONDS = 20  # on a machine that is busy with other work
USUAL_MEMORY = 8 * 2**20  # bytes that the smallest grammars take, most of them only to be tried
KIB = 1 if sys.platform == "darwin" else 1024  # in bytes, of what `getrusage` counts in
MEMORY = 512 * 2**20  # bytes of address space, beyond what the tokenizer takes

STACK = 128 * 2**20
"""Bytes of stack for a compiling thread, which take memory only where used. A chain of references recurses in native
code: 2,000 of them overflow the usual 8 MiB, which would end the process."""

BEGUN = b"+"
"""What a fork sends before it works, so that its end is told from that of this process."""


def main(control: socket.socket, tokens: LLTokenizer) -> None:
    """Fork for each connection, until the other end is closed: the service has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no fork is waited for
    gc.freeze()  # so that no collection in a fork copies what all of them share
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        with suppress(OSError):  # no memory for another process: the connection is closed unanswered
            if not os.fork():
                _answer(socket.socket(fileno=descriptors[0]), tokens)
        os.close(descriptors[0])


def _answer(connection: socket.socket, tokens: LLTokenizer) -> None:
    """Try the plan that comes, tell what came of it, and end the process."""
    try:
        _be_limited()
        connection.sendall(BEGUN)
        with connection.makefile("rb") as lines:
            plan = read_plan(lines.readline())
        threading.stack_size(STACK)
        thread = threading.Thread(target=lambda: connection.sendall(json.dumps(tried(plan, tokens)).encode()))
        thread.start()
        thread.join()
    finally:
        os._exit(0)


def _be_limited() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what a library says when it is out of memory
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.alarm(WALL_SECONDS)
    size = Path("/proc/self/statm")  # elsewhere than on Linux this limit means something else
    if size.exists():
        used = int(size.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def write_plan(plan: Plan) -> bytes:
    """A plan as a line."""
    return json.dumps([plan.rules, [(part.schema, part.strict, part.param) for part in plan.parts]]).encode() + b"\n"


def read_plan(line: bytes) -> Plan:
    rules, parts = json.loads(line)
    return Plan(tuple(rules), tuple(Part(*part) for part in parts))


def tried(plan: Plan, tokens: LLTokenizer) -> dict[str, object]:
    """A plan's `source`, and the bytes of `memory` that it took beyond the usual; or `refused` and the `param`."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        source = write(plan, tokens)
    except PartError as error:
        return {"refused": str(error), "param": error.param}
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * KIB
    return {"source": source, "memory": max(0, grown - USUAL_MEMORY)}


if __name__ == "__main__":
    loaded = LLTokenizer(sys.stdin.buffer.read().decode(), eos_token=json.loads(sys.argv[2]))
    with suppress(OSError):
        os.nice(5)  # answers come before new grammars
    main(socket.socket(fileno=int(sys.argv[1])), loaded)
