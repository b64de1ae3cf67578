"""HAProxy in front of several servers, with the configuration of deploy/balancer."""

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from benchmarks.contenders import free_port

CONFIGURATION = Path(__file__).parent.parent / "deploy" / "balancer" / "haproxy.cfg"
SERVER = re.compile(r"^    server .*\n", re.MULTILINE)


class BalancerError(Exception):
    """HAProxy is not there or does not start; the message says why."""


def configuration(port: int, servers: Sequence[SplitResult], *, affinity: bool = True) -> str:
    """The deployed configuration with this port of 127.0.0.1 and these servers; without affinity, the server with the
    fewest requests gets the next one."""
    lines = "".join(f"    server gpu{number} {server.netloc}\n" for number, server in enumerate(servers))
    text = SERVER.sub("", CONFIGURATION.read_text()).replace("bind :21010", f"bind 127.0.0.1:{port}") + lines
    if affinity:
        return text
    return re.sub(r"balance hash .*", "balance leastconn", re.sub(r" *hash-(type|balance-factor) .*\n", "", text))


@contextlib.contextmanager
def balancing(servers: Sequence[SplitResult], folder: Path, *, affinity: bool = True) -> Iterator[SplitResult]:
    """Its address. `folder` gets configuration and log. Raises BalancerError."""
    program = shutil.which("haproxy")
    if program is None:
        raise BalancerError("haproxy is not installed (apt-get install haproxy)")
    port = free_port()
    file, log = folder / "haproxy.cfg", folder / "haproxy.log"
    file.write_text(configuration(port, servers, affinity=affinity))
    checked = subprocess.run([program, "-c", "-q", "-f", str(file)], capture_output=True, text=True)
    if checked.returncode:
        raise BalancerError(f"haproxy refuses {file}: {checked.stderr.strip()}")
    with log.open("wb") as sink, subprocess.Popen([program, "-f", str(file)], stderr=sink) as popen:
        try:
            yield urlsplit(f"http://127.0.0.1:{port}")
        finally:
            popen.kill()
