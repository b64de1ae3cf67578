"""Live servers for tests: one in a thread of this process around a scripted engine, and one as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx2
import orjson
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from batching.engine import Engine
from batching.events import Event, RowEnded, State
from batching.progress import Progress
from batching.types import Request
from server.app import create_app
from server.http.connection import Connections, listener
from server.model.defaults import Defaults
from server.model.loader import Loading
from server.model.served_model import ServedModel
from server.model.text import Text
from server.observe.log import log_event
from server.observe.metrics import Metrics
from server.service import Service
from server.settings import PREFIX, Settings
from server.watchdog import Watchdog
from tests.fakes import INFO, Script, ScriptedEngine
from tests.loop_guard import LoopGuard

if TYPE_CHECKING:
    from openai import OpenAI

ROOT = Path(__file__).parents[1]
PATIENCE = 60.0
"""Seconds until a test gives up waiting for something that ought to happen at once."""

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    "{% if messages[-1].content == 'refuse me' %}{{ raise_exception('refused') }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
LOADING = Loading("Loading weights", 3, 12)
QUESTION: list[Any] = [{"role": "user", "content": "Hi"}]


def eventually(condition: Callable[[], bool], what: str, patience: float = PATIENCE, pause: float = 0.01) -> None:
    """Wait until `condition` holds, for which a `pause` lies between two looks."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, f"never came true: {what}"
        time.sleep(pause)


# Text of which every byte is a token.


def byte_tokenizer(template: str = TEMPLATE, tags: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level vocabulary of 256 tokens without merges, one end token, one for each tag, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(list(tags))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, eos_token="<|end|>")


BYTES = byte_tokenizer()
END: int = BYTES.eos_token_id


def tokens_of(text: str) -> list[int]:
    """One token for each byte of the text."""
    ids: list[int] = BYTES.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def says(text: str, **others: str) -> Script:
    """Every answer is this text, but for requests whose id is among `others`; then comes the end token."""
    answers = {name: [*tokens_of(other), END] for name, other in others.items()}
    default = [*tokens_of(text), END]

    def script(request: Request, position: int) -> int:
        answer = answers.get(request.id, default)
        return answer[min(position, len(answer) - 1)]

    return script


def scripted(
    script: Script | str = "Hello!",
    *,
    stepped: bool = False,
    before_step: Callable[[int], None] = lambda step: None,
    context_window: int = 4096,
    token_budget: int = 1_000_000,
    stop_token: int = END,
) -> ScriptedEngine:
    """An engine whose answers end with the end token of `byte_tokenizer`, and whose limits are out of the way."""
    info = replace(
        INFO,
        vocab_size=257,
        context_window=context_window,
        token_budget=token_budget,
        stop_token_ids=frozenset({stop_token}),
    )
    script = says(script) if isinstance(script, str) else script
    return ScriptedEngine(script, stepped=stepped, before_step=before_step, info=info)


@dataclass
class ScriptedLoader:
    """`Loader` of a given engine. `engine` waits for `may_load`, and raises `error` if there is one."""

    made: Engine
    may_load: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    loading: Loading = LOADING
    tokenizer: PreTrainedTokenizerFast = BYTES
    sampling: Defaults = field(default_factory=Defaults)

    def defaults(self) -> Defaults:
        return self.sampling

    def text(self) -> Text:
        return Text(self.tokenizer)

    def engine(self) -> Engine:
        self.may_load.wait(PATIENCE)
        if self.error:
            raise self.error
        return self.made


# What both kinds of server have.

NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Given to every client, none of which needs it: reading the certificates anew for each takes 50 ms."""


@dataclass
class Address:
    """Where a live server is, and how to ask it."""

    url: str

    @contextlib.contextmanager
    def openai(self, **options: Any) -> Iterator[OpenAI]:
        from openai import DefaultHttpxClient, OpenAI  # takes seconds, which stand-ins of the service have no use for

        defaults: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE}
        defaults["http_client"] = DefaultHttpxClient(verify=NO_CERTIFICATES)
        with OpenAI(base_url=f"{self.url}/v1", **defaults | options) as client:
            yield client

    @contextlib.contextmanager
    def http(self, **options: Any) -> Iterator[httpx2.Client]:
        defaults: dict[str, Any] = {"timeout": PATIENCE, "trust_env": False, "verify": NO_CERTIFICATES}
        with httpx2.Client(base_url=self.url, **defaults | options) as client:
            yield client

    @contextlib.contextmanager
    def connect(self) -> Iterator[socket.socket]:
        """A bare connection, for clients that misbehave. Leaving the block leaves the server."""
        host, port = self.url.removeprefix("http://").split(":")
        with contextlib.closing(socket.create_connection((host, int(port)), PATIENCE)) as bare:
            yield bare

    def get(self, path: str, **options: Any) -> httpx2.Response:
        with self.http() as client:
            return client.get(path, **options)

    def post(self, content: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx2.Response:
        """One request on a connection of its own, with a body as it is: bytes, or an iterator of chunks."""
        with self.http() as client:
            return client.post(path, content=content, **options)

    def chat(self, **fields: Any) -> httpx2.Response:
        """A chat completion that asks `QUESTION` unless told otherwise."""
        headers = fields.pop("headers", None)
        return self.post(orjson.dumps({"messages": QUESTION} | fields), headers=headers)

    def sample(self, name: str, **labels: str) -> float:
        """The value of one metric's sample, 0 if there is none yet."""
        return self.samples(name).get((name, tuple(sorted(labels.items()))), 0.0)

    def samples(self, prefix: str = "") -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Every sample on /metrics whose name begins so, by name and sorted labels."""
        lines = [line for line in self.get("/metrics").text.splitlines() if line.startswith(prefix)]
        families = text_string_to_metric_families("\n".join([*lines, ""]))
        found = [sample for family in families for sample in family.samples]
        return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in found}


def raw_request(body: bytes, *headers: str, length: int | None = None) -> bytes:
    """A chat request as it goes over the wire. `length` is what it says its body's length is."""
    head = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", f"Content-Length: {length or len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def frames(response: httpx2.Response) -> list[Any]:
    """The JSON of a streamed answer's events; the string "[DONE]" for the last one. Comments, which a slow answer has,
    are passed over."""
    *events, rest = response.text.split("\n\n")
    assert rest == ""
    data = [event.removeprefix("data: ") for event in events if not event.startswith(":")]
    return [one if one == "[DONE]" else orjson.loads(one) for one in data]


def text_of(chunks: Sequence[Any]) -> str:
    """The text that a streamed answer's frames add up to."""
    choices = [choice for chunk in chunks if chunk != "[DONE]" for choice in chunk.get("choices", [])]
    return "".join(choice["delta"].get("content", "") for choice in choices)


# A server in a thread.


class QuickServer(uvicorn.Server):
    """uvicorn, which itself looks only every tenth of a second whether it should end, and takes another to do so."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stopping = asyncio.Event()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.stopping.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.timeout_graceful_shutdown):
                while state.connections or state.tasks:  # noqa: ASYNC110  # nothing tells of their end
                    await asyncio.sleep(0.005)
        for task in state.tasks:
            task.cancel()
        await self.lifespan.shutdown()


@dataclass
class Live(Address):
    """A scripted server in a thread of this process. `events` is all that the batcher told."""

    service: Service
    engine: ScriptedEngine
    loader: ScriptedLoader
    events: list[Event]
    loop: asyncio.AbstractEventLoop
    connections: set[Any]

    @property
    def model(self) -> ServedModel:
        """What is served, once it is."""
        assert self.service.model is not None
        return self.service.model

    def drain(self) -> None:
        """What the first SIGTERM does; returns at once."""
        asyncio.run_coroutine_threadsafe(self.service.drain(), self.loop)

    def ended(self) -> list[RowEnded]:
        return [event for event in list(self.events) if isinstance(event, RowEnded)]

    def wait_state(self, state: State) -> None:
        eventually(lambda: self.service.batcher.state is state, f"state {state}")

    def wait_running(self, rows: int = 1) -> None:
        """Until so many requests have been handed to the engine in all."""
        eventually(lambda: sum(map(len, self.engine.batches)) >= rows, f"{rows} rows were run")

    def wait_queued(self, rows: int) -> None:
        eventually(lambda: self.sample("microbatch_queue_depth") == rows, f"{rows} rows wait")

    def wait_ended(self, rows: int = 1) -> list[RowEnded]:
        eventually(lambda: len(self.ended()) >= rows, f"{rows} rows ended")
        return self.ended()


def settings_of(**values: Any) -> Settings:
    """Settings for a scripted server: no batch window, a name, and any `Host`, as bare connections write it."""
    defaults: dict[str, Any] = {"batch_window_ms": 0.0, "name": ("scripted",), "allowed_hosts": ("*",)}
    return Settings(**defaults | values)


@contextlib.contextmanager
def live(
    engine: Engine | None = None,
    *,
    ready: bool = True,
    listen_on: int = 0,
    tokenizer: PreTrainedTokenizerFast = BYTES,
    defaults: Defaults | None = None,
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    guarded: bool = True,
    **settings: Any,
) -> Iterator[Live]:
    """A server around `engine`. With `ready=False` its model loads until `loader.may_load` is set.

    `listen_on` is its port, where it is to be that of a server before it. `defaults` are what its model recommends.
    What keeps its loop for long fails the test, unless not `guarded`. `new_loop` makes its event loop; on uvloop's,
    which the service has, nothing is known of callbacks that take long.
    """
    engine = engine or scripted()
    made = cast(ScriptedEngine, engine)  # a test with another one does not look at it
    if isinstance(engine, ScriptedEngine):
        engine.info = replace(engine.info, vocab_size=max(engine.info.vocab_size, len(tokenizer)))
    loader = ScriptedLoader(engine, tokenizer=tokenizer, sampling=defaults or Defaults())
    events: list[Event] = []
    progress = Progress()
    metrics = Metrics(progress)
    service = Service(settings_of(**settings), loader, progress, [metrics, log_event, events.append])
    app = create_app(service, metrics, lambda model: metrics.model(model.info, model.settings, "0"))
    with contextlib.closing(listener("127.0.0.1", listen_on)) as bound:
        http: Any = Connections(service.settings, service.observe)
        config = uvicorn.Config(
            app, http=http, ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=5
        )
        server = QuickServer(config)
        loops: list[asyncio.AbstractEventLoop] = []
        guard = LoopGuard()

        async def serve() -> None:
            loop = asyncio.get_running_loop()
            loops.append(loop)
            limit, lag = service.settings.watchdog_s, metrics.loop_lag.observe
            watchdog = Watchdog(loop, limit, progress, service.worker_stuck, lag, end=lambda reason: None)
            with watchdog, guard:
                await server.serve([bound])
            for connection in list(server.server_state.connections):
                connection.transport.abort()  # what a browser kept open: the loop does not close it
            await asyncio.sleep(0)

        def run() -> None:
            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(serve())

        thread = threading.Thread(target=run, name="live-server")
        thread.start()
        try:
            eventually(lambda: server.started or not thread.is_alive(), "the server started")
            url = f"http://127.0.0.1:{bound.getsockname()[1]}"
            found = Live(url, service, made, loader, events, loops[0], server.server_state.connections)
            if ready:
                loader.may_load.set()
                found.wait_state(State.READY)
                eventually(lambda: service.model is not None, "what is served is known")  # set right after it
            yield found
        finally:
            loader.may_load.set()
            with contextlib.suppress(AssertionError, AttributeError):  # an engine may have nothing to release
                made.release(100_000)
            with contextlib.suppress(RuntimeError):
                asyncio.run_coroutine_threadsafe(service.batcher.drain(0), loops[0])
                loops[0].call_soon_threadsafe(server.stopping.set)
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the server did not stop"
        if guarded:
            guard.check()


# A server in a process.

SMALL = ("--context-window", "1024", "--token-budget", "16384")
"""Flags for a quick start: with a budget given the server need not measure the memory that a batch takes."""


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without settings of the service, and with these.

    One thread for the model: several that wait for each other come to a halt where other processes have the cores.
    """
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)}
    return kept | {"OMP_NUM_THREADS": "1"} | variables


