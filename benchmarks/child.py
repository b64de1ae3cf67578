"""A server as a child process on a free port of this machine, for benchmarks that start their own."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.connection import get


class ServerEnded(Exception):
    """The server's process ended; the message says where its log is."""


class Child:
    """A running server: its process and address. `log` has all that it wrote."""

    def __init__(self, popen: subprocess.Popen[bytes], url: SplitResult, log: Path) -> None:
        self.popen = popen
        self.url = url
        self.log = log

    async def wait_ready(self) -> None:
        """Until requests are taken. Raises `ServerEnded`."""
        while True:
            if self.popen.poll() is not None:
                raise ServerEnded(f"the server ended with status {self.popen.returncode}; see {self.log}")
            with contextlib.suppress(OSError):
                if (await get(self.url, "/health/ready")).status == 200:
                    return
            await asyncio.sleep(0.2)

    async def metrics(self) -> dict[str, float]:
        """Every sample without labels, by its name without the prefix."""
        text = (await get(self.url, "/metrics")).body.decode()
        samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
        return {one.name.removeprefix("microbatch_"): one.value for one in samples if not one.labels}


@contextlib.contextmanager
def serving(module: str, flags: list[str], log: Path, variables: Mapping[str, str] | None = None) -> Iterator[Child]:
    """`python -m MODULE --port ... FLAGS`, not ready yet, with these variables and none of the service's others. Ended
    at the end, at once."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", module, "--port", str(port), *flags]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MICROBATCH_")}
    with log.open("wb") as sink, subprocess.Popen(command, stderr=sink, env=kept | dict(variables or {})) as popen:
        child = Child(popen, urlsplit(f"http://127.0.0.1:{port}"), log)
        try:
            yield child
        finally:
            popen.kill()