@dataclass
class Process(Address):
    """`python -m server` and all that it wrote to stderr so far."""

    popen: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def terminate(self) -> None:
        self.popen.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        return self.popen.wait(PATIENCE)

    def wait_ready(self) -> None:
        self._wait_for("/health/ready", "the process is ready")
        assert self.popen.poll() is None, "".join(self.lines)

    def wait_listening(self) -> None:
        self._wait_for("/health/live", "the process listens")

    def _wait_for(self, path: str, what: str) -> None:
        """Until the process answers there or has ended. It takes seconds to start, and needs the cores for it."""
        eventually(lambda: self.popen.poll() is not None or self._answers(path), what, 5 * PATIENCE, pause=0.1)

    def _answers(self, path: str) -> bool:
        try:
            return self.get(path).status_code == 200
        except httpx2.TransportError:
            return False


def free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port: int = taken.getsockname()[1]
        return port


@contextlib.contextmanager
def process(
    *flags: str, module: str = "server", program: tuple[str, ...] = (), folder: Path = ROOT, **variables: str
) -> Iterator[Process]:
    """`python -m server`, or a stand-in, with these settings, on a free port. Killed at the end if need be."""
    port = free_port()
    command = [sys.executable, *(program or ("-m", module)), "--port", str(port), *flags]
    with subprocess.Popen(
        command, cwd=folder, env=environment(**variables), stderr=subprocess.PIPE, text=True
    ) as popen:
        found = Process(f"http://127.0.0.1:{port}", popen)
        assert popen.stderr is not None
        reader = threading.Thread(target=found.lines.extend, args=(popen.stderr,))
        reader.start()
        try:
            yield found
        finally:
            if popen.poll() is None:
                popen.kill()
            popen.wait(PATIENCE)
            reader.join(PATIENCE)
